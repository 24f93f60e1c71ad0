"""Full fine-tuning: trains every weight of the base, without an adapter.

AdamW moves a weight by about the learning rate. In bfloat16 the next number after 0.02 is 1.2e-4 away, so at 1e-6 every
update would be rounded away. Therefore the optimizer always updates float32. A model that computes in bfloat16 stays as
both phases run it, and each weight has a float32 master that takes over its gradients and after each step gives it its
rounded value (Micikevicius et al. 2018, https://arxiv.org/abs/1710.03740, section 3.1). float32 weights under autocast
would need as much memory, counting autocast's casts, and would be another forward than the one whose numbers are
cached.

With layers sharded by FSDP, FSDP itself keeps the float32 rows and gathers them rounded to the compute dtype: the same
numbers, without a second copy of the rows (`engine/models/fsdp_rows`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dpoeng.cache.errors import UserError
from dpoeng.engine.config.fields import Quantization, TrainConfig, why_not_trained
from dpoeng.engine.models.checkpoint_names import named_class
from dpoeng.engine.models.fsdp_rows import make_whole, train_parts
from dpoeng.engine.models.model import CausalLM
from dpoeng.engine.models.multimodal.towers import left_out
from dpoeng.engine.models.sources import ModelSource, copy_beside, write_config
from dpoeng.engine.runtime.distributed import Group


def check_full(config: TrainConfig, reference: Mapping[str, Any], *, quantization: Quantization) -> None:
    """Raises UserError if all weights are to be trained but cannot be."""
    if config.use_peft:
        return
    if reference.get("adapter"):
        raise _refused(
            "full fine-tuning needs a plain checkpoint, and the reference has an SFT adapter",
            where=f"--no-use-peft, and {reference['adapter']}",
            expected="a reference without an adapter",
            remedy="merge the adapter (see examples/sft_then_dpo.sh), run precompute-ref on the merged model and train "
            "that; or leave --no-use-peft out",
        )
    dtype = config.dtype or reference["dtype"]
    if why := why_not_trained(quantization, dtype):
        raise _refused(
            why,
            where="--no-use-peft",
            expected="quantization none, and bfloat16 or float32",
            found=f"quantization {quantization}, dtype {dtype} (by default those of the cache's reference)",
            remedy="name the full-precision checkpoint with --model, here and in precompute-ref"
            if quantization == "stored"
            else "add --quantization none --dtype bfloat16: the policy then starts slightly off the reference, by the "
            "difference that the parity check reports; or run precompute-ref with these options",
        )
    model = str(config.model or reference["model"])
    if model.endswith(".gguf"):
        raise _refused(
            "a GGUF file has rounded weights, which full fine-tuning cannot train",
            where="--no-use-peft",
            expected="a directory with config.json and *.safetensors",
            found=model,
            remedy="name the original with --model here and in precompute-ref",
        )


def _refused(message: str, *, where: str, expected: str, remedy: str, found: str | None = None) -> UserError:
    return UserError(message, code="full-finetuning", where=where, expected=expected, found=found, remedy=remedy)


def train_all(lm: CausalLM) -> CausalLM:
    """Makes every weight trainable; a weight that is not float32 gets a float32 master.

    If layers are sharded, which must happen before this call, this process trains its share of them.
    """
    lm.base.requires_grad_(True)
    if lm.sharded:
        train_parts(lm)
    for weight in lm.base.parameters():
        if weight.dtype != torch.float32:
            master = nn.Parameter(weight.detach().float())
            weight.register_post_accumulate_grad_hook(_hand_over(master))
            lm.masters[weight] = master
    return lm


def add_left_out(source: ModelSource, folder: Path) -> None:
    """Copies weights that the trained text class does not have (such as a vision tower) from the base's files.

    The trained weights are saved already, under the names of the base's files; the copies go into a separate file.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    index_file = folder / "model.safetensors.index.json"
    if index_file.is_file():
        places: dict[str, str] = json.loads(index_file.read_text(encoding="utf-8"))["weight_map"]
    else:
        trained = folder / "model-trained.safetensors"
        (folder / "model.safetensors").rename(trained)  # if this file existed, it alone would be loaded
        with safe_open(trained, framework="pt") as tensors:
            places = dict.fromkeys(tensors.keys(), trained.name)
    left_out: dict[str, torch.Tensor] = {}
    for file in source.weight_files:
        with safe_open(file, framework="pt") as tensors:
            left_out |= {name: tensors.get_tensor(name) for name in tensors.keys() if name not in places}  # noqa: SIM118
    save_file(left_out, folder / "model-left-out.safetensors", metadata={"format": "pt"})
    places |= dict.fromkeys(left_out, "model-left-out.safetensors")
    total = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    index = {"metadata": {"total_size": total}, "weight_map": places}
    index_file.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _hand_over(master: nn.Parameter) -> Callable[[torch.Tensor], None]:
    """A hook that adds a weight's gradient to its master's, so that a step's forwards accumulate in float32."""

    def hand_over(weight: torch.Tensor) -> None:
        gradient = weight.grad
        assert gradient is not None, "called after a gradient has been left"
        if master.grad is None:
            master.grad = gradient.float()
        else:
            master.grad.add_(gradient)
        weight.grad = None  # so only one weight at a time has a gradient in its own dtype

    return hand_over


def whole_weights(lm: CausalLM, group: Group) -> dict[str, torch.Tensor] | None:
    """With sharded layers: the whole weights in host memory, for the first process to save; else None.

    All processes call this together.
    """
    if not lm.parts:
        return None
    parts = set(lm.parts.values())
    rounded = {name: part.detach().to(lm.dtype) for name, part in lm.trainable_parameters() if part in parts}
    return {**lm.base.state_dict(), **make_whole(lm, group, rounded)}


def save_model(
    lm: CausalLM, source: ModelSource, folder: Path, weights: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Writes a checkpoint that plain transformers loads: weights in the compute dtype, the rest as in `source`.

    `weights` is the result of `whole_weights`.
    """
    lm.base.save_pretrained(str(folder), state_dict=None if weights is None else dict(weights))
    if left_out(lm.base) or named_class(source, lm.base) is not None:
        add_left_out(source, folder)
    # The loaded model's own config was changed for scoring, so take the stored one.
    write_config(source, folder, str(lm.dtype).removeprefix("torch."))
    copy_beside(source, folder)
