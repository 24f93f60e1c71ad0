"""`dpoeng sweep`."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dpoeng.cache.words import counted
from dpoeng.cli.options import ConfigCommand, config_options, given
from dpoeng.cli.tables import Marked, json_option, say, say_json
from dpoeng.engine.config.fields import SweepConfig, TrainConfig
from dpoeng.engine.config.files import load_config
from dpoeng.engine.runtime.progress import NoProgress

if TYPE_CHECKING:
    from dpoeng.engine.recipes.sweeps.plan import SweepPlan
    from dpoeng.engine.recipes.sweeps.ranking import RunResult

PAGE_FILE = "sweep.html"

EPILOG = """\b
Examples:
  dpoeng sweep --cache refcache --vary beta=0.05,0.1,0.3 --vary learning_rate=5e-6,2e-5
  dpoeng sweep --cache refcache --vary loss_type=sigmoid,ipo,sigmoid+sft --num-train-epochs 1 --output-dir sweep
  dpoeng sweep --config sweep.yaml --rank-by rewards/accuracies_length_controlled
  dpoeng sweep --cache refcache --vary beta=0.05,0.1,0.3 --vary learning_rate=5e-6,1e-5,2e-5 --halving-factor 3
  dpoeng sweep --cache refcache --vary beta=0.05,0.1,0.3,0.5 --devices cuda:0,cuda:1

\b
The same in a file:
  cache: refcache
  num_train_epochs: 1
  vary:
    beta: [0.05, 0.1, 0.3]
    learning_rate: [5e-6, 2e-5]
"""


@click.command("sweep", cls=ConfigCommand, epilog=EPILOG)
@click.option("--config", "config_file", type=click.Path(path_type=Path), help="YAML file.  [default: dpoeng.yaml]")
@json_option
@config_options(SweepConfig)
@click.option("--output-dir", type=click.Path(path_type=Path), help="Folder for the runs' folders.  [default: sweep]")
@config_options(TrainConfig, skip=frozenset({"output_dir"}))
def sweep(config_file: Path | None, as_json: bool, **options: Any) -> None:
    """Run `dpoeng train` for every combination of the varied fields, over one cache.

    Each run gives the same bytes as `dpoeng train` alone, and is evaluated on the same held-out pairs. All combinations
    are checked before the first run starts. Started again, the command skips complete runs and continues the stopped
    one. It ends with the runs ranked, with intervals, in a table, sweep.json and sweep.html. With --halving-factor 3
    all runs train part of the way, and only the best third continues, each time.
    """
    from dpoeng.cli.progress import TerminalProgress, importing

    with importing():
        from dpoeng.engine.recipes.sweeps.plan import plan_sweep
        from dpoeng.engine.recipes.sweeps.run import forget_failures, run_sweep
    from dpoeng.engine.recipes.sweeps.ranking import SWEEP, SWEEP_FILE, verdict
    from dpoeng.engine.runtime.outputs import PAGE, refuse_output

    taken = given(options)
    sweep_fields = {name: taken.pop(name) for name in SweepConfig.model_fields if name in taken}
    config = load_config(SweepConfig, sweep_fields, config_file)
    plan = plan_sweep(config, taken, config_file)
    if plan.root.is_dir():  # fail before the first run, not after the last
        refuse_output(plan.root / PAGE_FILE, replace(PAGE, forced=False))
        refuse_output(plan.root / SWEEP_FILE, SWEEP)

    def show(results: Sequence[RunResult]) -> None:
        from dpoeng.cli.pages.html import write_page
        from dpoeng.cli.pages.sweep import sweep_page

        write_page(plan.root / PAGE_FILE, sweep_page(plan, results))

    if config.devices:
        forget_failures(plan)
        train_on_devices(find_devices(config.devices), config, taken, config_file, len(plan.points))
    # Do here what a killed process left.
    results = run_sweep(plan, TerminalProgress(), show, alone=not config.devices)
    if as_json:
        say_json({"rank_by": plan.rank_by, "verdict": verdict(results), "runs": results, "page": plan.root / PAGE_FILE})
    else:
        print_results(plan, results)
    _report_failures(results)


def find_devices(names: Sequence[str]) -> list[str]:
    """The devices of --devices; `all` means every GPU.

    Raises:
        UserError: there is no GPU, or no device with this name.
    """
    import torch

    from dpoeng.cache.errors import UserError
    from dpoeng.engine.models.loading import pick_device

    devices = list(names)
    if devices == ["all"]:
        devices = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
        if not devices:
            raise UserError(
                "this machine has no GPU that torch can use",
                code="config-value",
                where="--devices all",
                expected="at least one GPU",
                found="none",
                remedy="leave --devices out; dpoeng doctor shows what torch finds",
            )
    for name in devices:
        pick_device(name)
    return devices


def train_on_devices(
    devices: Sequence[str], config: SweepConfig, options: dict[str, Any], file: Path | None, runs: int
) -> None:
    """Trains the runs of a sweep in one process per device; each takes runs that no other process is training."""
    import multiprocessing

    spawn = multiprocessing.get_context("spawn")
    arguments = [(device, config, {**options, "device": device}, file) for device in devices[:runs]]
    processes = [spawn.Process(target=_train_on, args=one, name=one[0]) for one in arguments]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join()
    finally:
        for process in processes:
            if process.is_alive():
                process.terminate()  # it saves a checkpoint first
        for process in processes:
            if process.pid is not None:
                process.join()
    for process in processes:
        if process.exitcode:
            say(f"note: the process on {process.name} ended with exit status {process.exitcode}", err=True)


def _train_on(device: str, config: SweepConfig, options: dict[str, Any], file: Path | None) -> None:
    from dpoeng.cache.errors import UserError
    from dpoeng.engine.recipes.sweeps.plan import plan_sweep
    from dpoeng.engine.recipes.sweeps.run import run_sweep

    with contextlib.suppress(UserError):  # the parent process raises and shows the same error
        run_sweep(plan_sweep(config, options, file), _Lines(device), alone=False)


class _Lines(NoProgress):
    """Progress of one of several processes: its notes, each with its device."""

    def __init__(self, device: str) -> None:
        self._device = device

    def note(self, text: str) -> None:
        """See `Progress.note`."""
        say(f"{self._device}: {text}", err=True)


def print_results(plan: SweepPlan, results: Sequence[RunResult]) -> None:
    """Prints the runs, best first, and whether the held-out pairs can separate them."""
    from dpoeng.cli.pages.sweep import ranking_table
    from dpoeng.engine.recipes.sweeps.ranking import verdict

    say(
        ranking_table(plan, results, f"{counted(len(results), 'run')} by held-out {plan.rank_by}"),
        f"intervals: over the prompts of {counted(results[0].pairs, 'held-out pair')}; "
        f"the difference from the best run is taken pair by pair\n{verdict(results)}",
    )
    done = [result for result in results if result.value is not None]
    if done:
        say("\nThe best adapter: ", Marked(str(done[0].folder / "adapter"), "bold"))
    say(f"The whole sweep as a page: {plan.root / PAGE_FILE}")


def _report_failures(results: Sequence[RunResult]) -> None:
    """Raises UserError if runs failed, so that both scripts and people notice."""
    from dpoeng.cache.errors import UserError

    failed = [result for result in results if result.state == "failed"]
    if failed:
        lines = [f"{result.name}: {result.error.splitlines()[0]}" for result in failed]
        raise UserError(
            f"{len(failed)} of {counted(len(results), 'run')} failed",
            code="sweep-failed",
            where=str(failed[0].folder.parent),
            expected="every run complete",
            found=("\n" + " " * 12).join(lines),
            remedy="read error.txt in each folder; the same command retries only these runs",
            exit_status=5,
        )
