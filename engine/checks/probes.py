"""Small computations that exercise a library: `python -m dpoeng.engine.checks.probes NAME` prints one line of JSON.

Each runs in its own process (see `doctor`): a library that crashes the interpreter or hangs is then a finding.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any


def torch_probe() -> dict[str, Any]:
    """Matrix products on every device, in float32 and bfloat16, compared with float64."""
    import torch

    report: dict[str, Any] = {
        "version": torch.__version__,
        "cuda_build": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "gpus": [],
    }
    devices = ["cpu"]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            free, total = torch.cuda.mem_get_info(index)
            report["gpus"].append(
                {
                    "name": properties.name,
                    "capability": f"{properties.major}.{properties.minor}",
                    "total_bytes": total,
                    "free_bytes": free,
                    "bfloat16": torch.cuda.is_bf16_supported(including_emulation=False),
                    "bus_gb_per_s": bus_speed(torch.device("cuda", index)),
                }
            )
            devices.append(f"cuda:{index}")
    a, b = torch.randn(64, 96, dtype=torch.float64), torch.randn(96, 48, dtype=torch.float64)
    for device in devices:
        for dtype, tolerance in ((torch.float32, 1e-3), (torch.bfloat16, 0.5)):
            product = (a.to(device, dtype) @ b.to(device, dtype)).double().cpu()
            _near(product, a @ b, tolerance, f"{dtype} product on {device}")
    return report


def bus_speed(device: Any, n_bytes: int = 1 << 28, repeats: int = 4) -> float:
    """GB/s from pinned host memory to a device, without the first copy: the limit of layer offloading."""
    import torch

    on_gpu = device.type == "cuda"
    host = torch.zeros(n_bytes, dtype=torch.uint8, pin_memory=on_gpu)
    on_device = torch.empty_like(host, device=device)
    seconds = []
    for _ in range(1 + repeats):
        began = time.perf_counter()
        on_device.copy_(host, non_blocking=True)
        if on_gpu:
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return n_bytes / min(seconds[1:]) / 1e9


def bitsandbytes_probe() -> dict[str, Any]:
    """A linear layer in 8 bit and in NF4, forward and backward, compared with the unquantised layer."""
    import bitsandbytes as bnb
    import torch
    from torch import nn

    from dpoeng.engine.models.quantized import multiply_exactly

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    plain = nn.Linear(128, 64, bias=False).requires_grad_(False)
    x = torch.randn(8, 128)
    want = plain(x)
    for name, layer, tolerance in (
        ("8bit", bnb.nn.Linear8bitLt(128, 64, bias=False, has_fp16_weights=False), 0.05),
        ("4bit", bnb.nn.Linear4bit(128, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4"), 0.6),
    ):
        layer.load_state_dict(plain.state_dict())
        layer = layer.to(device).train()
        multiply_exactly(layer)
        inputs = x.to(device).requires_grad_()
        output = layer(inputs)
        _near(output.float().cpu(), want, tolerance, f"{name} layer on {device}")
        torch.autograd.backward(output.float().sum())
        if inputs.grad is None or not bool(inputs.grad.abs().sum() > 0):
            raise ArithmeticError(f"no gradient flows through the {name} layer on {device}")
    return {"version": bnb.__version__, "device": device}


def triton_probe() -> dict[str, Any]:
    """dpoeng's kernels on a GPU, compared with plain PyTorch. Without a GPU nothing runs, since nothing uses Triton."""
    import torch

    if not torch.cuda.is_available():
        return {"used": False}
    import triton

    report: dict[str, Any] = {"version": triton.__version__, "used": True}
    from dpoeng.kernels.token_logps import plain_token_logps, token_logps

    torch.manual_seed(0)
    hidden = torch.randn(48, 128, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(1000, 128, device="cuda", dtype=torch.bfloat16) / 16
    targets = torch.randint(0, 1000, (48,), device="cuda")
    want = plain_token_logps(hidden.double(), weight.double(), targets)
    _near(token_logps(hidden, weight, targets).double(), want, 0.05, "scoring kernel")
    leaf = hidden.clone().requires_grad_()
    scored = token_logps(leaf, weight, targets)
    _near(scored.detach().double(), want, 0.05, "training kernel")
    torch.autograd.backward(scored.sum())
    assert leaf.grad is not None
    return report


def transformers_probe() -> dict[str, Any]:
    """Imports the model libraries together, as both phases do, and runs a tiny model."""
    import accelerate
    import peft
    import torch
    import transformers
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **shape))
    logits = model(torch.arange(8)[None]).logits
    if logits.shape != (1, 8, 32) or not bool(logits.isfinite().all()):
        raise ArithmeticError("a tiny Llama gives no finite logits")
    return {"transformers": transformers.__version__, "peft": peft.__version__, "accelerate": accelerate.__version__}


PROBES: dict[str, Callable[[], dict[str, Any]]] = {
    "torch": torch_probe,
    "transformers": transformers_probe,
    "bitsandbytes": bitsandbytes_probe,
    "triton": triton_probe,
}


def _near(found: Any, want: Any, tolerance: float, what: str) -> None:
    gap = float((found - want).detach().abs().max())
    if not gap <= tolerance:
        raise ArithmeticError(f"{what}: off by {gap:.3g}, more than {tolerance:g}")


def main() -> None:
    """Runs the probe named on the command line; prints errors too."""
    try:
        result = {"ok": True, **PROBES[sys.argv[1]]()}
    except Exception as error:
        result = {"ok": False, "problem": f"{type(error).__name__}: {error}"[:500]}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
