"""Writes the figures in README and docs, only from recorded results, between two markers.

    python -m dpoeng.bench.figures           # rewrites README.md and docs/*.md

A block begins with `<!-- figures: NAME -->` and ends with `<!-- end of figures -->`. It uses the last record of its
kind in bench/results/. A test fails if a document differs from the record.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from dpoeng.bench.compare import PEERS, CompareSettings
from dpoeng.bench.figure_offload import offload, offload_cost, small_cards, small_cards_trunk
from dpoeng.bench.figure_studies import halving, plan_time, rows, selection, trunk
from dpoeng.bench.figure_tables import cache, kernels, memory, plan, responses, scale, sharing, step
from dpoeng.bench.figure_text import BASES, RESULTS, ROOT, Record, ranged, read, table, threads, where
from dpoeng.cache.words import gib

_BLOCK = re.compile(r"(<!-- figures: ([\w-]+) -->\n).*?(<!-- end of figures -->)", re.DOTALL)
_PEERS = {
    "trl precomputed": "its reference log-probs precomputed",
    "trl adapter off": "its default: the adapter switched off for the reference",
    "trl second model": "a second model as the reference",
}


def rewritten(text: str, results: Path = RESULTS) -> str:
    """Returns a document with its blocks rewritten from the records.

    Raises:
        KeyError: a block has an unknown name.
    """
    return _BLOCK.sub(lambda m: f"{m[1]}{BLOCKS[m[2]](results)}\n{m[3]}", text)


def documents() -> list[Path]:
    """The files that may have blocks."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


# --------------------------------------------------------------------------- blocks


def compare(results: Path) -> str:
    """dpoeng against each configuration of TRL: every recorded comparison."""
    return "\n\n".join(_comparison(record) for record in _comparisons(results))


def _comparisons(results: Path) -> list[Record]:
    """Comparisons whose losses agree; no ratio is reported for others."""
    return [record for record in read("compare", results) if record["equality"]["ok"]]


def _comparison(record: Record) -> str:
    settings, medians = record["settings"], record["medians"]
    rows = [
        [
            "TRL 1.16 over dpoeng",
            *("a step: CPU time", "memory of tensors", "of the process"),
            *("reference pass: CPU time", "memory of tensors", "of the process"),
        ],
        *(
            [
                _PEERS[peer],
                *(ranged(found, name) for name in ("step_cpu_s", "train_tensor_bytes", "train_peak_bytes")),
                *(
                    ranged(found, name)
                    for name in ("reference_cpu_s", "reference_tensor_bytes", "reference_peak_bytes")
                ),
            ]
            for peer, found in record["ratios"].items()
        ),
    ]
    ours = {**medians["dpoeng reference"], **medians["dpoeng"]}
    repeats = f"median and range of {settings['repeats']} repeats" if settings["repeats"] > 1 else "one repeat"
    prompts = f", prompts at most {settings['max_prompt_length']}" if settings["max_prompt_length"] else ""
    worst = max(record["equality"]["loss"].values())
    lengths = f"at most {settings['max_length']} tokens a side{prompts}"
    return (
        f"{settings['batch_size']} pairs a step, {settings['steps'] - 1} counted steps; reference pass over "
        f"{settings['pairs_count']} pairs; {lengths}; {settings['dtype']}, no gradient checkpointing; {repeats}. "
        f"{where(record)}:\n\n"
        f"{table(rows)}\n\n"
        f"dpoeng itself: {ours['step_cpu_s']:.3g} CPU-s a step, tensors of {gib(ours['train_tensor_bytes'])} above "
        f"the weights; reference {ours['reference_cpu_s_per_pair']:.2g} CPU-s a pair, "
        f"{gib(ours['reference_tensor_bytes'])}. "
        f"The losses of all steps agree to {worst:.1e}, relative. Measure again: `{_compare_command(settings)}`."
    )


def phases(results: Path) -> str:
    """Both phases in both layouts: speed, where the time goes, and how near to the machine's matrix product."""
    newest = {(r["settings"]["model"], r["versions"]["dtype"]): r for r in read("phases", results)}
    return "\n\n".join(_phases(record) for record in newest.values())


def _phases(record: Record) -> str:
    results, settings = record["results"], record["settings"]
    parts = list(dict.fromkeys(part for result in results for part in result["split"]))

    def share(result: Record, part: str) -> str:
        spent = result["split"].get(part)
        return "" if spent is None else f"{100 * spent['wall_s'] / statistics.median(result['wall_s']):.0f} %"

    rows = [
        ["", *(f"{result['phase']}, {result['layout']}" for result in results)],
        ["pairs/s", *(f"{result['pairs_per_s']:.2f}" for result in results)],
        ["unique tokens/s", *(f"{result['unique_tokens_per_s']:,.0f}" for result in results)],
        *([part, *(share(result, part) for result in results)] for part in parts),
        ["peak above weights", *(gib(result["peak_bytes"]) for result in results)],
        ["useful GFLOP/s", *(f"{result['flops'] / 1e9:.0f}" for result in results)],
        [
            f"of the matrix product's {record['gemm_flops'] / 1e9:.0f}",
            *(f"{100 * result['of_gemm']:.0f} %" for result in results),
        ],
    ]
    model = settings["model"] or f"The embedded model, {settings['layers']} layers of width {settings['width']:,}"
    return (
        f"{model}, {settings['batch_size']} pairs a step, {settings['steps']} steps, {settings['repeats']} repeats, "
        f"{record['versions']['dtype']}. {where(record)}:\n\n{table(rows)}"
    )


def accuracy(results: Path) -> str:
    """The same training by dpoeng and by TRL: results on held-out pairs, and costs."""
    record = read("accuracy-vs-trl", results)[-1]
    settings = record["settings"]
    ours, theirs = record["after"].values()

    def with_interval(found: Record) -> str:
        low, high = found["interval"]
        return f"{found['mean']:.3f} ({low:.3f} to {high:.3f})"

    names = {
        "rewards/accuracies": "the chosen response has the higher reward",
        "rewards/margins": "reward margin",
        "prefers chosen": "the chosen response has the higher log-prob",
    }
    rows = [
        ["on held-out pairs", "before", "dpoeng", "TRL 1.16", "dpoeng less TRL"],
        *(
            [
                shown,
                with_interval(record["before"][name]) if name in record["before"] else "0",
                *(with_interval(found[name]) for found in (ours, theirs, record["difference"])),
            ]
            for name, shown in names.items()
        ),
    ]
    costs = list(record["cost"].values())
    (cpu, their_cpu), (peak, their_peak) = (tuple(cost[name] for cost in costs) for name in ("cpu_s", "peak_bytes"))
    return (
        f"{settings['model']}, base in {BASES[settings['quantization']]}, LoRA r = {settings['lora_r']}; "
        f"{record['train_pairs']:,} pairs trained on once in steps of {settings['batch_size']}, learning rate "
        f"{settings['learning_rate']:g} ({settings['lr_scheduler_type']}), beta 0.1; {record['held_out_pairs']} pairs "
        f"of other prompts held out; texts cut to {settings['max_length']} tokens. {where(record)}:\n\n"
        f"{table(rows)}\n\n"
        f"Both programs agree on which response of a held-out pair has the higher reward in "
        f"{100 * record['same_verdict']:.1f} % of the pairs; the losses of the first ten steps differ by at most "
        f"{record['loss_difference']:.1e}, relative. dpoeng took {cpu:,.0f} CPU-s "
        f"({costs[0]['reference_cpu_s']:,.0f} of them for the reference) and {gib(peak)} above the loaded model, TRL "
        f"{their_cpu:,.0f} CPU-s and {gib(their_peak)}: **{their_cpu / cpu:.1f}** times the time, "
        f"**{their_peak / peak:.1f}** times the memory."
    )


def highlights(results: Path) -> str:
    """README's lines: float32 steps of TRL's usual batch of four, the reference pass, a whole training, the cache."""
    wanted = ("a step of 4 pairs, float32", "the reference pass over 200 pairs, float32", "an epoch of", "a cache of")
    rows = [row for row in _rows(results) if row[0].startswith(wanted) and "second model" not in row[0]]
    return table([["measured", "result", "measure again"], *rows])


def _times(ratios: Record, time: str, memory: str) -> str:
    return (
        f"TRL takes **{ratios[time]['median']:.1f}** times the CPU time, **{ratios[memory]['median']:.1f}** the memory"
    )


def _compare_command(settings: Record) -> str:
    """The command that repeats a comparison, without model, pairs and the peer's Python."""
    usual = asdict(CompareSettings(model="", pairs=()))
    names = ("batch_size", "pairs_count", "steps", "repeats", "max_length", "max_prompt_length", "dtype")
    options = [f"--{name.replace('_', '-')} {settings[name]}" for name in names if settings[name] != usual[name]]
    peers = [f"--peer {peer!r}" for peer in settings["peers"]] if len(settings["peers"]) < len(PEERS) else []
    return " ".join(["dpoeng bench compare --model M --pairs FILE", *options, *peers])


def _rows(results: Path) -> Iterator[list[str]]:
    """Measurement, result and command: comparisons, the newest training and the newest cache."""
    for record in _comparisons(results):
        settings, command = record["settings"], f"`{_compare_command(record['settings'])}`"
        for peer, found in record["ratios"].items():
            same = f"losses equal to within {record['equality']['loss'][peer]:.0e}"
            yield [
                f"a step of {settings['batch_size']} pairs, {settings['dtype']}, {threads(record)}, against TRL 1.16, "
                f"{_PEERS[peer]}",
                f"{_times(found, 'step_cpu_s', 'train_tensor_bytes')}; {same}",
                command,
            ]
            if "reference_cpu_s" in found:
                yield [
                    f"the reference pass over {settings['pairs_count']} pairs, {settings['dtype']}, against "
                    "`precompute_ref_log_probs`",
                    _times(found, "reference_cpu_s", "reference_tensor_bytes"),
                    command,
                ]
    for record in read("accuracy-vs-trl", results)[-1:]:
        ours, theirs, less = (
            found["rewards/accuracies"] for found in (*record["after"].values(), record["difference"])
        )
        cost, their_cost = record["cost"].values()
        low, high = less["interval"]
        yield [
            f"an epoch of {record['train_pairs']:,} pairs over a base in 8 bits, against TRL 1.16, its default",
            f"accuracy on {record['held_out_pairs']} held-out pairs {ours['mean']:.3f}, TRL's {theirs['mean']:.3f} "
            f"(difference {low:.3f} to {high:.3f}); TRL takes **{their_cost['cpu_s'] / cost['cpu_s']:.1f}** times the "
            f"CPU time, **{their_cost['peak_bytes'] / cost['peak_bytes']:.1f}** the memory",
            "`python -m dpoeng.bench.studies.accuracy_vs_trl --model M --pairs FILE --max-length "
            f"{record['settings']['max_length']} --max-prompt-length {record['settings']['max_prompt_length']}`",
        ]
    for record in read("cache", results)[-1:]:
        found = record["read"]
        yield [
            f"a cache of {found['pairs']:,} pairs",
            f"opens in {found['open_ms'] / 1e3:.2f} s, {found['rows_per_s']:,.0f} rows/s, "
            f"{found['anonymous_mib']:.0f} MiB of memory",
            f"`dpoeng bench cache --pairs {found['pairs']}`",
        ]


BLOCKS: dict[str, Callable[[Path], str]] = {
    "highlights": highlights,
    "compare": compare,
    "phases": phases,
    "accuracy": accuracy,
    "sharing": sharing,
    "cache": cache,
    "kernels": kernels,
    "plan": plan,
    "plan-time": plan_time,
    "memory": memory,
    "scale": scale,
    "step": step,
    "offload": offload,
    "offload-cost": offload_cost,
    "small-cards": small_cards,
    "small-cards-trunk": small_cards_trunk,
    "trunk": trunk,
    "halving": halving,
    "selection": selection,
    "rows": rows,
    "responses": responses,
}


def main() -> None:
    """Rewrites the documents."""
    for path in documents():
        text = path.read_text(encoding="utf-8")
        again = rewritten(text)
        if again != text:
            path.write_text(again, encoding="utf-8")
            print(f"{path.relative_to(ROOT)} rewritten")


if __name__ == "__main__":
    main()
