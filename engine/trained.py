"""A trained adapter and its model, found again: evaluated on cached pairs, and asked to go on before and after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dpoeng.cache.reader import View
from dpoeng.cache.schema import IdArray, as_ids
from dpoeng.engine.adapters import AdapterMode, before_training, load_trained_adapter
from dpoeng.engine.advice import Advice, advise
from dpoeng.engine.batch import evaluate
from dpoeng.engine.chat import to_sides
from dpoeng.engine.config import TrainConfig
from dpoeng.engine.encoding import encode
from dpoeng.engine.evaluation import Evaluation, summarise
from dpoeng.engine.generate import generate
from dpoeng.engine.loss_names import LossSettings
from dpoeng.engine.model import CausalLM, device_name, pick_device, set_mode
from dpoeng.engine.progress import QUIET, Progress
from dpoeng.engine.reference import ParityReport, load_policy_base
from dpoeng.engine.rows import Rows
from dpoeng.engine.run_folder import ADAPTER_FOLDER, RUN_FILE
from dpoeng.engine.run_record import read_json
from dpoeng.engine.scoring import choose_layout
from dpoeng.engine.shapes import PreferencePair
from dpoeng.engine.sources import find_adapter
from dpoeng.engine.train_setup import check_parity, resolve_adapter_mode, split

Which = Literal["held-out", "all"]


@dataclass(frozen=True, slots=True)
class Trained:
    """An adapter and what is known of its training.

    Attributes:
        adapter: the folder with adapter_config.json.
        run: the config of its run, where run.json lies beside it; else None.
        mode: how it stands on the base and the reference's adapter, where that is known.
    """

    adapter: Path
    run: dict[str, Any] | None
    mode: AdapterMode | None


def find_trained(path: Path) -> Trained:
    """A run's output folder, or an adapter's own, which may be a run's `adapter`.

    Raises:
        UserError: there is no adapter.
    """
    folder = path / ADAPTER_FOLDER if (path / ADAPTER_FOLDER).is_dir() else path
    find_adapter(str(folder))
    file = folder.parent / RUN_FILE
    if folder.name != ADAPTER_FOLDER or not file.is_file():
        return Trained(folder, None, None)
    record = read_json(file, dict)
    return Trained(folder, record["config"], record["adapter_mode"])


def load_trained(trained: Trained, config: TrainConfig, view: View, *, tokenizer: bool = False) -> CausalLM:
    """The base with the trained adapter, and under it the reference's where it was stacked, ready to score.

    Where the reference has an adapter it is loaded in any case, so that `before_training` can go back to it.

    Raises:
        UserError: base or adapters cannot be had, or do not fit.
    """
    reference = view.meta["reference"]
    sft_name = config.adapter or reference.get("adapter")
    mode = trained.mode or resolve_adapter_mode(TrainConfig.model_validate({}), has_adapter=sft_name is not None)
    lm = load_policy_base(config, reference, pick_device(config.device), tokenizer=tokenizer)
    sft = find_adapter(sft_name) if sft_name else None
    lm = load_trained_adapter(lm, mode, find_adapter(str(trained.adapter)), sft)
    set_mode(lm, training=False)
    choose_layout(lm, config.layout, config.attention)
    return lm


@dataclass(slots=True)
class EvaluationSummary:
    """What `dpoeng eval` found."""

    adapter: Path
    view: str
    which: str
    evaluation: Evaluation
    parity: ParityReport
    device: str
    loss_type: tuple[str, ...]
    beta: float
    advice: list[Advice] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {
            "adapter": str(self.adapter),
            "view": self.view,
            "which": self.which,
            "loss_type": list(self.loss_type),
            "beta": self.beta,
            **self.evaluation.record(),
            "advice": [remark.record() for remark in self.advice],
        }


def evaluate_adapter(
    trained: Trained, config: TrainConfig, which: Which | None = None, progress: Progress = QUIET
) -> EvaluationSummary:
    """Evaluates an adapter on cached pairs.

    Args:
        trained: see `find_trained`.
        config: of its run, with what is to be otherwise; cache, view, loss, precision and batch size are read.
        which: the pairs that its run held out, or all; by default the former where there is a run.
        progress: where notes go.

    Raises:
        UserError: the cache or the model is not usable, or the model without the adapter is not the cache's reference.
    """
    view = View.open(config.cache, config.view)
    eval_view = View.open(config.cache, config.eval_view) if config.eval_view else None
    which = which or ("all" if trained.run is None else "held-out")
    indices = split(view, eval_view, config)[1] if which == "held-out" else range(len(view))
    rows = Rows(eval_view if eval_view and which == "held-out" else view, indices)
    weights, labels = rows.weights(config.pair_weight_column), rows.labels(config.eval_group_by)
    lm = load_trained(trained, config, view)
    with before_training(lm):
        parity = check_parity(config, lm, view, range(len(view)), view.meta["reference"])
    settings = LossSettings.of(config)
    progress.note(f"evaluating {len(rows)} pairs of {rows.view.name} ({which})")
    found = evaluate(
        lm,
        rows,
        settings,
        weights,
        batch_size=config.per_device_eval_batch_size,
        per_token=not rows.view.spec.holds_sums,
    )
    result = summarise(found, rows.prompts(), labels, seed=config.seed, per_pair_loss=not settings.sorts_pairs)
    line = {f"eval_{name}": value for name, value in result.metrics.items()}
    return EvaluationSummary(
        adapter=trained.adapter,
        view=rows.view.name,
        which=which,
        evaluation=result,
        parity=parity,
        device=device_name(lm.device),
        loss_type=config.loss_type,
        beta=config.beta,
        advice=advise([], [line], loss_type=config.loss_type, beta=config.beta, held_out_pairs=result.pairs),
    )


@dataclass(frozen=True, slots=True)
class Generation:
    """One prompt as text, and how the model goes on before and after training."""

    prompt: str
    before: str
    after: str


def compare_generations(
    lm: CausalLM, prompts: Sequence[IdArray], *, special: bool = False, **settings: Any
) -> list[Generation]:
    """Continues prompts without the trained adapter and with it.

    Args:
        lm: from `load_trained`, with its tokenizer.
        prompts: token ids, [P] each.
        special: whether the prompts' special tokens are shown.
        settings: of `generate`; the same for both.
    """
    assert lm.tokenizer is not None, "generating needs the tokenizer"
    with before_training(lm):
        before = generate(lm, prompts, **settings)
    after = generate(lm, prompts, **settings)
    texts = lm.tokenizer.batch_decode([ids.tolist() for ids in prompts], skip_special_tokens=not special)
    return [Generation(*texts) for texts in zip(texts, before, after, strict=True)]


def held_out_prompts(view: View, config: TrainConfig, count: int) -> list[IdArray]:
    """The first `count` different prompts that a run held out, or of the view where it held out none."""
    rows = split(view, None, config)[1] or range(len(view))
    first = {view[row].ids.prompt_ids.tobytes(): view[row].ids.prompt_ids for row in rows}
    return list(first.values())[:count]


def encode_prompt(lm: CausalLM, text: str, *, chat: bool, prompt_format: str | None) -> IdArray:
    """A prompt as phase one would tokenise it: a user's message for the chat template, or a text.

    Raises:
        UserError: the tokenizer has no chat template.
    """
    if chat:
        turn = [{"role": "assistant", "content": "."}]
        pair = PreferencePair([{"role": "user", "content": text}], turn, turn)
    else:
        pair = PreferencePair((prompt_format or "{prompt}").replace("{prompt}", text), ".", ".")
    (encoded,) = encode(to_sides(pair, lm.tokenizer)[:1], lm.tokenizer)
    return as_ids(encoded.ids[: encoded.start])
