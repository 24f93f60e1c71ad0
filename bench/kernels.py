"""The fused head against its alternatives: time, peak memory, error to float64, share of the machine's own matmul.

Every implementation gets the same tensors and runs in every round, so that a ratio compares two neighbours in time. One
that is not installed or does not run here is listed with the reason, never left out silently.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dpoeng.bench.measuring.measure import PeakMemory, Stopwatch, gemm_flops, release_memory
from dpoeng.bench.measuring.records import stamp
from dpoeng.kernels.token_logps import plain_token_logps, token_logps

OURS = "dpoeng"
TRUTH_ROWS = 64  # rows that are compared with float64

Head = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden [N, H], weight [V, H], targets [N] -> log-probs [N]


class Shape(NamedTuple):
    vocabulary: int
    width: int
    tokens: int


# SmolLM2-135M's head and a micro-batch's response tokens: seconds on two cores.
DEFAULT_SHAPES = (Shape(49152, 576, 512),)


def naive(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Full logits, log_softmax, gather."""
    return torch.log_softmax(F.linear(hidden, weight).float(), -1).gather(1, targets.unsqueeze(1)).squeeze(1)


def _trl() -> Head:
    from trl.kernels import ChunkedLogProbFunction

    def head(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        # As DPOTrainer of 1.16 calls it: chunks of 32768, log-probs only.
        logps: Tensor = ChunkedLogProbFunction.apply(
            hidden, weight, None, targets, 1.0, 32768, None, 1.0, ("log_probs",)
        )[0]
        return logps

    return head


def _liger() -> Head:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    def head(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        loss: Tensor = liger_fused_linear_cross_entropy(hidden, weight, targets, reduction="none")
        return -loss

    return head


def _linear_cross_entropy() -> Head:
    options = torch.nn.LinearCrossEntropyOptions()
    fused = F.linear_cross_entropy

    def head(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return -fused(hidden, weight, targets, reduction="none", options=options).float()

    return head


WAYS: dict[str, Callable[[], Head]] = {
    OURS: lambda: token_logps,
    "naive": lambda: naive,
    "TRL": _trl,
    "Liger": _liger,
    "F.linear_cross_entropy": _linear_cross_entropy,
}


def run(
    shapes: Sequence[Shape] = DEFAULT_SHAPES,
    dtypes: Sequence[str] = ("float32", "bfloat16"),
    *,
    device: str = "cpu",
    repeats: int = 3,
    against: Sequence[str] = (),
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Measures all implementations on all shapes and dtypes, training and scoring.

    Args:
        shapes: (V, H, N) of each problem.
        dtypes: Names of torch dtypes.
        device: `cpu` or `cuda`.
        repeats: Counted rounds, after one that is not counted.
        against: Names in `WAYS` to compare with; empty: all that are installed.
        say: Receives progress messages.

    Returns:
        A record: `results`, one entry per shape, dtype and mode, and `missing`, name -> reason.
    """
    place = torch.device(device)
    settings = {"shapes": [list(s) for s in shapes], "dtypes": list(dtypes), "repeats": repeats, "against": [*against]}
    record = stamp("kernels", place, settings)
    ways, missing = _available([OURS, *against] if against else [*WAYS])
    results = []
    for shape in shapes:
        for name in dtypes:
            problem = head_problem(Shape(*shape), getattr(torch, name), place)
            rate = gemm_flops([(shape[1], shape[0])], shape[2], getattr(torch, name), place, tries=2)
            for mode in ("train", "score"):
                say(f"V {shape[0]}, H {shape[1]}, N {shape[2]}, {name}, {mode}")
                figures = _measure(ways, problem, mode, repeats, missing)
                products = 2 if mode == "train" else 1
                limit_s = products * 2.0 * shape[0] * shape[1] * shape[2] / rate
                for figure in figures.values():
                    figure["of_gemm"] = limit_s / statistics.median(figure["wall_s"])
                results.append({"shape": list(shape), "dtype": name, "mode": mode, "gemm_flops": rate, "ways": figures})
            del problem
            release_memory(place)
    return {**record, "results": results, "missing": missing}


def _available(names: Sequence[str]) -> tuple[dict[str, Head], dict[str, str]]:
    ways, missing = {}, {}
    for name in names:
        try:
            ways[name] = WAYS[name]()
        except (ImportError, AttributeError) as error:
            missing[name] = f"not installed ({error})"
    return ways, missing


class HeadProblem(NamedTuple):
    """Operands of a head, and the float64 results of the first `TRUTH_ROWS` rows."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    upstream: Tensor
    true_logps: Tensor  # [TRUTH_ROWS] float64
    true_grad: Tensor  # [TRUTH_ROWS, H] float64


def head_problem(shape: Shape, dtype: torch.dtype, device: torch.device) -> HeadProblem:
    """Logits with a spread of three nats, as trained models have."""
    rng = torch.Generator().manual_seed(0)
    weight = (torch.randn(shape.vocabulary, shape.width, generator=rng) * 3 / shape.width**0.5).to(device, dtype)
    hidden = torch.randn(shape.tokens, shape.width, generator=rng).to(device, dtype)
    targets = torch.randint(0, shape.vocabulary, (shape.tokens,), generator=rng).to(device)
    upstream = torch.randn(shape.tokens, generator=rng).to(device)
    leaf = hidden[:TRUTH_ROWS].double().requires_grad_()
    logps = plain_token_logps(leaf, weight.double(), targets[:TRUTH_ROWS])
    (grad,) = torch.autograd.grad(logps, leaf, upstream[:TRUTH_ROWS].double())
    return HeadProblem(hidden, weight, targets, upstream, logps.detach(), grad)


def _measure(
    ways: dict[str, Head], problem: HeadProblem, mode: str, repeats: int, missing: dict[str, str]
) -> dict[str, dict[str, Any]]:
    figures: dict[str, dict[str, Any]] = {}
    device = problem.hidden.device
    for name, head in ways.items():  # first round: errors and memory, not timed
        try:
            head_step(head, problem, mode)  # libraries allocate during their first call, which must not count
            with PeakMemory(device) as memory:
                logps, grad = head_step(head, problem, mode)
        except Exception as error:  # a peer may fail in any way, which the record reports
            if name == OURS:
                raise
            missing[name] = f"does not run here ({type(error).__name__}: {str(error).splitlines()[0][:200]})"
            continue
        figures[name] = {"wall_s": [], "cpu_s": [], "peak_bytes": memory.peak_bytes, **_errors(logps, grad, problem)}
        del logps, grad
    for _ in range(repeats):
        for name, figure in figures.items():
            watch = Stopwatch(device)
            head_step(ways[name], problem, mode)
            spent = watch.lap()
            figure["wall_s"].append(spent.wall_s)
            figure["cpu_s"].append(spent.cpu_s)
    ours = figures[OURS]
    for figure in figures.values():
        for clock in ("wall_s", "cpu_s"):
            pairs = [theirs / own for theirs, own in zip(figure[clock], ours[clock], strict=True)]
            figure[f"{clock}_ratio"] = {"median": statistics.median(pairs), "low": min(pairs), "high": max(pairs)}
    return figures


def head_step(head: Head, problem: HeadProblem, mode: str) -> tuple[Tensor, Tensor | None]:
    """One call: log-probs [N], and in mode `train` also the gradient [N, H], in mode `score` None."""
    if mode == "score":
        with torch.no_grad():
            return head(problem.hidden, problem.weight, problem.targets), None
    leaf = problem.hidden.detach().requires_grad_()
    logps = head(leaf, problem.weight, problem.targets)
    torch.autograd.backward(logps, problem.upstream.to(logps.dtype))
    return logps.detach(), leaf.grad


def _errors(logps: Tensor, grad: Tensor | None, problem: HeadProblem) -> dict[str, float | None]:
    """Worst log-prob error in nats; worst gradient error relative to the largest entry."""
    off = (logps[:TRUTH_ROWS].double() - problem.true_logps).abs().max()
    if grad is None:
        return {"logp_error": float(off), "grad_error": None}
    grad_off = (grad[:TRUTH_ROWS].double() - problem.true_grad).abs().max() / problem.true_grad.abs().max()
    return {"logp_error": float(off), "grad_error": float(grad_off)}


def aot(gpus: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Compiles every shipped configuration without a GPU, for the named GPUs or all in the table.

    Raises:
        RuntimeError: The compiler's process returned no report.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "dpoeng.kernels.aot", *(["--gpu", *gpus] if gpus else [])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if not done.stdout:
        raise RuntimeError(f"compiling ahead of time failed: {done.stderr[-2000:]}")
    reports: list[dict[str, Any]] = json.loads(done.stdout)
    return reports


def tune(shape: Shape, dtype: str) -> dict[str, Any]:
    """Times the fused scoring kernel's tiles on this GPU and stores the fastest. Needs a GPU."""
    import triton

    from dpoeng.kernels import tiles
    from dpoeng.kernels.head import Head as KernelHead
    from dpoeng.kernels.linear_logps import fused_logps

    device = torch.device("cuda")
    problem = head_problem(shape, getattr(torch, dtype), device)
    head = KernelHead(problem.weight)

    def seconds(tile: tiles.LinearTile) -> float:
        took: float = triton.testing.do_bench(
            lambda: fused_logps(problem.hidden, head, problem.targets, -100, tile=tile), return_mode="median"
        )
        return took / 1e3

    table = tiles.LINEAR_32 if dtype == "float32" else tiles.LINEAR_16[tiles.architecture(device)]
    best = tiles.tune(tiles.candidates(table), seconds)
    path, key = tiles.tuned_file(), tiles.tuned_key(device, getattr(torch, dtype))
    tiles.remember(path, key, best)
    return {"file": str(path), "key": key, "tile": best._asdict()}
