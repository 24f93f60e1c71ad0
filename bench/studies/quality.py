"""Compares the same training in several precisions by held-out accuracy and margin.

Each precision runs phase one and phase two on the same pairs, in a separate process, one after another. The result is
evaluated twice: as trained, with its own precision and reference; and its adapter on the float32 model against the
float32 reference, where all can be compared pair by pair. Intervals are over held-out prompts; differences from the
first precision are paired, so their intervals are much narrower than two separate ones suggest.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dpoeng.bench.compare import first_pairs, run_module
from dpoeng.bench.measuring.records import commit, named_settings, stamp
from dpoeng.cache.errors import UserError
from dpoeng.cache.reader import View
from dpoeng.engine.config.fields import PrecomputeConfig, TrainConfig
from dpoeng.engine.losses.batch import PreferenceLoss
from dpoeng.engine.losses.metrics import pair_values
from dpoeng.engine.losses.names import LossSettings
from dpoeng.engine.models.loading import pick_device
from dpoeng.engine.models.sources import find_model
from dpoeng.engine.recipes.evaluate import find_trained, load_trained
from dpoeng.engine.recipes.precompute import precompute_reference
from dpoeng.engine.recipes.train import train
from dpoeng.engine.runs.folder import ADAPTER_FOLDER
from dpoeng.engine.runs.reading import read_run
from dpoeng.engine.runtime.outputs import scratch_folder
from dpoeng.engine.runtime.progress import QUIET, Progress
from dpoeng.engine.training.batch_loss import evaluate
from dpoeng.engine.training.intervals import ACCURACY, Floats, bootstrap, intervals
from dpoeng.engine.training.order import hold_out
from dpoeng.engine.training.rows import Rows

Precision = tuple[str, str]
"""quantization and dtype, as the configs name them."""

FLOAT32, BFLOAT16 = ("none", "float32"), ("none", "bfloat16")
EIGHT, FOUR = ("8bit", "auto"), ("4bit", "auto")

WAYS: dict[str, tuple[Precision, Precision]] = {
    "float32": (FLOAT32, FLOAT32),
    "bfloat16": (BFLOAT16, BFLOAT16),
    "8bit": (EIGHT, EIGHT),
    "8bit, bfloat16 reference": (EIGHT, BFLOAT16),
    "4bit": (FOUR, FOUR),
    "4bit, bfloat16 reference": (FOUR, BFLOAT16),
}
"""Name -> precision of the policy's base, and of the reference."""

METRICS = ("rewards/accuracies", "rewards/margins")


@dataclass(frozen=True, slots=True)
class QualitySettings:
    """Settings of the comparison.

    Attributes:
        model: a directory with safetensors or a hub id.
        pairs: JSON Lines of preference pairs, plain or .gz.
        work: keeps models' caches and runs; a stopped comparison continues.
        ways: names of `WAYS`; the others are compared with the first.
        pairs_count: number of pairs to use, the first ones.
        held_out: share of the prompts to hold out; the same for all ways and seeds.
        seeds: trainings per way, with different orders and LoRA starts.
    """

    model: str
    pairs: tuple[Path, ...]
    work: Path
    ways: tuple[str, ...] = tuple(WAYS)
    pairs_count: int = 100
    held_out: float = 0.3
    seeds: int = 1
    epochs: float = 1.0
    batch_size: int = 4
    learning_rate: float = 2e-4
    beta: float = 0.1
    max_length: int = 256
    lora_r: int = 16
    device: str = "auto"


def bench_quality(settings: QualitySettings, progress: Progress = QUIET) -> dict[str, Any]:
    """Runs every way for every seed and returns the record. What was done before, in `work`, is not done again.

    Raises:
        UserError: the model or the pairs cannot be used, or the first way fails.
    """
    device = pick_device(settings.device)
    source = find_model(settings.model)
    record = stamp("quality", device, named_settings(settings))
    scratch_folder(settings.work, "bench quality")
    files = split_pairs(settings.pairs, settings.pairs_count, settings.held_out, settings.work)
    base = {
        **asdict(settings),
        "model": str(source.folder.resolve()),
        "files": [str(path.resolve()) for path in files],
        "cache": str((settings.work / "refcache").resolve()),
    }
    for name in ("pairs", "work", "ways", "seeds", "pairs_count", "held_out"):
        del base[name]
    results: dict[str, list[dict[str, Any]]] = {}
    failed: dict[str, str] = {}
    with progress.task("trainings", len(settings.ways) * settings.seeds, "runs") as advance:
        for way in settings.ways:
            for seed in range(settings.seeds):
                job = {**base, "way": way, "seed": seed}
                folder = settings.work / _folder_name(job)
                folder.mkdir(exist_ok=True)
                job["output_dir"] = str((folder / "out").resolve())
                try:
                    results.setdefault(way, []).append(
                        run_module(
                            sys.executable, "dpoeng.bench.studies.quality", job, folder, name=f"{way}, seed {seed}"
                        )
                    )
                except UserError as error:
                    if way == settings.ways[0]:
                        raise
                    failed[way] = str(error.found)
                advance(1, way)
    done = [way for way in settings.ways if way not in failed]
    return {**record, "results": [summarise(way, results[way], results[done[0]]) for way in done], "failed": failed}


def _folder_name(job: Mapping[str, Any]) -> str:
    """A folder for each way, seed and other settings, so that changed settings start again."""
    asked = hashlib.sha256(json.dumps([job, commit()], sort_keys=True).encode()).hexdigest()[:8]
    return f"{job['way'].replace(', ', '-').replace(' ', '-')}-{job['seed']}-{asked}"


def split_pairs(pairs: Sequence[Path], count: int, held_out_share: float, folder: Path) -> tuple[Path, Path]:
    """Two files of the first pairs, to train on and to hold out; all pairs of a prompt are in the same one.

    Raises:
        UserError: the files cannot be read, or there is nothing to hold out.
    """
    lines = first_pairs(pairs, count, folder / "pairs.jsonl").read_text(encoding="utf-8")
    rows = [line for line in lines.splitlines() if line.strip()]
    train_rows, held_out = hold_out([_prompt(row) for row in rows], held_out_share, 0)
    files = folder / "train.jsonl", folder / "held-out.jsonl"
    for path, chosen in zip(files, (train_rows, held_out), strict=True):
        if not chosen:
            raise UserError(
                "there are too few pairs to train on some and hold out others",
                code="data-empty",
                where=", ".join(map(str, pairs)),
                expected="pairs of several prompts",
                found=f"{len(rows)} pairs",
                remedy="give more pairs, or another --held-out",
                exit_status=3,
            )
        path.write_text("".join(rows[i] + "\n" for i in chosen), encoding="utf-8")
    return files


def _prompt(line: str) -> bytes:
    """Return the key of a row's prompt, or of the row if it has no prompt."""
    try:
        row = json.loads(line)
        return json.dumps(row["prompt"], sort_keys=True).encode()
    except (ValueError, KeyError, TypeError):
        return line.encode()


# --------------------------------------------------------------------------- one way, in a separate process


def run_way(job: Mapping[str, Any]) -> dict[str, Any]:
    """Both phases of one way with one seed, and its values on every held-out pair.

    Returns:
        `prompts` and `longer` of the held-out pairs; `trained` and `float32`: metric -> a value a pair; `seconds` of
        all steps, `steps`, and `parity`: mean |difference| a token before the first step, in nats.
    """
    policy, reference = WAYS[job["way"]]
    views = _score(job, reference)
    config = TrainConfig.model_validate(
        {
            "cache": job["cache"],
            "view": views[0],
            "eval_view": views[1],
            "output_dir": job["output_dir"],
            "quantization": policy[0],
            "dtype": policy[1],
            "per_device_train_batch_size": job["batch_size"],
            "gradient_accumulation_steps": 1,
            "num_train_epochs": job["epochs"],
            **{name: job[name] for name in ("device", "seed", "learning_rate", "beta", "lora_r")},
        }
    )
    summary = train(config)
    plain = _score(job, FLOAT32)
    alone = config.model_copy(
        update={"view": plain[0], "eval_view": plain[1], "quantization": FLOAT32[0], "dtype": FLOAT32[1]}
    )
    rows = Rows(View.open(config.cache, views[1]), range(summary.eval_pairs))
    run = read_run(config.output_dir)
    return {
        "prompts": [prompt.hex() for prompt in rows.prompts()],
        "longer": longer_by(rows),
        "trained": held_out_values(config),
        "float32": held_out_values(alone),
        "steps": summary.steps,
        "seconds": sum(ms for _, ms in run.step_ms()) / 1e3,
        "parity": run.record["parity"]["mean_diff"],
    }


def _score(job: Mapping[str, Any], precision: Precision) -> list[str]:
    """Phase one of both files in one precision, where the cache lacks it; the names of the views."""
    names = []
    for path in map(Path, job["files"]):
        name = "-".join((path.stem, *precision))
        names.append(name)
        precompute_reference(
            PrecomputeConfig.model_validate(
                {
                    "pairs": (path,),
                    "cache": job["cache"],
                    "name": name,
                    "quantization": precision[0],
                    "dtype": precision[1],
                    "max_reject_share": 1.0,  # pairs that are too long are left out of every way alike
                    **{field: job[field] for field in ("model", "device", "max_length")},
                }
            )
        )
    return names


def held_out_values(config: TrainConfig) -> dict[str, list[float]]:
    """A value a held-out pair of each of `METRICS`, for the adapter of a finished run in the precision of `config`."""
    values = pair_values(look_at(config.output_dir / ADAPTER_FOLDER, config))
    return {name: [float(value) for value in values[name]] for name in METRICS}


def look_at(adapter: Path, config: TrainConfig) -> PreferenceLoss:
    """Rewards and log-probs of all pairs of `config.eval_view`, under an adapter in the precision of `config`."""
    assert config.eval_view is not None
    view = View.open(config.cache, config.eval_view)
    lm = load_trained(find_trained(adapter), config, view)
    rows = Rows(view, range(len(view)))
    return evaluate(lm, rows, LossSettings.of(config), batch_size=config.per_device_eval_batch_size)


def longer_by(rows: Rows) -> list[int]:
    """Scored tokens of each chosen response less those of the rejected one."""
    pairs = (rows.view[place] for place in rows.indices)
    return [len(pair.chosen_logps) - len(pair.rejected_logps) for pair in pairs]


# --------------------------------------------------------------------------- results


def summarise(way: str, runs: Sequence[Mapping[str, Any]], first: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over pairs and seeds with intervals, as trained and in float32, and the paired difference from `first`.

    Values of a pair are averaged over seeds first, since its seeds are not independent of each other.
    """
    prompts = [bytes.fromhex(prompt) for prompt in runs[0]["prompts"]]
    longer = np.array(runs[0]["longer"], dtype=np.float64)
    means = partial(with_intervals, longer=longer, prompts=prompts)

    def mean(some: Sequence[Mapping[str, Any]], frame: str) -> dict[str, Any]:
        return {name: np.mean([run[frame][name] for run in some], axis=0) for name in METRICS}

    mean_here, others = mean(runs, "float32"), mean(first, "float32")
    return {
        "way": way,
        "pairs": len(prompts),
        "trained": means(mean(runs, "trained")),
        "float32": means(mean_here),
        "difference": means({name: mean_here[name] - others[name] for name in METRICS}, paired=True),
        "by_seed": {name: [float(np.mean(run["float32"][name])) for run in runs] for name in METRICS},
        "steps": runs[0]["steps"],
        "seconds": [run["seconds"] for run in runs],
        "parity": [run["parity"] for run in runs],
    }


def with_intervals(
    values: Mapping[str, Floats], *, longer: Floats, prompts: Sequence[bytes], paired: bool = False
) -> dict[str, Any]:
    """Metric -> the mean of its values and the interval of that, as an evaluation has it; see `intervals`.

    Means over several seeds are no shares: a pair may be right in half of them. These have the bootstrap alone.
    """
    right = values.get(ACCURACY, np.zeros(0))
    if (right == np.round(right)).all():
        bounds = intervals(values, longer, prompts, seed=0, paired=paired)
    else:
        bounds = bootstrap(values, longer, prompts, seed=0)
    return {name: {"mean": float(found.mean()), "interval": bounds.get(name)} for name, found in values.items()}


def main() -> None:
    """Reads the job, runs it, prints the result."""
    result = run_way(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    print("\n" + json.dumps(result))


if __name__ == "__main__":
    main()
