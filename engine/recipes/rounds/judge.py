"""Is the trained policy better? A judge compares its answers to held-out prompts with those before training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dpoeng.cache.errors import UserError
from dpoeng.cache.files import replacing
from dpoeng.cache.schema import IdArray
from dpoeng.cache.selection.mixed import AnyView
from dpoeng.engine.config.fields import TrainConfig
from dpoeng.engine.models.model import CausalLM
from dpoeng.engine.models.sources import find_model
from dpoeng.engine.models.tokenizer import load_chosen, recorded_tokenizer
from dpoeng.engine.recipes.compare import as_chat, encode_prompt, held_out_rows
from dpoeng.engine.recipes.evaluate import Trained, before_and_after
from dpoeng.engine.recipes.inputs import open_views
from dpoeng.engine.recipes.rounds.answers import Sampling, answer_here, answer_keys, are_answers, policy_identity
from dpoeng.engine.recipes.rounds.judges import Judge, Prompt, is_reply, note_origin, shown_prompt
from dpoeng.engine.recipes.rounds.outcomes import Outcome, compare_answers
from dpoeng.engine.recipes.rounds.source_pairs import source_pairs
from dpoeng.engine.runs.kept import Kept
from dpoeng.engine.runs.lock import holding
from dpoeng.engine.runs.reading import JUDGE_FOLDER, JUDGED_FILE, JUDGEMENT_FILE
from dpoeng.engine.runtime.folders import refuse_link, unwritable, write_durably
from dpoeng.engine.runtime.outputs import scratch_folder
from dpoeng.engine.runtime.progress import QUIET, Progress
from dpoeng.engine.training.intervals import ACCURACY, CONTROLLED, intervals, length_controlled_accuracy

STUDY = "dpoeng judge"


@dataclass(frozen=True, slots=True)
class Judged:
    """One prompt: both answers, which of them is better, and their lengths in tokens."""

    prompt: str
    before: str
    after: str
    before_tokens: int
    after_tokens: int
    better: str
    orders: tuple[str, ...] = ()
    why: str = ""


@dataclass(slots=True)
class Judgement:
    """The result of `dpoeng judge`.

    Attributes:
        trained, judge, folder: the judged run, the judge, and the folder with all results.
        prompts: number of prompts.
        wins, losses, ties: of the trained policy, over prompts with a verdict.
        same: ties with equal answers, which no judge sees.
        contradictions: ties where the judge preferred the same position in both orders.
        unjudged: prompts without a verdict, in full; not part of any rate.
        win_rate: share of wins, with ties as half; None without a verdict.
        win_rate_interval: its 95 % interval over prompts; see training/intervals.py.
        length_controlled: mean of the win rates for longer and for shorter answers after training;
            None without both kinds.
        length_controlled_interval: its 95 % interval.
        first_share: share of verdicts for the answer shown first, without ties; None for scores.
        before_tokens, after_tokens: mean tokens of the answers.
        cut: answers before and after training that `max_new_tokens` cut off.
        asked, kept: new questions, and stored ones.
    """

    trained: Path
    judge: str
    folder: Path
    prompts: int
    wins: int = 0
    losses: int = 0
    ties: int = 0
    same: int = 0
    contradictions: int = 0
    win_rate: float | None = None
    win_rate_interval: tuple[float, float] | None = None
    length_controlled: float | None = None
    length_controlled_interval: tuple[float, float] | None = None
    first_share: float | None = None
    before_tokens: float = 0.0
    after_tokens: float = 0.0
    cut: tuple[int, int] = (0, 0)
    asked: int = 0
    kept: int = 0
    unjudged: list[Judged] = field(default_factory=list)


def judge_trained(
    trained: Trained,
    config: TrainConfig,
    judge: Judge,
    folder: Path,
    *,
    prompts: Sequence[str] = (),
    count: int | None = None,
    chat: bool | None = None,
    sampling: Sampling | None = None,
    progress: Progress = QUIET,
) -> Judgement:
    """Answers prompts with the policy before and after training, and lets a judge compare the answers.

    Answers and replies are stored in `folder` by their content, so that an interrupted call continues, and a repeated
    one asks no judge. There judged.jsonl has one line per prompt, judgement.json the result.

    Args:
        trained: see `find_trained`.
        config: config of its run.
        judge: see `find_judge`.
        folder: folder for answers and verdicts.
        prompts: texts; if empty, prompts that the run held out.
        count: number of held-out prompts, by default all.
        chat: whether texts are a user's messages for the chat template; see `compare_prompts`.
        sampling: settings for the answers, the same for both.
        progress: receives bars and notes.

    Raises:
        UserError: the cache, the model, the judge or the folder is not usable.
    """
    sampling = sampling or Sampling()
    scratch_folder(folder, STUDY)
    with holding(folder):
        view, eval_view = open_views(config)
        if prompts:
            asked_of, ids = _given(view, prompts, chat)
        else:
            rows_view, rows, held_out = held_out_rows(view, eval_view, config, count)
            if not held_out:
                progress.note("the run held out no prompts, so these are training prompts")
            asked_of, ids = _held_out(rows_view, rows, progress)
        kept = Kept(folder / "answers.jsonl", lambda value: are_answers(value, "tokens"))
        pairs = _answers(trained, config, view, ids, sampling, kept, progress)
        items = [
            (prompt, before["text"], after["text"]) for prompt, (before, after) in zip(asked_of, pairs, strict=True)
        ]
        outcomes, asked = compare_answers(judge, items, Kept(folder / "verdicts.jsonl", is_reply), progress)
        note_origin(asked, judge, progress)
        found = Judgement(trained.folder, judge.name, folder, len(ids), asked=asked.new, kept=asked.kept)
        lines = _summarise(found, asked_of, pairs, outcomes, [prompt.tobytes() for prompt in ids], config.seed)
        _write(folder, found, lines)
    return found


def judge_folder(trained: Trained) -> Path:
    """The default folder for answers and verdicts: `judge` in the run's folder, else in the current one.

    Raises:
        UserError: that is a link, which could lead out of a stranger's run.
    """
    folder = (trained.folder.parent if trained.run is not None else Path()) / JUDGE_FOLDER
    refuse_link(folder, "the folder for answers and verdicts", "name a folder with --output-dir")
    return folder


def _given(view: AnyView, prompts: Sequence[str], chat: bool | None) -> tuple[list[Prompt], list[IdArray]]:
    reference = view.meta["reference"]
    source = find_model(reference["model"], revision=reference.get("revision"))
    tokenizer = load_chosen(recorded_tokenizer(source, reference))
    wrapped = view.meta.get("prompt_format")
    templated = as_chat(tokenizer, wrapped) if chat is None else chat
    return list(prompts), [encode_prompt(tokenizer, text, chat=templated, prompt_format=wrapped) for text in prompts]


def _held_out(view: AnyView, rows: Sequence[int], progress: Progress) -> tuple[list[Prompt], list[IdArray]]:
    """The prompts of some rows from their files, or otherwise decoded from their tokens; and their tokens."""
    ids = [view[row].ids.prompt_ids for row in rows]
    try:
        return [pair.prompt for pair in source_pairs(view, rows)], ids
    except UserError as error:
        progress.note(f"the judge sees decoded prompts: {error.message} ({error.found})")
    reference = view.meta["reference"]
    source = find_model(reference["model"], revision=reference.get("revision"))
    tokenizer = load_chosen(recorded_tokenizer(source, reference))
    return [str(text) for text in tokenizer.batch_decode([one.tolist() for one in ids], skip_special_tokens=True)], ids


def _answers(
    trained: Trained,
    config: TrainConfig,
    view: AnyView,
    prompts: Sequence[IdArray],
    sampling: Sampling,
    kept: Kept,
    progress: Progress,
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """An answer before and one after training to each prompt. The model is loaded only if one is not stored."""
    sides = [
        answer_keys(policy_identity(policy, config, view.spec.digest), sampling, prompts) for policy in (None, trained)
    ]

    def answer(keys: Sequence[str]) -> Any:
        return lambda lm: answer_here(lm, prompts, keys, sampling, kept, progress)

    def nothing(lm: CausalLM) -> None:
        del lm

    lacking = [any(kept.get(key) is None for key in keys) for keys in sides]
    if any(lacking):
        work = [answer(keys) if lacks else nothing for keys, lacks in zip(sides, lacking, strict=True)]
        before_and_after(trained, config, view, work[0], work[1], tokenizer=True)
    return [(kept.get(one)[0], kept.get(other)[0]) for one, other in zip(*sides, strict=True)]


def _summarise(
    found: Judgement,
    prompts: Sequence[Prompt],
    pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]],
    outcomes: Sequence[Outcome],
    clusters: Sequence[bytes],
    seed: int,
) -> list[Judged]:
    """Fills in the figures of `found` and returns the line of each prompt."""
    words = {1: "after", -1: "before", 0: "tie", None: "no verdict"}
    lines = [
        Judged(
            shown_prompt(prompt),
            before["text"],
            after["text"],
            before["tokens"],
            after["tokens"],
            words[outcome.value],
            outcome.orders,
            outcome.why,
        )
        for prompt, (before, after), outcome in zip(prompts, pairs, outcomes, strict=True)
    ]
    found.unjudged = [line for line in lines if line.better == "no verdict"]
    found.wins, found.losses, found.ties = (sum(outcome.value == value for outcome in outcomes) for value in (1, -1, 0))
    found.same = sum(outcome.same for outcome in outcomes)
    found.contradictions = sum(outcome.contradicts for outcome in outcomes)
    verdicts = [verdict for outcome in outcomes for verdict in outcome.orders if verdict != "tie"]
    found.first_share = verdicts.count("first") / len(verdicts) if verdicts else None
    found.cut = tuple(sum(not one[side]["ended"] for one in pairs) for side in (0, 1))  # type: ignore[assignment]
    found.before_tokens = float(np.mean([line.before_tokens for line in lines]))
    found.after_tokens = float(np.mean([line.after_tokens for line in lines]))
    judged = [place for place, outcome in enumerate(outcomes) if outcome.value is not None]
    if judged:
        # A tie is half a win. Intervals of shares accept values between 0 and 1 too, and are then slightly too wide.
        won = np.array([(outcomes[place].value + 1) / 2 for place in judged])  # type: ignore[operator]
        longer = np.array([lines[place].after_tokens - lines[place].before_tokens for place in judged])
        bounds = intervals({ACCURACY: won}, longer, [clusters[place] for place in judged], seed=seed)
        found.win_rate, found.win_rate_interval = float(won.mean()), bounds.get(ACCURACY)
        found.length_controlled = length_controlled_accuracy(won, longer)
        found.length_controlled_interval = bounds.get(CONTROLLED)
    return lines


def _write(folder: Path, found: Judgement, lines: Sequence[Judged]) -> None:
    texts = {
        JUDGED_FILE: "".join(json.dumps(asdict(line), ensure_ascii=False) + "\n" for line in lines),
        JUDGEMENT_FILE: json.dumps(asdict(found), indent=2, default=str) + "\n",
    }
    try:
        for name, text in texts.items():
            with replacing(folder / name) as temporary:
                write_durably(temporary, text.encode("utf-8", "surrogatepass"))
    except OSError as error:
        raise unwritable(folder, error) from error
