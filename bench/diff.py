"""What two commits' records of the same measurement say: which figures differ by more than their repeats do.

A figure differs where all repeats of one side are above all of the other, with a margin of `threshold` between them.
Of three repeats against three that differ by chance alone, the ranges part once in ten times; it is the margin that
keeps a long table quiet. Repeats lie close together in time and know nothing of a machine that was slower that day:
CPU seconds tell less of that than the clock.
"""

from __future__ import annotations

import json
import statistics
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dpoeng.bench.compare import step_time
from dpoeng.bench.measuring.measure import Spent
from dpoeng.cache.errors import UserError

THRESHOLD = 0.05
"""Margin between the ranges, as a share: less is not told apart from chance."""

Verdict = Literal["worse", "better", "same", "not judged"]


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure of a record, of which less is better: a value a repeat, or one that repeats exactly.

    Attributes:
        unit: s, CPU-s or bytes.
        exact: whether one value is enough, since it does not depend on the clock.
    """

    values: tuple[float, ...]
    unit: str
    exact: bool = False

    @property
    def median(self) -> float:
        """Of the repeats."""
        return statistics.median(self.values)


@dataclass(frozen=True, slots=True)
class Difference:
    """A figure on both sides. `change` is the second median over the first, less 1."""

    name: str
    before: Figure
    after: Figure
    change: float
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two records of one measurement, and what of their circumstances is not the same."""

    before: dict[str, Any]
    after: dict[str, Any]
    unlike: dict[str, tuple[Any, Any]]
    differences: list[Difference]


@dataclass(frozen=True, slots=True)
class DiffResult:
    """All comparisons, and what was not compared, with the reason."""

    comparisons: list[Comparison]
    alone: list[str]

    @property
    def worse(self) -> list[Difference]:
        """What got worse outside of noise."""
        return [d for comparison in self.comparisons for d in comparison.differences if d.verdict == "worse"]


# --------------------------------------------------------------------------- records


def find_records(name: str, folder: Path) -> list[dict[str, Any]]:
    """The records of a file, or of a commit among those in a folder.

    Args:
        name: a file of records; or a commit: its hash, the beginning of it, or anything that git knows it by here.
        folder: where `--results` put the records.

    Raises:
        UserError: there is no such record, or a file holds something else.
    """
    if Path(name).is_file():
        return list(_read(Path(name)))
    everything = [record for path in sorted(folder.glob("*.jsonl")) for record in _read(path)]
    commits = sorted({str(record["commit"]) for record in everything if record["commit"]})
    for wanted in (name, _hash_of(name)):
        if wanted and len(wanted) >= 4:
            found = [r for r in everything if r["commit"] and wanted.startswith(r["commit"].rstrip("+")[: len(wanted)])]
            if found:
                return found
    raise UserError(
        f"no record of {name}",
        code="bench-no-record",
        where=str(folder),
        expected="a file of records, or a commit of which the folder has some",
        found=f"records of {', '.join(commits)}" if commits else "no records",
        remedy="measure it: git checkout COMMIT, then dpoeng bench phases --results DIR; or name the folder with "
        "--results",
        exit_status=3,
    )


def _read(path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            record = json.loads(line)
            if record["kind"] and "settings" in record and "machine" in record:
                yield record
                continue
        except (ValueError, TypeError, KeyError):
            pass
        raise UserError(
            "this is no record of dpoeng bench",
            code="bench-no-record",
            where=f"{path}, line {number}",
            expected="a line of JSON, as --json or --results writes it",
            found=line[:60],
            remedy="name a file that dpoeng bench has written",
            exit_status=3,
        )


def _hash_of(name: str) -> str:
    """The full hash of what git calls so in the current folder; empty if it does not."""
    command = ["git", "rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False).stdout.strip()
    except OSError:
        return ""


def circumstances(record: Mapping[str, Any]) -> dict[str, Any]:
    """What must be the same for figures to be comparable: the measurement, its settings, the machine."""
    machine = {name: value for name, value in record["machine"].items() if name not in ("load", "memory_bytes")}
    settings = {f"setting {name}": value for name, value in record["settings"].items()}
    return {"kind": record["kind"], "device": record["device"], **machine, **settings}


# --------------------------------------------------------------------------- comparing


def compare_records(
    before: Sequence[dict[str, Any]],
    after: Sequence[dict[str, Any]],
    *,
    threshold: float = THRESHOLD,
    anyway: bool = False,
) -> DiffResult:
    """Compares the newest record of every measurement that both sides have.

    Args:
        before: records of one side, oldest first.
        after: of the other.
        threshold: see `THRESHOLD`.
        anyway: compares measurements of a kind with each other even where machine or settings differ.

    Raises:
        UserError: nothing can be compared.
    """

    def key(record: dict[str, Any]) -> str:
        return str(record["kind"]) if anyway else json.dumps(circumstances(record), sort_keys=True)

    newest = {key(record): record for record in before if record["kind"] in FIGURES}
    others = {key(record): record for record in after if record["kind"] in FIGURES}
    both = [name for name in newest if name in others]
    if not both:
        raise _not_comparable(list(newest.values()), list(others.values()))
    comparisons = []
    for name in both:
        one, two = newest[name], others[name]
        comparisons.append(Comparison(one, two, _unlike(one, two), differences(one, two, threshold)))
    alone = [
        f"{record['kind']} (only {side})"
        for side, mine, theirs in (("before", newest, others), ("after", others, newest))
        for name, record in mine.items()
        if name not in theirs
    ]
    kinds = {str(record["kind"]) for record in (*before, *after)} - FIGURES.keys()
    alone += [f"{kind} (its record keeps no repeats)" for kind in sorted(kinds)]
    return DiffResult(comparisons, alone)


def differences(before: dict[str, Any], after: dict[str, Any], threshold: float = THRESHOLD) -> list[Difference]:
    """Every figure that both records have."""
    figures = FIGURES[before["kind"]]
    ours, theirs = dict(figures(before)), dict(figures(after))
    return [
        Difference(
            name,
            ours[name],
            theirs[name],
            theirs[name].median / ours[name].median - 1 if ours[name].median else 0.0,
            verdict(ours[name], theirs[name], threshold),
        )
        for name in ours
        if name in theirs
    ]


def verdict(before: Figure, after: Figure, threshold: float = THRESHOLD) -> Verdict:
    """Whether all values of one side are above all of the other, by more than `threshold`."""
    if any(len(figure.values) < 2 and not figure.exact for figure in (before, after)):
        return "not judged"
    if min(after.values) > max(before.values) * (1 + threshold):
        return "worse"
    if max(after.values) * (1 + threshold) < min(before.values):
        return "better"
    return "same"


def _unlike(one: dict[str, Any], two: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    sides = [
        {**circumstances(r), **{f"version of {name}": version for name, version in r["versions"].items()}}
        for r in (one, two)
    ]
    names = dict.fromkeys([*sides[0], *sides[1]])
    return {
        name: (sides[0].get(name), sides[1].get(name)) for name in names if sides[0].get(name) != sides[1].get(name)
    }


def _not_comparable(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> UserError:
    alike = [(one, two) for one in before for two in after if one["kind"] == two["kind"]]
    found = "no measurement of one kind on both sides"
    if alike:
        unlike = min((_unlike(one, two) for one, two in alike), key=len)
        told = {name: pair for name, pair in unlike.items() if not name.startswith("version of")}
        found = "; ".join(f"{name}: {one!r} and {two!r}" for name, (one, two) in list(told.items())[:6])
    return UserError(
        "these records cannot be compared",
        code="bench-not-comparable",
        where="dpoeng bench diff",
        expected=f"the same measurement ({', '.join(FIGURES)}), settings and machine on both sides",
        found=found,
        remedy="measure both commits on one machine with the same options; --anyway compares all the same",
        exit_status=3,
    )


# --------------------------------------------------------------------------- the figures of each kind

Figures = Iterator[tuple[str, Figure]]


def _phases(record: dict[str, Any]) -> Figures:
    for result in record["results"]:
        name = f"{result['phase']}, {result['layout']}"
        yield f"{name}: CPU", Figure(tuple(result["cpu_s"]), "CPU-s")
        yield f"{name}: clock", Figure(tuple(result["wall_s"]), "s")
        yield f"{name}: peak", Figure(tuple(result["peaks_bytes"]), "bytes")


def _memory(record: dict[str, Any]) -> Figures:
    for case in record["results"]:
        yield f"{case['case']}: peak", Figure((case["measured_bytes"],), "bytes", exact=True)
        yield f"{case['case']}: predicted", Figure((case["predicted_bytes"],), "bytes", exact=True)


def _compare(record: dict[str, Any]) -> Figures:
    programs = [(peer, program) for peer, beside in record["runs"][0].items() for program in beside]
    for peer, name in programs:
        runs = [run[peer][name] for run in record["runs"]]
        program = name if name == peer else f"{name} beside {peer}"
        if runs[0]["steps"]:
            steps = [step_time([Spent(**step) for step in run["steps"]]) for run in runs]
            yield f"{program}: a step, CPU", Figure(tuple(step.cpu_s for step in steps), "CPU-s")
            yield f"{program}: a step, clock", Figure(tuple(step.wall_s for step in steps), "s")
            peaks = tuple(run["train_peak_bytes"] for run in runs)
            yield f"{program}: peak of training", Figure(peaks, "bytes")
        if runs[0]["reference"]:
            passes = tuple(run["reference"]["cpu_s"] / run["reference_pairs"] for run in runs)
            yield f"{program}: reference, CPU a pair", Figure(passes, "CPU-s")
            peaks = tuple(run["reference_peak_bytes"] for run in runs)
            yield f"{program}: peak of the reference", Figure(peaks, "bytes")
    for program, found in record["medians"].items():
        for phase in ("train", "reference"):
            peak = found.get(f"{phase}_tensor_bytes")
            if peak is not None:
                yield f"{program}: {phase}, peak of tensors", Figure((peak,), "bytes", exact=True)


def _kernels(record: dict[str, Any]) -> Figures:
    for result in record["results"]:
        for way, figure in result["ways"].items():
            name = f"{result['mode']} {result['shape']} {result['dtype']}, {way}"
            yield f"{name}: CPU", Figure(tuple(figure["cpu_s"]), "CPU-s")
            yield f"{name}: clock", Figure(tuple(figure["wall_s"]), "s")
            yield f"{name}: peak", Figure((figure["peak_bytes"],), "bytes")


def _scale(record: dict[str, Any]) -> Figures:
    for curve in record["curves"]:
        for size, values in zip(curve["sizes"], curve["values"], strict=True):
            name = f"{curve['name']}, {curve['over']} {size:,}"
            yield name, Figure(tuple(values), curve["unit"], exact=curve["unit"] == "bytes")


FIGURES: dict[str, Callable[[dict[str, Any]], Figures]] = {
    "phases": _phases,
    "memory": _memory,
    "compare": _compare,
    "kernels": _kernels,
    "scale": _scale,
}
