"""Measures each precision's log-probs: error against float32, reward noise, dependence on the batch, speed.

    python -m dpoeng.bench.studies.precision MODEL PAIRS [--pairs 32] [--max-length 192]

8 bits are measured as dpoeng multiplies (8-bit weights, exact activations) and by LLM.int8(), bitsandbytes' product on
a GPU (activations in 8 bits too, outliers beside them), which it also computes on a CPU, slowly, in layers in eval().
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from dpoeng.cache.schema import PairIds
from dpoeng.engine.data.pairs import read_pairs
from dpoeng.engine.data.tokenization import tokenize_pairs
from dpoeng.engine.models.loading import load_model
from dpoeng.engine.models.model import CausalLM, set_mode
from dpoeng.engine.models.quantized import multiply_as_bitsandbytes, quantized_layers
from dpoeng.engine.models.sources import ModelSource, find_model
from dpoeng.engine.models.tokenizer import load_tokenizer
from dpoeng.engine.scoring.choose_layout import choose_layout
from dpoeng.engine.scoring.pairs import score_pairs

BETA = 0.1


@dataclass(frozen=True, slots=True)
class Way:
    """A name, and how the model is loaded and run; `threshold` is that of LLM.int8(), where it multiplies."""

    name: str
    quantization: Any = "none"
    dtype: str = "float32"
    threshold: float | None = None


WAYS = (
    Way("float32"),
    Way("bfloat16", dtype="bfloat16"),
    Way("8bit", "8bit"),
    Way("LLM.int8(), threshold 6", "8bit", threshold=6.0),
    Way("LLM.int8(), threshold 0", "8bit", threshold=0.0),
    Way("4bit nf4", "4bit"),
)


@dataclass(frozen=True, slots=True)
class Result:
    """Differences from float32 in nats.

    Attributes:
        mean: mean |difference| a token.
        largest: largest |difference| of a token.
        bias: mean difference a token.
        reward_noise: root mean square of beta times the difference of a pair's margin.
        repeats: whether a second pass gives the same bits.
        batch: largest difference of a token between a pair alone and in its batch.
        tokens_per_s: positions a second.
    """

    mean: float
    largest: float
    bias: float
    reward_noise: float
    repeats: bool
    batch: float
    tokens_per_s: float


Scores = list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]


def measure(source: ModelSource, pairs: Sequence[PairIds], ways: Sequence[Way] = WAYS) -> dict[str, Result]:
    """Every way against the first, on the same tokens."""
    truth: Scores = []
    results = {}
    for way in ways:
        lm = load_model(
            source,
            quantization=way.quantization,
            dtype=way.dtype,
            device=torch.device("cpu"),
            tokenizer=False,
        )
        set_mode(lm, training=False)
        choose_layout(lm)  # before: its probe would take the noise of activations in 8 bits for a wrong layout
        if way.threshold is not None:
            multiply_as_bitsandbytes(lm.model)
            for module in quantized_layers(lm.model):
                layer: Any = module
                layer.eval().state.threshold = way.threshold
        began = time.perf_counter()
        scores = _score(lm, pairs, 8)
        seconds = time.perf_counter() - began
        truth = truth or scores
        again, alone = _score(lm, pairs[:8], 8)[:4], _score(lm, pairs[:4], 1)
        results[way.name] = Result(
            **_differences(scores, truth),
            repeats=_largest(again, scores[:4]) == 0.0,
            batch=_largest(alone, scores[:4]),
            tokens_per_s=sum(ids.total_tokens for ids in pairs) / seconds,
        )
    return results


def _score(lm: CausalLM, pairs: Sequence[PairIds], batch: int) -> Scores:
    scores: Scores = []
    for begin in range(0, len(pairs), batch):
        scores += [(pair.chosen_logps, pair.rejected_logps) for pair in score_pairs(lm, pairs[begin : begin + batch])]
    return scores


def _largest(some: Scores, others: Scores) -> float:
    """The largest difference of a token."""
    sides = [(a, b) for x, y in zip(some, others, strict=True) for a, b in zip(x, y, strict=True)]
    return max(float(np.abs(a - b).max()) for a, b in sides)


def _differences(scores: Scores, truth: Scores) -> dict[str, float]:
    differences = [
        (c.astype(np.float64) - tc, r.astype(np.float64) - tr) for (c, r), (tc, tr) in zip(scores, truth, strict=True)
    ]
    every = np.concatenate([side for pair in differences for side in pair])
    margins = [float(c.sum() - r.sum()) for c, r in differences]
    return {
        "mean": float(np.abs(every).mean()),
        "largest": float(np.abs(every).max()),
        "bias": float(every.mean()),
        "reward_noise": BETA * math.sqrt(float(np.mean(np.square(margins)))),
    }


@click.command()
@click.argument("model")
@click.argument("pairs", type=click.Path(path_type=Path))
@click.option("--pairs", "count", default=32, show_default=True)
@click.option("--max-length", default=192, show_default=True)
def main(model: str, pairs: Path, count: int, max_length: int) -> None:
    """Prints the table of docs/memory.md."""
    source = find_model(model)
    rows = read_pairs([pairs]).pairs[: 2 * count]
    data = tokenize_pairs(rows, load_tokenizer(source), max_length=max_length)
    results = measure(source, [pair.ids for pair in data.pairs[:count]])
    columns = ("precision", "mean", "largest", "bias", "reward noise", "repeats", "batch", "tokens/s")
    click.echo(f"| {' | '.join(columns)} |")
    click.echo("|---" * len(columns) + "|")
    for name, r in results.items():
        click.echo(
            f"| {name} | {r.mean:.2g} | {r.largest:.2g} | {r.bias:+.2g} | {r.reward_noise:.2g} | "
            f"{'yes' if r.repeats else 'no'} | {r.batch:.2g} | {r.tokens_per_s:,.0f} |"
        )


if __name__ == "__main__":
    main()
