"""Savings of a trunk, and the loss from training fewer layers.

    python -m dpoeng.bench.studies.trunk --model M --pairs FILE [--peer-python PYTHON] [--work DIR] [--record FILE]

Cost: a step of the top third from a trunk, of the same layers in the whole model, and of TRL with the same
`layers_to_transform`, each in a separate process, with the same token ids, order and start of the LoRA; so the losses
are equal, which the record shows. Peak memory is that of tensors, by the allocator, with the weights.

Quality: held-out accuracy and margin after the same number of steps, for all layers, the top half, third and sixth, and
several seeds. Runs are skipped that are complete, so the same command continues after a stop.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Protocol

import click
import numpy as np
import torch

from dpoeng.bench.compare import check_peer, in_folder, kept, relative, run_process
from dpoeng.bench.job import Figures, Job, Program
from dpoeng.bench.measuring.records import named_settings, show, stamp
from dpoeng.bench.studies.quality import split_pairs, with_intervals
from dpoeng.cache.info import cache_info
from dpoeng.cache.words import MIB
from dpoeng.engine.config.fields import Dtype, PrecomputeConfig, TrainConfig
from dpoeng.engine.models.model_config import config_of, sizes
from dpoeng.engine.models.sources import find_model, read_fields
from dpoeng.engine.recipes.precompute import precompute_reference
from dpoeng.engine.recipes.train import train
from dpoeng.engine.runs.metrics import HELD_OUT_FILE, read_lines
from dpoeng.engine.runtime.outputs import scratch_folder
from dpoeng.engine.runtime.progress import Advance, NoProgress
from dpoeng.engine.training.intervals import Floats

SHARES: Final = {"all layers": 1, "top half": 2, "top third": 3, "top sixth": 6}
_OF_QUALITY: Final = {"steps", "seeds", "dtype"}
METRICS: Final = ("rewards/accuracies", "rewards/margins")


@dataclass(frozen=True, slots=True)
class TrunkSettings:
    """What is trained.

    Attributes:
        pairs_count: number of pairs to use, the first ones of the files.
        held_out: share of their prompts to hold out.
        steps: of each run of the quality part; 0 leaves it out.
        cost_steps: of each program of the cost part; the first one, which warms up, is left out of the mean; 0 leaves
            the part out.
        seeds: runs of each share.
        work: keeps caches and finished runs.
    """

    model: str
    pairs: tuple[Path, ...]
    work: Path
    peer_python: str | None = None
    pairs_count: int = 300
    held_out: float = 0.33
    steps: int = 50
    cost_steps: int = 9
    seeds: int = 3
    batch_size: int = 4
    learning_rate: float = 2e-4
    lora_r: int = 16
    dtype: Dtype = "bfloat16"
    cost_dtype: Dtype = "float32"
    max_length: int = 128
    max_prompt_length: int = 64


# --------------------------------------------------------------------------- the whole


def trunk_study(settings: TrunkSettings) -> dict[str, Any]:
    """Measures both parts and returns the record.

    Raises:
        UserError: model, pairs or peer are missing, or a program failed.
    """
    if settings.peer_python is not None:
        check_peer(settings.peer_python)
    work = settings.work.resolve()
    scratch_folder(work, "trunk")
    train_file, held_out_file = split_pairs(settings.pairs, settings.pairs_count, settings.held_out, work)
    record = stamp("trunk", torch.device("cpu"), named_settings(settings))
    depth = sizes(config_of(read_fields(find_model(settings.model)))).layers
    asked = {name: value for name, value in record["settings"].items() if name not in _OF_QUALITY}

    def costs() -> dict[str, Any]:
        return _costs(settings, depth, train_file, work / "cost")

    return {
        **record,
        "layers": depth,
        "cost": kept(work / "cost", asked, costs) if settings.cost_steps else None,
        "quality": _quality(settings, depth, train_file, held_out_file, work) if settings.steps else None,
    }


# --------------------------------------------------------------------------- cost


def _costs(settings: TrunkSettings, depth: int, pairs: Path, work: Path) -> dict[str, Any]:
    """Each program's step: CPU seconds, peak of tensors; and how far the losses lie apart."""
    last = depth // SHARES["top third"]
    folder = find_model(settings.model).folder.resolve()
    job = Job(
        program="dpoeng reference",
        model=str(folder),
        pairs=(str(pairs),),
        cache=str(work / "refcache"),
        scratch="",
        batch_size=settings.batch_size,
        steps=0,
        dtype=settings.cost_dtype,
        max_length=settings.max_length,
        lora_r=settings.lora_r,
        learning_rate=settings.learning_rate,
        seed=0,
        threads=torch.get_num_threads(),
        device="cpu",
        max_prompt_length=settings.max_prompt_length,
        train_last_layers=last,
        trunk_layer=depth - last,
    )
    run_process(sys.executable, in_folder(job, work / "reference"))
    programs: dict[str, tuple[Program, str, int]] = {
        "from the trunk": ("dpoeng", sys.executable, depth - last),
        "the whole model": ("dpoeng", sys.executable, 0),
    }
    if settings.peer_python is not None:
        programs["TRL, precomputed"] = ("trl precomputed", settings.peer_python, 0)
        programs["TRL, adapter off"] = ("trl adapter off", settings.peer_python, 0)
    found: dict[str, Any] = {}
    losses: dict[str, list[float]] = {}
    for name, (program, python, layer) in programs.items():
        own = replace(job, program=program, steps=settings.cost_steps, trunk_layer=layer)
        place = work / name.replace(" ", "-").replace(",", "")
        timed = run_process(python, in_folder(own, place))
        in_tensors = run_process(python, in_folder(replace(own, tensors=True, steps=2), work / f"{place.name}-memory"))
        losses[name] = timed.losses
        weights = weights_bytes(settings.model, settings.cost_dtype, layer)
        found[name] = {**_cost(timed), "weights_bytes": weights, "peak_bytes": weights + in_tensors.train_peak_bytes}
    trunk = next(one for one in cache_info(job.cache).trunks)
    return {
        "last_layers": last,
        "programs": found,
        "loss_difference": {name: relative(losses["from the trunk"], own) for name, own in losses.items()},
        "trunk_bytes": trunk.bytes,
        "trunk_texts": trunk.texts,
    }


def _cost(figures: Figures) -> dict[str, float]:
    steps = figures.steps[1:]
    return {"step_cpu_s": float(np.median([step.cpu_s for step in steps])), "steps": len(steps)}


def weights_bytes(model: str, dtype: Dtype, trunk_layer: int) -> int:
    """Bytes of a base's weights, of one that begins at a trunk if a layer is given; counted without loading it."""
    from dpoeng.engine.models.loading import empty_model
    from dpoeng.engine.models.model import DTYPES
    from dpoeng.engine.models.trunk.stand_ins import cut_below

    lm = empty_model(read_fields(find_model(model)), quantization="none", dtype=DTYPES[dtype])
    if trunk_layer:
        cut_below(lm.base, trunk_layer)
    return sum(parameter.numel() * DTYPES[dtype].itemsize for parameter in lm.base.parameters())  # a tied one once


# --------------------------------------------------------------------------- quality


def _quality(settings: TrunkSettings, depth: int, train_file: Path, held_out: Path, work: Path) -> dict[str, Any]:
    """Held-out figures of each share of the depth: of each seed, and over all with an interval over prompts."""
    cache = work / "cache"
    for share in (2, 3, 6):
        for file, name in ((train_file, "train"), (held_out, "held-out")):
            score_file(settings, cache, file, name, dtype=settings.dtype, trunk_layer=depth - depth // share)
    all_runs: dict[str, list[list[dict[str, Any]]]] = {name: [] for name in SHARES}
    for seed in range(settings.seeds):  # a study that is stopped has whole seeds
        for name, share in SHARES.items():
            all_runs[name].append(_run(settings, cache, depth // share, seed, work))
    found: dict[str, Any] = {}
    for name, share in SHARES.items():
        runs = all_runs[name]
        found[name] = {
            "layers": depth // share,
            "seeds": [seed_means(run) for run in runs],
            **over_seeds(runs),
        }
    return {"held_out_pairs": len(runs[0]), "shares": found}


def _run(settings: TrunkSettings, cache: Path, last: int, seed: int, work: Path) -> list[dict[str, Any]]:
    """One training; what its last evaluation says of each held-out pair."""
    out = work / "runs" / f"last-{last}-seed-{seed}"
    options = {
        "cache": cache,
        "view": "train",
        "eval_view": "held-out",
        "output_dir": out,
        "train_last_layers": last,
        "lora_r": settings.lora_r,
        "learning_rate": settings.learning_rate,
        "max_steps": settings.steps,
        "per_device_train_batch_size": settings.batch_size,
        "gradient_accumulation_steps": 1,
        "per_device_eval_batch_size": settings.batch_size,
        "eval_steps": settings.steps,
        "save_steps": max(1, settings.steps // 5),
        "parity_pairs": 4,
        "seed": seed,
        "device": "cpu",
    }
    train(TrainConfig.model_validate(options), Told())
    return read_lines(out / HELD_OUT_FILE)


def seed_means(run: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Metric -> its mean over the held-out pairs of one run."""
    return {name: float(np.mean([line[name] for line in run])) for name in METRICS}


def over_seeds(runs: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """The mean over seeds of each pair's values, with the interval that other held-out prompts would give."""
    return _over_prompts(_pair_means(runs), runs[0])


def paired_difference(
    runs: Sequence[Sequence[Mapping[str, Any]]], others: Sequence[Sequence[Mapping[str, Any]]]
) -> dict[str, Any]:
    """The same of the differences from `others`, pair by pair."""
    own, theirs = _pair_means(runs), _pair_means(others)
    return _over_prompts({name: own[name] - theirs[name] for name in METRICS}, runs[0], paired=True)


def _pair_means(runs: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, Floats]:
    return {name: np.mean([[line[name] for line in run] for run in runs], axis=0) for name in METRICS}


def _over_prompts(
    values: Mapping[str, Floats], lines: Sequence[Mapping[str, Any]], *, paired: bool = False
) -> dict[str, Any]:
    longer = np.array([line["chosen_tokens"] - line["rejected_tokens"] for line in lines], dtype=np.float64)
    prompts = [str(line["prompt"]).encode() for line in lines]
    return with_intervals(values, longer=longer, prompts=prompts, paired=paired)


class Scored(Protocol):
    """Settings of a study that phase one needs."""

    @property
    def model(self) -> str:
        """A directory or a hub id."""
        ...

    @property
    def max_length(self) -> int:
        """Most tokens of prompt + response."""
        ...

    @property
    def max_prompt_length(self) -> int:
        """Most tokens of a prompt."""
        ...


def score_file(settings: Scored, cache: Path, file: Path, view: str, **more: Any) -> None:
    """Phase one of a file, on a CPU; `more`: further fields of its configuration."""
    options = {
        "pairs": (file,),
        "name": view,
        "model": str(find_model(settings.model).folder),
        "cache": cache,
        "device": "cpu",
        "max_length": settings.max_length,
        "max_prompt_length": settings.max_prompt_length,
        **more,
    }
    precompute_reference(PrecomputeConfig.model_validate(options), Told())


class Told(NoProgress):
    """Progress of a long study: notes on stderr, no bars."""

    def task(self, title: str, total: int, unit: str, done: int = 0) -> contextlib.AbstractContextManager[Advance]:
        """See `Progress.task`."""
        self.note(title)
        return super().task(title, total, unit, done)

    def note(self, text: str) -> None:
        """See `Progress.note`."""
        print(text, file=sys.stderr, flush=True)


# --------------------------------------------------------------------------- table


def table(record: Mapping[str, Any]) -> Any:
    """The record for a terminal."""
    from rich.console import Group

    return Group(
        *([_cost_table(record)] if record["cost"] else []), *([_quality_table(record)] if record["quality"] else [])
    )


def _cost_table(record: Mapping[str, Any]) -> Any:
    from rich.table import Table

    cost = record["cost"]
    first = next(iter(cost["programs"].values()))
    costs = Table(
        title=f"a step of {record['settings']['batch_size']} pairs, last {cost['last_layers']} layers trained"
    )
    for heading in ("", "CPU s a step", "times", "weights MiB", "peak MiB", "losses differ by"):
        costs.add_column(heading, justify="right" if heading else "left")
    for name, one in cost["programs"].items():
        shown = [f"{one[key] / MIB:,.0f}" for key in ("weights_bytes", "peak_bytes")]
        times = one["step_cpu_s"] / first["step_cpu_s"]
        costs.add_row(name, f"{one['step_cpu_s']:.2f}", f"{times:.1f}", *shown, f"{cost['loss_difference'][name]:.1g}")
    costs.caption = f"trunk: {cost['trunk_bytes'] / MIB:,.0f} MiB"
    return costs


def _quality_table(record: Mapping[str, Any]) -> Any:
    from rich.table import Table

    quality = record["quality"]
    found = Table(title=f"{quality['held_out_pairs']} held-out pairs, {record['settings']['seeds']} seeds")
    for heading in ("trained", "layers", "accuracy", "margin", "accuracies of the seeds"):
        found.add_column(heading)
    for name, one in quality["shares"].items():
        cells = []
        for metric in METRICS:
            low, high = one[metric]["interval"] or (float("nan"), float("nan"))
            cells.append(f"{one[metric]['mean']:.3f} ({low:.3f} to {high:.3f})")
        each = ", ".join(f"{seed['rewards/accuracies']:.2f}" for seed in one["seeds"])
        found.add_row(name, str(one["layers"]), *cells, each)
    return found


@click.command()
@click.option("--model", required=True, help="A directory with safetensors or a hub id.")
@click.option("--pairs", "files", multiple=True, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--peer-python", help="A Python with TRL and dpoeng.  [default: no comparison with TRL]")
@click.option("--work", default="trunk-study", show_default=True, type=click.Path(path_type=Path))
@click.option("--pairs-count", default=300, show_default=True, help="Number of pairs to use, the first ones.")
@click.option("--held-out", default=0.33, show_default=True, help="Share of the prompts that are not trained on.")
@click.option("--steps", default=50, show_default=True, help="Of each run of the quality part; 0 leaves it out.")
@click.option("--cost-steps", default=9, show_default=True, help="Of each program of the cost part; 0 leaves it out.")
@click.option("--seeds", default=3, show_default=True)
@click.option("--learning-rate", default=2e-4, show_default=True)
@click.option("--max-length", default=128, show_default=True, help="Most tokens of prompt + response.")
@click.option("--max-prompt-length", default=64, show_default=True, help="Most tokens of a prompt.")
@click.option("--record", type=click.Path(path_type=Path), help="Append the record to this file.")
def main(files: tuple[Path, ...], record: Path | None, **settings: Any) -> None:
    """Measures a trunk's savings and the loss from training fewer layers."""
    show(lambda: trunk_study(TrunkSettings(pairs=files, **settings)), table, record)


if __name__ == "__main__":
    main()
