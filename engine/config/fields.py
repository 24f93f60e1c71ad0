"""Typed configuration: defines every field of `dpoeng.yaml`, the command line and the Python API once.

One file may contain the fields of both phases; each command reads its own. Precedence: command line, then file, then
default; `config.files` reads and explains. A field with the same meaning as in TRL's DPOConfig, transformers'
TrainingArguments or peft's LoraConfig has the same name.
"""

from __future__ import annotations

import functools
import re
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    InstanceOf,
    PlainSerializer,
    ValidationInfo,
    WithJsonSchema,
    WrapValidator,
    field_validator,
    model_validator,
)

from dpoeng.engine.config.problems import Problem, as_error, unknown_field
from dpoeng.engine.data.in_memory import RowsInMemory
from dpoeng.engine.data.kinds.ranked import RankedPairs
from dpoeng.engine.losses.names import FDivergence, LossType, check_combination, check_names
from dpoeng.engine.losses.own import OwnLoss, as_own_loss

Dtype = Literal["auto", "float32", "bfloat16", "float16"]

Quantization = Literal["none", "8bit", "4bit", "stored"]

Attention = Literal["auto", "segments", "varlen"]

LayerOffloading = Literal["auto", "on", "off"]

Optimizer = Literal[
    "adamw_torch",
    "adamw_torch_fused",
    "adamw_bnb_8bit",
    "adamw_8bit",
    "paged_adamw_8bit",
    "paged_adamw_32bit",
]
# transformers' schedules that need only the number of steps.
Schedule = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"
]


def _device(name: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise ValueError("must be auto, cpu, cuda or cuda:N")
    return name


Device = Annotated[str, AfterValidator(_device)]

Mode = Literal["new", "stack", "continue", "full"]
"""What to train: a LoRA on the base, one on top of the SFT adapter, the SFT adapter itself, or all weights."""

# Only Python can pass rows in memory: the file and its schema know paths.
Source = Annotated[
    Path | InstanceOf[RowsInMemory],
    PlainSerializer(str, when_used="json"),
    WithJsonSchema({"type": "string", "format": "path"}),
]


# A loss of dpoeng, or the user's: `my_loss.py:my_loss`, `my_module:my_loss`, in Python also the function itself.
Loss = Annotated[
    LossType,
    WrapValidator(lambda value, known: value if isinstance(value, OwnLoss) else known(value)),
    PlainSerializer(str, when_used="json"),
    WithJsonSchema({"anyOf": [{"enum": [*typing.get_args(LossType)]}, {"type": "string", "pattern": ":"}]}),
]

# The fields of TrainConfig that define the loss.
LOSS_FIELDS = (
    "loss_type loss_weights beta label_smoothing ld_alpha f_divergence_type f_alpha_divergence_coef rpo_alpha "
    "use_weighting pair_weight_column discopop_tau dpop_lambda bco_reward_shift beta_dpo_alpha beta_dpo_momentum "
    "beta_dpo_keep simpo_gamma cpo_alpha desirable_weight undesirable_weight score_scale pairs_in_row"
).split()

# First field of a group -> the group's heading, in --help, `dpoeng config show` and the file that init writes.
SECTIONS = {
    "precompute-ref": {
        "pairs": "Pairs and model",
        "cache": "Cache",
        "quantization": "Precision and device",
        "max_length": "From pairs to tokens",
        "batch_tokens": "Batches",
    },
    "train": {
        "cache": "Pairs and output",
        "model": "Model, adapter and precision",
        "use_peft": "LoRA, or all weights",
        "loss_type": "Loss",
        "optim": "Optimisation",
        "per_device_train_batch_size": "Batches and memory",
        "report_to": "Log, evaluation and checkpoints",
        "parity_pairs": "Policy against cache",
    },
    "sweep": {"vary": "Sweep"},
}


def bare_type(annotation: Any) -> Any:
    """`X | None` -> X; a union of a flag and names -> text."""
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        kinds = [kind for kind in typing.get_args(annotation) if kind is not type(None)]
        return kinds[0] if len(kinds) == 1 else str
    return annotation


_INT64 = 2**63


class _Config(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False, coerce_numbers_to_str=True
    )

    @field_validator("*", mode="before")
    @classmethod
    def _as_meant(cls, value: Any, info: ValidationInfo) -> Any:
        """Accepts a list as words with commas; refuses true and false as numbers, which Python would accept."""
        kind = bare_type(cls.model_fields[info.field_name or ""].annotation)
        if typing.get_origin(kind) is tuple and isinstance(value, str):
            return tuple(word.strip() for word in value.split(",") if word.strip())
        number = value.strip() if isinstance(value, str) else value
        if kind is int and re.fullmatch(r"[-+]?\d+", str(number)) and not -_INT64 <= int(number) < _INT64:
            raise ValueError("has more than 64 bits")
        if kind in (int, float) and isinstance(value, bool):
            raise ValueError("must be a number, not true or false")
        return value

    @model_validator(mode="before")
    @classmethod
    def _known(cls, values: Any) -> Any:
        """Explain unknown fields with the command line's message; pydantic's says less."""
        names = [name for name in values if name not in cls.model_fields] if isinstance(values, dict) else []
        if names:
            raise as_error([unknown(cls, str(name), where=str(name)) for name in names])
        return values


def whole_layer(value: float | None) -> float | None:
    """Refuses a fractional layer number."""
    if value is not None and value > 1 and value != int(value):
        raise ValueError("must be a layer's number, or a share of the depth below 1")
    return value


class PrecomputeConfig(_Config):
    """Phase one: score the frozen reference once."""

    pairs: tuple[Source, ...] = Field((), description="Files or folders of preference pairs.")
    model: str | None = Field(None, description="The SFT base: a directory, a .gguf file or a hub id.")
    adapter: str | None = Field(None, description="SFT LoRA adapter on the base; the reference is base + adapter.")
    tokenizer: str | None = Field(
        None,
        description="Folder or hub id of tokenizer and chat template. Default: beside the adapter, or the model's.",
    )
    cache: Path = Field(Path("refcache"), description="The reference cache's folder; created if missing.")
    name: str | None = Field(
        None, description="Name of this set of pairs in the cache. Default: the first file's name without endings."
    )
    quantization: Quantization = Field(
        "none",
        description="Precision of the base: none, 8bit or 4bit (bitsandbytes); stored: as its files are quantised.",
    )
    dtype: Dtype = Field(
        "auto", description="Compute dtype; auto takes the checkpoint's, or float32 on a CPU without bfloat16 units."
    )
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = Field("nf4", description="4bit: the number format.")
    bnb_4bit_use_double_quant: bool = Field(True, description="4bit: quantise the scales too.")
    device: Device = Field("auto", description="auto, cpu, cuda or cuda:N.")
    layout: Literal["auto", "shared", "separate"] = Field(
        "auto", description="shared runs each prompt once; separate repeats it; auto tries and checks."
    )
    attention: Attention = Field(
        "auto",
        description="Over shared prompts: segments calls scaled_dot_product_attention on each; varlen makes one "
        "FlashAttention call a layer. auto tries varlen on a GPU, and checks.",
    )
    max_length: int = Field(1024, ge=2, description="Maximum tokens of prompt + response; longer texts are truncated.")
    max_prompt_length: int | None = Field(
        None, ge=1, description="Maximum tokens of a prompt. Default: no separate limit."
    )
    truncation_mode: Literal["keep_start", "keep_end"] = Field(
        "keep_start", description="Which end of a too long text to keep; see docs/data.md."
    )
    append_eos: bool = Field(True, description="End each text response with the end-of-sequence token, once.")
    train_on: Literal["assistant", "last", "all"] = Field(
        "assistant",
        description="What to score in a response of several messages: the assistant's turns, its last turn, or all.",
    )
    columns: dict[str, str] = Field({}, description="Other names of fields, e.g. chosen=response_a.")
    prompt_format: str | None = Field(
        None, description="How SFT wrapped a prompt given as text, e.g. 'Instruction: {prompt}\\nResponse:'."
    )
    where: str | None = Field(None, description="Use only rows for which this is true, e.g. 'confident'.")
    ranked_pairs: RankedPairs | None = Field(
        None,
        description="Pairs to make from a row of several scored responses: best, the best one against each worse one; "
        "all, each one against every worse one. Default: keep such rows whole; pairs_in_row then decides.",
    )
    max_reject_share: float = Field(0.05, ge=0, le=1, description="Stop if more than this share of rows is unusable.")
    batch_tokens: int | None = Field(
        None,
        ge=1,
        description="Positions computed in one forward. Default: 2048 on a CPU, 16384 on a GPU, or as many as fit.",
    )
    layer_offloading: LayerOffloading = Field(
        "auto",
        description="on: leave the base's layers in its files and load one at a time, for all pairs of a pass "
        "together: the same bytes in the memory of two layers. auto: only if the base does not fit.",
    )
    offload_gib: float | None = Field(
        None,
        gt=0,
        description="With layer offloading: GiB of hidden states to keep at most; this limits the pairs of a pass. "
        "Default: half of the free memory.",
    )
    offload_folder: Path | None = Field(
        None,
        description="With layer offloading: keep hidden states in a scratch file in this folder, not in host memory.",
    )
    trunk_layer: float | None = Field(
        None,
        ge=0,
        description="Also store the hidden states that enter this decoder layer, counted from 0; below 1 it is a share "
        "of the depth. Training the layers from there on then needs no layer below.",
    )
    shard: str | None = Field(
        None, description="Do one part of the work, e.g. 1/4 to 4/4 in four jobs on one cache folder."
    )
    shard_tokens: int = Field(
        65536,
        ge=1,
        description="Positions stored in one file of the cache: the most work that an interruption can lose.",
    )

    _whole_layer = field_validator("trunk_layer")(whole_layer)

    @field_validator("prompt_format")
    @classmethod
    def _newlines(cls, value: str | None) -> str | None:
        """Turns the two characters `\\n` from a shell into a newline."""
        return value.replace("\\n", "\n") if value is not None else None

    @model_validator(mode="after")
    def _room_for_a_response(self) -> PrecomputeConfig:
        if self.max_prompt_length is not None and self.max_prompt_length >= self.max_length:
            raise ValueError(
                f"max_prompt_length {self.max_prompt_length} leaves no room for a response in max_length "
                f"{self.max_length}"
            )
        return self


def why_not_trained(quantization: str | None, dtype: str | None) -> str:
    """Why weights in this precision cannot be trained; empty if they can."""
    if quantization not in (None, "none"):
        return f"quantised weights cannot be trained (quantization {quantization})"
    if dtype == "float16":
        return "float16 cannot represent the gradients of all weights: use bfloat16 or float32"
    return ""


class TrainConfig(_Config):
    """Phase two: train the policy against the cached log-probs."""

    cache: Path = Field(Path("refcache"), description="The reference cache that precompute-ref wrote.")
    view: str | None = Field(None, description="Which set of pairs of the cache. Default: the only one.")
    mix_with: tuple[str, ...] = Field(
        (),
        description="Further sets of pairs to train on: views of the cache, or FOLDER:VIEW of another one with the "
        "same reference.",
    )
    mix: tuple[float, ...] | None = Field(
        None,
        min_length=2,
        description="Share of each set in training, view's first, e.g. 0.7,0.3; an epoch has as "
        "many pairs as there are. Default: each pair once per epoch.",
    )
    order: Literal["random", "easy_first", "hard_first"] = Field(
        "random", description="Order of the pairs within each epoch; easy ones have the largest order_by."
    )
    order_by: str = Field(
        "margin",
        pattern="^(margin|margin_per_token|length_difference|spread|agreement|logp|logp_per_token|length|column:.+)$",
        description="With order: a score of the row as in dpoeng select, such as the reference's margin_per_token, or "
        "column:NAME, a number of yours.",
    )
    eval_view: str | None = Field(None, description="A set of pairs in the cache to evaluate on.")
    eval_share: float = Field(
        0.1, ge=0, lt=1, description="Without eval_view: share of prompts held out for evaluation; 0 for none."
    )
    output_dir: Path = Field(Path("out"), description="Folder for the adapter, the log and the checkpoints.")
    resume: bool | None = Field(
        None, description="true: require a checkpoint; false: start over; default: continue if there is one."
    )

    model: str | None = Field(None, description="Overrides the base that the cache names, for example if it moved.")
    adapter: str | None = Field(None, description="Overrides the SFT adapter that the cache names.")
    adapter_mode: Literal["auto", "new", "stack", "continue"] = Field(
        "auto",
        description="new: a fresh LoRA on the base; stack: a fresh LoRA on base + frozen SFT adapter; continue: the "
        "SFT adapter, trained further; auto: continue if the reference has an adapter, else new.",
    )
    init_adapter: str | None = Field(
        None,
        description="Start with the weights of this trained adapter, of the same shape. The reference does not change.",
    )
    quantization: Quantization | None = Field(None, description="Overrides the reference's quantisation.")
    dtype: Dtype | None = Field(None, description="Overrides the reference's compute dtype.")
    device: Device = Field("auto", description="auto, cpu, cuda or cuda:N.")
    layout: Literal["auto", "shared", "separate"] = Field(
        "auto", description="shared runs each prompt once; separate repeats it; auto tries and checks."
    )
    attention: Attention = Field(
        "auto",
        description="Over shared prompts: segments calls scaled_dot_product_attention on each; varlen makes one "
        "FlashAttention call a layer. auto tries varlen on a GPU, and checks.",
    )

    use_peft: bool = Field(
        True,
        description="Train a LoRA on the frozen base. false: full fine-tuning of all weights, without an adapter; "
        "use a learning rate of 1e-6 or less and an unquantised base.",
    )
    lora_r: int = Field(16, ge=1, le=65_536, description="LoRA rank.")
    lora_alpha: float = Field(32, gt=0, le=1e6, description="LoRA scale: the update is alpha / r times B A x.")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the input of the trained LoRA.")
    lora_target_modules: tuple[str, ...] = Field(("all-linear",), description="Modules that get a LoRA.")
    lora_target_parameters: tuple[str, ...] = Field(
        (),
        description="Parameters that get a LoRA besides the modules: the stacked experts of a mixture of experts, "
        "e.g. gate_up_proj,down_proj; gate.weight is its router.",
    )
    layers_to_transform: tuple[int, ...] | None = Field(
        None, min_length=1, description="Decoder layers that get a LoRA, counted from 0, e.g. 20,21,22. Default: all."
    )
    train_last_layers: int | None = Field(
        None, ge=1, description="Give only this many of the last decoder layers a LoRA."
    )
    use_rslora: bool = Field(False, description="Scale by alpha / sqrt(r), https://arxiv.org/abs/2312.03732")
    use_dora: bool = Field(False, description="Weight-decomposed LoRA, https://arxiv.org/abs/2402.09353")
    init_lora_weights: bool | Literal["gaussian", "orthogonal"] = Field(
        True, description="How LoRA weights start; with each of these the first policy equals the reference."
    )

    loss_type: tuple[Loss, ...] = Field(
        ("sigmoid",),
        min_length=1,
        description="One loss, or several to add up: sigmoid (DPO), sigmoid_norm, robust, ipo, hinge, exo_pair, "
        "nca_pair, bco_pair, sppo_hard, aot, aot_unpaired, apo_zero, apo_down, discopop, dpop, beta_dpo, simpo, cpo, "
        "orpo, sft; of rows with one response and a label kto, apo_zero_unpaired, bco; of rows with several scored "
        "responses soft_sigmoid, plackett_luce, listnet, lipo_lambda; or a function of yours, "
        "my_loss.py:my_loss; see docs/losses.md.",
    )
    loss_weights: tuple[float, ...] | None = Field(
        None, description="A weight for each loss of loss_type, e.g. sigmoid,sft with 1,0.2. Default: 1 each."
    )
    beta: float = Field(
        0.1,
        gt=0,
        description="How strongly the policy is kept near the reference. ipo: the paper's tau; orpo: its lambda; simpo "
        "needs 2 to 2.5; ipo and sigmoid_norm need more than DPO, since they divide by the length.",
    )
    label_smoothing: float = Field(
        0.0,
        ge=0,
        lt=0.5,
        description="Assumed share of pairs with swapped labels. With sigmoid this is cDPO; robust "
        "corrects for it without bias; exo_pair needs some, e.g. 1e-3.",
    )
    ld_alpha: float | None = Field(
        None,
        ge=0,
        le=1,
        description="LD-DPO: weight of the tokens by which the longer response exceeds the shorter one; 1 is plain "
        "DPO, 0 leaves them out. https://arxiv.org/abs/2409.06411",
    )
    f_divergence_type: FDivergence = Field(
        "reverse_kl",
        description="Divergence that keeps the policy near the reference: reverse_kl is DPO's. https://arxiv.org/abs/2309.16240",
    )
    f_alpha_divergence_coef: float = Field(0.5, description="alpha_divergence: its alpha; 1 is reverse_kl.")
    rpo_alpha: float | None = Field(
        None,
        gt=0,
        description="Adds rpo_alpha times the chosen response's mean negative log-prob per token, which keeps chosen "
        "responses likely. https://arxiv.org/abs/2404.19733",
    )
    use_weighting: bool = Field(
        False,
        description="WPO: give pairs that the policy would rarely write less weight. https://arxiv.org/abs/2406.11827",
    )
    pair_weight_column: str | None = Field(
        None, description="A column of numbers >= 0 in the pairs, e.g. margin, by which each pair's loss is multiplied."
    )
    discopop_tau: float = Field(0.05, gt=0, lt=1, description="discopop: temperature of the blend.")
    dpop_lambda: float = Field(
        50.0,
        ge=0,
        description="dpop: penalty, times beta, if the policy gives the chosen response less than the reference does.",
    )
    bco_reward_shift: bool = Field(
        False, description="bco_pair: subtract the mean reward of previous steps, as in the paper and unlike TRL."
    )
    beta_dpo_alpha: float = Field(0.6, ge=0, description="beta_dpo: how strongly beta follows the batch's mean margin.")
    beta_dpo_momentum: float = Field(0.9, ge=0, lt=1, description="beta_dpo: decay of the mean margin's average.")
    beta_dpo_keep: float = Field(
        1.0,
        gt=0,
        le=1,
        description="beta_dpo: share of a step's pairs to train on; pairs with usual margins are drawn more often. The "
        "paper uses 0.8.",
    )
    simpo_gamma: float = Field(0.5, ge=0, description="simpo: target margin, in units of the reward.")
    cpo_alpha: float = Field(1.0, ge=0, description="cpo: weight of its likelihood term; 0 turns it off.")
    desirable_weight: float = Field(
        1.0,
        ge=0,
        description="kto, apo_zero_unpaired, bco: weight of desirable rows; KTO wants desirable_weight times "
        "their number to be 1 to 4/3 of undesirable_weight times the number of the others.",
    )
    undesirable_weight: float = Field(1.0, ge=0, description="kto, apo_zero_unpaired, bco: weight of the other rows.")
    score_scale: float = Field(
        1.0,
        gt=0,
        description="soft_sigmoid, listnet, lipo_lambda: what scores are multiplied by; 0.1 for 1 to 10 stars.",
    )
    pairs_in_row: RankedPairs = Field(
        "all",
        description="Pairs that losses of pairs compare in a row of several scored responses: all, each one with every "
        "worse one; best, the best one with each worse one. A row's loss is the mean over its pairs.",
    )

    optim: Optimizer = Field(
        "adamw_torch",
        description="AdamW from torch (adamw_torch_fused: one kernel per step, the default on a GPU), or "
        "from bitsandbytes, with its state in 8 bits or paged out to the CPU's memory.",
    )
    learning_rate: float = Field(1e-5, gt=0, lt=1, description="Peak learning rate of AdamW.")
    lr_scheduler_type: Schedule = Field(
        "linear", description="How the learning rate falls: one of transformers' schedules."
    )
    warmup_ratio: float = Field(0.1, ge=0, lt=1, description="Share of the steps over which the learning rate rises.")
    warmup_steps: int = Field(
        0, ge=0, le=10**12, description="Number of warm-up steps; if > 0 it replaces warmup_ratio."
    )
    weight_decay: float = Field(0.0, ge=0, description="AdamW's weight decay, for matrices only.")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's decay of the mean.")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="AdamW's decay of the variance.")
    adam_epsilon: float = Field(1e-8, gt=0, description="AdamW's epsilon.")
    max_grad_norm: float = Field(1.0, ge=0, description="Gradients are clipped to this norm; 0 turns clipping off.")
    router_aux_loss_coef: float = Field(
        0.0,
        ge=0,
        description="Adds a mixture of experts' own balancing loss, times this; its config.json has the model's own.",
    )
    num_train_epochs: float = Field(3.0, gt=0, le=1e6, description="Passes over the pairs.")
    max_steps: int = Field(-1, ge=-1, le=10**12, description="Optimizer steps; if > 0 it replaces num_train_epochs.")
    per_device_train_batch_size: int = Field(
        2,
        ge=1,
        description="Pairs in one forward. Left out, a GPU takes more of a step's pairs at once if they are short and "
        "fit, or fewer.",
    )
    gradient_accumulation_steps: int = Field(
        4, ge=1, description="Forwards in one optimizer step, of all processes together."
    )
    per_device_eval_batch_size: int = Field(4, ge=1, description="Pairs in one forward of the evaluation.")
    fsdp: bool = Field(
        False,
        description="Under torchrun: shard the base's layers over the processes (FSDP2), if the base does not fit one "
        "card; with use_peft false also their gradients, float32 masters and moments. Otherwise each process has "
        "a full copy, and they share a step's forwards.",
    )
    gradient_checkpointing: bool | None = Field(
        None,
        description="Recompute layers in the backward pass: less memory, more time. Default: none on a CPU; on a GPU "
        "as many as its memory requires.",
    )
    activation_offloading: bool = Field(
        False, description="Keep the inputs that gradient checkpointing saves in host memory: slower steps."
    )
    layer_offloading: LayerOffloading = Field(
        "auto",
        description="on: leave the base's layers in its files and load one at a time, for all forwards of a step "
        "together: the same bytes in the memory of two layers. auto: only if the base does not fit.",
    )
    offload_gib: float | None = Field(
        None,
        gt=0,
        description="With layer offloading: GiB of hidden states to keep at most in a step. Default: half of what is "
        "free.",
    )
    offload_folder: Path | None = Field(
        None,
        description="With layer offloading: keep hidden states in a scratch file in this folder, not in host memory.",
    )
    seed: int = Field(42, ge=0, description="Seeds the LoRA, the order of the pairs, the held-out share and dropout.")
    full_determinism: bool = Field(
        False,
        description="On a GPU, sum in a fixed order: a repeated or resumed run then gives the same bytes, as it "
        "always does on a CPU. Slightly slower.",
    )

    report_to: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = Field(
        (), description="Trackers that also receive the metrics, besides metrics.jsonl."
    )
    report_samples: int = Field(
        0,
        ge=0,
        description="Held-out pairs whose texts, with their reward margins, trackers receive at the end.",
    )
    run_name: str | None = Field(None, description="Name of the run in trackers. Default: the output folder's name.")
    logging_steps: int = Field(1, ge=1, description="Steps between lines of metrics.jsonl.")
    eval_steps: int | None = Field(None, ge=1, description="Steps between evaluations. Default: once per epoch.")
    eval_group_by: tuple[str, ...] | None = Field(
        None,
        description="Columns to group held-out results by. Default: columns of text or yes/no with 2 to 12 values.",
    )
    metric_for_best_model: str | None = Field(
        None, description="Held-out metric to watch, e.g. rewards/accuracies. Default: loss."
    )
    greater_is_better: bool | None = Field(
        None,
        description="Whether a larger value of that metric is better. Default: false for a loss or a KL, else true.",
    )
    load_best_model_at_end: bool = Field(
        False, description="Save the adapter of the best evaluation, not of the last step."
    )
    early_stopping_patience: int | None = Field(
        None, ge=1, description="Stop after this many evaluations without a better value."
    )
    early_stopping_threshold: float = Field(0.0, ge=0, description="How much better a value must be to count.")
    save_steps: int | None = Field(None, ge=1, description="Steps between checkpoints. Default: a tenth of the run.")
    save_total_limit: int = Field(2, ge=1, description="Number of checkpoints to keep.")

    trunk_layer: float | None = Field(
        None,
        ge=0,
        description="Start each forward from the hidden states that phase one stored at this layer; 0: compute all "
        "layers. Default: the highest stored layer with no trained layer below it.",
    )
    parity_pairs: int = Field(32, ge=1, description="Pairs for comparing policy and cache before step one.")
    parity_tolerance: float | None = Field(
        None,
        gt=0,
        description="Largest allowed mean difference per token, in nats. Default: by the precision, and by this "
        "machine's noise if that is larger.",
    )

    _whole_layer = field_validator("trunk_layer")(whole_layer)

    @field_validator("report_to", mode="before")
    @classmethod
    def _no_tracker(cls, value: Any) -> Any:
        """Accepts transformers' "none", and one name without a list."""
        names = [value] if isinstance(value, str) else value
        return () if names in (None, ["none"], ("none",)) else names

    def lora_shape_given(self) -> list[str]:
        """The fields of a new LoRA's shape that were set explicitly."""
        shape = (
            "lora_r lora_alpha lora_target_modules lora_target_parameters layers_to_transform train_last_layers "
            "use_rslora use_dora init_lora_weights"
        )
        return sorted(name for name in {*shape.split()} & self.model_fields_set if getattr(self, name) is not None)

    @model_validator(mode="after")
    def _stacks_take_plain_lora(self) -> TrainConfig:
        others = ("lora_dropout", "use_dora", "layers_to_transform", "train_last_layers")
        named = [name for name in others if getattr(self, name)] if self.lora_target_parameters else []
        if named:
            raise ValueError(
                f"{named[0]} cannot be set with lora_target_parameters: peft adapts parameters by plain LoRA, in all "
                "layers"
            )
        return self

    @model_validator(mode="after")
    def _all_weights_are_no_adapter(self) -> TrainConfig:
        if self.use_peft:
            return self
        of_adapters = {"lora_dropout", "adapter", "init_adapter"} & self.model_fields_set
        named = sorted({*self.lora_shape_given(), *of_adapters})
        named += ["adapter_mode"] if self.adapter_mode != "auto" else []
        if named:
            raise ValueError(
                f"{', '.join(named)} cannot be set with use_peft false: full fine-tuning trains all weights and makes "
                "no adapter"
            )
        if why := why_not_trained(self.quantization, self.dtype):
            raise ValueError(f"use_peft false trains all weights, but {why}")
        return self

    @field_validator("loss_type", mode="before")
    @classmethod
    def _loss_names(cls, value: Any) -> Any:
        """Accepts one name, several, or several separated by commas."""
        value = as_own_loss(value) if callable(value) else value
        names = [word.strip() for word in value.split(",")] if isinstance(value, str) else value
        if isinstance(names, list | tuple):
            names = [as_own_loss(name) for name in names]
            check_names([name for name in names if not isinstance(name, OwnLoss)])
        return names

    @model_validator(mode="after")
    def _routers_see_whole_forwards(self) -> TrainConfig:
        if self.router_aux_loss_coef and self.layer_offloading == "on":
            raise ValueError("router_aux_loss_coef needs all layers in one forward: leave layer_offloading out")
        return self

    @model_validator(mode="after")
    def _losses_fit_their_settings(self) -> TrainConfig:
        values = {name: getattr(self, name) for name in LOSS_FIELDS}
        changed = [name for name in LOSS_FIELDS if values[name] != type(self).model_fields[name].default]
        check_combination(values, changed)
        return self

    def checkpoints_on(self, device_type: str) -> bool:
        """Whether layers are recomputed: as set; by default on a GPU, and if their inputs go to the host."""
        if self.gradient_checkpointing is None:
            return device_type == "cuda" or self.activation_offloading
        return self.gradient_checkpointing

    @property
    def watches_a_metric(self) -> bool:
        """Whether evaluations decide what is saved or when training ends."""
        return self.load_best_model_at_end or self.early_stopping_patience is not None

    @model_validator(mode="after")
    def _best_needs_evaluations(self) -> TrainConfig:
        for name in ("load_best_model_at_end", "early_stopping_patience", "metric_for_best_model"):
            if getattr(self, name) and self.eval_view is None and self.eval_share == 0:
                raise ValueError(f"{name} needs held-out pairs: set eval_view, or eval_share above 0")
        for name in ("greater_is_better", "metric_for_best_model"):
            if getattr(self, name) is not None and not self.watches_a_metric:
                raise ValueError(f"{name} has no effect without load_best_model_at_end or early_stopping_patience")
        if self.early_stopping_threshold and self.early_stopping_patience is None:
            raise ValueError("early_stopping_threshold has no effect without early_stopping_patience")
        return self

    @model_validator(mode="after")
    def _offloading_needs_checkpointing(self) -> TrainConfig:
        if self.activation_offloading and self.gradient_checkpointing is False:
            raise ValueError("activation_offloading needs gradient checkpointing: leave it on")
        return self

    @model_validator(mode="after")
    def _offloading_by_layer(self) -> TrainConfig:
        if self.layer_offloading != "on":
            return self
        for name, why in (
            ("fsdp", "fsdp shards the layers that layer_offloading leaves in the files"),
            ("use_dora", "DoRA needs the norms of whole weights"),
            ("activation_offloading", "layer_offloading already keeps these inputs"),
        ):
            if getattr(self, name):
                raise ValueError(f"layer_offloading on cannot be combined with {name}: {why}")
        if not self.use_peft:
            raise ValueError("layer_offloading on reads frozen layers from their files: it trains a LoRA (use_peft)")
        return self

    @model_validator(mode="after")
    def _places_differ(self) -> TrainConfig:
        if self.cache == self.output_dir:
            raise ValueError(f"cache and output_dir are the same folder, {self.cache}; a run cannot write into a cache")
        if self.eval_view is not None and self.eval_view == self.view:
            raise ValueError(f"view and eval_view are both {self.view}; name other pairs to evaluate on")
        return self

    @model_validator(mode="after")
    def _mixture_fits(self) -> TrainConfig:
        if self.mix is not None and len(self.mix) != 1 + len(self.mix_with):
            raise ValueError(
                f"mix has {len(self.mix)} numbers for {1 + len(self.mix_with)} sets of pairs (view, then mix_with); "
                "give one each"
            )
        if self.mix is not None and min(self.mix) <= 0:
            raise ValueError("mix takes numbers above 0; leave out a set that you do not want to train on")
        named = [name for name in (self.view, self.eval_view, *self.mix_with) if name is not None]
        if twice := {name for name in self.mix_with if named.count(name) > 1}:
            raise ValueError(f"{', '.join(sorted(twice))} is named twice among view, mix_with and eval_view")
        if self.order == "random" and self.order_by != type(self).model_fields["order_by"].default:
            raise ValueError("order_by has no effect with order random")
        return self

    @model_validator(mode="after")
    def _layers_are_named_once(self) -> TrainConfig:
        if self.layers_to_transform is not None and self.train_last_layers is not None:
            raise ValueError("layers_to_transform and train_last_layers both say which layers are trained: give one")
        if min(self.layers_to_transform or (0,)) < 0:
            raise ValueError("layers_to_transform counts layers from 0; train_last_layers counts from the end")
        return self

    @model_validator(mode="after")
    def _continue_keeps_its_shape(self) -> TrainConfig:
        named = self.lora_shape_given()
        if self.adapter_mode == "continue" and named:
            raise ValueError(
                f"{', '.join(named)} cannot be set with adapter_mode continue: the SFT adapter keeps its own shape; "
                "use adapter_mode stack for a new LoRA on top of it"
            )
        return self


class SweepConfig(_Config):
    """Many runs of phase two over one cache. Fields that do not vary are as in TrainConfig."""

    vary: dict[str, tuple[Any, ...]] = Field(
        {},
        description="A field of train and its values; every combination is a run. Several losses "
        "or modules that belong together are joined with +, as in loss_type=sigmoid,sigmoid+sft.",
    )
    rank_by: str = Field(
        "rewards/accuracies",
        description="Held-out metric to rank runs by. Losses and rewards are comparable only between runs "
        "with the same loss.",
    )
    halving_factor: int | None = Field(
        None,
        ge=2,
        description="Successive halving: all runs train a part of the way, the best one in so many train on, and so "
        "on; the others end early. 3 trains ten runs for about the steps of three.  [default: no run ends early]",
    )
    devices: tuple[str, ...] = Field(
        (),
        description="Train one run on each of these at a time, as in cuda:0,cuda:1; `all` takes every GPU.  "
        "[default: one run at a time, on --device]",
    )
    max_runs: int = Field(64, ge=1, description="Refuse larger sweeps, so that a typo cannot start hundreds of runs.")

    @field_validator("rank_by")
    @classmethod
    def _held_out_name(cls, value: str) -> str:
        """Accepts a metric with the prefix `eval_`, as metrics.jsonl writes it."""
        return value.removeprefix("eval_")

    @field_validator("vary", mode="before")
    @classmethod
    def _values(cls, value: Any) -> Any:
        """Accepts a list, words separated by commas, or one value."""
        if not isinstance(value, dict):
            return value

        def listed(values: Any) -> Any:
            if isinstance(values, str):
                return tuple(word.strip() for word in values.split(",") if word.strip())
            return tuple(values) if isinstance(values, list | tuple) else (values,)

        return {str(name).replace("-", "_"): listed(values) for name, values in value.items()}


COMMANDS: dict[str, type[PrecomputeConfig] | type[TrainConfig] | type[SweepConfig]] = {
    "precompute-ref": PrecomputeConfig,
    "train": TrainConfig,
    "sweep": SweepConfig,
}


@functools.cache
def known_fields() -> dict[str, list[str]]:
    """Every field of dpoeng -> the commands that have it."""
    fields: dict[str, list[str]] = {}
    for command, cls in COMMANDS.items():
        for name in cls.model_fields:
            fields.setdefault(name, []).append(command)
    return fields


def unknown(cls: type[BaseModel] | None, name: str, *, where: str) -> Problem:
    """Explains a name that is not a field of this command; see `problems.unknown_field`."""
    command = next((command for command, config in COMMANDS.items() if config is cls), None)
    return unknown_field(name, where=where, fields=known_fields(), command=command)
