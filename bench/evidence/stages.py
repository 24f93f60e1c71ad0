"""The stages: each gets a `Place` and returns its results; `ok` is whether they are as expected."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpoeng.bench.kernels import Shape, head_problem, head_step, naive
from dpoeng.bench.measuring.gpu import card_of, copy_bytes_per_s
from dpoeng.bench.measuring.measure import PeakMemory, elapsed_s, gemm_flops, synchronize
from dpoeng.engine.config.fields import Quantization

Result = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a stage runs, and whether with small sizes that take seconds on a CPU."""

    device: torch.device
    small: bool = False

    def random(self, *shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Normal numbers, the same on every device."""
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(self.device, dtype)

    def seconds(self, work: Callable[[], object], tries: int = 5) -> float:
        """The median of some tries, after an uncounted one."""
        work()
        synchronize(self.device)
        return statistics.median(elapsed_s(self.device, work) for _ in range(tries))


def machine(place: Place) -> Result:
    """Bandwidth of a copy and rate of a bfloat16 product, for comparison with everything else."""
    width, rows = (256, 128) if place.small else (8192, 8192)
    rate = gemm_flops([(width, width)], rows, torch.bfloat16, place.device)
    copied = copy_bytes_per_s(place.device)
    card = card_of(place.device)
    sheet = {"sheet_flops": card.flops, "sheet_bytes_per_s": card.bytes_per_s} if card else {}
    return {"ok": rate > 0 and copied > 0, "copy_bytes_per_s": copied, "gemm_flops": rate, **sheet}


def head(place: Place) -> Result:
    """The log-prob kernels: compared with float64, twice the same bits, and without whole logits in memory."""
    from dpoeng.kernels.token_logps import token_logps

    shape = Shape(1000, 64, 96) if place.small else Shape(151936, 5120, 4096)
    problem = head_problem(shape, torch.bfloat16, place.device)
    result: Result = {"ok": True}
    for mode in ("score", "train"):
        head_step(token_logps, problem, mode)
        with PeakMemory(place.device) as memory:
            logps, grad = head_step(token_logps, problem, mode)
        again = head_step(token_logps, problem, mode)
        n = problem.true_logps.shape[0]
        error = float((logps[:n].double() - problem.true_logps).abs().max())
        same = torch.equal(logps, again[0]) and (grad is None or again[1] is None or torch.equal(grad, again[1]))
        whole = shape.vocabulary * shape.tokens * 2
        step: Result = {"logp_error": error, "repeats": same, "peak_bytes": memory.peak_bytes, "logits_bytes": whole}
        step["seconds"] = place.seconds(partial(head_step, token_logps, problem, mode), 3)
        eager, eager_grad = head_step(naive, problem, mode)
        eager_error = float((eager[:n].double() - problem.true_logps).abs().max())
        right = error <= 1.5 * eager_error  # the same rounding on a CPU with bfloat16 units; on a GPU much less
        if grad is not None and eager_grad is not None:
            largest = problem.true_grad.abs().max()
            step["grad_error"], step["eager_grad_error"] = (
                float((some[:n].double() - problem.true_grad).abs().max() / largest) for some in (grad, eager_grad)
            )
            right &= step["grad_error"] <= 1.5 * step["eager_grad_error"]
        result[mode] = {**step, "eager_logp_error": eager_error}
        result["ok"] &= same and right and (place.small or memory.peak_bytes < whole)
    return result


def attention(place: Place) -> Result:
    """FlashAttention over shared prompts, the same in pieces, and both against float64, with gradients."""
    from dpoeng.engine.memory.simulate import Pair
    from dpoeng.engine.scoring.attention import AttentionPlan, shared_prompt_attention
    from dpoeng.engine.scoring.layout import pack, pair_group

    lengths = ((9, 7, 5), (4, 6, 8)) if place.small else ((700, 300, 400), (512, 512, 512))
    row = pack([pair_group(Pair(*some).scored().ids) for some in lengths])
    tokens, heads, kv, size = len(row.input_ids), 8, 2, 16 if place.small else 128
    q, k, v = (place.random(1, n, tokens, size, seed=seed) for seed, n in enumerate((heads, kv, kv)))
    pull = place.random(1, tokens, heads, size, seed=3)

    def run(way: Any, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype).detach().requires_grad_() for x in (q, k, v)]
        query, key, value = leaves
        plan = AttentionPlan(row.groups, way)
        out, _ = shared_prompt_attention(torch.nn.Identity(), query, key, value, None, dpoeng_plan=plan)
        return [out.detach(), *torch.autograd.grad(out, leaves, pull.to(out.dtype))]

    true = run("segments", torch.float64)
    result: Result = {"ok": True, "tokens": tokens}
    for way in ("segments", "varlen") if place.device.type == "cuda" else ("segments",):
        ours, again = run(way, torch.bfloat16), run(way, torch.bfloat16)
        errors = [float((a.double() - b).norm() / b.norm()) for a, b in zip(ours, true, strict=True)]
        same = [torch.equal(a, b) for a, b in zip(ours, again, strict=True)]
        result[way] = {"errors": errors, "repeats": same, "seconds": place.seconds(partial(run, way, torch.bfloat16))}
        result["ok"] &= max(errors) < 2e-2 and same[0]
    if place.device.type != "cuda":
        result["varlen"] = "not run: needs a GPU"
    return result


def rows(place: Place) -> Result:
    """Whether a row's bits depend on the number of rows of a product, by which cuBLAS chooses its kernel."""
    width, out, most = (64, 96, 40) if place.small else (5120, 27648, 8192)
    x, weight = place.random(most, width), place.random(out, width, seed=1)
    whole = torch.nn.functional.linear(x, weight)
    some = (1, 7, 37) if place.small else (1, 37, 512, 1000, 2048, 6144)
    off = {
        str(n): float((torch.nn.functional.linear(x[:n], weight).double() - whole[:n].double()).abs().max())
        for n in some
    }
    return {"ok": True, "largest_difference": off, "same_bits": [name for name, value in off.items() if value == 0.0]}


def layers(place: Place) -> Result:
    """Compares each fused kernel with PyTorch's operations in bfloat16: error against float64, and time."""
    from dpoeng.engine.models.fused.install import what_disagrees
    from dpoeng.engine.models.lora_product import LoraLinear
    from dpoeng.kernels.fused.gated import gated, plain_gated
    from dpoeng.kernels.fused.rms_norm import plain_rms_norm, rms_norm
    from dpoeng.kernels.int8_linear import _plain_widened, widened

    tokens, width, inner = (24, 64, 96) if place.small else (6144, 5120, 27648)
    x, weight = place.random(tokens, width), place.random(width, seed=1)
    gate, up = place.random(tokens, inner, seed=2), place.random(tokens, inner, seed=3)
    codes = torch.randint(-127, 128, (inner, width), device=place.device, dtype=torch.int8)
    scales = torch.rand(inner, device=place.device)
    a, b = place.random(16, width, seed=4, dtype=torch.float32), place.random(inner, 16, seed=5, dtype=torch.float32)

    def lora() -> Tensor:
        out: Tensor = LoraLinear.apply(x, codes, None, a / width**0.5, b, 1.0, scales)  # type: ignore[no-untyped-call]
        return out

    def eager_norm() -> Tensor:
        wide = x.float()
        return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)

    def eager_lora() -> Any:
        return torch.nn.functional.linear(x, _plain_widened(codes, scales, x.dtype)) + (
            (x.float() @ (a / width**0.5).T) @ b.T
        ).to(x.dtype)

    ways: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor], Callable[[], Tensor] | None]] = {
        "RMSNorm": (
            lambda: rms_norm(x, weight, 1e-6), eager_norm, lambda: plain_rms_norm(x.double(), weight.double(), 1e-6)
        ),
        "gate": (
            lambda: gated(gate, up),
            lambda: torch.nn.functional.silu(gate) * up,
            lambda: plain_gated(gate.double(), up.double()),
        ),
        "int8 widened": (
            lambda: widened(codes, scales, torch.bfloat16), lambda: _plain_widened(codes, scales, torch.bfloat16), None
        ),
        "int8 product with LoRA": (lora, eager_lora, None),
    }  # fmt: skip
    problem = what_disagrees(place.device)
    result: Result = {"ok": problem is None, "disagrees": problem}
    for name, (ours, eager, exact) in ways.items():
        with torch.no_grad():
            step: Result = {"seconds": place.seconds(ours), "eager_seconds": place.seconds(eager)}
            step["speedup"] = step["eager_seconds"] / step["seconds"]
            if exact is not None:
                true = exact()
                step["error"], step["eager_error"] = (
                    float((way().double() - true).norm() / true.norm()) for way in (ours, eager)
                )
                result["ok"] &= step["error"] <= step["eager_error"] * 1.01
        result[name] = step
    return result


_Step = tuple[str, Quantization, tuple[int, int, int]]
_TINY_STEPS: list[_Step] = [("tiny", "none", (9, 7, 5)), ("tiny", "8bit", (9, 7, 5))]
_STEPS: list[_Step] = [
    ("Qwen/Qwen2.5-7B", "none", (100, 200, 200)),
    ("Qwen/Qwen2.5-7B", "none", (1024, 1024, 1024)),
    ("Qwen/Qwen2.5-32B", "8bit", (1024, 1024, 1024)),
]


def steps(place: Place) -> Result:
    """Forward and backward of a few layers with random weights: measured time and launches, next to the estimates."""
    from dpoeng.bench.measuring.workload import save_small_model
    from dpoeng.bench.step import StepSettings, count_step
    from dpoeng.bench.step_time import random_model, time_a_step

    result: Result = {"ok": True}
    card = card_of(place.device)
    for name, quantization, lengths in _TINY_STEPS if place.small else _STEPS:
        with tempfile.TemporaryDirectory() as folder:
            if name == "tiny":
                model = save_small_model(Path(folder) / "model", layers=2, width=64, vocabulary=512)
            else:
                model = random_model(name, Path(folder), 4, place.device)
            prompt, chosen, rejected = lengths
            settings = StepSettings(str(model), quantization, prompt=prompt, chosen=chosen, rejected=rejected)
            seconds, launches = time_a_step(settings, place.device)
            counted = count_step(settings)
        base = "bfloat16" if quantization == "none" else quantization
        result[f"{name}, {base}, {counted.tokens} tokens, {counted.layers} layers"] = {
            "seconds": seconds,
            "estimated_s": counted.seconds(card) if card else None,
            "launches": launches,
            "counted_launches": counted.layers * counted.layer.launches.total() + counted.outside.launches.total(),
        }
    return result


def offloading(place: Place) -> Result:
    """Checkpointed inputs in host memory: the same bits, and their cost."""
    from dpoeng.engine.models.offload import HostInputs

    width = 64 if place.small else 8192
    layer = torch.nn.Linear(width, width, device=place.device, dtype=torch.bfloat16)
    x = place.random(width, width).requires_grad_()

    def run(on_host: bool) -> Tensor:
        plain = partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
        checkpoint, out = HostInputs().checkpoint if on_host else plain, x
        for _ in range(8):  # copies run beside the layers before and after
            out = checkpoint(layer, out)
        grads = torch.autograd.grad(out.sum(), x)
        return grads[0]

    same = torch.equal(run(True), run(False))
    return {"ok": same, "same_bits": same, "seconds": [place.seconds(partial(run, way)) for way in (False, True)]}


def suite(place: Place) -> Result:
    """The tests that need a GPU: both phases, resume, planned and measured memory."""
    import subprocess
    import sys

    if place.device.type != "cuda":
        return {"ok": True, "ran": False, "tests": "need a GPU"}
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    return {"ok": done.returncode == 0, "tests": lines[-1] if lines else done.stderr[-500:], "output": lines[-40:]}


STAGES: dict[str, tuple[Callable[[Place], Result], int]] = {
    "machine": (machine, 60),
    "head": (head, 120),
    "attention": (attention, 90),
    "rows": (rows, 60),
    "layers": (layers, 120),
    "steps": (steps, 240),
    "offloading": (offloading, 120),
    "suite": (suite, 300),
}
"""Name -> (stage, time limit in seconds)."""
