"""Tables of studies: upper layers, halving, selection of pairs, the time of plans, and rows up to a million."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dpoeng.bench.figure_text import Record, read, table, where
from dpoeng.bench.studies.rows import WORKS
from dpoeng.cache.words import MIB


def trunk(results: Path) -> str:
    """Savings of a trunk, and the loss from training fewer layers: the newest record of each."""
    records = read("trunk", results)
    costs = [record for record in records if record["cost"] is not None]
    qualities = [record for record in records if record["quality"] is not None]
    return "\n\n".join([*map(_trunk_cost, costs[-1:]), *map(_trunk_quality, qualities[-1:])])


def _trunk_cost(record: Record) -> str:
    settings, cost = record["settings"], record["cost"]
    base = cost["programs"]["from the trunk"]["step_cpu_s"]
    costs = [
        [
            f"last {cost['last_layers']} of {record['layers']} layers",
            "CPU s a step",
            "times",
            "peak MiB",
            "losses differ",
        ],
        *(
            [
                name,
                f"{one['step_cpu_s']:.2f}",
                f"{one['step_cpu_s'] / base:.1f}",
                f"{one['peak_bytes'] / MIB:,.0f}, {one['weights_bytes'] / MIB:,.0f} of it weights",
                f"{cost['loss_difference'][name]:.0e}" if cost["loss_difference"][name] else "0",
            ]
            for name, one in cost["programs"].items()
        ),
    ]
    return (
        f"{settings['model']}, steps of {settings['batch_size']} pairs of at most {settings['max_length']} tokens a "
        f"side, {settings['cost_dtype']}; peaks are of tensors. {where(record)}:\n\n{table(costs)}"
    )


def _trunk_quality(record: Record) -> str:
    settings, quality = record["settings"], record["quality"]
    shares = [
        ["trained", "layers", "accuracy", "margin", "accuracy of each seed"],
        *(
            [
                name,
                str(one["layers"]),
                *(_with_interval(one[metric]) for metric in ("rewards/accuracies", "rewards/margins")),
                ", ".join(f"{seed['rewards/accuracies']:.2f}" for seed in one["seeds"]),
            ]
            for name, one in quality["shares"].items()
        ),
    ]
    return (
        f"{settings['model']}, {settings['steps']} steps of {settings['batch_size']} pairs at "
        f"{settings['learning_rate']:g} in {settings['dtype']}, {quality['held_out_pairs']} held-out pairs, "
        f"{settings['seeds']} seeds; intervals are over prompts, of the mean of the seeds. {where(record)}:"
        f"\n\n{table(shares)}"
    )


def halving(results: Path) -> str:
    """What successive halving finds of whole grids, and for how many steps."""
    record = read("halving", results)[-1]
    settings, whole = record["settings"], record["whole"]
    found = sum(case["found"] for case in whole)
    share = whole[0]["share"]
    rows = [
        ["", "cases", "found the best run", "loss above the best", "worst run above the best", "steps of the grid"],
        *(
            [
                name,
                str(one["cases"]),
                f"{one['found']:.0%}",
                f"{one['regret']:.4f}",
                f"{one['spread']:.4f}",
                f"{one['share']:.0%}",
            ]
            for name, one in (("halving", record["parts"]), ("one run by chance", record["by_chance"]))
        ),
    ]
    return (
        f"{settings['model']}, grids of {len(record['grids'][0])} runs (learning rate, LoRA rank) of "
        f"{settings['steps']} steps, top {record['last_layers']} layers, {record['held_out_pairs']} held-out pairs, "
        f"factor {settings['factor']}. Of the whole grids halving found the best run in {found} of {len(whole)}, for "
        f"{share:.0%} of the steps. The table has random parts of {settings['part']} runs; they overlap. "
        f"{where(record)}:\n\n{table(rows)}"
    )


def selection(results: Path) -> str:
    """Accuracy and margin after training on pairs that each rule selects, against random ones."""
    record = read("selection", results)[-1]
    settings = record["settings"]
    measured = {"rewards/accuracies": "accuracy", "rewards/margins": "margin"}
    heads = [cell for name in measured.values() for cell in (name, "difference from random")]
    rows = [["pairs", *heads, "accuracy of each seed"]]
    for name, one in record["choices"].items():
        cells = [
            cell for key in measured for cell in (f"{one[key]['mean']:.3f}", _with_interval(one["difference"][key]))
        ]
        if name == "random":
            cells[1] = cells[3] = ""
        rows.append([name, *cells, ", ".join(f"{seed['rewards/accuracies']:.3f}" for seed in one["seeds"])])
    whole = record["all"]
    rows.append(["all", f"{whole['rewards/accuracies']:.3f}", "", f"{whole['rewards/margins']:.3f}", "", "one seed"])
    return (
        f"{settings['model']}, {record['pairs_chosen']} of {record['pairs_all']} pairs, one epoch of batches of "
        f"{settings['batch_size']} at {settings['learning_rate']:g} in {settings['dtype']}, "
        f"{record['held_out_pairs']} held-out pairs, {settings['seeds']} seeds; intervals are over prompts, of the "
        f"mean of the seeds. {where(record)}:\n\n{table(rows)}"
    )


def _with_interval(value: Record) -> str:
    if not value["interval"]:
        return f"{value['mean']:.3f}"
    low, high = value["interval"]
    return f"{value['mean']:.3f} ({low:.3f} to {high:.3f})"


def plan_time(results: Path) -> str:
    """Time and memory of `dpoeng plan` itself."""
    record = read("plan-time", results)[-1]
    settings = record["settings"]
    cells = [
        [one["model"].split("/")[-1], f"{one['cpu_s']:.0f}", f"{one['peak_bytes'] / MIB:,.0f}"]
        for one in record["results"]
    ]
    head = ["`dpoeng plan` of", "CPU s", "resident MiB"]
    what = f"All options compared, {settings['quantization']}, one card"
    return f"{what}. {where(record)}:\n\n{table([head, *cells])}"


def rows(results: Path) -> str:
    """Memory and time of what reads every row: the newest result of each piece of work and number of rows."""
    records = read("rows", results)
    newest = {(one["work"], one["rows"]): one for record in records for one in record["results"]}
    sizes = sorted({count for _, count in newest})

    def cells(work: str, show: Callable[[Record], str]) -> list[str]:
        return [show(newest[work, count]) if (work, count) in newest else "" for count in sizes]

    head = [f"{what}, {count:,}" for what in ("resident MiB", "CPU µs a row") for count in sizes]
    body = [
        [
            name,
            *cells(work, lambda one: f"{one['resident_mib']:.0f} ({one['own_mib']:.0f})"),
            *cells(work, lambda one: f"{1e6 * one['cpu_s'] / one['rows']:.3g}"),
        ]
        for work, (name, _) in WORKS.items()
        if any(work == measured for measured, _ in newest)
    ]
    places = list(dict.fromkeys(where(record) for record in records))
    return f"{'; '.join(places)}:\n\n{table([['over rows', *head], *body])}"
