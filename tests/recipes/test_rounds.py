"""Rounds: answers are sampled, judged and trained on; only new rows are computed; killed anywhere they end the same."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from dpoeng_testing import pair_rows, tree, write_jsonl
from stub_server import stub_server

from dpoeng.cache.errors import UserError
from dpoeng.cache.reader import View
from dpoeng.cache.store import Store
from dpoeng.cli.main import main
from dpoeng.engine.config.fields import PrecomputeConfig, TrainConfig
from dpoeng.engine.data.shapes import PreferencePair
from dpoeng.engine.recipes.evaluate import find_trained
from dpoeng.engine.recipes.precompute import precompute_reference
from dpoeng.engine.recipes.rounds import rounds as module
from dpoeng.engine.recipes.rounds.answers import Sampling
from dpoeng.engine.recipes.rounds.begin import RoundSettings
from dpoeng.engine.recipes.rounds.best_and_worst import choose_pairs
from dpoeng.engine.recipes.rounds.judges import Judge, JudgeSettings, find_judge
from dpoeng.engine.recipes.rounds.prompts import RoundPrompt, distinct_prompts, of_round, read_prompt_file
from dpoeng.engine.recipes.rounds.record import RoundSummary
from dpoeng.engine.recipes.rounds.rounds import train_rounds
from dpoeng.engine.recipes.train import train
from dpoeng.engine.runs.kept import Kept
from dpoeng.engine.runs.metrics import MetricsLog
from dpoeng.engine.runtime import endpoint
from dpoeng.engine.runtime.endpoint import Endpoint
from dpoeng.engine.runtime.progress import QUIET

FIELDS: dict[str, Any] = {"max_steps": 3, "learning_rate": 2e-2, "eval_share": 0.3, "parity_pairs": 2, "lora_r": 4}
SAMPLING = Sampling(count=4, max_new_tokens=6, temperature=1.0, batch_size=5)


def many_vowels(prompt: str, answer: str) -> float:
    return sum(letter in "aeiou" for letter in answer) / max(1, len(answer))


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "LONGEST_PAUSE_S", 0.01)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A run with 16 pairs, in `out`."""
    folder = tmp_path_factory.mktemp("run")
    pairs = write_jsonl(folder / "pairs.jsonl", pair_rows(16))
    precompute_reference(PrecomputeConfig(pairs=(pairs,), model=str(tiny_model), cache=folder / "cache"))
    train(TrainConfig(cache=folder / "cache", output_dir=folder / "out", **FIELDS))
    return folder / "out"


def config_of(run: Path, **fields: Any) -> TrainConfig:
    return TrainConfig(cache=run.parent / "cache", output_dir=run, **{**FIELDS, **fields})


def rounds(run: Path, folder: Path, reference: Any = "first", number: int = 3, **settings: Any) -> list[RoundSummary]:
    given = {"keep_cut": True, "sampling": SAMPLING, **settings}
    judge = find_judge(many_vowels, JudgeSettings())
    wanted = RoundSettings(reference, number, **given)
    return train_rounds(find_trained(run), config_of(run), judge, wanted, folder)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("reference", ["first", "last"])
def test_three_rounds(tmp_path: Path, run: Path, reference: str) -> None:
    before = tree(run.parent)
    folder = tmp_path / "rounds"
    done = rounds(run, folder, reference)
    assert tree(run.parent) == before  # the user's cache and run
    start = View.open(run.parent / "cache")
    seen: set[bytes] = set()
    log = MetricsLog(run).read_evaluations()
    for number, one in enumerate(done, 1):
        place = folder / f"round-{number}"
        view = View.open(folder / "cache", f"round-{number}")
        pairs = lines(place / "pairs.jsonl")
        assert one.pairs == len(pairs) > 3
        assert one.pairs + sum(one.left_out.values()) == one.prompts
        for pair in pairs:  # the rule's best against its worst
            scores = [many_vowels("", pair[side]) for side in ("chosen", "rejected")]
            assert scores == [pair["chosen_score"], pair["rejected_score"]]
            assert scores[0] > scores[1]
            answers = [text for line in lines(place / "answers.jsonl") for text in (a["text"] for a in line["value"])]
            assert {pair["chosen"], pair["rejected"]} <= set(answers)
        own = {view.key(row) for row in range(len(view)) if view.source(row)[0].endswith(f"{place.name}/pairs.jsonl")}
        began = MetricsLog(place / "run").read_evaluations()[0]["metrics"]
        if reference == "first":
            assert view.spec.digest == start.spec.digest == one.reference
            assert one.computed == len(own - seen)  # nothing but the new rows
            ended = log[-1]["metrics"]
            assert began == pytest.approx(ended, abs=1e-5)  # training continues from the last policy
        else:
            assert one.reference not in (start.spec.digest, *(other.reference for other in done[: number - 1]))
            assert one.computed == len({view.key(row) for row in range(len(view))})
            assert began["rewards/margins"] == 0  # the policy is the reference
        seen |= own
        log = MetricsLog(place / "run").read_evaluations()
        assert one.sampled == str(
            run / "adapter" if number == 1 else folder / f"round-{number - 1}" / "run" / "adapter"
        )
        held_out = View.open(folder / "cache", f"round-{number}-held-out")
        assert not {held_out[row].ids.prompt_ids.tobytes() for row in range(len(held_out))} & {
            view[row].ids.prompt_ids.tobytes() for row in range(len(view))
        }
    assert done[2].train_pairs == done[0].train_pairs + done[1].pairs + done[2].pairs
    assert len({one.mean_score for one in done}) == 3  # each round's answers are another policy's


class KilledError(Exception):
    pass


def events(monkeypatch: pytest.MonkeyPatch, on: Callable[[], None]) -> None:
    """Calls `on` before each write of an answer, score, shard, step or record."""
    places: list[tuple[Any, str]] = [
        (Kept, "put"),
        (Store, "commit_shard"),
        (MetricsLog, "write"),
        (MetricsLog, "write_timing"),
    ]
    places += [(module, "write_state"), (module, "write_lines")]
    for holder, name in places:
        whole = getattr(holder, name)

        def before(*arguments: Any, whole: Any = whole, **named: Any) -> Any:
            on()
            return whole(*arguments, **named)

        monkeypatch.setattr(holder, name, before)


def test_killed_between_and_inside_steps_they_end_the_same(
    tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = 0

    def counts() -> None:
        nonlocal count
        count += 1

    with monkeypatch.context() as patch:
        events(patch, counts)
        rounds(run, tmp_path / "whole", number=2, count=4)
    every = count // 5 + 1
    kills = left = 0

    def kills_now() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise KilledError

    with monkeypatch.context() as patch:
        events(patch, kills_now)
        while True:
            left = every
            try:
                rounds(run, tmp_path / "broken", number=2, count=4)
                break
            except KilledError:
                kills += 1
    assert kills >= 4
    for number in (1, 2):
        for name in ("pairs.jsonl", "left_out.jsonl", "run/adapter/adapter_model.safetensors", "run/metrics.jsonl"):
            path = f"round-{number}/{name}"
            assert (tmp_path / "broken" / path).read_bytes() == (tmp_path / "whole" / path).read_bytes(), path
    told = [json.loads((tmp_path / name / "rounds.json").read_text()) for name in ("whole", "broken")]
    for state in told:
        for one in state["rounds"]:  # what was new when it was done
            for field in ("asked", "kept", "computed", "sampled", "result"):
                del one[field]
    assert told[0] == told[1]


def test_more_rounds_are_added_and_other_settings_refused(
    tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "rounds"
    quick: dict[str, Any] = {"count": 3, "train_on": "new"}
    (first,) = rounds(run, folder, number=1, **quick)
    assert first.prompts == 3
    assert first.train_pairs == first.pairs <= 3
    state = (folder / "rounds.json").read_bytes()
    again = rounds(run, folder, number=1, **quick)
    assert again == [first]
    assert (folder / "rounds.json").read_bytes() == state
    done = rounds(run, folder, number=2, **quick)
    assert done[0] == first
    asked = [
        line["prompt"]
        for n in (1, 2)
        for file in ("pairs", "left_out")
        for line in lines(folder / f"round-{n}" / f"{file}.jsonl")
    ]
    assert len(set(asked)) == 6  # the next prompts, not the same ones
    for changed, word in (({"reference": "last"}, "reference"), ({"count": 4}, "count"),
                          ({"sampling": replace(SAMPLING, count=2)}, "sampling")):  # fmt: skip
        with pytest.raises(UserError, match="round-changed") as caught:
            rounds(run, folder, **{"number": 1, **quick, **changed})
        assert word in str(caught.value)
    record = json.loads((folder / "rounds.json").read_text())
    number = record["rounds"][0]
    for damage in ("{", "[]", "[" * 100_000, json.dumps({**record, "settings": [1]}),
                   json.dumps({**record, "rounds": [{**number, "pairs": "3"}]}),
                   json.dumps({**record, "rounds": [{**number, "evaluation": []}]})):  # fmt: skip
        (folder / "rounds.json").write_text(damage)
        with pytest.raises(UserError, match="round-damaged"):
            rounds(run, folder, number=1, **quick)


def test_all_weights_against_the_last_policy(tmp_path: Path, tiny_model: Path) -> None:
    pairs = write_jsonl(tmp_path / "pairs.jsonl", pair_rows(8))
    precompute_reference(PrecomputeConfig(pairs=(pairs,), model=str(tiny_model), cache=tmp_path / "cache"))
    fields: dict[str, Any] = {
        "use_peft": False,
        "max_steps": 1,
        "learning_rate": 1e-3,
        "eval_share": 0,
        "parity_pairs": 2,
    }
    config = TrainConfig(cache=tmp_path / "cache", output_dir=tmp_path / "out", **fields)
    train(config)
    judge = find_judge(many_vowels, JudgeSettings())
    wanted = RoundSettings("last", 1, keep_cut=True, sampling=SAMPLING, count=3)
    (done,) = train_rounds(find_trained(tmp_path / "out"), config, judge, wanted, tmp_path / "rounds")
    assert done.result.endswith("run/model")
    assert done.evaluation == {}
    with pytest.raises(UserError, match="round-start"):
        train_rounds(find_trained(tmp_path / "out"), config, judge, replace(wanted, reference="first"), tmp_path / "r")


def test_conversations_stay_conversations(tmp_path: Path, tiny_model: Path) -> None:
    """Of a chat data set the judge sees the question, and pairs are messages with the same tokens as before."""
    asked = [{"role": "user", "content": f"What of {name}?"} for name in ("tides", "bread", "rivers", "leaves")]
    rows = [
        {
            "prompt": [{"role": "system", "content": "Be brief."}, turn],
            "chosen": [{"role": "assistant", "content": f"Yes {n}."}],
            "rejected": [{"role": "assistant", "content": f"No {n}."}],
            "margin": n,
        }
        for n, turn in enumerate(asked)
    ]
    pairs = write_jsonl(tmp_path / "pairs.jsonl", rows)
    precompute_reference(PrecomputeConfig(pairs=(pairs,), model=str(tiny_model), cache=tmp_path / "cache"))
    config = TrainConfig(cache=tmp_path / "cache", output_dir=tmp_path / "out", max_steps=1, eval_share=0, lora_r=2)
    train(config)
    prompts: set[str] = set()

    def rule(prompt: str, answer: str) -> float:
        prompts.add(prompt)
        return many_vowels(prompt, answer)

    wanted = RoundSettings("first", 1, keep_cut=True, sampling=SAMPLING)
    (done,) = train_rounds(
        find_trained(tmp_path / "out"), config, find_judge(rule, JudgeSettings()), wanted, tmp_path / "rounds"
    )
    assert prompts <= {f"system: Be brief.\n\nuser: {turn['content']}" for turn in asked}
    found = lines(tmp_path / "rounds" / "round-1" / "pairs.jsonl")
    assert found
    assert {pair["chosen"][0]["role"] for pair in found} == {"assistant"}
    assert all(pair["prompt"][0] == {"role": "system", "content": "Be brief."} for pair in found)
    assert done.train_pairs == 4 + done.pairs
    view = View.open(tmp_path / "rounds" / "cache", "round-1")
    assert [view.extra(row).get("margin") for row in range(4)] == [0, 1, 2, 3]


def scored(*scores: float | None) -> Judge:
    given = dict(zip("abcdef", scores, strict=False))

    def ask(questions: Any) -> Any:
        for place, (_, answer) in enumerate(questions):
            score = given[answer.strip()]
            yield place, {"score": score} if score is not None else {"refused": "none"}

    return Judge("given", {"scores": list(scores)}, False, ask)


@pytest.mark.parametrize(
    ("scores", "texts", "pair", "why"),
    [
        ((1, 3, 2), "abc", ("b", "a"), ""),
        ((1, 1), "ab", None, "a tie"),
        ((2, 2, 1), "abc", ("a", "c"), ""),  # of several best ones the first
        ((None, 1, 2), "abc", ("c", "b"), ""),
        ((None, 1), "ab", None, "no verdict"),
        ((1, 2), "aaa", None, "all answers are equal"),
        ((1, 2), "", None, "every answer was cut off or empty"),
    ],
)
def test_the_best_and_the_worst(tmp_path: Path, scores: Any, texts: str, pair: Any, why: str) -> None:
    prompt = RoundPrompt(PreferencePair("p", ".", "."), ids=None)  # type: ignore[arg-type]
    answers = [
        [{"text": text, "ended": True} for text in texts]
        + [{"text": " ", "ended": True}, {"text": "f", "ended": False}]
    ]
    found, _ = choose_pairs(scored(*scores, 7, 8, 9), [prompt], answers, Kept(tmp_path / "k"), QUIET, keep_cut=False)
    assert [(row["chosen"], row["rejected"]) for row in found.rows] == ([pair] if pair else [])
    assert found.reasons() == ({why: 1} if why else {})
    assert (found.answers, found.cut, found.empty) == (len(texts) + 2, 1, 1)


def test_prompts_are_those_of_a_file_as_the_run_has_its_own(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "p.txt").write_text("one\n\n two \none\n")
    write_jsonl(tmp_path / "p.jsonl", [{"prompt": "one"}, {"question": "two", "system": "s"}])
    text = PreferencePair("x", "y", "z")
    chat = PreferencePair([{"role": "user", "content": "x"}], [], [])
    assert [pair.prompt for pair in read_prompt_file(tmp_path / "p.txt", text, "<{prompt}>")] == [
        "<one>",
        "<two>",
        "<one>",
    ]
    found = read_prompt_file(tmp_path / "p.txt", chat, None)
    assert found[1].prompt == [{"role": "user", "content": "two"}]
    assert [pair.prompt for pair in read_prompt_file(tmp_path / "p.jsonl", chat, None)] == [
        [{"role": "user", "content": "one"}],
        [{"role": "system", "content": "s"}, {"role": "user", "content": "two"}],
    ]
    write_jsonl(tmp_path / "bad.jsonl", [{"text": "one"}])
    with pytest.raises(UserError, match="round-prompts"):
        read_prompt_file(tmp_path / "bad.jsonl", chat, None)
    distinct, unusable = distinct_prompts(found, tokenizer, 20)
    assert (len(distinct), len(unusable)) == (2, 0)
    distinct, unusable = distinct_prompts(found, tokenizer, 3)
    assert (len(distinct), len(unusable)) == (0, 2)
    assert of_round("abcde", 2, 1) == ["a", "b"]  # type: ignore[arg-type]
    assert of_round("abcde", 2, 3) == ["e", "a"]  # type: ignore[arg-type]
    assert of_round("abcde", None, 3) == list("abcde")  # type: ignore[arg-type]


# --------------------------------------------------------------------------- sampled on a server


def test_the_policy_is_sampled_on_a_server_that_loads_it(tmp_path: Path, run: Path) -> None:
    """vLLM's way, in words and not in JSON; each round's policy has its own name."""
    loaded: dict[str, str] = {}

    def answer(path: str, body: dict[str, Any]) -> Any:
        if path == "/v1/load_lora_adapter":
            loaded[body["lora_name"]] = body["lora_path"]
            stub.models.append(body["lora_name"])
            return 200, b"Success: LoRA adapter added successfully.", {}
        assert body["model"] in loaded
        asked = {name: body[name] for name in ("temperature", "top_p", "top_k", "min_p", "repeat_penalty")}
        assert asked == {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0, "repeat_penalty": 1.0}
        assert body["repetition_penalty"] == body["repeat_penalty"], "vLLM's name, and llama.cpp's"
        if body["prompt"] == refused:
            return 400, {"error": "this model's maximum context length"}, {}
        return " " + "aeiou"[body["seed"] % 5] * (1 + body["seed"] % 3) + "xyz"

    start = View.open(run.parent / "cache")
    prompts = [start[row].ids.prompt_ids.tolist() for row in range(len(start))]
    refused = prompts[0]
    with stub_server(answer, ("base",)) as stub:
        settings: dict[str, Any] = {"server": Endpoint(stub.url), "keep_cut": False}
        done = rounds(run, tmp_path / "rounds", number=2, **settings)
        sent = [body for path, _, body in stub.requests if path == "/v1/completions"]
        count = len(stub.requests)
        assert rounds(run, tmp_path / "rounds", number=2, **settings) == done
        assert len(stub.requests) == count
    assert [Path(folder) for folder in loaded.values()] == [
        (run / "adapter").resolve(),
        (tmp_path / "rounds" / "round-1" / "run" / "adapter").resolve(),
    ]
    assert {tuple(body["prompt"]) for body in sent} <= {tuple(ids) for ids in prompts}
    assert len({body["seed"] for body in sent[: 4 * done[0].prompts]}) == 4 * done[0].prompts
    assert done[0].cut == 0
    held_out = {line["prompt"] for line in lines(tmp_path / "rounds" / "held-out.jsonl")}
    if pair_rows(1)[0]["prompt"] not in held_out:
        (line,) = [
            line for line in lines(tmp_path / "rounds" / "round-1" / "left_out.jsonl") if "refused" in line["why"]
        ]
        assert "maximum context length" in line["why"]


def test_a_server_without_the_policy_gives_the_command_to_load_it(tmp_path: Path, run: Path) -> None:
    with stub_server(lambda path, body: (404, {}, {}), ("base",)) as stub:
        with pytest.raises(UserError, match="round-server") as caught:
            rounds(run, tmp_path / "rounds", number=1, server=Endpoint(stub.url))
        assert stub.paths().count("/load_lora_adapter") == stub.paths().count("/v1/load_lora_adapter") == 1
    name = re.search(r"--lora-modules (\S+)=(\S+)", str(caught.value))
    assert name
    assert Path(name[2]) == (run / "adapter").resolve()
    assert "--max-lora-rank 4" in str(caught.value)


# --------------------------------------------------------------------------- the command


RULE = """
def score(prompt, answer):
    return sum(letter in "aeiou" for letter in answer) / max(1, len(answer))
"""


def test_the_command_tells_what_each_round_did(
    tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rule.py").write_text(RULE)
    command = ["round", str(run), "--judge", "rule.py:score", "--reference", "first", "--count", "4", "--samples", "2"]
    command += ["--max-new-tokens", "4", "--keep-cut", "--max-steps", "1", "--train-on", "new"]
    with pytest.raises(SystemExit) as stop:
        main(command)
    said = capsys.readouterr()
    assert stop.value.code == 0, said.err
    assert "mean score" in said.out
    assert "rounds/round-1/run/adapter" in said.out
    with pytest.raises(SystemExit) as stop:
        main(["eval", "--adapter", "rounds/round-1/run"])
    assert stop.value.code == 0, capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main([*command, "--temperature", "0", "--output-dir", "other"])
    assert stop.value.code == 2
    assert "round-start" in capsys.readouterr().err
    shutil.rmtree("rounds")


def test_a_missing_tracker_is_refused_before_anything_is_sampled(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dpoeng.engine.runs.trackers.importlib.util.find_spec", lambda name: None)
    config = TrainConfig(cache=run.parent / "cache", output_dir=run, report_to=("wandb",), **FIELDS)
    judge = find_judge(many_vowels, JudgeSettings())
    with pytest.raises(UserError) as caught:
        train_rounds(find_trained(run), config, judge, RoundSettings("first", 1), tmp_path / "rounds")
    assert caught.value.code == "tracker-missing"
    assert not (tmp_path / "rounds").exists()


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["first", "last"])
def test_three_rounds_of_a_real_model(tmp_path: Path, demo_model: Path, reference: Any) -> None:
    """SmolLM2-135M-Instruct says more and more of what the rule likes.

    With rpo_alpha the best answer becomes likelier, not only likelier than the worst: so few steps show in new samples.
    """
    rows = [
        {
            "prompt": [{"role": "user", "content": f"Name a {what}."}],
            "chosen": [{"role": "assistant", "content": "Certainly: it is short."}],
            "rejected": [{"role": "assistant", "content": "There are many of these."}],
        }
        for what in ("river", "tree", "metal", "planet")
    ]
    pairs = write_jsonl(tmp_path / "pairs.jsonl", rows)
    precompute_reference(PrecomputeConfig(pairs=(pairs,), model=str(demo_model), cache=tmp_path / "cache"))
    fields: dict[str, Any] = {
        **{"max_steps": 4, "learning_rate": 1e-3, "rpo_alpha": 1.0, "lora_r": 8, "eval_share": 0, "parity_pairs": 2},
        **{"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1},
    }
    config = TrainConfig(cache=tmp_path / "cache", output_dir=tmp_path / "out", **fields)
    train(config.model_copy(update={"max_steps": 1, "learning_rate": 1e-5}))
    judge = find_judge(many_vowels, JudgeSettings())
    sampling = Sampling(count=6, max_new_tokens=16, temperature=1.0)
    wanted = RoundSettings(reference, 3, train_on="new", keep_cut=True, sampling=sampling)
    done = train_rounds(find_trained(tmp_path / "out"), config, judge, wanted, tmp_path / "rounds")
    assert [one.number for one in done] == [1, 2, 3]
    assert all(one.pairs > 2 for one in done)
    scores = [one.mean_score for one in done]
    assert scores[2] is not None
    assert scores[0] is not None
    assert scores[2] > scores[0] + 0.01, scores
    if reference == "first":
        assert len({one.reference for one in done}) == 1
        assert [one.computed for one in done] == [one.pairs for one in done]
