"""`dpoeng check`: every finding from rows that have the fault, none from rows that do not."""

from __future__ import annotations

import json
import math
import re
import shlex
import shutil
import tracemalloc
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from dpoeng_testing import pair_rows, write_jsonl

from dpoeng.cache.errors import UserError
from dpoeng.cli.main import main
from dpoeng.engine.checks.findings import KINDS
from dpoeng.engine.checks.texts import tail
from dpoeng.engine.config.fields import PrecomputeConfig
from dpoeng.engine.data.pairs import PairStream
from dpoeng.engine.recipes.check import CheckReport, check_pairs, sign_test

ROOT = Path(__file__).resolve().parents[2]
CASES = ROOT / "tests" / "data" / "cases"
Row = dict[str, Any]


def clean_rows(count: int = 120) -> list[Row]:
    """Pairs without any finding: lengths even, endings alike, prompts distinct."""
    rows = []
    for i in range(count):
        words = [f"answer{i}a plain and true", f"answer{i}b long, vague and wrong"]
        first, second = words if i % 2 else [words[1].replace("b", "d"), words[0].replace("a ", "c ")]
        rows.append({"prompt": f"Question {i}?\nAnswer:", "chosen": f" {first}.", "rejected": f" {second}."})
    return rows


def run(tmp_path: Path, rows: list[Row], eval_rows: list[Row] | None = None, **fields: Any) -> CheckReport:
    file = write_jsonl(tmp_path / "pairs.jsonl", rows)
    evaluation = [write_jsonl(tmp_path / "eval.jsonl", eval_rows)] if eval_rows else []
    return check_pairs(PrecomputeConfig(pairs=(file,), **fields), evaluation)


def codes(report: CheckReport) -> dict[str, int]:
    return {finding.code: finding.count for finding in report.findings}


def chat(row: Row, system: int = 0) -> Row:
    """A row as messages."""
    turns = [{"role": "system", "content": f"Rule {k}."} for k in range(system)]
    turns.append({"role": "user", "content": row["prompt"]})
    sides = {side: [{"role": "assistant", "content": row[side].strip()}] for side in ("chosen", "rejected")}
    return {"prompt": turns, **sides}


def test_clean_pairs_give_no_finding(tmp_path: Path, tiny_model: Path) -> None:
    assert codes(run(tmp_path, clean_rows())) == {}
    report = run(tmp_path, clean_rows(), model=str(tiny_model))
    assert codes(report) == {}
    assert (report.unit, report.pairs, report.prompts, report.worst()) == ("tokens", 120, 120, None)


Edit = Callable[[list[Row]], Any]


def edit(number: int, **fields: Any) -> Edit:
    """Changes of the row `number` (from 0), made of its old values."""

    def change(rows: list[Row]) -> None:
        old = rows[number]
        rows[number] = {**old, **{k: v(old) if callable(v) else v for k, v in fields.items()}}

    return change


# code -> (what makes it of clean rows, how often it must be found, words of the first example)
TEXT_FAULTS: dict[str, tuple[Edit, int, str]] = {
    "duplicate": (lambda rows: rows.append(rows[3]), 1, "pairs.jsonl:4"),
    "contradiction": (
        lambda rows: rows.append({**rows[3], "chosen": rows[3]["rejected"], "rejected": rows[3]["chosen"]}),
        1,
        "pairs.jsonl:4",
    ),
    "nearly-same": (edit(2, rejected=lambda row: row["chosen"].upper() + " "), 1, "answer2"),
    "score-against-preference": (edit(2, margin=-0.5), 1, "margin -0.5"),
    "tie": (edit(2, winner="tie"), 1, "winner: tie"),
    "prompt-begins-responses": (
        edit(2, prompt="Hi", chosen=" Hi there, ask on.", rejected=" Hi, or maybe not"),
        1,
        "'Hi'",
    ),
    "later-human-turn": (edit(2, chosen=" Yes.\n\nHuman: and then?\n\nAssistant: no."), 1, "Human"),
    "system-twice": (
        edit(2, prompt="<|im_start|>system\na<|im_end|>\n<|im_start|>system\nb<|im_end|>\n<|im_start|>assistant\n"),
        1,
        "system",
    ),
    "special-token-inside": (edit(2, chosen=" Yes.</s> And more."), 1, "</s> in chosen"),
    "bos-in-text": (edit(2, prompt="<s>Question?\nAnswer:"), 1, "<s>Question"),
    "end-token-in-text": (edit(2, chosen=" Yes, surely.</s>"), 1, "</s>"),
    "boundary-one-sided": (edit(2, chosen="Yes, surely so."), 1, "'Yes, surely so.'"),
    "joined-words": (edit(2, chosen="Yes, surely so.", rejected="No, or maybe."), 1, "Answer:Yes"),
    "damaged-text": (edit(2, chosen=" CafÃ© is open today."), 1, "CafÃ©"),
    "not-confident": (edit(2, confident=False), 1, "confident: false"),
    "mixed-types": (
        lambda rows: [row.update(margin="0.5" if k == 2 else 0.5 + k) for k, row in enumerate(rows)],
        1,
        "margin is text, '0.5'; in 119 pairs it is a number",
    ),
    "template-in-messages": (
        lambda rows: rows.append(chat({**rows[0], "prompt": "<|im_start|>user\nhi<|im_end|>"})),
        1,
        "<|im_start|>",
    ),
    "same-response": (edit(2, rejected=lambda row: row["chosen"]), 1, "equal"),
    "empty-response": (edit(2, rejected="  "), 1, "nothing"),
    "wrong-type": (edit(2, rejected=5), 1, "a number"),
}


@pytest.mark.parametrize("code", TEXT_FAULTS)
def test_a_fault_of_a_text_is_found_and_only_it(tmp_path: Path, code: str) -> None:
    change, count, words = TEXT_FAULTS[code]
    rows = clean_rows()
    change(rows)
    report = run(tmp_path, rows)
    found = {finding.code: finding for finding in report.findings}
    assert set(found) - {"no-category"} == {code}
    assert found[code].count == count
    where, shown = found[code].examples[0]
    assert re.fullmatch(r".*pairs\.jsonl:\d+", where)
    assert words in f"{where} {shown}"
    assert found[code].why
    assert found[code].remedy


@pytest.mark.parametrize(
    ("more", "code"),
    [
        ({"score_chosen": "9.0", "score_rejected": "10.0"}, "score-against-preference"),
        ({"chosen-rating": 3, "rejected-rating": 5}, "score-against-preference"),
        ({"reward_chosen": 0.5, "reward_rejected": 0.5}, "tie"),
        ({"winner": "rejected"}, "score-against-preference"),
        ({"preference": "Tie"}, "tie"),
        ({"winner": "chosen"}, None),
        ({"score_chosen": "10.0", "score_rejected": "9.0"}, None),
    ],
)
def test_winners_ties_and_reversed_scores_are_found(tmp_path: Path, more: Row, code: str | None) -> None:
    found = set(codes(run(tmp_path, [{**row, **more} for row in clean_rows()])))
    assert found & {"tie", "score-against-preference"} == ({code} if code else set())


def test_prompts_from_elsewhere_are_findings(tmp_path: Path) -> None:
    guessed = [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in clean_rows()]
    report = run(tmp_path, guessed)
    assert codes(report)["prompt-from-transcript"] == 120
    (found,) = [finding for finding in report.findings if finding.code == "prompt-from-transcript"]
    assert found.examples[0][1].startswith("the prompt ends 'Question 0?")
    for row in guessed:
        row["prompt"] = row["chosen"].partition("Answer:")[0] + "Answer:"
    assert codes(run(tmp_path, guessed))["prompt-repeated"] == 120
    talks = [
        {"system": "Be brief.", "question": row["prompt"], **{s: row[s] for s in ("chosen", "rejected")}}
        for row in clean_rows()
    ]
    assert codes(run(tmp_path, talks))["conversation-made"] == 120


THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content if loop.last else m.content.split('</think>')[-1] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_what_the_template_leaves_out_or_others_say(tmp_path: Path, tiny_model: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    (folder / "chat_template.jinja").write_text(THINKING)
    rows = [chat(row) for row in clean_rows()]
    early = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "<think>hm</think>Hello"}]
    rows[1]["prompt"] = [*early, *rows[1]["prompt"]]
    rows[2]["chosen"] = [
        *rows[2]["chosen"],
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "That."},
    ]
    found = codes(run(tmp_path, rows, model=str(folder)))
    assert (found["thought-dropped"], found["others-in-response"]) == (1, 1)
    assert "later-human-turn" not in found
    assert codes(run(tmp_path, rows, model=str(folder), train_on="all"))["later-human-turn"] == 1


def test_white_space_that_a_special_token_swallows(tmp_path: Path) -> None:
    from chat_styles import styled_tokenizer

    styled_tokenizer("phi3", swallows=True).save_pretrained(tmp_path / "phi3")
    file = CASES / "13-phi3-rstrip" / "p.jsonl"
    report = check_pairs(PrecomputeConfig(pairs=(file,), model=str(tmp_path / "phi3")))
    assert codes(report)["space-swallowed"] == 2


def test_21_22_ids_and_positions_that_the_model_does_not_have(tmp_path: Path, tiny_model: Path) -> None:
    from transformers import AutoTokenizer

    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 40}))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|sep|>"]})
    tokenizer.save_pretrained(folder)
    report = check_pairs(PrecomputeConfig(pairs=(CASES / "21-small-embedding" / "p.jsonl",), model=str(folder)))
    (found,) = [finding for finding in report.findings if finding.code == "id-above-vocabulary"]
    assert (found.level, found.count) == ("error", 1)
    assert found.examples[0][1] == f"'<|sep|>' is {len(tokenizer) - 1}; the model has {len(tokenizer) - 1} ids"
    report = check_pairs(PrecomputeConfig(pairs=(CASES / "22-positions" / "p.jsonl",), model=str(folder)))
    assert codes(report)["beyond-positions"] == 1
    report = check_pairs(PrecomputeConfig(pairs=(CASES / "22-positions" / "short.jsonl",), model=str(folder)))
    assert "beyond-positions" not in codes(report)


def test_15_rows_that_the_template_refuses_are_findings_and_no_end_of_the_road(tmp_path: Path) -> None:
    from chat_styles import styled_tokenizer

    styled_tokenizer("gemma2").save_pretrained(tmp_path / "gemma2")
    file = CASES / "15-gemma-system" / "p.jsonl"
    report = check_pairs(PrecomputeConfig(pairs=(file,), model=str(tmp_path / "gemma2")))
    (found,) = [finding for finding in report.findings if finding.code == "template-error"]
    assert found.count == 2
    assert "System role not supported" in found.examples[0][1]
    assert report.worst() == "error"


def test_36_a_sentencepiece_model_names_the_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dpoeng.engine.models import tokenizer

    (tmp_path / "tokenizer.model").write_bytes(b"model")
    monkeypatch.setattr(tokenizer, "_installed", lambda name: False)
    with pytest.raises(UserError) as caught:
        check_pairs(PrecomputeConfig(pairs=(CASES / "36-sentencepiece-only" / "p.jsonl",), model=str(tmp_path)))
    assert caught.value.code == "tokenizer-missing"
    assert "pip install sentencepiece" in str(caught.value.remedy)


def test_the_text_is_shown_with_what_is_scored(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [chat(row) for row in clean_rows()]
    rows[0]["chosen"][0]["content"] = ":smile: [bold]so[/bold] <b>"
    file = write_jsonl(tmp_path / "pairs.jsonl", rows)
    page = tmp_path / "check.html"
    with pytest.raises(SystemExit):
        main(["check", str(file), "--model", str(tiny_model), "--html", str(page)])
    out = capsys.readouterr().out
    assert "<|im_start|>assistant\n[[:smile: [bold]so[/bold] <b><|im_end|>\n]]" in out
    assert "<mark>:smile: [bold]so[/bold] &lt;b&gt;&lt;|im_end|&gt;\n</mark>" in page.read_text()
    # without a tokenizer the texts are shown as they will be joined
    with pytest.raises(SystemExit):
        main(["check", str(write_jsonl(file, clean_rows()))])
    assert "Answer:[[ " in capsys.readouterr().out
    report = check_pairs(PrecomputeConfig(pairs=(file,)))
    assert [piece.scored for piece in report.shown[0].chosen] == [False, True]


def test_not_confident_is_what_the_filter_leaves_out(tmp_path: Path) -> None:
    """Files write yes and no in many ways; a row that says nothing is not counted."""
    said = [False, "False", "no", " FALSE ", 0, "0", "", True, "True", "yes", 1, None]
    rows = [{**row, "confident": value} for row, value in zip(clean_rows(), said, strict=False)]
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    found = codes(check_pairs(PrecomputeConfig(pairs=(tmp_path / "pairs.jsonl",))))
    filtered = check_pairs(PrecomputeConfig(pairs=(tmp_path / "pairs.jsonl",), where="confident or confident == null"))
    assert found["not-confident"] == 7 == filtered.filtered
    assert "not-confident" not in codes(filtered)


def test_findings_about_the_whole(tmp_path: Path) -> None:
    rows = clean_rows(200)
    for i, row in enumerate(rows):
        row["chosen"] += " It goes on and on.\nEND" if i % 20 else "\nEND"
        row["rejected"] += "" if i % 2 else "\nEND"
        row["negative_type"] = "wrong" if i > 2 else "evasive"
        if i < 12:
            row["rejected"] = " I do not know\nEND"
        if i == 50:
            del row["negative_type"]
    report = run(tmp_path, rows)
    found = {finding.code: finding for finding in report.findings}
    assert set(found) == {
        *("end-marker-one-sided", "longer-is-better", "one-response-often", "no-category", "rare-category")
    }
    assert "'END' ends 100% of chosen and 53% of rejected" in found["end-marker-one-sided"].detail
    assert found["one-response-often"].count == 12
    assert found["longer-is-better"].count == report.bias.longer if report.bias else False
    assert {(one.value, one.count) for one in report.categories} == {("wrong", 196), ("evasive", 3)}
    assert found["rare-category"].count == 3
    rows = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    assert "shorter-is-better" in codes(run(tmp_path, rows))
    few = run(tmp_path, clean_rows(20))
    assert codes(few) == {"few-pairs": 20}


def test_an_ending_that_a_few_lack(tmp_path: Path) -> None:
    rows = clean_rows()
    for row in rows:
        row["chosen"] += "\nEND"
        row["rejected"] += "\nEND"
    assert codes(run(tmp_path, rows)) == {}
    rows[4]["rejected"] = rows[4]["rejected"].removesuffix("\nEND")
    assert codes(run(tmp_path, rows)) == {"end-marker-missing": 1}
    assert tail("a\nb\nEND") == "END"
    assert tail("so it ends.") == ""
    assert tail("so it ends.<|im_end|>\n") == "<|im_end|>"


# With the tiny model's tokenizer: code -> (rows, settings)
TOKEN_FAULTS: dict[str, tuple[Edit, Row]] = {
    "truncated": (edit(2, chosen=" very" * 60 + "."), {"max_length": 60}),
    "boundary-merged": (edit(2, prompt="Question?\nAnswer: ", chosen=lambda r: "short ", rejected="short waves "), {}),
    "end-token-missing": (lambda rows: None, {"append_eos": False}),
    "prompt-too-long": (edit(2, prompt="why " * 80), {"max_length": 60}),
    "foreign-template": (edit(2, prompt="<start_of_turn>user\nHi\n<start_of_turn>model\n"), {}),
}


@pytest.mark.parametrize("code", TOKEN_FAULTS)
def test_a_fault_of_the_tokens_is_found(tmp_path: Path, tiny_model: Path, code: str) -> None:
    change, settings = TOKEN_FAULTS[code]
    rows = clean_rows()
    change(rows)
    report = run(tmp_path, rows, model=str(tiny_model), **settings)
    assert codes(report)[code] == (120 if code == "end-token-missing" else 1)
    if code == "truncated":
        assert report.max_length_needed is not None
        assert report.max_length_needed > 60
        settings = {"max_length": report.max_length_needed}
        assert "truncated" not in codes(run(tmp_path, rows, model=str(tiny_model), **settings))


def test_text_that_the_tokenizer_does_not_know(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["[UNK]", "</s>", "Question", "Answer", "?", ":", ".", "yes", "no", *map(str, range(3))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="[UNK]")
    made.save_pretrained(tmp_path / "words")
    rows = [{"prompt": f"Question {i} ? Answer :", "chosen": " yes .", "rejected": " no ."} for i in range(3)]
    assert set(codes(run(tmp_path, rows, model=str(tmp_path / "words")))) == {"few-pairs"}
    rows[1]["rejected"] = " perhaps ."
    report = run(tmp_path, rows, model=str(tmp_path / "words"))
    (found,) = (finding for finding in report.findings if finding.code == "unknown-token")
    assert (found.count, found.examples[0][1]) == (1, "in rejected: ' perhaps .'")


def test_templates(tmp_path: Path, tiny_model: Path, tokenizer: Any) -> None:
    rows = [chat(row) for row in clean_rows()]
    assert codes(run(tmp_path, rows, model=str(tiny_model))) == {}
    rows[3] = chat(clean_rows()[3], system=2)
    assert codes(run(tmp_path, rows, model=str(tiny_model))) == {"system-twice": 1}
    # A template without an end token, and one with its own system prompt.
    import copy

    other = copy.deepcopy(tokenizer)
    other.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}" + (
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    other.save_pretrained(tmp_path / "open")
    found = codes(run(tmp_path, [chat(row) for row in clean_rows()], model=str(tmp_path / "open")))
    assert found["end-token-missing"] == 120
    other.chat_template = "<|im_start|>system\nBe kind.<|im_end|>\n" + tokenizer.chat_template
    other.save_pretrained(tmp_path / "kind")
    found = codes(run(tmp_path, [chat(row) for row in clean_rows()], model=str(tmp_path / "kind")))
    assert found == {"default-system-prompt": 120}


def test_leakage_between_files(tmp_path: Path) -> None:
    rows = clean_rows()
    swapped = {**rows[9], "chosen": rows[9]["rejected"], "rejected": rows[9]["chosen"]}
    prompt = {**rows[7], "prompt": rows[7]["prompt"].upper(), "chosen": " Another answer."}
    report = run(tmp_path, rows, [rows[5], swapped, prompt])
    found = {finding.code: finding for finding in report.findings}
    assert set(found) == {"eval-same-pair", "eval-same-prompt"}
    assert found["eval-same-pair"].level == "error"
    assert [where.rsplit(":", 1)[1] for where, _ in found["eval-same-pair"].examples] == ["6", "10"]
    assert found["eval-same-prompt"].examples[0][1].endswith("eval.jsonl:3")
    assert report.eval_pairs == 3


def test_the_sign_test_by_hand() -> None:
    assert sign_test(0, 0) == 1
    assert sign_test(5, 0) == pytest.approx(2 / 32)
    assert sign_test(3, 1) == pytest.approx(2 * (1 + 4) / 16)
    assert sign_test(7, 7) == 1
    # From 1,001 throws on it is an approximation.
    exact = 2 * sum(math.comb(1001, k) for k in range(442)) / 2**1001
    assert sign_test(560, 441) == pytest.approx(exact, rel=0.02)


def test_memory_does_not_grow_with_the_texts(tmp_path: Path) -> None:
    """2,000 rows of 20 kB: 80 times the memory that the pass may take."""
    row = {"prompt": "p" * 10_000, "chosen": "c" * 5_000, "rejected": "r" * 5_000}
    with (tmp_path / "pairs.jsonl").open("w") as file:
        for i in range(2000):
            file.write(json.dumps({**row, "prompt": f"{i} {row['prompt']}", "chosen": f"{i} {row['chosen']}"}) + "\n")
    tracemalloc.start()
    report = check_pairs(PrecomputeConfig(pairs=(tmp_path / "pairs.jsonl",)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert report.pairs == 2000
    assert peak < 5e6


def test_the_stream_counts_what_read_pairs_counts(tmp_path: Path) -> None:
    rows = [*pair_rows(6), pair_rows(1)[0], {"prompt": "p", "chosen": "", "rejected": "x"}]
    stream = PairStream([write_jsonl(tmp_path / "pairs.jsonl", rows)], where="confident")
    list(stream)
    assert (stream.rejected, stream.filtered) == (0, 2)  # a row without the column is filtered, not rejected


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.asks: list[str] = []

    def handle_starttag(self, name: str, attrs: list[tuple[str, str | None]]) -> None:
        self.asks += [key for key, _ in attrs if key in ("src", "href", "data", "xlink:href") or key.startswith("on")]
        assert name not in ("script", "link", "iframe")


@pytest.mark.parametrize("as_json", [False, True])
def test_the_command(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, as_json: bool
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    rows = clean_rows()
    rows[2]["chosen"] = " Yes.</s> <script>alert(1)</script> [bold]x"
    file = write_jsonl(tmp_path / "pairs.jsonl", rows)

    def call(*arguments: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as stop:
            main(["check", str(file), *arguments])
        assert isinstance(stop.value.code, int)
        return stop.value.code, capsys.readouterr().out

    page = tmp_path / "check.html"
    status, out = call("--model", str(tiny_model), "--html", str(page), *(["--json"] if as_json else []))
    assert status == 0
    if as_json:
        found = json.loads(out)
        assert [one["code"] for one in found["findings"]] == ["special-token-inside"]
        assert found["pairs"] == 120
    else:
        assert "special-token-inside" in out
        assert f"{file}:3" in out
        assert "[bold]x" in out
        assert "remedy: remove these tokens" in out
    text = page.read_text()
    Page().feed(text)
    assert "&lt;script&gt;" in text
    assert "url(" not in text
    assert call("--strict")[0] == 3
    write_jsonl(file, [*rows, *([{"prompt": "p", "chosen": "same", "rejected": "same"}] * 9)])
    status, out = call()
    assert status == 3
    assert "too-many-rejects" in out
    assert call("--max-reject-share", "0.1")[0] == 0


def test_what_to_do_next_has_what_was_given(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Phase one on other rows, cut at another length, is not what was checked."""
    monkeypatch.chdir(tmp_path)
    file = write_jsonl(
        tmp_path / "my [b] pairs.jsonl", [{**row, "answer": row["chosen"], "margin": 0.5} for row in clean_rows()]
    )
    (tmp_path / "other.yaml").write_text("max_prompt_length: 100\n")
    options = [
        *("--config", "other.yaml", "--model", str(tiny_model), "--columns", "chosen=answer"),
        *("--where", "margin > 0.2 or margin == null", "--max-length", "200", "--no-append-eos"),
    ]

    def then(*words: str) -> list[str]:
        with pytest.raises(SystemExit):
            main(["check", *words])
        return shlex.split(capsys.readouterr().out.rsplit("Next: ", 1)[1])

    words = then(file.name, *options)
    assert words[:3] == ["dpoeng", "precompute-ref", file.name]
    pairs = [(words[k], words[k + 1]) for k in range(3, len(words) - 1) if words[k].startswith("--")]
    assert set(pairs) >= {(options[k], options[k + 1]) for k in range(0, 10, 2)}
    assert "--no-append-eos" in words
    assert len(words) == 3 + len(options)
    assert then(file.name)[-3:] == ["dpoeng", "precompute-ref", file.name]
    with pytest.raises(SystemExit) as stop:
        main(words[1:])
    assert stop.value.code == 0


def renamed(rows: list[Row], **names: str) -> list[Row]:
    """Rows with other names of some columns."""
    return [{names.get(name, name): value for name, value in row.items()} for row in rows]


@pytest.mark.parametrize(
    ("rows", "fields", "found"),
    [
        # The user's file with a slip: the bare instruction would be trained on in silence.
        (
            renamed(pair_rows(24), prompt="promt"),
            {},
            {
                "prompt-from-instruction": "prompt taken from `instruction` in 24 pairs",
                "unused-column": "unused column `promt`: did you mean `prompt`? (--columns prompt=promt)",
            },
        ),
        (
            renamed(clean_rows(), prompt="instruction"),
            {},
            {"prompt-from-instruction": "prompt taken from `instruction` in 120 pairs"},
        ),
        (renamed(clean_rows(), prompt="instruction"), {"prompt_format": "Q: {prompt}"}, {}),
        ([{**row, "tool": "none"} for row in clean_rows()], {}, {"unused-column": "did you mean `tools`?"}),
        # named on purpose, or not close: nothing to say
        (renamed(clean_rows(), prompt="promt"), {"columns": {"prompt": "promt"}}, {}),
        (pair_rows(24), {}, {}),
        ([{**row, "prompt_id": "a", "prompts": "b"} for row in clean_rows()], {}, {}),
        (renamed(clean_rows(), chosen="answer"), {"columns": {"chosen": "answer"}}, {}),
    ],
)
def test_a_prompt_from_another_column_and_a_misspelt_column_are_reported(
    tmp_path: Path, rows: list[Row], fields: dict[str, Any], found: dict[str, str]
) -> None:
    told = {
        finding.code: finding.detail
        for finding in run(tmp_path, rows, **fields).findings
        if finding.code in ("prompt-from-instruction", "unused-column")
    }
    assert set(told) == set(found)
    for code, words in found.items():
        assert words in told[code]


def test_single_responses_with_labels(tmp_path: Path) -> None:
    """No finding compares a response with the mismatched one, which is another row's."""
    rows = [
        {
            "prompt": f"Instruction: {i}?\nResponse:",
            "completion": f" {'yes ' * (1 + i % 2)}{i}\nEND",
            "label": i % 3 > 0,
        }
        for i in range(12)
    ]
    report = run(tmp_path, rows)
    assert codes(report) == {"label-desirable": 8, "label-undesirable": 4, "few-pairs": 12}
    assert [one.part for one in report.lengths] == ["prompt", "completion", "mismatched"]
    assert report.bias is None
    assert report.shown[0].names == ("completion", "mismatched")


def test_every_kind_is_complete_and_in_the_docs() -> None:
    text = (ROOT / "docs" / "check.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| `([a-z-]+)`", text, re.MULTILINE))
    assert listed == set(KINDS)
    for code, this in KINDS.items():
        assert f"`{code}` | {this.level} |" in text, code
    tests = Path(__file__).read_text(encoding="utf-8")
    elsewhere = (Path(__file__).parent / "test_texts.py").read_text(encoding="utf-8")
    for code in KINDS:
        assert f'"{code}"' in tests + elsewhere, f"{code} is found in no test"


@pytest.mark.parametrize("model", [True, False])
def test_check_looks_at_rows_that_are_kept_whole(tmp_path: Path, tiny_model: Path, tokenizer: Any, model: bool) -> None:
    row = {"prompt": "Q:", "responses": [" a", " b", " c", " d"], "scores": [2, 5, 2, 1], "topic": "x"}
    rows = [{**row, "prompt": f"Instruction: {i}?\nResponse:", "scores": [2, 5, 3 + i % 2, 1]} for i in range(3)]
    rows[0]["scores"] = [2, 5, 2, 1]
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    report = check_pairs(PrecomputeConfig(pairs=(file,), model=str(tiny_model) if model else None))
    assert (report.pairs, report.prompts, report.bias) == (3, 3, None)
    assert [one.part for one in report.lengths] == ["prompt", "response"]
    tokens = [len(tokenizer(text).input_ids) + 1 if model else 2 for text in row["responses"]]  # and the end
    assert report.lengths[1].mean == pytest.approx(sum(tokens) / 4)
    found = {finding.code: finding for finding in report.findings}
    assert found["ranked-row"].count == 3
    assert found["equal-scores"].examples == [(f"{file}:1", "2, 5, 2, 1")]
    assert report.shown[0].names == ("response 1", "response 2")
