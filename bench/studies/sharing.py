"""Measures the gain of running each prompt once, by the prompt's share of the tokens, by pairs and responses a prompt.

Both sides of each ratio are dpoeng's own code on the same tokens, in turn; the other side repeats the prompt for every
response, sorted by length and padded as little as that allows. The counted share of positions that sharing leaves is
beside each speed-up: it is what a machine without overheads would gain.
"""

from __future__ import annotations

import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dpoeng.bench.measuring.measure import TimeSplit
from dpoeng.bench.measuring.records import named_settings, stamp
from dpoeng.bench.measuring.workload import model_or_embedded
from dpoeng.bench.phases import Limits, PhaseSettings, measure_phases
from dpoeng.cache.schema import PairIds, as_ids
from dpoeng.engine.config.fields import Dtype
from dpoeng.engine.models.loading import load_model, pick_device
from dpoeng.engine.models.model import CausalLM, set_mode
from dpoeng.engine.recipes.precompute import default_batch_tokens
from dpoeng.engine.runtime.progress import QUIET, Progress
from dpoeng.engine.scoring.attention import use_layout
from dpoeng.engine.scoring.choose_layout import choose_layout
from dpoeng.engine.scoring.forward import score_groups
from dpoeng.engine.scoring.layout import (
    Branch,
    PromptGroup,
    batches_by_tokens,
    batches_of_pairs,
    pack,
    pair_group,
    positions_of,
    separate,
    share_prompts,
)
from dpoeng.engine.scoring.pairs import score_pairs

PROMPT_SHARES = (0.1, 0.25, 0.5, 0.75, 0.9)
PAIRS_A_PROMPT = (1, 2, 4, 8)


@dataclass(frozen=True, slots=True)
class SharingSettings:
    """Settings; the embedded model unless `model` names one.

    Attributes:
        tokens: of a pair: prompt, chosen and rejected together.
        pairs: in one step and in one reference pass.
        repeats: counted rounds.
    """

    model: str | None = None
    dtype: Dtype = "auto"
    device: str = "auto"
    tokens: int = 384
    pairs: int = 8
    repeats: int = 3


def bench_sharing(settings: SharingSettings, progress: Progress = QUIET) -> dict[str, Any]:
    """Measures both curves and returns the record.

    Raises:
        UserError: the model cannot be used.
    """
    device = pick_device(settings.device)
    record = stamp("sharing", device, named_settings(settings))
    with tempfile.TemporaryDirectory(prefix="dpoeng-bench-") as scratch:
        folder = Path(scratch)
        source = model_or_embedded(settings.model, folder)

        def load() -> CausalLM:
            return load_model(source, quantization="none", dtype=settings.dtype, device=device, tokenizer=False)

        shares = [_share_point(load(), share, folder / f"share{share}", settings, progress) for share in PROMPT_SHARES]
        lm = load()
        set_mode(lm, training=False)
        choose_layout(lm, "shared")
        negatives = [_negatives_point(lm, count, settings, progress) for count in PAIRS_A_PROMPT]
    return {**record, "prompt_share": shares, "pairs_a_prompt": negatives}


@dataclass(frozen=True, slots=True)
class ResponsesSettings:
    """Settings of the curve over responses to one prompt.

    Attributes:
        prompt: its tokens.
        response: tokens of each response. All begin alike for a quarter of them, and each two for half.
        counts: responses.
        repeats: counted rounds.
    """

    model: str | None = None
    dtype: Dtype = "auto"
    device: str = "auto"
    prompt: int = 1024
    response: int = 256
    counts: tuple[int, ...] = (2, 4, 8)
    repeats: int = 3


def bench_responses(settings: ResponsesSettings, progress: Progress = QUIET) -> dict[str, Any]:
    """Counts the tokens of a reference pass over several responses in each layout, and measures it.

    Raises:
        UserError: the model cannot be used, or cannot share beginnings of responses.
    """
    device = pick_device(settings.device)
    record = stamp("responses", device, named_settings(settings))
    with tempfile.TemporaryDirectory(prefix="dpoeng-bench-") as scratch:
        source = model_or_embedded(settings.model, Path(scratch))
        lm = load_model(source, quantization="none", dtype=settings.dtype, device=device, tokenizer=False)
        set_mode(lm, training=False)
        choose_layout(lm, "shared")
        points = [_responses_point(lm, count, settings, progress) for count in settings.counts]
    return {**record, "responses": points}


def branching(count: int, prompt: int, response: int, vocabulary: int) -> PromptGroup:
    """A prompt with responses that fork at a quarter of their length, and two by two at half of it."""
    random = np.random.default_rng(0)

    def draw(length: int) -> Any:
        return as_ids(random.integers(0, vocabulary, length))

    stem, stems = draw(response // 4), [draw(response // 4) for _ in range(-(-count // 2))]
    rest = response - 2 * (response // 4)
    branches = (Branch(np.concatenate([stem, stems[i // 2], draw(rest)])) for i in range(count))
    return PromptGroup(draw(prompt), tuple(branches))


def _responses_point(lm: CausalLM, count: int, settings: ResponsesSettings, progress: Progress) -> dict[str, Any]:
    group = branching(count, settings.prompt, settings.response, lm.vocab_size)
    tree = lm.tree
    ways = {"a response": ("separate", 0), "prompt once": ("shared", 0), "beginnings once": ("shared", tree)}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    with progress.task(f"{count} responses", 1 + settings.repeats, "rounds") as advance, torch.inference_mode():
        for number in range(1 + settings.repeats):
            for way, (layout, shortest) in ways.items():
                use_layout(lm, layout)  # type: ignore[arg-type]
                lm.tree = shortest
                split = TimeSplit(lm.device)
                with split.part("score"):
                    score_groups(lm, [group])
                if number > 0:
                    seconds[way].append(split.total().wall_s)
            advance(1, "")
    use_layout(lm, "shared")
    lm.tree = tree
    median = {way: statistics.median(times) for way, times in seconds.items()}
    apart, *others = ways
    return {
        "responses": count,
        "tokens": {
            apart: sum(one.total_tokens for one in separate(group)),
            **{way: positions_of([group], ways[way][1]) for way in others},
        },
        "speedup": {way: median[apart] / median[way] for way in others},
    }


def pairs_of(prompts: int, each: int, prompt: int, response: int, vocabulary: int) -> list[PairIds]:
    """`each` pairs for each of some random prompts: one chosen response, `each` rejected ones."""
    random = np.random.default_rng(0)

    def draw(length: int) -> Any:
        return as_ids(random.integers(0, vocabulary, length))

    made = []
    for _ in range(prompts):
        text, chosen = draw(prompt), draw(response)
        made += [PairIds(text, chosen, draw(response)) for _ in range(each)]
    return made


def positions_left(pairs: list[PairIds]) -> float:
    """Positions with each prompt and response once, over those of one row a response."""
    groups, _ = share_prompts(pairs)
    apart = sum(single.total_tokens for ids in pairs for group in share_prompts([ids])[0] for single in separate(group))
    return len(pack(groups).input_ids) / apart


def _share_point(
    lm: CausalLM, share: float, folder: Path, settings: SharingSettings, progress: Progress
) -> dict[str, Any]:
    prompt = round(share * settings.tokens)
    pairs = pairs_of(settings.pairs, 1, prompt, (settings.tokens - prompt) // 2, lm.vocab_size)
    phases = PhaseSettings(batch_size=settings.pairs, steps=1, repeats=settings.repeats)
    results = {
        (r.phase, r.layout): r
        for r in measure_phases(lm, pairs, folder, phases, limits=Limits(lambda: 1.0, 1.0), progress=progress)
    }

    def faster(phase: str) -> float:
        return statistics.median(results[phase, "separate"].wall_s) / statistics.median(results[phase, "shared"].wall_s)

    return {
        "prompt_share": share,
        "positions_left": positions_left(pairs),
        "reference_speedup": faster("reference"),
        "training_speedup": faster("training"),
    }


def _negatives_point(lm: CausalLM, count: int, settings: SharingSettings, progress: Progress) -> dict[str, Any]:
    """The reference pass with the prompt once for all its pairs, once for each pair, once for each response."""
    prompt, response = settings.tokens // 2, settings.tokens // 4
    pairs = pairs_of(max(1, settings.pairs // count), count, prompt, response, lm.vocab_size)
    budget = default_batch_tokens(lm.device)
    once = [[pairs[i] for i in batch] for batch, _ in batches_of_pairs(pairs, budget)]
    lengths = [ids.total_tokens for ids in pairs]
    seconds: dict[str, list[float]] = {"once": [], "a pair": [], "a response": []}
    with progress.task(f"{count} pairs a prompt", 1 + settings.repeats, "rounds") as advance:
        for number in range(1 + settings.repeats):
            for way, found in seconds.items():
                use_layout(lm, "separate" if way == "a response" else "shared")
                split = TimeSplit(lm.device)
                with split.part("score"):
                    if way == "once":
                        for batch in once:
                            score_pairs(lm, batch)
                    else:
                        for span in batches_by_tokens(lengths, budget):
                            _score_apart(lm, [pairs[i] for i in span])
                if number > 0:
                    found.append(split.total().wall_s)
            advance(1, "")
    use_layout(lm, "shared")
    median = {way: statistics.median(found) for way, found in seconds.items()}
    return {
        "pairs_a_prompt": count,
        "positions_left": positions_left(pairs),
        "over_once_a_pair": median["a pair"] / median["once"],
        "over_once_a_response": median["a response"] / median["once"],
    }


def _score_apart(lm: CausalLM, pairs: list[PairIds]) -> None:
    """One forward, in which pairs share nothing with each other."""
    with torch.inference_mode():
        score_groups(lm, [pair_group(ids) for ids in pairs])
