"""What phase two decides and checks before its first step: adapter mode, rows, devices, policy against cache."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import Any

import torch

from dpoeng.cache.errors import UserError
from dpoeng.cache.reader import View
from dpoeng.cache.words import counted
from dpoeng.engine.config.fields import TrainConfig
from dpoeng.engine.models.adapters import Mode
from dpoeng.engine.models.loading import pick_device
from dpoeng.engine.models.model import CausalLM, device_name
from dpoeng.engine.reference.parity import ParityReport, compare_with_cache, parity_tolerance, spread
from dpoeng.engine.runtime.distributed import Group
from dpoeng.engine.runtime.progress import Progress


def resolve_mode(config: TrainConfig, *, has_adapter: bool) -> Mode:
    """`full` without peft; else `auto` -> `continue` where the reference has an SFT adapter, and `new` where not.

    Raises:
        UserError: the mode does not fit the reference.
    """
    if not config.use_peft:
        return "full"
    if config.adapter_mode == "auto":
        named = config.lora_shape_given()
        if has_adapter and named:
            raise UserError(
                "the reference has an SFT adapter, and LoRA settings were given: which adapter is to be trained?",
                code="adapter-mode",
                where=", ".join("--" + name.replace("_", "-") for name in named),
                expected="adapter_mode stack: a new LoRA of this shape on top of the frozen SFT adapter; or "
                "adapter_mode continue: the SFT adapter itself, in its own shape",
                remedy="add --adapter-mode stack, or take the LoRA settings out",
            )
        return "continue" if has_adapter else "new"
    if (config.adapter_mode == "new") == has_adapter:
        raise UserError(
            f"adapter_mode {config.adapter_mode} does not fit this reference",
            code="adapter-mode",
            where="--adapter-mode",
            expected="continue or stack, since the reference has an SFT adapter"
            if has_adapter
            else "new, since the reference has no SFT adapter",
            found=config.adapter_mode,
            remedy="leave it out: auto chooses what fits",
        )
    return config.adapter_mode


def note_idle(config: TrainConfig, group: Group, progress: Progress) -> None:
    """Says so where a step has fewer forwards than there are processes: the batch does not grow with their number."""
    forwards, size = config.gradient_accumulation_steps, config.per_device_train_batch_size
    if forwards < group.size:
        progress.note(
            f"a step has {counted(forwards, 'forward')} of {counted(size, 'pair')} for {group.size} processes, so some "
            f"have nothing to do: the batch of a step ({counted(forwards * size, 'pair')}) is the same with any number "
            f"of processes; give --gradient-accumulation-steps {group.size} or more, or a smaller "
            "--per-device-train-batch-size"
        )


def own_device(config: TrainConfig, group: Group) -> torch.device:
    """The device of this process, made torch's current one if it is a GPU.

    Raises:
        UserError: another process of the group has the same GPU, which NCCL refuses.
    """
    device = pick_device(config.device, group.local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        refuse_shared_gpu(group, f"{socket.gethostname()}, GPU {torch.cuda.get_device_properties(device).uuid}")
    return device


def refuse_shared_gpu(group: Group, gpu: str) -> None:
    """Raises UserError in every process unless each has a GPU of its own."""
    everyones = group.gather(gpu)
    for rank, other in enumerate(everyones):
        if other in everyones[:rank]:
            raise UserError(
                "two processes of this run have the same GPU",
                code="ranks-one-gpu",
                where=f"ranks {everyones.index(other)} and {rank}",
                expected="a GPU for each process",
                found=other,
                remedy="start at most as many processes on a machine as it has GPUs (--nproc-per-node), and leave "
                "--device out",
                exit_status=5,
            )


def refuse_attention_on_cpu(config: TrainConfig, device: torch.device) -> None:
    """Raises UserError where the backward pass that training needs is not there, or not even the forward."""
    if config.attention == "varlen" and config.layout != "separate" and device.type == "cpu":
        raise UserError(
            "training through FlashAttention needs a GPU: it has no backward pass on a CPU",
            code="attention-unsupported",
            where="--attention varlen",
            expected="a GPU",
            found=device_name(device),
            remedy="leave --attention out",
            exit_status=5,
        )


def check_parity(
    config: TrainConfig, lm: CausalLM, view: View, rows: Sequence[int], reference: dict[str, Any]
) -> ParityReport:
    """Compares the policy, as the reference, with the cache on pairs spread over the view.

    Raises:
        UserError: they differ by more than rounding explains.
    """
    sample = spread(rows, config.parity_pairs)
    tolerance = config.parity_tolerance or parity_tolerance(lm, reference["quantization"], reference["dtype"])
    report = compare_with_cache(
        lm, view, sample, beta=config.beta, batch_tokens=reference["batch_tokens"], tolerance=tolerance
    )
    if not report.ok:
        raise UserError(
            "the policy is not the model that the cache was made with",
            code="parity-failed",
            where=f"{counted(report.pairs, 'pair')}, {counted(report.tokens, 'token')}, scored without the new adapter",
            expected=f"mean difference per token <= {tolerance:g} nats",
            found=f"mean {report.mean_diff:.4g}, largest {report.max_diff:.4g} nats; as reward noise "
            f"{report.reward_noise:.3g} at beta {config.beta:g}",
            remedy="train with the model, adapter and precision that the cache names (leave out --model, --adapter, "
            "--dtype and --quantization), or run precompute-ref for this model",
            exit_status=4,
        )
    return report


def parity_text(report: ParityReport) -> str:
    """What the comparison has found, on one line."""
    return (
        f"policy = cache on {counted(report.pairs, 'pair')}: mean difference {report.mean_diff:.2g}, largest "
        f"{report.max_diff:.2g} nats a token; reward noise {report.reward_noise:.2g}"
    )
