"""Rounds of training on the policy's own answers: sample, judge, pair the best with the worst, train.

Each round has the same steps: answers, scores, pairs, phase one, phase two. Every step stores its results, so the same
command continues a killed round. The bytes are the same if the sampling and the judge are deterministic. rounds.json
lists the finished rounds and their settings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpoeng.cache.errors import UserError
from dpoeng.cache.words import counted
from dpoeng.engine.config.fields import PrecomputeConfig, TrainConfig
from dpoeng.engine.config.files import config_of
from dpoeng.engine.recipes.evaluate import Trained, find_trained, load_trained
from dpoeng.engine.recipes.inputs import open_views
from dpoeng.engine.recipes.precompute import PrecomputeSummary, precompute_reference
from dpoeng.engine.recipes.rounds.answers import answer_here, answer_keys, are_answers, policy_identity
from dpoeng.engine.recipes.rounds.begin import RoundSettings, Start, begin, check_start, rounds_identity
from dpoeng.engine.recipes.rounds.best_and_worst import Answers, Chosen, choose_pairs
from dpoeng.engine.recipes.rounds.judges import Judge, is_reply, note_origin, shown_prompt
from dpoeng.engine.recipes.rounds.prompts import RoundPrompt, of_round
from dpoeng.engine.recipes.rounds.record import STUDY, RoundSummary, open_state, write_lines, write_state
from dpoeng.engine.recipes.rounds.serving import answer_on_server, serve
from dpoeng.engine.recipes.train import train
from dpoeng.engine.runs.kept import Kept
from dpoeng.engine.runs.lock import holding
from dpoeng.engine.runtime.out_of_memory import release_memory
from dpoeng.engine.runtime.outputs import scratch_folder
from dpoeng.engine.runtime.progress import QUIET, Progress


@dataclass(frozen=True, slots=True)
class _Work:
    """What all rounds share."""

    start: Start
    judge: Judge
    settings: RoundSettings
    folder: Path
    progress: Progress

    def place(self, number: int) -> Path:
        """The folder of a round."""
        return self.folder / f"round-{number}"


def train_rounds(
    trained: Trained,
    config: TrainConfig,
    judge: Judge,
    settings: RoundSettings,
    folder: Path,
    progress: Progress = QUIET,
) -> list[RoundSummary]:
    """Runs all unfinished rounds: sample, judge, pair, phase one, phase two.

    Args:
        trained: the starting run's policy; see `find_trained`.
        config: its run's config, with the changes for the rounds' trainings.
        judge: see `find_judge`.
        settings: settings of the rounds.
        folder: output folder: a folder per round, and the rounds' own cache.
        progress: receives bars and notes.

    Raises:
        UserError: rounds cannot start from this run; its pairs cannot be read again; the folder has rounds with other
            settings; or a step fails.
    """
    check_start(trained, config, settings)
    scratch_folder(folder, STUDY)
    with holding(folder):
        work = _Work(begin(trained, config, settings, folder, progress), judge, settings, folder, progress)
        identity = rounds_identity(trained, work.start, judge, settings)
        done = open_state(folder, identity)
        policy, own = trained, config
        for number in range(1, settings.rounds + 1):
            if number > len(done):
                progress.note(f"round {number} of {settings.rounds}")
                done.append(_round(work, number, policy, own))
                write_state(folder, identity, done)
            own = _train_config(work, number, policy)
            policy = find_trained(own.output_dir)
    return done[: settings.rounds]


def _round(work: _Work, number: int, policy: Trained, own: TrainConfig) -> RoundSummary:
    """Runs one round. `policy` answers the prompts; `own` is the config of its run."""
    prompts = of_round(work.start.prompts, work.settings.count, number)
    answers, refused = _sample(work, number, policy, own, prompts)
    kept = Kept(work.folder / "verdicts.jsonl", is_reply)
    chosen, asked = choose_pairs(work.judge, prompts, answers, kept, work.progress, keep_cut=work.settings.keep_cut)
    note_origin(asked, work.judge, work.progress)
    for line in chosen.left_out:
        line["why"] = refused.get(line["prompt"], line["why"])
    write_lines(work.place(number) / "pairs.jsonl", [{**row, "round": number} for row in chosen.rows])
    write_lines(work.place(number) / "left_out.jsonl", chosen.left_out)
    work.progress.note(_describe(number, chosen))
    if not chosen.rows:
        raise _no_pairs(work.place(number), chosen)
    scored = _score(work, number, policy)
    summary = train(_train_config(work, number, policy), work.progress)
    release_memory()
    return RoundSummary(
        number=number,
        sampled=str(policy.folder),
        reference=scored.spec,
        prompts=len(prompts),
        answers=chosen.answers,
        cut=chosen.cut,
        empty=chosen.empty,
        mean_score=chosen.mean_score,
        pairs=len(chosen.rows),
        left_out=chosen.reasons(),
        train_pairs=scored.pairs,
        computed=scored.computed,
        rejected=len(scored.rejects),
        asked=asked.new,
        kept=asked.kept,
        evaluation=summary.eval_after,
        result=str(summary.result),
    )


def _describe(number: int, chosen: Chosen) -> str:
    without = ", ".join(f"{why} ({count:,})" for why, count in chosen.reasons().items())
    text = f"round {number}: {counted(len(chosen.rows), 'pair')} from {counted(chosen.answers, 'answer')}"
    text += f"; prompts without a pair: {without}" if without else ""
    return text + (f"; {counted(chosen.cut, 'answer')} cut off by --max-new-tokens" if chosen.cut else "")


# --------------------------------------------------------------------------- steps


def _sample(
    work: _Work, number: int, policy: Trained, config: TrainConfig, prompts: Sequence[RoundPrompt]
) -> tuple[list[Answers], dict[str, str]]:
    """Returns the policy's answers to each prompt, and the server's reasons by shown prompt if it refused some."""
    view, _ = open_views(config)
    settings, ids = work.settings, [prompt.ids for prompt in prompts]
    kept = Kept(work.place(number) / "answers.jsonl", are_answers)
    identity = {**policy_identity(policy, config, view.spec.digest), "on_server": settings.server is not None}
    keys = answer_keys(identity, settings.sampling, ids)
    refused: dict[str, str] = {}
    if all(kept.get(key) is not None for key in keys):
        pass
    elif settings.server is not None:
        model = serve(settings.server, policy, config.model or view.meta["reference"]["model"])
        refused = answer_on_server(settings.server, model, ids, keys, settings.sampling, kept, work.progress)
    else:
        lm = load_trained(policy, config, view, tokenizer=True)
        answer_here(lm, ids, keys, settings.sampling, kept, work.progress)
        del lm  # phase one needs this memory for the reference
        release_memory()
    shown = {
        shown_prompt(prompt.pair.prompt): refused[key]
        for prompt, key in zip(prompts, keys, strict=True)
        if key in refused
    }
    return [kept.get(key) or [] for key in keys], shown


def _score(work: _Work, number: int, policy: Trained) -> PrecomputeSummary:
    """Runs phase one on the round's pairs and the held-out ones; the cache already has most rows.

    Raises:
        UserError: the run's pairs have other token ids than in its cache, or the reference has changed.
    """
    start, every = work.start, work.settings.train_on == "all"
    files = [work.place(k) / "pairs.jsonl" for k in (range(1, number + 1) if every else [number])]
    values = _reference_values(start, work.settings, policy)
    name = f"round-{number}"
    if start.held_out_file is not None:
        held_out = {**values, "pairs": (start.held_out_file,), "name": f"{name}-held-out"}
        precompute_reference(config_of(PrecomputeConfig, held_out), work.progress)
    pairs = (*([start.train_file] if every else []), *files)
    found = precompute_reference(config_of(PrecomputeConfig, {**values, "pairs": pairs, "name": name}), work.progress)
    scored_keys = {bytes(key) for key in found.data.keys}
    changed = every and not start.keys <= scored_keys
    if changed or (work.settings.reference == "first" and found.spec != start.view.spec.digest):
        raise UserError(
            "the tokens of the run's pairs have changed" if changed else "the reference has changed",
            code="round-reference",
            where=f"view {start.view.name}",
            expected="the tokenizer, chat template, model and adapter that phase one used",
            found=f"{len(start.keys - scored_keys)} of {len(start.keys)} pairs differ" if changed else found.spec,
            remedy="restore the model's files",
        )
    return found


def _reference_values(start: Start, settings: RoundSettings, policy: Trained) -> dict[str, Any]:
    """The fields of PrecomputeConfig for a round's reference."""
    reference, meta, config = start.view.meta["reference"], start.view.meta, start.config
    same = (
        "bnb_4bit_quant_type bnb_4bit_use_double_quant batch_tokens layout attention quantization dtype model adapter"
    )
    values: dict[str, Any] = {name: reference[name] for name in same.split()}
    if "chat_template" not in reference:  # a recorded template comes from the adapter's folder, where it is found again
        values["tokenizer"] = reference.get("tokenizer")
    if settings.reference == "last":
        values |= {"model": config.model or reference["model"], "adapter": str(policy.folder)}
        values |= {name: getattr(config, name) or reference[name] for name in ("quantization", "dtype")}
        if start.mode == "full":
            values |= {"model": str(policy.folder), "adapter": None}
    offloading = {name: getattr(config, name) for name in ("layer_offloading", "offload_gib", "offload_folder")}
    trunk = {"trunk_layer": config.trunk_layer} if config.trunk_layer else {}
    cache = {"cache": start.train_file.parent / "cache", "device": config.device, "max_reject_share": 1.0}
    return {**values, **meta["tokens"], **offloading, **trunk, **cache}


def _train_config(work: _Work, number: int, policy: Trained) -> TrainConfig:
    """The config of a round's training, which starts from `policy`."""
    start, config = work.start, work.start.config
    values = {name: getattr(config, name) for name in config.model_fields_set}
    for name in ("mix_with", "mix", "resume", "init_adapter", "eval_share", "eval_view"):
        values.pop(name, None)
    name = f"round-{number}"
    values |= {"cache": work.folder / "cache", "view": name, "output_dir": work.place(number) / "run"}
    values |= {"eval_view": f"{name}-held-out"} if start.held_out_file is not None else {"eval_share": 0.0}
    if work.settings.reference == "first":
        return config_of(TrainConfig, {**values, "adapter_mode": start.mode, "init_adapter": str(policy.folder)})
    for name in (*config.lora_shape_given(), "adapter"):
        values.pop(name, None)
    if start.mode == "full":
        values.pop("model", None)
        return config_of(TrainConfig, values)
    return config_of(TrainConfig, {**values, "adapter_mode": "continue"})


def _no_pairs(place: Path, chosen: Chosen) -> UserError:
    return UserError(
        "this round produced no pairs",
        code="round-empty",
        where=str(place / "left_out.jsonl"),
        expected="two answers to a prompt, one better than the other",
        found=", ".join(f"{why} ({count})" for why, count in chosen.reasons().items()),
        remedy="increase --max-new-tokens or --samples, or add --keep-cut; use another --output-dir",
        exit_status=3,
    )
