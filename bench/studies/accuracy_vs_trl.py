"""Compares a whole training by dpoeng and by TRL: held-out accuracy and margin, time and memory.

    python -m dpoeng.bench.studies.accuracy_vs_trl --model M --pairs FILE [--peer-python PYTHON] [--work DIR]
        [--record FILE]

Both programs get the same token ids in the same order, the same start of the LoRA, the same precision of the base, and
train one epoch, each in a separate process. The same code then evaluates both adapters, in that precision, on pairs of
prompts that neither has seen. Each program computes its own reference: dpoeng in phase one, TRL by switching the
adapter off in every step, its default. (TRL precomputes in eval(), where LLM.int8() also quantises activations: these
numbers differ from the policy's, and take many times as long on a CPU.)
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import click
import numpy as np
import numpy.typing as npt
import torch

from dpoeng.bench.compare import check_peer, in_folder, relative, run_process
from dpoeng.bench.job import Figures, Job, Program, adapter_folder
from dpoeng.bench.measuring.measure import Spent
from dpoeng.bench.measuring.records import named_settings, show, stamp
from dpoeng.bench.studies.quality import longer_by, look_at, split_pairs, with_intervals
from dpoeng.cache.reader import View
from dpoeng.engine.config.fields import Quantization, TrainConfig
from dpoeng.engine.losses.metrics import pair_values
from dpoeng.engine.models.loading import pick_device
from dpoeng.engine.models.sources import find_model
from dpoeng.engine.runtime.outputs import scratch_folder
from dpoeng.engine.training.rows import Rows

Values = dict[str, npt.NDArray[np.float64]]

PROGRAMS: Final[tuple[Program, ...]] = ("dpoeng", "trl adapter off")
METRICS: Final = ("rewards/accuracies", "rewards/margins", "prefers chosen")


@dataclass(frozen=True, slots=True)
class AccuracySettings:
    """Settings of the two trainings.

    Attributes:
        pairs_count: number of pairs to use, the first ones of the files.
        held_out: share of their prompts to hold out.
        quantization: quantization of the base, in both programs.
        max_length: maximum tokens of prompt + response; cuts a response's end.
        max_prompt_length: maximum tokens of a prompt; cuts its beginning.
        lr_scheduler_type: schedule over the one epoch, to 0.
        work: keeps caches, finished runs and adapters; a stopped comparison continues with the next program.
    """

    model: str
    pairs: tuple[Path, ...]
    work: Path
    peer_python: str = sys.executable
    pairs_count: int = 1518
    held_out: float = 0.33
    quantization: Quantization = "8bit"
    batch_size: int = 4
    learning_rate: float = 1e-4
    lr_scheduler_type: str = "linear"
    lora_r: int = 16
    max_length: int = 96
    max_prompt_length: int = 48
    seed: int = 3
    device: str = "auto"


def accuracy_vs_trl(settings: AccuracySettings) -> dict[str, Any]:
    """Trains with both programs and returns the record.

    Raises:
        UserError: model, pairs or peer are missing, or a program failed.
    """
    device = pick_device(settings.device)
    check_peer(settings.peer_python)
    source = find_model(settings.model)
    work = settings.work.resolve()
    scratch_folder(work, "accuracy_vs_trl")
    train_file, held_out_file = split_pairs(settings.pairs, settings.pairs_count, settings.held_out, work)
    record = stamp("accuracy-vs-trl", device, named_settings(settings))

    job = _reference_job(settings, source.folder.resolve(), train_file, work / "train-cache", device)
    reference = run_process(sys.executable, in_folder(job, work / "reference"))
    held_out_job = replace(job, pairs=(str(held_out_file),), cache=str(work / "held-out-cache"))
    run_process(sys.executable, in_folder(held_out_job, work / "held-out-reference"))
    pairs = len(View.open(job.cache))
    job = replace(job, steps=pairs // settings.batch_size)

    view = View.open(held_out_job.cache)
    rows = Rows(view, range(len(view)))
    scored = (view[i] for i in range(len(view)))
    before = np.array([float(pair.chosen_logps.sum() - pair.rejected_logps.sum()) for pair in scored])
    values: dict[str, Values] = {}
    runs: dict[str, Figures] = {}
    for program in PROGRAMS:
        python = settings.peer_python if program != "dpoeng" else sys.executable
        own_job = in_folder(replace(job, program=program), work / program.replace(" ", "-"))
        runs[program] = run_process(python, own_job)
        values[program] = _values(own_job, held_out_job.cache, view.name)
    return {
        **record,
        "peer_versions": runs[PROGRAMS[1]].versions,
        "train_pairs": pairs,
        "steps": job.steps,
        "loss_difference": relative(*(runs[program].losses[:10] for program in PROGRAMS)),
        **summarise(before, values, rows.prompts(), np.array(longer_by(rows), dtype=np.float64)),
        "cost": {
            "dpoeng": _cost(reference.reference, runs["dpoeng"], reference.reference_peak_bytes),
            PROGRAMS[1]: _cost(Spent(), runs[PROGRAMS[1]]),
        },
    }


def _reference_job(settings: AccuracySettings, model: Path, pairs: Path, cache: Path, device: torch.device) -> Job:
    """Phase one of one file; the programs' jobs are this one with another program and a number of steps."""
    return Job(
        program="dpoeng reference",
        model=str(model),
        pairs=(str(pairs),),
        cache=str(cache),
        scratch="",
        batch_size=settings.batch_size,
        steps=0,
        dtype="float32",
        max_length=settings.max_length,
        lora_r=settings.lora_r,
        learning_rate=settings.learning_rate,
        seed=settings.seed,
        threads=torch.get_num_threads(),
        device=str(device),
        lr_scheduler_type=settings.lr_scheduler_type,
        quantization=settings.quantization,
        max_prompt_length=settings.max_prompt_length,
    )


def _values(job: Job, cache: str, view: str) -> Values:
    """A value a held-out pair of each of `METRICS`, under the adapter that the job has left."""
    config = TrainConfig.model_validate(
        {
            "cache": cache,
            "eval_view": view,
            "quantization": job.quantization,
            "dtype": job.dtype,
            "device": job.device,
        }
    )
    found = pair_values(look_at(adapter_folder(job), config))
    values = {name: value.cpu().double().numpy() for name, value in found.items()}
    values["prefers chosen"] = (values["logps/chosen"] > values["logps/rejected"]).astype(np.float64)
    return {name: values[name] for name in METRICS}


def _cost(reference: Spent | None, training: Figures, reference_peak: int = 0) -> dict[str, float]:
    """Seconds of the reference pass, where there is one, and of all steps; most memory above the loaded model."""
    assert reference is not None
    return {
        "reference_cpu_s": reference.cpu_s,
        "training_cpu_s": sum(step.cpu_s for step in training.steps),
        "cpu_s": reference.cpu_s + sum(step.cpu_s for step in training.steps),
        "wall_s": reference.wall_s + sum(step.wall_s for step in training.steps),
        "peak_bytes": max(reference_peak, training.train_peak_bytes),
    }


def summarise(
    before: npt.NDArray[np.float64],
    values: Mapping[str, Values],
    prompts: Sequence[bytes],
    longer: npt.NDArray[np.float64],
) -> dict[str, Any]:
    """Means with intervals over held-out prompts, and dpoeng's paired difference from the peer.

    Args:
        before: log-prob of the chosen response less that of the rejected one, in nats, of the untrained model.
        values: program -> metric -> one value per pair.
        prompts: a key of each pair's prompt.
        longer: tokens of the chosen response less those of the rejected one.
    """
    means = partial(with_intervals, longer=longer, prompts=prompts)
    ours, theirs = (values[program] for program in PROGRAMS)
    return {
        "held_out_pairs": len(prompts),
        "before": means({"prefers chosen": (before > 0).astype(np.float64)}),
        "after": {program: means(found) for program, found in values.items()},
        "difference": means({name: ours[name] - theirs[name] for name in METRICS}, paired=True),
        "same_verdict": float((ours["rewards/accuracies"] == theirs["rewards/accuracies"]).mean()),
    }


def table(record: Mapping[str, Any]) -> Any:
    """The record for a terminal."""
    from rich.table import Table

    def cell(value: Mapping[str, Any]) -> str:
        low, high = value["interval"] or (float("nan"), float("nan"))
        return f"{value['mean']:.3f} ({low:.3f} to {high:.3f})"

    rows_table = Table(title=f"{record['train_pairs']} pairs trained on, {record['held_out_pairs']} held out")
    rows_table.add_column("")
    for heading in ("before", "dpoeng", "TRL", "dpoeng less TRL"):
        rows_table.add_column(heading, justify="right")
    for name in METRICS:
        start = cell(record["before"][name]) if name in record["before"] else "0"
        after = [cell(record["after"][program][name]) for program in PROGRAMS]
        rows_table.add_row(name, start, *after, cell(record["difference"][name]))
    costs = [record["cost"][program] for program in PROGRAMS]
    for name in costs[0]:
        ours, theirs = (cost[name] for cost in costs)
        rows_table.add_row(
            name, "", f"{ours:,.0f}", f"{theirs:,.0f}", f"{theirs / ours:.2f} times less" if theirs else ""
        )
    rows_table.caption = f"same verdict on {record['same_verdict']:.1%} of the held-out pairs"
    return rows_table


@click.command()
@click.option("--model", required=True, help="A directory with safetensors or a hub id.")
@click.option("--pairs", "files", multiple=True, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--peer-python", default=sys.executable, help="A Python with TRL and dpoeng.  [default: this one]")
@click.option("--work", default="accuracy-vs-trl", show_default=True, type=click.Path(path_type=Path))
@click.option("--pairs-count", default=1518, show_default=True, help="Number of pairs to use, the first ones.")
@click.option("--held-out", default=0.33, show_default=True, help="Share of the prompts that are not trained on.")
@click.option("--quantization", default="8bit", show_default=True, type=click.Choice(["none", "8bit", "4bit"]))
@click.option("--max-length", default=96, show_default=True, help="Most tokens of prompt + response.")
@click.option("--max-prompt-length", default=48, show_default=True, help="Most tokens of a prompt.")
@click.option("--learning-rate", default=1e-4, show_default=True)
@click.option("--record", type=click.Path(path_type=Path), help="Append the record to this file.")
def main(files: tuple[Path, ...], record: Path | None, **settings: Any) -> None:
    """Trains the same pairs with dpoeng and with TRL, and compares held-out accuracy, margin, time and memory."""
    show(lambda: accuracy_vs_trl(AccuracySettings(pairs=files, **settings)), table, record)


if __name__ == "__main__":
    main()
