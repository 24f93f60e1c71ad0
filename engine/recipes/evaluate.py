"""Finds a trained policy (an adapter or a whole checkpoint), evaluates it, and generates before and after training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from dpoeng.cache.errors import UserError
from dpoeng.cache.selection.mixed import AnyView
from dpoeng.cache.words import counted
from dpoeng.engine.config.fields import Mode, PrecomputeConfig, TrainConfig
from dpoeng.engine.losses.batch import LossState, PreferenceLoss
from dpoeng.engine.losses.names import LossSettings
from dpoeng.engine.losses.own_check import check_own_losses
from dpoeng.engine.memory.offloading import decide_scoring
from dpoeng.engine.models.adapters import (
    before_training,
    load_reference_adapter,
    load_trained_adapter,
    stands_alone,
)
from dpoeng.engine.models.layers.setting_up import check_adapter_by_layer
from dpoeng.engine.models.loading import pick_device
from dpoeng.engine.models.model import CausalLM, device_name, set_mode
from dpoeng.engine.models.sources import find_adapter, find_model
from dpoeng.engine.recipes.inputs import open_views, split
from dpoeng.engine.recipes.policy import check_parity
from dpoeng.engine.reference.limits import longest_text
from dpoeng.engine.reference.loading import load_policy_base
from dpoeng.engine.reference.parity import ParityReport
from dpoeng.engine.runs.checkpoint import read_finished
from dpoeng.engine.runs.folder import ADAPTER_FOLDER, MODEL_FOLDER, RUN_FILE
from dpoeng.engine.runs.identity import rows_digest
from dpoeng.engine.runs.reading import read_json
from dpoeng.engine.runtime.out_of_memory import release_memory
from dpoeng.engine.runtime.progress import QUIET, Progress
from dpoeng.engine.scoring.passes import choose_how_to_score
from dpoeng.engine.training.advice import Advice, advise
from dpoeng.engine.training.batch_loss import evaluate
from dpoeng.engine.training.evaluation import Evaluation, summarise
from dpoeng.engine.training.rows import Rows

Which = Literal["held-out", "all"]

Before = TypeVar("Before")

After = TypeVar("After")


@dataclass(frozen=True, slots=True)
class Trained:
    """A trained model or adapter, and the record of its run.

    Attributes:
        folder: folder with adapter_config.json, or (mode `full`) with the config.json of a whole checkpoint.
        run: config of its run, if run.json is next to it; else None.
        mode: how an adapter relates to the base and the reference's adapter, if known; or `full`.
    """

    folder: Path
    run: dict[str, Any] | None
    mode: Mode | None


def find_trained(path: Path) -> Trained:
    """Accepts a run's output folder, the folder of its result, any adapter, or any fully trained checkpoint.

    Raises:
        UserError: it is none of these.
    """
    folder = next((path / name for name in (ADAPTER_FOLDER, MODEL_FOLDER) if (path / name).is_dir()), path)
    whole = (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file()
    if not whole:
        find_adapter(str(folder))
    file = folder.parent / RUN_FILE
    if folder.name != (MODEL_FOLDER if whole else ADAPTER_FOLDER) or not file.is_file():
        return Trained(folder, None, "full" if whole else None)
    record = read_json(file, dict, ("config", "adapter_mode"))
    return Trained(folder, record["config"], record["adapter_mode"])


def load_trained(
    trained: Trained, config: TrainConfig, view: AnyView, *, tokenizer: bool = False, by_layer: bool = False
) -> CausalLM:
    """The policy after training, ready to score: the base with its adapters, or the fully trained checkpoint.

    If the reference has an adapter, it is loaded too, so that `before_training` can switch to it. With `by_layer` the
    base's layers stay in its files.

    Raises:
        UserError: base or adapters are not available, or do not fit.
    """
    reference = view.meta["reference"]
    device = pick_device(config.device)
    sft_name = config.adapter or reference.get("adapter")
    mode = trained.mode or ("continue" if sft_name else "new")
    if mode == "full":
        here = config.model_copy(update={"model": str(trained.folder)})
        return _ready(load_policy_base(here, reference, device, tokenizer=tokenizer, by_layer=by_layer), config, view)
    lm = load_policy_base(config, reference, device, tokenizer=tokenizer, by_layer=by_layer)
    sft = find_adapter(sft_name) if sft_name else None
    if sft is not None and mode != "stack" and stands_alone(sft):
        sft = None  # `before_and_after` scores the reference in a separate model
    return _ready(load_trained_adapter(lm, mode, find_adapter(str(trained.folder)), sft), config, view)


def before_and_after(
    trained: Trained,
    config: TrainConfig,
    view: AnyView,
    before: Callable[[CausalLM], Before],
    after: Callable[[CausalLM], After],
    *,
    tokenizer: bool = False,
    by_layer: bool = False,
) -> tuple[Before, After]:
    """Runs `before` on the policy before training and `after` on the trained one, with one model in memory at a time.

    With an adapter it is the same model, with its adapter off and on. For fully trained weights, and for an adapter
    that changed the base (PiSSA), the reference's model comes first.

    Raises:
        UserError: see `load_trained`.
    """
    reference = view.meta["reference"]
    sft_name = config.adapter or reference.get("adapter")
    sft = find_adapter(sft_name) if sft_name and trained.mode != "full" else None
    apart = sft is not None and trained.mode != "stack" and stands_alone(sft)
    if trained.mode != "full" and not apart:
        lm = load_trained(trained, config, view, tokenizer=tokenizer, by_layer=by_layer)
        with before_training(lm):
            earlier = before(lm)
        return earlier, after(lm)
    base = load_policy_base(config, reference, pick_device(config.device), tokenizer=tokenizer, by_layer=by_layer)
    if sft is not None:
        base = load_reference_adapter(base, sft)
    earlier = before(_ready(base, config, view))
    # Release it before the second one is loaded: there may be no room for both. Its modules refer to each other in
    # cycles, which only the garbage collector frees.
    del base
    release_memory()
    return earlier, after(load_trained(trained, config, view, tokenizer=tokenizer, by_layer=by_layer))


def _ready(lm: CausalLM, config: TrainConfig, view: AnyView) -> CausalLM:
    set_mode(lm, training=False)
    longest = longest_text(view[row].ids for row in range(len(view)))
    choose_how_to_score(lm, config.layout, config.attention, longest, ranked=view.rows == "ranked")
    return lm


def _by_layer(trained: Trained, config: TrainConfig, rows: Rows, reference: dict[str, Any], progress: Progress) -> bool:
    """Whether the policy is scored layer by layer.

    Raises:
        UserError: it would have to be, and one of its adapters changes more than that can follow.
    """
    adapter = None if trained.mode == "full" else str(trained.folder)
    source = find_model(config.model or reference["model"], revision=reference.get("revision"))
    values = {
        "adapter": adapter,
        "quantization": config.quantization or reference["quantization"],
        "dtype": config.dtype or reference["dtype"],
        "layer_offloading": config.layer_offloading,
    }
    scoring = PrecomputeConfig.model_validate(values)
    pairs = (row.ids for row in rows)
    found = decide_scoring(scoring, source, pairs, pick_device(config.device), progress.note)
    for name in (config.adapter or reference.get("adapter"), adapter) if found else ():
        check_adapter_by_layer(find_adapter(name) if name else None)
    return found


@dataclass(slots=True)
class EvaluationSummary:
    """Result of `dpoeng eval`."""

    trained: Path
    view: str
    which: str
    evaluation: Evaluation
    parity: ParityReport
    device: str
    loss_type: tuple[str, ...]
    beta: float
    advice: list[Advice] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """The result as JSON values."""
        return {
            "trained": str(self.trained),
            "view": self.view,
            "which": self.which,
            "loss_type": list(self.loss_type),
            "beta": self.beta,
            **self.evaluation.record(),
            "advice": [remark.record() for remark in self.advice],
        }


def evaluate_trained(
    trained: Trained, config: TrainConfig, which: Which | None = None, progress: Progress = QUIET
) -> EvaluationSummary:
    """Evaluates a trained policy on cached pairs.

    Args:
        trained: see `find_trained`.
        config: config of its run, with changes; reads cache, view, loss, precision and batch size.
        which: the pairs that the run held out, or all; by default the former if there is a run.
        progress: receives notes.

    Raises:
        UserError: the cache or the model is not usable, or the model before training is not the cache's reference.
    """
    which = which or ("all" if trained.run is None else "held-out")
    view, rows = _open_rows(trained, config, which)
    weights, labels = rows.weights(config.pair_weight_column), rows.labels(config.eval_group_by)
    check_own_losses(config.loss_type, config.beta, per_token=not view.spec.holds_sums)
    settings = LossSettings.of(config)
    state = _loss_state(trained, settings, progress) if settings.remembers else {}

    def compare(lm: CausalLM) -> tuple[ParityReport, str]:
        return check_parity(config, lm, Rows.all_of(view)), device_name(lm.device)

    def score(lm: CausalLM) -> PreferenceLoss:
        progress.note(f"evaluating {counted(len(rows), 'pair')} of view {rows.view.name!r} ({which})")
        return evaluate(
            lm,
            rows,
            settings,
            weights,
            batch_size=config.per_device_eval_batch_size,
            state=state,
            per_token=not rows.view.spec.holds_sums,
        )

    by_layer = _by_layer(trained, config, rows, view.meta["reference"], progress)
    (parity, device), losses = before_and_after(trained, config, view, compare, score, by_layer=by_layer)
    result = summarise(losses, rows.prompts(), labels, seed=config.seed, per_pair_loss=not settings.sorts_pairs)
    line = {f"eval_{name}": value for name, value in result.metrics.items()}
    return EvaluationSummary(
        trained=trained.folder,
        view=rows.view.name,
        which=which,
        evaluation=result,
        parity=parity,
        device=device,
        loss_type=config.loss_type,
        beta=config.beta,
        advice=advise([], [line], loss_type=config.loss_type, beta=config.beta, held_out_pairs=result.pairs),
    )


def _loss_state(trained: Trained, settings: LossSettings, progress: Progress) -> LossState:
    """The means over the run's steps that its losses compare with, as they were at its end."""
    finished = read_finished(trained.folder.parent) if trained.run is not None else None
    if trained.run is None or finished is None or tuple(trained.run["loss_type"]) != settings.loss_type:
        progress.note(
            f"{' + '.join(settings.loss_type)} compares with means over a run's steps; there is no such run, so these "
            "are the evaluated pairs' own"
        )
        return {}
    state: LossState = finished.state.get("losses", {})
    return state


def _open_rows(trained: Trained, config: TrainConfig, which: Which) -> tuple[AnyView, Rows]:
    """The training view, to compare the model before training with, and the rows to evaluate.

    Raises:
        UserError: there are none, or the run's held-out pairs cannot be determined any more.
    """
    view, eval_view = open_views(config)
    if which == "all":
        rows = Rows.all_of(view)
    else:
        if eval_view is None:
            _check_pairs_of_run(trained, view)
        rows = Rows(eval_view or view, split(view, eval_view, config)[1])
    if not rows:
        raise UserError(
            "no pairs to evaluate",
            code="eval-empty",
            where=str(trained.folder.parent),
            expected="pairs that the run held out",
            found=f"none of {counted(len(view), 'pair')}",
            remedy="add --pairs all to evaluate on all pairs of the view, training pairs included",
        )
    return view, rows


def _check_pairs_of_run(trained: Trained, view: AnyView) -> None:
    """Raises if the view changed since training: a new split would hold out pairs that the run trained on."""
    file = trained.folder.parent / RUN_FILE
    trained_on = read_json(file, dict, ("identity",))["identity"].get("pairs") if trained.run is not None else None
    if trained_on is not None and trained_on != rows_digest(view):
        raise UserError(
            "the view has changed since the run was trained",
            code="eval-changed",
            where=f"view {view.name}, {counted(len(view), 'pair')}",
            expected=f"the pairs that {file} was trained on",
            found="pairs were added, removed or reordered, so the held-out ones are unknown",
            remedy="add --pairs all to evaluate on all of them, or put new pairs into a separate view",
        )
