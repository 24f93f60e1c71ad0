"""Tokenizers and templates from strangers: what never ends or grows without bound is refused, ordinary ones read."""

from __future__ import annotations

import json
import resource
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from dpoeng.cache.errors import UserError
from dpoeng.engine.data import rendering
from dpoeng.engine.data.rendering import within_limits
from dpoeng.engine.data.shapes import PreferencePair
from dpoeng.engine.data.tokenization import tokenize_pairs
from dpoeng.engine.models.foreign import tokenizers as foreign
from dpoeng.engine.models.foreign.tokenizers import check_tokenizer, is_plain

# How published tokenizers split text: GPT-2, Llama 3, Qwen2, o200k, DeepSeek-V3, Falcon, StarCoder, CLIP.
PUBLISHED = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"[0-9][0-9][0-9]",
    r"[^\S\r\n]|\s+|<\|startoftext\|>|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
    r"[一-龥぀-ゟ゠-ヿ]+",
)


def tokenizer_file(folder: Path, **parts: Any) -> Path:
    vocabulary = {"<unk>": 0, "a": 1}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"}
    empty = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
    fields = {"version": "1.0", **empty, "added_tokens": [], "model": model, **parts}
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(fields), encoding="utf-8")
    return path


def split_by(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def replace(what: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": what, "content": content}


def test_published_patterns_are_only_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreign, "_ends", lambda file: pytest.fail("tried in a process"))
    assert [pattern for pattern in PUBLISHED if not is_plain(pattern)] == []
    steps = [{"type": "Prepend", "prepend": "▁"}, replace({"String": " "}, "▁"), {"type": "NFC"}]
    t5 = [{"type": "Precompiled", "precompiled_charsmap": ""}, replace({"Regex": " {2,}"}, "▁")]
    for normalizers in (steps, t5, [replace({"Regex": r"\s+"}, " ")] * 20):
        check_tokenizer(
            tokenizer_file(
                tmp_path,
                normalizer={"type": "Sequence", "normalizers": normalizers},
                pre_tokenizer={"type": "Sequence", "pretokenizers": [*map(split_by, PUBLISHED), {"type": "ByteLevel"}]},
                decoder={"type": "Sequence", "decoders": [replace({"String": "▁"}, " "), {"type": "Fuse"}]},
            )
        )
    check_tokenizer(tmp_path / "none.json")


@pytest.mark.parametrize(
    "normalizers",
    [
        [replace({"String": "a"}, "aa")] * 12,
        [replace({"Regex": "a|b"}, "ab")] * 12,
        [replace({"Regex": ""}, "x")] * 12,
        [replace({"String": "a"}, "a" * 5000)],
        [{"type": "ByteLevel"}] * 12,
        [{"type": "Lowercase"}] * 101,
    ],
)
@pytest.mark.parametrize("part", ["normalizer", "decoder"])
def test_texts_that_grow_without_bound_are_refused(tmp_path: Path, normalizers: list[Any], part: str) -> None:
    inner = {"type": "Sequence", part + "s": normalizers[1:]}
    file = tokenizer_file(tmp_path, **{part: {"type": "Sequence", part + "s": [normalizers[0], inner]}})
    with pytest.raises(UserError) as caught:
        check_tokenizer(file)
    assert (caught.value.code, caught.value.where) == ("tokenizer-claims", f"{file}, {part}")


def test_a_pattern_that_never_ends_is_stopped_in_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The library gives up after ten million ways at one place; it may do so at every place of a text.
    file = tokenizer_file(tmp_path, pre_tokenizer=split_by(r"(a+)+\1b"))
    with pytest.raises(UserError, match="patterns that end on any text"):
        check_tokenizer(file)
    monkeypatch.setattr(foreign, "_TRIAL", "import time; time.sleep(60)")
    monkeypatch.setattr(foreign, "TRIAL_SECONDS", 0.2)
    with pytest.raises(UserError, match="patterns that end on any text"):
        check_tokenizer(file)


def test_a_doubtful_pattern_that_ends_is_taken(tmp_path: Path) -> None:
    for pattern in (
        r"(?:\r?\n)+|\s+",
        r" ?[^(\s|[.,!?…。，、।۔،])]+",
    ):  # the second is Bloom's, which Python cannot read
        assert not is_plain(pattern)
        check_tokenizer(tokenizer_file(tmp_path, pre_tokenizer=split_by(pattern)))


def test_a_pattern_that_fails_at_a_text_is_told(tmp_path: Path) -> None:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer_file(tmp_path, pre_tokenizer=split_by(r"(a+)+\1b"))), eos_token="</s>"
    )
    pair = PreferencePair("a" * 40 + "!", "x", "y", source_file="p.jsonl", source_row=3)
    with pytest.raises(UserError, match="limit-in-match"):
        tokenize_pairs([pair], tokenizer, append_eos=False)


def test_a_file_larger_than_any_is_not_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreign, "MAX_FILE_BYTES", 10)
    with pytest.raises(UserError, match="size"):
        check_tokenizer(tokenizer_file(tmp_path))


def without_end() -> None:
    while True:
        try:
            sum(range(1000))
        except Exception:
            pytest.fail("an exception that a template could catch")


def test_work_within_the_limits_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGVTALRM), resource.getrlimit(resource.RLIMIT_AS)
    with within_limits("a pair"):
        assert resource.getrlimit(resource.RLIMIT_AS) != before[1]
    with monkeypatch.context() as patch:
        patch.setattr(rendering, "MAX_SECONDS", 0.05)
        with pytest.raises(UserError) as caught, within_limits("pairs.jsonl:7"):
            without_end()
    assert (caught.value.code, caught.value.where) == ("tokenizer-template-limits", "pairs.jsonl:7")
    with pytest.raises(UserError, match="more memory"), within_limits("a pair"):
        bytearray(4 * rendering.MAX_BYTES)  # other tests may give back gigabytes of mapped files meanwhile
    assert (signal.getsignal(signal.SIGVTALRM), resource.getrlimit(resource.RLIMIT_AS)) == before
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)


def in_thread(work: Callable[[], object]) -> object:
    """What `work` returns or raises in a thread of its own."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


def test_work_in_another_thread_is_within_limits_too(monkeypatch: pytest.MonkeyPatch) -> None:
    before = resource.getrlimit(resource.RLIMIT_AS)
    monkeypatch.setattr(rendering, "MAX_SECONDS", 0.05)

    def work() -> None:
        with within_limits("pairs.jsonl:7"):
            without_end()

    for _ in range(2):  # the watch goes on
        with pytest.raises(UserError, match="does not end") as caught:
            in_thread(work)
        assert (caught.value.code, caught.value.where) == ("tokenizer-template-limits", "pairs.jsonl:7")

    def waits_then_works() -> int:
        with within_limits("a pair"):
            time.sleep(0.2)  # takes no CPU
        deadline = time.monotonic() + 0.3
        while time.monotonic() < deadline:  # outside of the block nothing ends it
            pass
        return 7

    assert in_thread(waits_then_works) == 7
    assert resource.getrlimit(resource.RLIMIT_AS) == before


def test_two_threads_leave_no_limit_behind() -> None:
    before = resource.getrlimit(resource.RLIMIT_AS)
    inside = threading.Barrier(2, timeout=5)

    def work(seconds: float) -> None:
        inside.wait()
        for _ in range(20):
            with within_limits("a pair"):
                time.sleep(seconds)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, (0.001, 0.002)))
    assert resource.getrlimit(resource.RLIMIT_AS) == before


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'x' * 9999999999 }}",
        "{% set ns = namespace(s='ab') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}",
        "{{ '%09999999999d' % 1 }}",
        "{{ 'x' * 90000000 }}",
    ],
)
def test_templates_that_run_away_are_stopped(template: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "MAX_SECONDS", 0.3)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_file(tmp_path)), eos_token="</s>")
    tokenizer.chat_template = template
    sides = [
        [{"role": role, "content": text}] for role, text in (("user", "q"), ("assistant", "a"), ("assistant", "b"))
    ]
    pair = PreferencePair(*sides, source_file="p.jsonl", source_row=3)
    with pytest.raises(UserError) as caught:
        tokenize_pairs([pair], tokenizer)
    assert (caught.value.code, caught.value.where) == ("tokenizer-template-limits", "p.jsonl:3")
    if "range(99999)" in template:
        with pytest.raises(UserError, match="does not end"):
            in_thread(lambda: tokenize_pairs([pair], tokenizer))
