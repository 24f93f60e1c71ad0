"""`dpoeng check`: finds everything about pairs that is visible without a GPU, with a remedy for each finding.

Rows are streamed: memory grows by hashes and lengths, not by texts. Phase one's own code decides what is a row, what is
rejected, where a response begins and what is truncated.
"""

from __future__ import annotations

import itertools
import math
import time
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from dpoeng.cache.analytics import histogram
from dpoeng.cache.errors import UserError
from dpoeng.cache.words import counted
from dpoeng.engine.checks.findings import Finding, Level, Tally, snippet
from dpoeng.engine.checks.limits import ModelLimits, read_limits
from dpoeng.engine.checks.shown import ShownPair, show_texts, show_tokens
from dpoeng.engine.checks.texts import Category, TextCheck, content
from dpoeng.engine.config.fields import PrecomputeConfig
from dpoeng.engine.data.in_memory import RowsInMemory, place
from dpoeng.engine.data.pairs import PairStream, ReadPair, content_key, misspelt_remark
from dpoeng.engine.data.rejects import Reject
from dpoeng.engine.data.rendering import within_limits
from dpoeng.engine.data.shapes import PreferencePair, Turns, holds_human_turn
from dpoeng.engine.data.tokenization import TokenizedPair, tokenize_pairs

CHUNK_PAIRS = 512

SHOWN_PAIRS = 3
"""Number of pairs whose texts are shown in full."""
PARTS = ("prompt", "chosen", "rejected")
PART_NAMES = {
    "pairs": {part: part for part in PARTS},
    "unpaired": {"prompt": "prompt", "chosen": "completion", "rejected": "mismatched"},
    "ranked": {"prompt": "prompt", "chosen": "response"},
}
"""Kind of rows -> part (one of PARTS) -> its name for such rows."""


@dataclass(frozen=True, slots=True)
class LengthStats:
    """Lengths of one part: `quantiles` at 0, 5, 50, 95 and 100 %; a histogram with outliers in its last bar."""

    part: str
    mean: float
    quantiles: tuple[float, ...]
    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LengthBias:
    """How often chosen is the longer response.

    Attributes:
        longer, shorter, equal: numbers of pairs.
        mean_difference: chosen - rejected.
        p_value: of a two-sided sign test: the probability of a split at least this uneven by chance.
    """

    longer: int
    shorter: int
    equal: int
    mean_difference: float
    p_value: float

    @property
    def share_longer(self) -> float:
        """Share of longer chosen responses among pairs of unequal length."""
        return self.longer / max(self.longer + self.shorter, 1)


@dataclass(slots=True)
class CheckReport:
    """Result of a check. Lengths are in `unit`: tokens after truncation if a model was named, else characters.

    `pairs` are rows that can be used, of whatever kind.
    `tokenizer` is the source of tokenizer and chat template; `shown` are the texts of the first pairs.
    """

    files: list[str]
    eval_files: list[str]
    model: str | None
    unit: str
    tokenizer: str | None = None
    rows: int = 0
    pairs: int = 0
    rejected: int = 0
    filtered: int = 0
    prompts: int = 0
    eval_pairs: int = 0
    max_length_needed: int | None = None
    lengths: list[LengthStats] = field(default_factory=list)
    bias: LengthBias | None = None
    categories: list[Category] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    shown: list[ShownPair] = field(default_factory=list)
    seconds: float = 0.0

    def worst(self) -> Level | None:
        """The most severe level among the findings."""
        return self.findings[0].level if self.findings else None

    def count(self, level: Level) -> int:
        """Number of kinds of findings at a level."""
        return sum(finding.level == level for finding in self.findings)


def check_pairs(
    config: PrecomputeConfig, eval_files: Sequence[Path | RowsInMemory] = (), *, examples: int = 3
) -> CheckReport:
    """Reads all pairs and finds everything that could spoil a run.

    Args:
        config: `pairs`; the fields for shapes, filter and truncation; `model`, `adapter` and `tokenizer` for the
            tokenizer.
        eval_files: evaluation pairs, checked for leakage.
        examples: how many rows to show for each finding.

    Raises:
        UserError: no file, a file that cannot be read, a missing column, no usable tokenizer.
    """
    began = time.perf_counter()
    if not config.pairs:
        raise UserError(
            "no pairs given",
            code="config-missing",
            where="pairs",
            expected="at least one file, e.g. dpoeng check pairs.jsonl",
            remedy="name the file, or write `pairs: [pairs.jsonl]` into dpoeng.yaml",
        )
    tally = Tally(examples)
    text = _Tokenizer.of(config)
    evaluation = _EvalPairs(_stream(config, eval_files)) if eval_files else None
    run = _Run(config, text, tally, evaluation, TextCheck(tally, text.markers()))
    stream = _stream(config, config.pairs)
    for row in stream:
        if isinstance(row, Reject):
            tally.add(row.reason, row, row.detail)
        else:
            run.add(row)
    run.finish_chunk()
    categories = run.texts.finish()
    run.whole(stream.rejected)
    _count_origins(stream, text, run.rows, tally)
    if not run.lengths["prompt"] and not stream.rejected and not run.rejected:
        raise _nothing_left(stream, config.where)
    report = CheckReport(
        files=list(stream.files),
        eval_files=[str(path) for path in eval_files],
        model=config.model,
        unit="tokens" if text.tokenizer is not None else "characters",
        tokenizer=text.where,
        rows=run.rows + stream.rejected + stream.filtered,
        pairs=len(run.lengths["prompt"]),
        rejected=stream.rejected + run.rejected,
        filtered=stream.filtered,
        prompts=len(run.prompts),
        eval_pairs=evaluation.pairs if evaluation is not None else 0,
        max_length_needed=run.needed or None,
        lengths=run.length_stats(),
        bias=run.bias() if run.lengths["prompt"] and stream.kind == "pairs" else None,
        categories=categories,
        findings=tally.findings(run.rows + stream.rejected),
        shown=run.shown,
    )
    report.seconds = time.perf_counter() - began
    return report


def _nothing_left(stream: PairStream, where: str | None) -> UserError:
    return UserError(
        "no pair is left",
        code="data-empty",
        where=", ".join(stream.files),
        expected="at least one row that passes the filter",
        found=f"{counted(stream.filtered, 'row')} left out by the filter {where!r}",
        remedy="use a wider --where",
        exit_status=3,
    )


def sign_test(one: int, other: int) -> float:
    """Two-sided p-value of the split under a fair coin: exact up to 1,000 throws, then the normal approximation."""
    throws, least = one + other, min(one, other)
    if throws <= 1000:
        return min(1.0, float(2 * sum(math.comb(throws, k) for k in range(least + 1)) / 2**throws))
    z = (throws / 2 - least - 0.5) / math.sqrt(throws / 4)
    return math.erfc(z / math.sqrt(2))


def _count_origins(stream: PairStream, text: _Tokenizer, rows: int, tally: Tally) -> None:
    """Adds findings about the sources of prompts and tokenizer."""
    if text.remark:
        tally.count("other-tokenizer", rows, text.remark)
    prompts = stream.prompts
    for name, count in prompts.columns.items():
        tally.count("prompt-from-instruction", count, f"prompt taken from `{name}` in {counted(count, 'pair')}")
    if prompts.example is not None:
        where, end = prompts.example
        tally.count("prompt-from-transcript", prompts.transcripts)
        tally.example("prompt-from-transcript", where, f"the prompt ends {end}")
    if prompts.repeated:
        tally.count("prompt-repeated", prompts.repeated)
    if prompts.conversations:
        tally.count("conversation-made", prompts.conversations)
    if stream.misspelt:
        tally.count("unused-column", rows, misspelt_remark(stream.misspelt))


@dataclass(frozen=True, slots=True)
class _Tokenizer:
    """The tokenizer that phase one will use, its source, and the model's limits."""

    tokenizer: Any = None
    where: str | None = None
    remark: str = ""
    limits: ModelLimits = field(default_factory=lambda: ModelLimits(None, None))

    def markers(self) -> frozenset[str] | None:
        """The special tokens; None without a tokenizer."""
        return frozenset(map(str, self.tokenizer.get_added_vocab())) if self.tokenizer is not None else None

    @staticmethod
    def of(config: PrecomputeConfig) -> _Tokenizer:
        """The tokenizer for these fields; none if they name neither a model nor a tokenizer.

        Raises:
            UserError: it cannot be loaded.
        """
        from dpoeng.engine.models.sources import find_tokenizer
        from dpoeng.engine.models.tokenizer import choose_tokenizer, load_chosen, remark_on

        name = config.model or config.tokenizer or config.adapter
        if name is None:
            return _Tokenizer()
        source = find_tokenizer(name)
        choice = choose_tokenizer(source, config.adapter, config.tokenizer)
        tokenizer = load_chosen(choice)
        if config.model is None:
            return _Tokenizer(tokenizer, str(choice.source.folder))
        adapter = find_tokenizer(config.adapter).folder if config.adapter else None
        limits = ModelLimits(None, None) if source.gguf else read_limits(source.folder, adapter)
        return _Tokenizer(tokenizer, str(choice.template or choice.source.folder), remark_on(choice, tokenizer), limits)


class _EvalPairs:
    """Hashes of the evaluation pairs and prompts, with the first row of each."""

    def __init__(self, stream: PairStream) -> None:
        self.pairs = 0
        self._pairs: dict[bytes, str] = {}
        self._prompts: dict[int, str] = {}
        for row in stream:
            if isinstance(row, Reject):
                continue
            self.pairs += 1
            where = place(row.pair.source_file, row.pair.source_row)
            for key in (content_key(row.pair), content_key(row.pair, swapped=True)):
                self._pairs.setdefault(key, where)
            self._prompts.setdefault(prompt_key(row.pair.prompt), where)

    def look(self, pair: PreferencePair, tally: Tally) -> None:
        """Adds findings about a training pair."""
        if (where := self._pairs.get(content_key(pair))) is not None:
            tally.add("eval-same-pair", pair, f"also {where}")
        elif (where := self._prompts.get(prompt_key(pair.prompt))) is not None:
            tally.add("eval-same-prompt", pair, f"also {where}")


class _Run:
    """The pass over the training pairs, tokenised in chunks."""

    def __init__(
        self, config: PrecomputeConfig, text: _Tokenizer, tally: Tally, evaluation: _EvalPairs | None, texts: TextCheck
    ) -> None:
        self.config, self.tokenizer, self.limits = config, text.tokenizer, text.limits
        self.tally, self.evaluation, self.texts = tally, evaluation, texts
        tokenizer = text.tokenizer
        self.shown: list[ShownPair] = []
        self.rows = self.rejected = self.needed = 0
        self.kind = "pairs"
        self.prompts: set[int] = set()
        self.lengths = {part: array("q") for part in PARTS}
        self._chunk: list[PreferencePair] = []
        self._adds_system = tokenizer is not None and _adds_system_prompt(tokenizer)

    @property
    def _names(self) -> tuple[str, str]:
        if self.kind == "ranked":
            return "response 1", "response 2"
        names = PART_NAMES[self.kind]
        return names["chosen"], names["rejected"]

    def add(self, row: ReadPair) -> None:
        self.rows += 1
        pair = row.pair
        self.kind = pair.kind
        if pair.kind == "unpaired":
            self.tally.count("label-desirable" if pair.scores[0] else "label-undesirable", 1)
        if pair.kind == "ranked":
            self.tally.count("ranked-row", 1)
            if len(set(pair.scores)) < len(pair.scores):
                self.tally.add("equal-scores", pair, ", ".join(f"{score:g}" for score in pair.scores))
        self.prompts.add(prompt_key(pair.prompt))
        for code, repeat in (("duplicate", row.duplicate), ("contradiction", row.contradiction)):
            if repeat is not None:
                self.tally.add(code, pair, f"as {place(repeat.first_file, repeat.first_row)}")
        if self.evaluation is not None:
            self.evaluation.look(pair, self.tally)
        if self.tokenizer is None:
            if len(self.shown) < SHOWN_PAIRS and (texts := show_texts(pair, self._names)) is not None:
                self.shown.append(texts)
            self._measure(pair, len(content(pair.prompt)), [len(content(side)) for side in pair.sides])
        else:
            self._chunk.append(pair)
            if len(self._chunk) == CHUNK_PAIRS:
                self.finish_chunk()

    def finish_chunk(self) -> None:
        """Tokenises the waiting pairs."""
        if not self._chunk:
            return
        config = self.config
        data = tokenize_pairs(
            self._chunk,
            self.tokenizer,
            max_length=config.max_length,
            max_prompt_length=config.max_prompt_length,
            truncation_mode=config.truncation_mode,
            append_eos=config.append_eos,
            train_on=config.train_on,
        )
        self.rejected += len(data.rejects)
        for reject in data.rejects:
            self.tally.add(reject.reason, reject, reject.detail)
        # A ranked row gives several pairs, distinguished by their number in the row.
        pairs = {(pair.source_file, pair.source_row, pair.extra.get("pair_of_row")): pair for pair in self._chunk}
        rows = itertools.groupby(
            data.pairs, lambda one: (one.source_file, one.source_row, one.extra.get("pair_of_row"))
        )
        for key, of_row in rows:
            pair, row = pairs[key], list(of_row)
            # Report a finding once per row, not once per pair of its responses.
            faults = {code: example for tokens in row[::-1] for code, example in self._token_faults(pair, tokens)}
            for code, example in faults.items():
                self.tally.add(code, pair, example)
            self.needed = max(self.needed, row[0].needed)
            if len(self.shown) < SHOWN_PAIRS:
                where = place(pair.source_file, pair.source_row)
                self.shown.append(show_tokens(where, row[0].ids, self.tokenizer, self._names))
            sides = [len(side) for one in row for side in (one.ids.chosen_ids, one.ids.rejected_ids)]
            self._measure(pair, len(row[0].ids.prompt_ids), sides[: len(pair.sides)])
        self._chunk = []

    def _measure(self, pair: PreferencePair, prompt: int, sides: Sequence[int]) -> None:
        self.lengths["prompt"].append(prompt)
        for number, length in enumerate(sides):
            self.lengths["chosen" if number == 0 or self.kind == "ranked" else "rejected"].append(length)
        chosen, rejected = sides[:2]
        self.texts.add(pair, ((chosen > rejected) - (chosen < rejected)) if self.kind == "pairs" else 0)

    def _token_faults(self, pair: PreferencePair, tokens: TokenizedPair) -> Iterator[tuple[str, str]]:
        ids, tokenizer = tokens.ids, self.tokenizer
        if tokens.truncated:
            yield "truncated", f"{tokens.needed:,} tokens"
        if tokens.merged:
            start = content(pair.prompt) if isinstance(pair.prompt, str) else ""
            yield "boundary-merged", f"the prompt ends {snippet(start[-20:])}" if start else "inside the template"
        unknown = tokenizer.unk_token_id
        parts = {"prompt": ids.prompt_ids, "chosen": ids.chosen_ids, "rejected": ids.rejected_ids}
        if unknown is not None and (where := next((name for name in parts if (parts[name] == unknown).any()), None)):
            side = pair.prompt if where == "prompt" else pair.chosen if where == "chosen" else pair.rejected
            yield "unknown-token", f"in {where}: {snippet(content(side))}"
        yield from self._limit_faults(tokens)
        if ids.chosen_gaps or ids.rejected_gaps:
            yield "others-in-response", snippet(content(pair.chosen))
        if tokens.swallowed:
            yield "space-swallowed", snippet(content(pair.chosen))
        if tokens.thoughts:
            yield "thought-dropped", f"{counted(tokens.thoughts, 'thought')} of {snippet(content(pair.prompt))}"
        is_text = isinstance(pair.prompt, str)
        if not is_text and self.config.train_on == "all" and holds_human_turn(pair):
            yield "later-human-turn", snippet(content(pair.chosen))
        if not tokens.truncated:
            names = ("a response",) * 2 if pair.kind == "ranked" else pair.responses
            sides = zip(names, (ids.chosen_ids, ids.rejected_ids), strict=False)
            for name, part in sides:
                if not _ends(part.tolist(), tokenizer, is_text and self.config.append_eos):
                    yield "end-token-missing", f"{name} ends {snippet(str(tokenizer.decode(part[-8:].tolist())))}"
                    break
        if self._adds_system and not is_text and all(message["role"] != "system" for message in _messages(pair.prompt)):
            yield "default-system-prompt", snippet(content(pair.prompt))

    def _limit_faults(self, tokens: TokenizedPair) -> Iterator[tuple[str, str]]:
        ids = tokens.ids
        highest = max(int(part.max()) for part in (ids.prompt_ids, ids.chosen_ids, ids.rejected_ids) if len(part))
        if self.limits.vocabulary is not None and highest >= self.limits.vocabulary:
            token = str(self.tokenizer.convert_ids_to_tokens(highest))
            yield "id-above-vocabulary", f"{token!r} is {highest}; the model has {self.limits.vocabulary:,} ids"
        longest = len(ids.prompt_ids) + max(len(ids.chosen_ids), len(ids.rejected_ids))
        if self.limits.positions is not None and longest > self.limits.positions:
            yield "beyond-positions", f"{longest:,} tokens; the model has {self.limits.positions:,} positions"

    def length_stats(self) -> list[LengthStats]:
        """Statistics of each part, under its name for such rows."""
        names = PART_NAMES[self.kind]
        return [_length_stats(names[part], values) for part, values in self.lengths.items() if values]

    def bias(self) -> LengthBias:
        """The length bias of all pairs."""
        chosen, rejected = (np.frombuffer(self.lengths[part], np.int64) for part in ("chosen", "rejected"))
        longer, shorter = int((chosen > rejected).sum()), int((chosen < rejected).sum())
        return LengthBias(
            longer,
            shorter,
            len(chosen) - longer - shorter,
            float((chosen - rejected).mean()),
            sign_test(longer, shorter),
        )

    def whole(self, unread: int) -> None:
        """Adds findings about all pairs together."""
        pairs, rows = len(self.lengths["prompt"]), self.rows + unread
        rejected = self.rejected + unread
        if rejected > self.config.max_reject_share * rows:
            limit = self.config.max_reject_share
            self.tally.count("too-many-rejects", rejected, f"{rejected / rows:.1%} of the rows, allowed {limit:.3g}")
        if not pairs:
            return
        if pairs < 100:
            self.tally.count("few-pairs", pairs)
        if self.kind != "pairs":
            return
        bias = self.bias()
        if bias.p_value < 0.001 and abs(bias.share_longer - 0.5) >= 0.1:
            code = "longer-is-better" if bias.share_longer > 0.5 else "shorter-is-better"
            count = max(bias.longer, bias.shorter)
            detail = f"{count / (bias.longer + bias.shorter):.0%} of pairs of unequal length, sign test p = "
            self.tally.count(code, count, f"{detail}{bias.p_value:.1g}; choosing by length alone is right as often")


def prompt_key(prompt: Turns) -> int:
    """A hash of the prompt that ignores letter case and white space."""
    return xxhash.xxh3_64_intdigest(" ".join(content(prompt).split()).casefold().encode("utf-8", "surrogatepass"))


def _stream(config: PrecomputeConfig, paths: Sequence[Path | RowsInMemory]) -> PairStream:
    return PairStream(
        paths,
        columns=config.columns,
        where=config.where,
        prompt_format=config.prompt_format,
        ranked_pairs=config.ranked_pairs,
    )


def _messages(prompt: Turns) -> list[dict[str, Any]]:
    assert isinstance(prompt, list)
    return prompt


def _adds_system_prompt(tokenizer: Any) -> bool:
    """Whether the chat template adds a system prompt if the messages have none."""
    try:
        with within_limits("the chat template, of one message"):
            alone = str(tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False))
    except UserError:
        raise
    except Exception:  # no template, or one that needs other messages: nothing to report
        return False
    return "system" in alone.lower()


def _ends(ids: Sequence[int], tokenizer: Any, appended: bool) -> bool:
    """Whether a response's last token, ignoring white space, is special; with `appended` tokens it is."""
    if appended:
        return True  # the end token was appended, or the text itself ends with it
    special = {*tokenizer.all_special_ids, *(k for k, token in tokenizer.added_tokens_decoder.items() if token.special)}
    for token in reversed(ids):
        if token in special:
            return True
        if str(tokenizer.decode([token])).strip():
            return False
    return False


def _length_stats(part: str, lengths: array[int]) -> LengthStats:
    values = np.frombuffer(lengths, np.int64)
    edges, counts = histogram(values, float(values.min()), float(np.quantile(values, 0.995)), whole=True)
    quantiles = np.quantile(values, (0, 0.05, 0.5, 0.95, 1), method="nearest")
    return LengthStats(part, float(values.mean()), tuple(quantiles.tolist()), edges, counts)
