"""Settings of `dpoeng plan`, for the command line and for Python."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from dpoeng.engine.config.fields import (
    Dtype,
    LayerOffloading,
    Optimizer,
    Quantization,
    TrainConfig,
    whole_layer,
    why_not_trained,
)


class PlanConfig(BaseModel):
    """A model, some cards, and the longest pair."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(description="A folder with config.json (no weights needed), or a name: Qwen/Qwen2.5-32B.")
    gpu: tuple[str, ...] = Field(("a100-80gb",), description="Cards, by name or by memory: 24gb.")
    gpus: int = Field(1, ge=1, description="Number of cards that share the work, under torchrun.")
    fsdp: bool = Field(False, description="Shard the frozen layers over these cards in phase two.")
    use_peft: bool = Field(True, description="Train a LoRA; false: full fine-tuning of all weights.")
    quantization: Quantization = Field(
        "8bit", description="Precision of the policy's base. Default with full fine-tuning: none."
    )
    reference_quantization: Quantization | None = Field(
        None, description="Precision of the reference in phase one. Default: the policy's."
    )
    dtype: Dtype = Field("bfloat16", description="Compute dtype; auto means bfloat16 here.")
    max_length: int = Field(2048, ge=2, description="Tokens of prompt + response, for each response.")
    responses: int = Field(2, ge=2, le=256, description="Responses to a prompt: two in a pair, more in a ranked row.")
    prompt_length: int = Field(
        1, ge=1, description="Tokens of the prompt among these. The prompt is computed once, so 1 is the worst case."
    )
    lora_r: int = Field(16, ge=1, description="LoRA rank, on all linear layers.")
    optim: Optimizer = Field("adamw_torch", description="As in dpoeng train.")
    gradient_checkpointing: bool = Field(True, description="Recompute layers in the backward pass.")
    trunk_layer: float | None = Field(
        None,
        gt=0,
        description="Begin phase two at this layer, with hidden states that phase one stores, and train the "
        "layers from there on; below 1 it is a share of the depth.",
    )
    layout: Literal["shared", "separate"] = Field(
        "shared", description="shared: compute a prompt once for all responses."
    )
    layer_offloading: LayerOffloading = Field(
        "auto",
        description="Load the base's layers one at a time; auto: on cards where the base does not fit otherwise.",
    )
    load_gb_per_s: float = Field(
        25.0, gt=0, description="GB/s from host memory to the card, for the time by layer; dpoeng doctor measures it."
    )
    disk_gb_per_s: float = Field(
        3.0, gt=0, description="GB/s at which files are read, likewise; dpoeng doctor --model measures it."
    )
    host_gib: float = Field(
        64.0, ge=0, description="GiB of host memory. Files that fit into it are read from disk once, others every time."
    )
    offload_gib: float = Field(16.0, gt=0, description="GiB of hidden states to keep on the host then.")
    batch: int = Field(8, ge=1, description="Pairs in an optimizer step.")
    pairs: int = Field(1000, ge=1, description="Number of pairs, for the time.")
    epochs: float = Field(3.0, gt=0, description="Passes over them.")
    utilisation: float = Field(0.4, gt=0, le=1, description="Share of the card's peak speed that is reached.")
    price_per_hour: float | None = Field(
        None, ge=0, description="Price of one card per hour, in any currency: shows the cost."
    )
    compare: bool = Field(True, description="Also show what other options and two models would need.")
    whole: bool = Field(False, description="Simulate every layer instead of a few: the same result, slower.")

    _whole_layer = field_validator("trunk_layer")(whole_layer)

    @model_validator(mode="before")
    @classmethod
    def _all_weights_are_not_quantised(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("use_peft") is False:
            values = {"quantization": "none", **values}
            if why := why_not_trained(values["quantization"], values.get("dtype")):
                raise ValueError(f"use_peft false trains all weights, but {why}")
            if "lora_r" in values:
                raise ValueError("lora_r has no effect with use_peft false (full fine-tuning)")
        return values

    @model_validator(mode="after")
    def _divided(self) -> PlanConfig:
        if self.fsdp and (self.gpus == 1 or not self.use_peft):
            raise ValueError("fsdp shards a frozen base over several cards: add --gpus 2 or more, and train a LoRA")
        return self

    @model_validator(mode="after")
    def _layers_stay_frozen(self) -> PlanConfig:
        if self.layer_offloading == "on" and (self.fsdp or not self.use_peft):
            raise ValueError("layer_offloading loads frozen layers one at a time: train a LoRA, without fsdp")
        if self.trunk_layer is not None and (self.fsdp or not self.use_peft):
            raise ValueError("trunk_layer leaves out frozen layers: use it with a LoRA, and without fsdp")
        return self

    @model_validator(mode="after")
    def _room_for_a_response(self) -> PlanConfig:
        if self.prompt_length >= self.max_length:
            raise ValueError("prompt_length leaves no room for a response within max_length")
        return self

    def train_config(self) -> TrainConfig:
        """The fields that phase two reads."""
        values = {
            **({"lora_r": self.lora_r} if self.use_peft else {"use_peft": False}),
            "optim": self.optim,
            "gradient_checkpointing": self.gradient_checkpointing,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": self.batch,
            "num_train_epochs": self.epochs,
        }
        return TrainConfig.model_validate(values)
