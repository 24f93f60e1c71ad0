"""Finds problems in pairs from their texts: template markers, boundaries, endings, damage, categories."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import xxhash

from dpoeng.cache.words import counted
from dpoeng.engine.checks.findings import Tally, snippet
from dpoeng.engine.data.chat import END_TEXTS
from dpoeng.engine.data.in_memory import place
from dpoeng.engine.data.messages import Message
from dpoeng.engine.data.shapes import PreferencePair, Turns, holds_human_turn
from dpoeng.engine.data.where import truth

BOS_TEXTS = ("<s>", "<|begin_of_text|>", "<bos>", "<|startoftext|>")
SYSTEM_TEXTS = ("<|im_start|>system", "<|start_header_id|>system", "<<SYS>>", "<|system|>")
# Headers of turns. Beginning and end tokens have separate findings.
TEMPLATE_TEXTS = (
    *("<|im_start|>", "<|start_header_id|>", "[INST]", "[/INST]", "<<SYS>>", "<start_of_turn>"),
    *("<|user|>", "<|assistant|>", "<|system|>"),
)

# Replacement and control characters; UTF-8 that was read as Windows-1252 or Latin-1 ("Ã©", "â€™").
_DAMAGE = re.compile("\ufffd|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|Ã[\x80-\xbf©¨¤¶¼«]|â€[™œ\x9d“”˜¦]")
_TAIL = 24  # characters: a longer ending is a sentence
_TAILS_KEPT = 5_000
_SCORE_WORDS = ("score", "rating", "reward", "grade", "elo", "quality", "points")
_WINNERS = ("winner", "preferred", "preference", "better", "label", "choice")
_TIES = frozenset(("tie", "tied", "both", "neither", "equal", "same", "draw", "tie (bothbad)", "none"))
_REJECTED = frozenset(("rejected", "reject"))
_MARGINS = ("margin", "score_margin", "score_diff", "preference_strength")
_CATEGORY_VALUES = 30
_TYPE_EXAMPLES = 10


@dataclass(slots=True)
class Category:
    """Pairs with one value in one column. `chosen_longer` counts pairs with the longer chosen response."""

    column: str
    value: str
    count: int = 0
    chosen_longer: int = 0

    def row(self, of: int) -> tuple[str, str, str, str, str]:
        """The cells of a table row."""
        longer = f"{self.chosen_longer / self.count:.0%}"
        return self.column, self.value, f"{self.count:,}", f"{self.count / max(of, 1):.1%}", longer


@dataclass(slots=True)
class _Values:
    """Values of one type in one column: their number, and (file:line, value) of the first."""

    count: int = 0
    first: list[tuple[str, str]] = field(default_factory=list)


class TextCheck:
    """Looks at each pair once, and at the whole data set at the end."""

    def __init__(self, tally: Tally, known_markers: frozenset[str] | None) -> None:
        """`known_markers`: the tokenizer's special tokens, or None without a tokenizer."""
        self._tally = tally
        self._known = known_markers
        self._pairs = 0
        self._of_pairs = True
        self._tails: tuple[Counter[str], Counter[str]] = (Counter(), Counter())
        self._responses: dict[int, int] = {}
        self._often: dict[int, tuple[str, str]] = {}
        self._categories: dict[str, dict[str, Category] | None] = {}
        self._types: dict[str, dict[str, _Values]] = {}

    def add(self, pair: PreferencePair, longer: int) -> None:
        """Adds a pair; `longer` is 1 if chosen is the longer response, -1 if rejected is, else 0."""
        self._pairs += 1
        for code, example in _faults(pair, self._known):
            self._tally.add(code, pair, example)
        self._of_pairs = pair.kind == "pairs"
        for number, side in enumerate(pair.responses.values()):
            written = content(side)
            tails = self._tails[min(number, 1)]
            tails[tail(written)] += 1
            if len(tails) > 2 * _TAILS_KEPT:
                for word, _ in tails.most_common()[_TAILS_KEPT:]:
                    del tails[word]
            key = xxhash.xxh3_64_intdigest(written.encode("utf-8", "surrogatepass"))
            self._responses[key] = self._responses.get(key, 0) + 1
            if self._responses[key] == 2:
                self._often[key] = (place(pair.source_file, pair.source_row), snippet(written))
        self._categorise(pair, longer)
        self._note_types(pair)

    def finish(self) -> list[Category]:
        """Adds findings about the whole data set; returns the table of categories."""
        self._endings()
        self._mixed_types()
        often = [(count, key) for key, count in self._responses.items() if count >= max(5, self._pairs / 20)]
        for count, key in sorted(often, reverse=True)[:20]:
            where, snippet_text = self._often[key]
            self._tally.count("one-response-often", count)
            self._tally.example("one-response-often", where, f"{count:,} times {snippet_text}")
        categories = []
        for column, values in self._categories.items():
            total = sum(one.count for one in (values or {}).values())
            if values is None or total < 0.2 * self._pairs:
                continue
            if len(values) > max(10, total / 2):  # nearly every row has its own value: short texts, not categories
                continue
            categories += sorted(values.values(), key=lambda one: -one.count)
            without = self._pairs - total
            if 0 < without <= self._pairs / 2:
                self._tally.count("no-category", without)
                self._tally.example("no-category", f"column {column}", counted(without, "pair"))
            for one in values.values():
                if one.count < 5 <= self._pairs / 20:
                    self._tally.count("rare-category", one.count)
                    self._tally.example(
                        "rare-category", f"column {column}", f"{one.value}: {counted(one.count, 'pair')}"
                    )
        return categories

    def _categorise(self, pair: PreferencePair, longer: int) -> None:
        for column, value in pair.extra.items():
            values = self._categories.setdefault(column, {})
            if values is None or value is None:
                continue
            if not isinstance(value, str | bool) or len(str(value)) > 60:
                self._categories[column] = None
                continue
            name = str(value).lower() if isinstance(value, bool) else value
            category = values.setdefault(name, Category(column, name))
            category.count += 1
            category.chosen_longer += longer > 0
            if len(values) > _CATEGORY_VALUES:
                self._categories[column] = None

    def _note_types(self, pair: PreferencePair) -> None:
        for column, value in pair.extra.items():
            kind = "yes/no" if isinstance(value, bool) else "text" if isinstance(value, str) else "a number"
            if isinstance(value, str | int | float):
                values = self._types.setdefault(column, {}).setdefault(kind, _Values())
                values.count += 1
                if len(values.first) < _TYPE_EXAMPLES:
                    values.first.append((place(pair.source_file, pair.source_row), snippet(str(value))))

    def _mixed_types(self) -> None:
        for column, kinds in self._types.items():
            most, *others = sorted(kinds, key=lambda kind: -kinds[kind].count)
            for kind in others:
                self._tally.count("mixed-types", kinds[kind].count)
                for where, example in kinds[kind].first:
                    remark = f"{column} is {kind}, {example}; in {counted(kinds[most].count, 'pair')} it is {most}"
                    self._tally.example("mixed-types", where, remark)

    def _endings(self) -> None:
        """Looks for words that end most responses of one side, such as END: on both sides, and in all responses?"""
        if self._pairs < 10 or not self._of_pairs:
            return
        candidates = {word for tails in self._tails for word, count in tails.most_common(5) if count >= self._pairs / 2}
        for word in sorted(candidates - {""}):
            chosen, rejected = (tails[word] for tails in self._tails)
            shares = f"{word!r} ends {chosen / self._pairs:.0%} of chosen and {rejected / self._pairs:.0%} of rejected"
            if abs(chosen - rejected) >= 0.1 * self._pairs:
                self._tally.count("end-marker-one-sided", abs(chosen - rejected), shares)
            elif min(chosen, rejected) < self._pairs and min(chosen, rejected) >= 0.8 * self._pairs:
                self._tally.count("end-marker-missing", 2 * self._pairs - chosen - rejected, shares)


def content(turns: Turns) -> str:
    """The text of one side, without roles."""
    return turns if isinstance(turns, str) else "\n".join(message["content"] for message in turns)


def tail(written: str) -> str:
    """The marker at a response's end, if there is one: an end token, or a short last line of one word."""
    last = written.rstrip()
    for end in END_TEXTS:
        if last.endswith(end):
            return end
    line = last.rsplit("\n", 1)[-1].strip() if "\n" in last else ""
    return line if 0 < len(line) <= _TAIL and " " not in line else ""


def _faults(pair: PreferencePair, known: frozenset[str] | None) -> Iterator[tuple[str, str]]:
    """Every finding about one pair: (code, example)."""
    sides = {"prompt": pair.prompt, **pair.responses}
    if isinstance(pair.prompt, str):
        texts = {name: side for name, side in sides.items() if isinstance(side, str)}
        yield from _text_faults(texts, known)
    else:
        messages = {name: side for name, side in sides.items() if not isinstance(side, str)}
        yield from _message_faults(messages)
        texts = {name: content(side) for name, side in messages.items()}
    written_responses = [texts[name] for name in pair.responses]
    if len(set(map(_folded, written_responses))) < len(written_responses):
        yield "nearly-same", snippet(written_responses[0])
    if isinstance(pair.prompt, str) and holds_human_turn(pair):
        yield "later-human-turn", snippet(written_responses[0])
    for name, written in texts.items():
        if hit := _DAMAGE.search(written):
            yield "damaged-text", f"{name}: {snippet(written[max(hit.start() - 30, 0) : hit.end() + 30])}"
            break
    yield from _token_texts(texts)
    yield from _scores(pair.extra)


def _text_faults(texts: Mapping[str, str], known: frozenset[str] | None) -> Iterator[tuple[str, str]]:
    prompt, responses = texts["prompt"], {name: written for name, written in texts.items() if name != "prompt"}
    first = next(iter(responses.values()))
    if prompt.strip() and all(side.lstrip().startswith(prompt.strip()) for side in responses.values()):
        yield "prompt-begins-responses", f"{snippet(prompt)} before {snippet(first)}"
    if any(prompt.count(marker) > 1 for marker in SYSTEM_TEXTS):
        yield "system-twice", snippet(prompt)
    if known is not None:
        foreign = [marker for marker in TEMPLATE_TEXTS if marker in prompt and marker not in known]
        if foreign and not (foreign == ["[INST]", "[/INST]"] or known.intersection(("[INST]", "</s>"))):
            yield "foreign-template", f"{', '.join(foreign)} in {snippet(prompt)}"
    if len({written[:1].isspace() for written in responses.values()}) > 1:
        yield "boundary-one-sided", ", ".join(f"{name} {snippet(written[:30])}" for name, written in responses.items())
    elif prompt and _runs_together(prompt[-1], first[:1]):
        yield "joined-words", snippet(prompt[-30:] + first[:30])


def _message_faults(sides: Mapping[str, list[Message]]) -> Iterator[tuple[str, str]]:
    systems = [k for k, message in enumerate(sides["prompt"]) if message["role"] == "system"]
    if len(systems) > 1:
        yield "system-twice", f"messages {', '.join(str(k + 1) for k in systems)} are system prompts"
    for name, messages in sides.items():
        for message in messages:
            markers = [marker for marker in TEMPLATE_TEXTS if marker in message["content"]]
            if markers:
                yield "template-in-messages", f"{name}: {', '.join(markers)} in {snippet(message['content'])}"
                return


def _token_texts(texts: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Beginning and end tokens that are written out in the text."""
    whole = texts["prompt"]
    if whole.startswith(BOS_TEXTS):
        yield "bos-in-text", snippet(whole)
    inner = {"prompt": whole[max((len(bos) for bos in BOS_TEXTS if whole.startswith(bos)), default=0) :]}
    ended = False
    responses = [name for name in texts if name != "prompt"]
    for name in responses:
        written = texts[name].rstrip()
        stripped = written
        while end := next((end for end in END_TEXTS if stripped.endswith(end)), None):
            stripped = stripped.removesuffix(end).rstrip()
        ended = ended or stripped != written
        inner[name] = stripped
    if ended:
        yield "end-token-in-text", snippet(texts[responses[0]], end=True)
    # In a prompt given as one text, end tokens close its turns; in a response they cut it.
    for name, written in inner.items():
        marks = BOS_TEXTS[1:] if name == "prompt" else (*BOS_TEXTS[1:], *END_TEXTS)
        if hit := next((mark for mark in marks if mark in written), None):
            yield "special-token-inside", f"{hit} in {name}: {snippet(written)}"
            return


def _scores(extra: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    confident = extra.get("confident")
    if confident is not None and not truth(confident):  # as --where reads it
        yield "not-confident", f"confident: {json.dumps(confident, default=str)}"
    for name, value in extra.items():
        if name.casefold() in _WINNERS and isinstance(value, str):
            answer = value.strip().casefold()
            if answer in _TIES:
                yield "tie", f"{name}: {value}"
                return
            if answer in _REJECTED:
                yield "score-against-preference", f"{name}: {value}"
                return
    for chosen, rejected in _score_columns(extra):
        better, worse = _number(extra[chosen]), _number(extra[rejected])
        if better is not None and worse is not None and better <= worse:
            code = "tie" if better == worse else "score-against-preference"
            yield code, f"{chosen} {extra[chosen]}, {rejected} {extra[rejected]}"
            return
    for name in _MARGINS:
        margin = _number(extra.get(name))
        if margin is not None and margin <= 0:
            yield "score-against-preference" if margin < 0 else "tie", f"{name} {extra[name]}"
            return


def _score_columns(extra: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Score columns: they differ only in containing chosen or rejected, and their names suggest a score."""
    for name in extra:
        folded = name.casefold()
        if "chosen" in folded and any(word in folded for word in _SCORE_WORDS):
            at = folded.index("chosen")
            other = next((o for o in extra if o.casefold() == folded[:at] + "rejected" + folded[at + 6 :]), None)
            if other is not None:
                yield name, other


def _number(value: Any) -> float | None:
    """The value as a number, even if it is written as text."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    return float(value) if _is_number(value) and math.isfinite(value) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _runs_together(last: str, first: str) -> bool:
    """Whether two characters need a space between them; scripts without spaces are left alone."""
    return last.isascii() and first.isascii() and first.isalnum() and (last.isalnum() or last in ".,:;!?")


def _folded(written: str) -> str:
    return " ".join(written.split()).casefold()
