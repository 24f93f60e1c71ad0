"""Judges: what they say is read, kept and counted as it is; both orders, ties, intervals; nobody is asked twice."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dpoeng_testing import pair_rows, tree, write_jsonl
from stub_server import stub_server

import dpoeng
from dpoeng.cache.errors import UserError
from dpoeng.cli.main import main
from dpoeng.engine.config.fields import PrecomputeConfig, TrainConfig
from dpoeng.engine.recipes import evaluate
from dpoeng.engine.recipes.precompute import precompute_reference
from dpoeng.engine.recipes.rounds.judges import Judge, JudgeSettings, find_judge, parse_verdict, shown_prompt
from dpoeng.engine.recipes.rounds.outcomes import compare_answers, score_answers
from dpoeng.engine.recipes.train import train
from dpoeng.engine.runs.kept import Kept
from dpoeng.engine.runtime import endpoint
from dpoeng.engine.runtime.progress import QUIET
from dpoeng.engine.training.intervals import wilson


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "LONGEST_PAUSE_S", 0.01)


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("A is right.\nVerdict: A", "first"),
        ("**Verdict:** B.", "second"),
        ("verdict: [[tie]]", "tie"),
        ("Verdict: Answer B", "second"),
        ("Verdict: A\nOn second thought:\nVerdict: B", "second"),
        ("<think>Verdict: A</think>\nVerdict: tie", "tie"),
        ("B", "second"),
        (" **Answer A**. ", "first"),
        ("Verdict: A or Verdict: B", None),
        ("Verdict: about even", None),
        ("A good answer is short.", None),
        ("", None),
    ],
)
def test_verdicts_are_parsed(reply: str, verdict: str | None) -> None:
    assert parse_verdict(reply) == verdict


def by_texts(verdicts: dict[tuple[str, str], str]) -> Judge:
    """A judge that compares, from a table of what it says of two texts in this order."""

    def ask(questions: Any) -> Any:
        for place, (_, first, second) in enumerate(questions):
            yield place, {"reply": verdicts[first, second]}

    return Judge("table", {"table": sorted(map(str, verdicts.items()))}, True, ask)


A, B, TIE = "Verdict: A", "Verdict: B", "Verdict: tie"


@pytest.mark.parametrize(
    ("one", "other", "value", "contradicts"),
    [
        (B, A, 1, False),  # the second answer both times
        (A, B, -1, False),
        (TIE, TIE, 0, False),
        (B, TIE, 1, False),  # once a tie, once the second answer
        (TIE, B, -1, False),
        (A, A, 0, True),  # whichever is shown first
        (B, B, 0, True),
        (A, "well", None, False),
        ("", B, None, False),
    ],
)
def test_both_orders_make_one_outcome(
    tmp_path: Path, one: str, other: str, value: int | None, contradicts: bool
) -> None:
    judge = by_texts({("x", "y"): one, ("y", "x"): other})
    (found,), asked = compare_answers(judge, [("p", "x", "y")], Kept(tmp_path / "k"), QUIET)
    assert (found.value, found.contradicts, asked.new) == (value, contradicts, 2)
    assert (found.why == "") == (value is not None)


def test_equal_answers_are_a_tie_without_a_question(tmp_path: Path) -> None:
    found, asked = compare_answers(by_texts({}), [("p", "x", "x")], Kept(tmp_path / "k"), QUIET)
    assert (found[0].value, found[0].same, asked.new) == (0, True, 0)


def test_several_answers_are_scored_by_their_wins(tmp_path: Path) -> None:
    """Worked by hand: z beats x and y, x and y tie, so z has 1, and both others (0 + 1/2) / 2."""
    table = {("x", "y"): TIE, ("y", "x"): TIE, ("x", "z"): B, ("z", "x"): A, ("y", "z"): B, ("z", "y"): TIE}
    scores, asked = score_answers(by_texts(table), [("p", ["x", "y", "z"])], Kept(tmp_path / "k"), QUIET)
    assert scores == [[0.25, 0.25, 1.0]]
    assert asked.new == 6
    table = {("x", "y"): "?", ("y", "x"): TIE}
    assert score_answers(by_texts(table), [("p", ["x", "y"])], Kept(tmp_path / "l"), QUIET)[0] == [[None, None]]


def test_replies_are_stored_by_content_and_refusals_are_not(tmp_path: Path) -> None:
    calls: list[Any] = []

    def ask(questions: Any) -> Any:
        calls.append(list(questions))
        for place, (_, answer) in enumerate(questions):
            yield place, ({"refused": "too long"} if answer == "long" and len(calls) == 1 else {"score": len(answer)})

    def scores(name: str, *answers: str) -> list[list[float | None]]:
        judge = Judge(name, {"name": name}, False, ask)
        return score_answers(judge, [("p", answers)], Kept(tmp_path / "k"), QUIET)[0]

    assert scores("one", "aa", "long") == [[2, None]]
    assert scores("one", "aa", "long", "b") == [[2, 4, 1]]
    assert calls[1] == [("p", "long"), ("p", "b")]
    scores("two", "aa", "b")
    assert calls[2] == [("p", "aa"), ("p", "b")]
    scores("two", "b", "aa")
    assert len(calls) == 3


def test_a_judge_that_gives_no_verdicts_is_not_paid_for_long(tmp_path: Path) -> None:
    with stub_server(lambda path, body: "As a language model I like both.") as stub:
        judge = find_judge(stub.url, JudgeSettings(concurrency=1))
        items = [(f"p{n}", "x", "y") for n in range(50)]
        with pytest.raises(UserError, match="judge-verdicts") as caught:
            compare_answers(judge, items, Kept(tmp_path / "k"), QUIET)
        assert "I like both" in str(caught.value)
        assert len(stub.asked()) <= 11


def test_the_texts_stand_where_the_template_says(tmp_path: Path) -> None:
    with stub_server(lambda path, body: TIE) as stub:
        settings = JudgeSettings(server_model="m", template="{prompt}|{first}|{second}|{other}", max_tokens=7)
        compare_answers(find_judge(stub.url, settings), [("p {first}", "{second}", "y")], Kept(tmp_path / "k"), QUIET)
        assert sorted(stub.asked()) == ["p {first}|y|{second}|{other}", "p {first}|{second}|y|{other}"]
        body = stub.requests[0][2]
        assert (body["model"], body["max_tokens"], body["temperature"]) == ("m", 7, 0)
    with pytest.raises(UserError, match="judge-template"):
        find_judge("http://h/v1", JudgeSettings(server_model="m", template="{prompt} {first}"))


def test_the_model_of_a_server_with_several_is_asked_for() -> None:
    with stub_server(lambda path, body: TIE, models=("one", "two")) as stub:
        with pytest.raises(UserError, match="endpoint-model") as caught:
            find_judge(stub.url, JudgeSettings())
        assert "one, two" in str(caught.value)
    with stub_server(lambda path, body: TIE) as stub:
        assert find_judge(stub.url, JudgeSettings()).name == f"stub at {stub.url}"


def test_prompts_as_a_reader_sees_them() -> None:
    assert shown_prompt("text") == "text"
    assert shown_prompt([{"role": "user", "content": "why?"}]) == "why?"
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "why?"}]
    assert shown_prompt(turns) == "system: be brief\n\nuser: why?"


RULE = """
def score(prompt, answer):
    return len(answer)

def odd(prompt, answer):
    return None if len(answer) == 1 else float("nan")

def broken(prompt, answer):
    return 1 / 0
"""


def test_a_rule_scores_and_its_mistakes_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rule.py").write_text(RULE)
    items = [("p", "x", "yy"), ("p", "zz", "yy")]
    found, _ = compare_answers(find_judge("rule.py:score", JudgeSettings()), items, Kept(tmp_path / "k"), QUIET)
    assert [one.value for one in found] == [1, 0]
    with pytest.raises(UserError, match="judge-verdicts") as caught:
        compare_answers(find_judge("rule.py:odd", JudgeSettings()), items, Kept(tmp_path / "k"), QUIET)
    assert "None" in str(caught.value) or "nan" in str(caught.value)
    with pytest.raises(UserError, match="judge-rule") as caught:
        compare_answers(find_judge("rule.py:broken", JudgeSettings()), items, Kept(tmp_path / "k"), QUIET)
    assert "rule.py:9" in str(caught.value)
    assert "ZeroDivisionError" in str(caught.value)
    with pytest.raises(UserError, match="judge-rule") as caught:
        find_judge("rule.py:scoer", JudgeSettings())
    assert "score" in str(caught.value.found)


def test_a_changed_rule_is_another_judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = []
    for body in ("len(answer)", "len(answer)  # the same", "-len(answer)"):
        (tmp_path / "rule.py").write_text(f"def score(prompt, answer):\n    return {body}\n")
        found.append(find_judge("rule.py:score", JudgeSettings()).identity)
    assert found[0] == found[1] != found[2]


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A random Llama with one output."""
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(1)
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    config = LlamaConfig(
        **sizes, num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64, num_labels=1
    )
    folder = tmp_path_factory.mktemp("reward")
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_reward_model_gives_transformers_own_number(tmp_path: Path, reward_model: Path) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    judge = find_judge(str(reward_model), JudgeSettings(device="cpu"))
    scores, _ = score_answers(judge, [("why?", ["so", "no", "x" * 500])], Kept(tmp_path / "k"), QUIET)
    own = AutoTokenizer.from_pretrained(reward_model)
    model = AutoModelForSequenceClassification.from_pretrained(reward_model)
    for answer, score in zip(("so", "no"), scores[0], strict=False):
        turns = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": answer}]
        text = own.apply_chat_template(turns, tokenize=False)
        with torch.no_grad():
            plain = model(**own(text, return_tensors="pt")).logits[0, 0]
        assert score == pytest.approx(float(plain), abs=1e-6), text
    assert scores[0][2] is None  # longer than its 64 positions
    assert scores[0][0] != scores[0][1]


def test_a_model_here_compares(tmp_path: Path, tiny_model: Path) -> None:
    """It is random and gives no verdict: every outcome says what it said instead."""
    judge = find_judge(str(tiny_model), JudgeSettings(template="{prompt}{first}{second}", max_tokens=3, device="cpu"))
    kept = Kept(tmp_path / "k")
    with pytest.raises(UserError, match="judge-verdicts"):
        compare_answers(judge, [("p", "x", "y")], kept, QUIET)
    assert len((tmp_path / "k").read_text().splitlines()) == 2


# --------------------------------------------------------------------------- the whole command


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    folder = tmp_path_factory.mktemp("run")
    pairs = write_jsonl(folder / "pairs.jsonl", pair_rows(24))
    precompute_reference(PrecomputeConfig(pairs=(pairs,), model=str(tiny_model), cache=folder / "cache"))
    train(
        TrainConfig(cache=folder / "cache", output_dir=folder / "out", max_steps=6, learning_rate=3e-2, eval_share=0.4)
    )
    return folder / "out"


def texts_of(question: str) -> tuple[str, str, str]:
    found = re.search(
        r"\[The prompt\]\n(.*)\n\[The end of the prompt\].*\[Answer A\]\n(.*)\n\[The end of answer A\].*"
        r"\[Answer B\]\n(.*)\n\[The end of answer B\]",
        question,
        re.DOTALL,
    )
    assert found
    return found[1], found[2], found[3]


def likes_short(path: str, body: dict[str, Any]) -> str:
    """Verdicts of a judge that likes short answers, but says nothing of prompts with "bread"."""
    prompt, first, second = texts_of(body["messages"][0]["content"])
    if "bread" in prompt:
        return "I would rather not."
    return f"It is short.\nVerdict: {'A' if len(first) < len(second) else 'B' if len(second) < len(first) else 'tie'}"


def test_wins_are_counted_with_an_interval_and_questions_are_asked_once(
    tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    with stub_server(likes_short) as stub:
        found = dpoeng.judge(run, judge=stub.url, max_new_tokens=8, output_dir=tmp_path / "judge")
        asked = len(stub.asked())
        again = dpoeng.judge(run, judge=stub.url, judge_model="stub", max_new_tokens=8, output_dir=tmp_path / "judge")
        assert len(stub.asked()) == asked == found.asked == again.kept
    lines = [json.loads(line) for line in (tmp_path / "judge" / "judged.jsonl").read_text().splitlines()]
    prompts = {row["prompt"] for row in pair_rows(24)}
    assert {line["prompt"] for line in lines} <= prompts  # as the file has them
    values = []
    for line in lines:
        sizes = len(line["before"]), len(line["after"])
        if line["before"] != line["after"] and "bread" in line["prompt"]:
            assert (line["better"], line["why"]) == ("no verdict", "I would rather not.")
            continue
        values.append((sizes[0] > sizes[1]) + (sizes[0] == sizes[1]) / 2)
        assert line["better"] == {1: "after", 0.5: "tie", 0: "before"}[values[-1]]
    assert found.win_rate == pytest.approx(np.mean(values))
    assert found.win_rate_interval == pytest.approx(wilson(float(np.mean(values)), len(values)))
    assert found.wins + found.losses + found.ties == len(values)
    assert len(found.unjudged) == len(lines) - len(values) > 0
    assert found.contradictions == 0
    assert (again.win_rate, again.asked) == (found.win_rate, 0)
    everything = b"".join(file.read_bytes() for file in (tmp_path / "judge").rglob("*") if file.is_file())
    assert b"sk-very-secret" not in everything


def test_a_judge_that_prefers_a_position_is_reported(tmp_path: Path, run: Path) -> None:
    with stub_server(lambda path, body: A) as stub:
        found = dpoeng.judge(run, judge=stub.url, max_new_tokens=8, output_dir=tmp_path / "judge", count=4)
    assert (found.wins, found.losses, found.first_share) == (0, 0, 1.0)
    assert found.contradictions == found.ties - found.same > 0


def test_killed_anywhere_it_continues_and_samples_no_answer_twice(
    tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ends in each batch of answers and after each reply; the files end as those of an undisturbed call."""

    class KilledError(Exception):
        pass

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    settings: dict[str, Any] = {"max_new_tokens": 4, "batch_size": 3, "count": 6, "concurrency": 1}
    with stub_server(likes_short) as stub:
        dpoeng.judge(run, judge=stub.url, output_dir=whole, **settings)
        asked = len(stub.asked())
        put, kills = Kept.put, 0
        while True:
            left = 3

            def dying(self: Kept, key: str, value: Any) -> None:
                nonlocal left
                if left == 0:
                    raise KilledError
                left -= 1
                put(self, key, value)

            monkeypatch.setattr(Kept, "put", dying)
            try:
                dpoeng.judge(run, judge=stub.url, output_dir=broken, **settings)
                break
            except KilledError:
                kills += 1
        assert kills > 3
        assert len(stub.asked()) - asked <= asked + 2 * kills  # one reply is lost, and one may be on its way
    for name in ("judged.jsonl", "answers.jsonl"):
        assert (broken / name).read_bytes() == (whole / name).read_bytes()


def test_a_rule_needs_no_server_and_the_model_is_loaded_once(
    tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rule.py").write_text(RULE)
    command = ["judge", str(run), "--judge", "rule.py:score", "--max-new-tokens", "6", "--output-dir", "judge"]
    loads: list[int] = []
    load = evaluate.load_policy_base
    monkeypatch.setattr(evaluate, "load_policy_base", lambda *a, **k: loads.append(1) or load(*a, **k))
    said = []
    for _ in range(2):
        with pytest.raises(SystemExit) as stop:
            main(command)
        assert stop.value.code == 0
        said.append(capsys.readouterr().out)
    assert len(loads) == 1
    assert "win rate" in said[0]
    assert re.sub(r"questions.*", "", said[0]) == re.sub(r"questions.*", "", said[1])
    assert not set(tree(tmp_path)) - {"rule.py", *(f"judge/{name}" for name in (
        ".dpoeng-study", "answers.jsonl", "verdicts.jsonl", "judged.jsonl", "judgement.json"))}  # fmt: skip


def test_pairs_that_have_gone_leave_prompts_as_the_tokenizer_has_them(
    tmp_path: Path, tiny_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pairs = write_jsonl(tmp_path / "pairs.jsonl", pair_rows(8))
    precompute_reference(PrecomputeConfig(pairs=(pairs,), model=str(tiny_model), cache=tmp_path / "cache"))
    train(TrainConfig(cache=tmp_path / "cache", output_dir=tmp_path / "out", max_steps=1, eval_share=0.4))
    pairs.unlink()
    caplog.set_level("INFO")
    found = dpoeng.judge(tmp_path / "out", judge=lambda prompt, answer: len(prompt), max_new_tokens=2)
    assert found.folder == tmp_path / "out" / "judge"
    assert "the judge sees decoded prompts" in caplog.text
    assert (found.ties, found.win_rate) == (found.prompts, 0.5)


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path, run: Path) -> None:
    (tmp_path / "answers.jsonl").write_text("mine\n")
    with pytest.raises(UserError, match="output-exists"):
        dpoeng.judge(run, judge=lambda prompt, answer: 1, output_dir=tmp_path)
    assert (tmp_path / "answers.jsonl").read_text() == "mine\n"


def test_the_rule_of_the_documents_judges(tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[2] / "docs" / "judge.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(def score.*?)```", text, re.DOTALL)
    assert code
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_rule.py").write_text(code[1])
    judge = find_judge("my_rule.py:score", JudgeSettings())
    scores, _ = score_answers(judge, [("p", ["Yes.", "Yes it is.", "Yes and"])], Kept(tmp_path / "k"), QUIET)
    assert scores == [[-4, -10, -10_000]]
