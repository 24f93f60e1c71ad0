"""`dpoeng watch`: a run in the terminal, redrawn from its folder while it trains. Only reads."""

from __future__ import annotations

import math
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from dpoeng.cache.words import gib, number
from dpoeng.cli.tables import Cell, Marked, Table, accuracy_line, facts_table, json_option, say, say_json, say_live

if TYPE_CHECKING:
    from dpoeng.engine.runs.reading import RunRecord

State = Literal["loading", "running", "complete", "stopped"]

EPILOG = """\b
Examples:
  dpoeng watch out
  dpoeng watch out --every 10
  dpoeng watch out --json
"""

_SHOWN = (
    "loss",
    "rewards/margins",
    "rewards/accuracies",
    "rewards/chosen",
    "rewards/rejected",
    "kl/chosen",
    "grad_norm",
)
_BLOCKS = "▁▂▃▄▅▆▇█"
_WIDEST = 48


@click.command("watch", epilog=EPILOG)
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@click.option("--every", type=click.FloatRange(0.1), default=2.0, show_default=True, help="Seconds between updates.")
@json_option
def watch(out: Path, every: float, as_json: bool) -> None:
    """Show the run in OUT, the --output-dir of `dpoeng train`: curves, held-out figures, time left, memory.

    Draws until the run ends; Ctrl-C only ends the drawing. Nothing in OUT is changed, so you can use it from any shell,
    also for a finished run. Without a terminal, or with --json, it prints the run's state once.
    """
    if as_json:
        say_json(standing(out))
    elif not sys.stdout.isatty():
        for part in frame(out, *look(out), width=_width()):
            say(part)
    else:
        try:
            say_live(_frames(out, every))
        except KeyboardInterrupt:
            sys.exit(130)


def look(out: Path) -> tuple[State, RunRecord | None]:
    """The state of the run, and its record; None before a new run has loaded its model.

    Raises:
        UserError: there is no run, or a record is damaged.
    """
    from dpoeng.engine.runs.folder import RUN_FILE
    from dpoeng.engine.runs.lock import is_held
    from dpoeng.engine.runs.reading import read_run

    running = is_held(out)
    if running and not (out / RUN_FILE).is_file():
        return "loading", None
    run = read_run(out)
    return "running" if running else "complete" if run.complete else "stopped", run


def standing(out: Path) -> dict[str, Any]:
    """The same as data, for `--json`."""
    state, run = look(out)
    if run is None:
        return {"folder": out, "state": state}
    return {
        "folder": out,
        "state": state,
        "step": run.steps_timed(),
        "total_steps": run.total_steps,
        "seconds_left": _left_s(state, run),
        "step_s": run.recent_step_s(),
        "peak_bytes": run.peak_bytes(),
        "last": next((line for line in reversed(run.metrics) if "loss" in line), None),
        "evaluation": run.evaluations[-1] if run.evaluations else None,
        "warnings": [seen for seen, _ in run.warnings()],
    }


def _frames(out: Path, every: float) -> Iterator[Sequence[Cell | Table]]:
    """A frame per update, until the run ends."""
    while True:
        state, run = look(out)
        yield frame(out, state, run, width=_width())
        if state not in ("loading", "running"):
            return
        time.sleep(every)


def _width() -> int:
    return shutil.get_terminal_size((80, 24)).columns


def frame(out: Path, state: State, run: RunRecord | None, *, width: int) -> list[Cell | Table]:
    """What to show of a run at one moment, in `width` columns."""
    if run is None:
        return [Marked(f"{out}: the model is being loaded", "bold")]
    parts: list[Cell | Table] = [Marked(f"{out}, {state}", "bold"), _progress(state, run, width)]
    parts.append(_curves(run, width))
    if run.evaluations and (line := accuracy_line(run.evaluations[-1])):
        parts.append(line)
    facts = [("device", str(run.record.get("device", ""))), ("model", str(run.record.get("model", "")))]
    if (peak := run.peak_bytes()) is not None:
        facts.insert(0, ("peak memory", gib(peak)))
    parts.append(facts_table([(name, value) for name, value in facts if value]))
    parts += [Marked(f"warning: {seen}", "warning") for seen, _ in run.warnings()]
    return parts


def _left_s(state: State, run: RunRecord) -> float | None:
    """Seconds for the remaining steps, at the recent speed; evaluations come on top."""
    step_s = run.recent_step_s()
    if state != "running" or run.total_steps is None or step_s is None:
        return None
    return max(0, run.total_steps - run.steps_timed()) * step_s


def _progress(state: State, run: RunRecord, width: int) -> str:
    from dpoeng.cli.progress import clock

    done, total, step_s, left = run.steps_timed(), run.total_steps, run.recent_step_s(), _left_s(state, run)
    facts = [f"step {done:,}" + (f" of {total:,}, {100 * done // max(total, 1)} %" if total else "")]
    if left is not None:
        facts.append(f"{clock(left)} left")
    if step_s is not None:
        facts.append(f"{number(step_s, 3)} s/step" if step_s >= 0.1 else f"{number(1e3 * step_s, 3)} ms/step")
    while len(words := "  ".join(facts)) > width and len(facts) > 1:
        facts.pop()
    columns = min(_WIDEST, width - len(words) - 2)
    if not total or columns < 8:
        return words
    full = columns * min(done, total) // total
    return f"{'━' * full}{'─' * (columns - full)}  {words}"


def _curves(run: RunRecord, width: int) -> Table:
    """One row per metric: its curve over the steps if that fits, its last value, and the held-out value."""
    from dpoeng.cli.pages.run import figure
    from dpoeng.engine.runs.reading import EVAL

    columns = min(_WIDEST, width - 48)
    rows = []
    for name in _SHOWN:
        training, held_out = run.curve(name), run.curve(EVAL + name)
        points = training or held_out
        if not points:
            continue
        last = figure(name, training[-1][1]) if training else ""
        rows.append(
            (name, sparkline([y for _, y in points], columns), last, figure(name, held_out[-1][1]) if held_out else "")
        )
    if columns < 8:
        return Table([(name, last, held_out) for name, _, last, held_out in rows], ("", "last", "held out"))
    return Table(rows, ("", "training", "last", "held out"), words=2)


def sparkline(values: Sequence[float], width: int) -> str:
    """At most `width` blocks from the smallest to the largest value; each is a mean, and a gap means no number."""
    count = max(0, min(width, len(values)))
    means = []
    for k in range(count):
        part = [v for v in values[k * len(values) // count : (k + 1) * len(values) // count] if math.isfinite(v)]
        means.append(sum(part) / len(part) if part else math.nan)
    finite = [mean for mean in means if math.isfinite(mean)]
    if not finite:
        return " " * count
    low, spread = min(finite), max(finite) - min(finite)
    top = len(_BLOCKS) - 1
    return "".join(
        " " if math.isnan(mean) else _BLOCKS[round(top * (mean - low) / spread) if spread else 0] for mean in means
    )
