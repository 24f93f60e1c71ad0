"""The keyword arguments of the Python functions, typed for editors and type checkers.

Each is a field of a config, with the types that it accepts; `fields` and `plan` describe them. All are optional. A
test compares every line with its field.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Any, Literal, TypedDict

from dpoeng.engine.config.fields import Attention, Dtype, LayerOffloading, Optimizer, Quantization, Schedule
from dpoeng.engine.data.kinds.ranked import RankedPairs
from dpoeng.engine.losses.names import FDivergence, LossType

LossName = LossType | str | Callable[..., Any]
"""A loss of dpoeng by name, your own by its place (`my_loss.py:my_loss`), or your function itself."""


class PrecomputeSettings(TypedDict, total=False):
    """Arguments of `dpoeng.precompute_reference`."""

    name: str | None
    tokenizer: str | PathLike[str] | None
    quantization: Quantization
    dtype: Dtype
    bnb_4bit_quant_type: Literal["nf4", "fp4"]
    bnb_4bit_use_double_quant: bool
    device: str
    layout: Literal["auto", "shared", "separate"]
    attention: Attention
    max_length: int
    max_prompt_length: int | None
    truncation_mode: Literal["keep_start", "keep_end"]
    append_eos: bool
    train_on: Literal["assistant", "last", "all"]
    columns: Mapping[str, str]
    prompt_format: str | None
    ranked_pairs: RankedPairs | None
    where: str | None
    max_reject_share: float
    batch_tokens: int | None
    layer_offloading: LayerOffloading
    offload_gib: float | None
    offload_folder: str | PathLike[str] | None
    trunk_layer: float | None
    shard: str | None
    shard_tokens: int


class CheckSettings(TypedDict, total=False):
    """Arguments of `dpoeng.check`."""

    adapter: str | PathLike[str] | None
    tokenizer: str | PathLike[str] | None
    max_length: int
    max_prompt_length: int | None
    truncation_mode: Literal["keep_start", "keep_end"]
    append_eos: bool
    train_on: Literal["assistant", "last", "all"]
    columns: Mapping[str, str]
    prompt_format: str | None
    ranked_pairs: RankedPairs | None
    where: str | None
    max_reject_share: float


class LossFields(TypedDict, total=False):
    """The fields that define the loss, in `dpoeng.train` and `dpoeng.evaluate`."""

    loss_type: LossName | Sequence[LossName]
    loss_weights: Sequence[float] | None
    beta: float
    label_smoothing: float
    ld_alpha: float | None
    f_divergence_type: FDivergence
    f_alpha_divergence_coef: float
    rpo_alpha: float | None
    use_weighting: bool
    pair_weight_column: str | None
    discopop_tau: float
    dpop_lambda: float
    bco_reward_shift: bool
    beta_dpo_alpha: float
    beta_dpo_momentum: float
    beta_dpo_keep: float
    simpo_gamma: float
    cpo_alpha: float
    desirable_weight: float
    undesirable_weight: float
    score_scale: float
    pairs_in_row: RankedPairs


class TrainSettings(LossFields, total=False):
    """Arguments of `dpoeng.train`."""

    view: str | None
    mix_with: str | Sequence[str]
    mix: Sequence[float] | None
    order: Literal["random", "easy_first", "hard_first"]
    order_by: str
    eval_view: str | None
    eval_share: float
    resume: bool | None
    model: str | PathLike[str] | None
    adapter: str | PathLike[str] | None
    adapter_mode: Literal["auto", "new", "stack", "continue"]
    init_adapter: str | PathLike[str] | None
    quantization: Quantization | None
    dtype: Dtype | None
    device: str
    layout: Literal["auto", "shared", "separate"]
    attention: Attention
    use_peft: bool
    lora_r: int
    lora_alpha: float
    lora_dropout: float
    lora_target_modules: str | Sequence[str]
    lora_target_parameters: str | Sequence[str]
    layers_to_transform: int | Sequence[int] | None
    train_last_layers: int | None
    use_rslora: bool
    use_dora: bool
    init_lora_weights: bool | Literal["gaussian", "orthogonal"]
    optim: Optimizer
    learning_rate: float
    lr_scheduler_type: Schedule
    warmup_ratio: float
    warmup_steps: int
    weight_decay: float
    adam_beta1: float
    adam_beta2: float
    adam_epsilon: float
    max_grad_norm: float
    router_aux_loss_coef: float
    num_train_epochs: float
    max_steps: int
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    per_device_eval_batch_size: int
    fsdp: bool
    gradient_checkpointing: bool | None
    activation_offloading: bool
    layer_offloading: LayerOffloading
    offload_gib: float | None
    offload_folder: str | PathLike[str] | None
    seed: int
    full_determinism: bool
    report_to: (
        Literal["tensorboard", "wandb", "mlflow", "trackio"]
        | Sequence[Literal["tensorboard", "wandb", "mlflow", "trackio"]]
    )
    report_samples: int
    run_name: str | None
    logging_steps: int
    eval_steps: int | None
    eval_group_by: str | Sequence[str] | None
    metric_for_best_model: str | None
    greater_is_better: bool | None
    load_best_model_at_end: bool
    early_stopping_patience: int | None
    early_stopping_threshold: float
    save_steps: int | None
    save_total_limit: int
    trunk_layer: float | None
    parity_pairs: int
    parity_tolerance: float | None


class EvaluateSettings(LossFields, total=False):
    """Arguments of `dpoeng.evaluate`; they replace the run's."""

    cache: str | PathLike[str]
    view: str | None
    eval_view: str | None
    eval_share: float
    model: str | PathLike[str] | None
    quantization: Quantization | None
    dtype: Dtype | None
    device: str
    layout: Literal["auto", "shared", "separate"]
    per_device_eval_batch_size: int
    seed: int
    eval_group_by: str | Sequence[str] | None
    parity_pairs: int
    parity_tolerance: float | None
    layer_offloading: LayerOffloading
    offload_gib: float | None
    offload_folder: str | PathLike[str] | None


class CompareSettings(TypedDict, total=False):
    """Arguments of `dpoeng.compare`; they replace the run's."""

    cache: str | PathLike[str]
    view: str | None
    model: str | PathLike[str] | None
    quantization: Quantization | None
    dtype: Dtype | None
    device: str


class ExportSettings(TypedDict, total=False):
    """Arguments of `dpoeng.export`; they replace the run's."""

    cache: str | PathLike[str]
    view: str | None
    model: str | PathLike[str] | None
    device: str


class RoundFields(LossFields, total=False):
    """Of `dpoeng.train_rounds`: in place of what the run had."""

    cache: str | PathLike[str]
    device: str
    seed: int
    optim: Optimizer
    learning_rate: float
    lr_scheduler_type: Schedule
    warmup_ratio: float
    warmup_steps: int
    weight_decay: float
    max_grad_norm: float
    num_train_epochs: float
    max_steps: int
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    per_device_eval_batch_size: int
    gradient_checkpointing: bool | None
    activation_offloading: bool
    layer_offloading: LayerOffloading
    offload_gib: float | None
    offload_folder: str | PathLike[str] | None
    report_to: (
        Literal["tensorboard", "wandb", "mlflow", "trackio"]
        | Sequence[Literal["tensorboard", "wandb", "mlflow", "trackio"]]
    )
    logging_steps: int
    eval_steps: int | None
    save_steps: int | None
    save_total_limit: int
    full_determinism: bool


class PlanSettings(TypedDict, total=False):
    """Arguments of `dpoeng.plan`."""

    gpu: str | Sequence[str]
    gpus: int
    fsdp: bool
    use_peft: bool
    quantization: Quantization
    reference_quantization: Quantization | None
    dtype: Dtype
    max_length: int
    responses: int
    prompt_length: int
    lora_r: int
    optim: Optimizer
    gradient_checkpointing: bool
    trunk_layer: float | None
    layout: Literal["shared", "separate"]
    layer_offloading: LayerOffloading
    load_gb_per_s: float
    disk_gb_per_s: float
    host_gib: float
    offload_gib: float
    batch: int
    pairs: int
    epochs: float
    utilisation: float
    price_per_hour: float | None
    compare: bool
    whole: bool
