"""Figures in README and docs, from recorded results alone: what stands between two markers is written by this file.

    python -m dpoeng.bench.figures           # rewrites README.md and docs/*.md

A block begins with `<!-- figures: NAME -->` and ends with `<!-- end of figures -->`. Each takes the last record of its
kind in bench/results/. A test fails where a document says something else than the record.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"

Record = dict[str, Any]
_BLOCK = re.compile(r"(<!-- figures: ([\w-]+) -->\n).*?(<!-- end of figures -->)", re.DOTALL)
_PEERS = {
    "trl precomputed": "its reference log-probs precomputed",
    "trl adapter off": "its default: the adapter switched off for the reference",
    "trl second model": "a second model as the reference",
}

_HEADS = {"dpoeng": "dpoeng", "naive": "full logits", "TRL": "TRL 1.16's head"}


def read(kind: str, results: Path = RESULTS) -> list[Record]:
    """The records of a kind measured on CPUs, oldest first; none if there is no file of them."""
    file = results / f"{kind}-cpu.jsonl"
    return _lines(file) if file.is_file() else []


def _lines(file: Path) -> list[Record]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def rewritten(text: str, results: Path = RESULTS) -> str:
    """A document with its blocks made anew from the records.

    Raises:
        KeyError: a block of an unknown name.
    """
    return _BLOCK.sub(lambda m: f"{m[1]}{BLOCKS[m[2]](results)}\n{m[3]}", text)


def documents() -> list[Path]:
    """The files that may have blocks."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


# --------------------------------------------------------------------------- blocks


def compare(results: Path) -> str:
    """dpoeng against each configuration of TRL: every recorded comparison."""
    return "\n\n".join(_comparison(record) for record in read("compare", results))


def _comparison(record: Record) -> str:
    settings, medians = record["settings"], record["medians"]
    rows = [
        ["TRL 1.16 over dpoeng", "a step, CPU time", "a step, memory", "reference pass, CPU time", "its memory"],
        *(
            [
                _PEERS[peer],
                _range(found, "step_cpu_s"),
                _range(found, "train_peak_bytes"),
                _range(found, "reference_cpu_s"),
                _range(found, "reference_peak_bytes"),
            ]
            for peer, found in record["ratios"].items()
        ),
    ]
    ours = {**medians["dpoeng reference"], **medians["dpoeng"]}
    worst = max(record["equality"]["loss"].values())
    return (
        f"{settings['batch_size']} pairs a step, {settings['steps'] - 1} counted steps; reference pass over "
        f"{settings['pairs_count']} pairs; {settings['dtype']}; median and range of {settings['repeats']} repeats. "
        f"{_where(record)}:\n\n"
        f"{_table(rows)}\n\n"
        f"dpoeng itself: {ours['step_cpu_s']:.3g} CPU-s a step, {_gib(ours['train_peak_bytes'])} above the weights; "
        f"reference {ours['reference_cpu_s_per_pair']:.2g} CPU-s a pair, {_gib(ours['reference_peak_bytes'])}. "
        f"The losses of all steps agree to {worst:.1e}, relative."
    )


def phases(results: Path) -> str:
    """Both phases in both layouts: speed, where the time goes, and how near to the machine's matrix product."""
    record = read("phases", results)[-1]
    found, settings = record["results"], record["settings"]
    parts = list(dict.fromkeys(part for result in found for part in result["split"]))

    def share(result: Record, part: str) -> str:
        spent = result["split"].get(part)
        return "" if spent is None else f"{100 * spent['wall_s'] / statistics.median(result['wall_s']):.0f} %"

    rows = [
        ["", *(f"{result['phase']}, {result['layout']}" for result in found)],
        ["pairs/s", *(f"{result['pairs_per_s']:.2f}" for result in found)],
        ["unique tokens/s", *(f"{result['unique_tokens_per_s']:,.0f}" for result in found)],
        *([part, *(share(result, part) for result in found)] for part in parts),
        ["peak above weights", *(_gib(result["peak_bytes"]) for result in found)],
        ["useful GFLOP/s", *(f"{result['flops'] / 1e9:.0f}" for result in found)],
        [
            f"of the matrix product's {record['gemm_flops'] / 1e9:.0f}",
            *(f"{100 * result['of_gemm']:.0f} %" for result in found),
        ],
    ]
    return (
        f"{settings['model']}, {settings['batch_size']} pairs a step, {settings['steps']} steps, {settings['repeats']} "
        f"repeats, {settings['dtype']}. {_where(record)}:\n\n{_table(rows)}"
    )


def accuracy(results: Path) -> str:
    """The same training by dpoeng and by TRL: what it brings on held-out pairs, and what it takes."""
    record = read("accuracy-vs-trl", results)[-1]
    settings, ours, theirs = record["settings"], *record["after"].values()

    def told(found: Record) -> str:
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
                told(record["before"][name]) if name in record["before"] else "0",
                *(told(found[name]) for found in (ours, theirs, record["difference"])),
            ]
            for name, shown in names.items()
        ),
    ]
    costs = list(record["cost"].values())
    (cpu, their_cpu), (peak, their_peak) = (tuple(cost[name] for cost in costs) for name in ("cpu_s", "peak_bytes"))
    return (
        f"{settings['model']}, base in {_BASES[settings['quantization']]}, LoRA r = {settings['lora_r']}; "
        f"{record['train_pairs']:,} pairs trained on once in steps of {settings['batch_size']}, learning rate "
        f"{settings['learning_rate']:g} ({settings['lr_scheduler_type']}), beta 0.1; {record['held_out_pairs']} pairs "
        f"of other prompts held out; texts cut to {settings['max_length']} tokens. {_where(record)}:\n\n"
        f"{_table(rows)}\n\n"
        f"Both programs agree on which response of a held-out pair has the higher reward in "
        f"{100 * record['same_verdict']:.1f} % of the pairs; the losses of the first ten steps differ by at most "
        f"{record['loss_difference']:.1e}, relative. dpoeng took {cpu:,.0f} CPU-s "
        f"({costs[0]['reference_cpu_s']:,.0f} of them for the reference) and {_gib(peak)} above the loaded model, TRL "
        f"{their_cpu:,.0f} CPU-s and {_gib(their_peak)}: **{their_cpu / cpu:.1f}** times the time, "
        f"**{their_peak / peak:.1f}** times the memory."
    )


def sharing(results: Path) -> str:
    """The two curves of `dpoeng bench sharing`."""
    record = read("sharing", results)[-1]
    by_share = [
        ["prompt's share of a pair", "positions left", "reference pass", "training"],
        *(
            [
                f"{100 * point['prompt_share']:.0f} %",
                f"{100 * point['positions_left']:.0f} %",
                f"{point['reference_speedup']:.2f} times",
                f"{point['training_speedup']:.2f} times",
            ]
            for point in record["prompt_share"]
        ),
    ]
    by_pairs = [
        ["pairs a prompt", "positions left", "over once a pair", "over once a response"],
        *(
            [
                str(point["pairs_a_prompt"]),
                f"{100 * point['positions_left']:.0f} %",
                f"{point['over_once_a_pair']:.2f} times",
                f"{point['over_once_a_response']:.2f} times",
            ]
            for point in record["pairs_a_prompt"]
        ),
    ]
    pairs = record["settings"]
    return (
        f"Speed with each prompt once over speed with repeats, {pairs['pairs']} pairs of {pairs['tokens']} tokens. "
        f"{_where(record)}:\n\n{_table(by_share)}\n\n{_table(by_pairs)}"
    )


def cache(results: Path) -> str:
    """What `dpoeng bench cache` found, beside what was asked for."""
    record = read("cache", results)[-1]
    found, weights = record["read"], record["weights"]
    reached = [
        ["", "reached", "asked for"],
        [f"open {found['pairs']:,} pairs, structure checked", f"{found['open_ms'] / 1e3:.2f} s", "≤ 1 s"],
        ["the same, every byte hashed and every log-prob looked at", f"{found['open_verified_ms'] / 1e3:.2f} s", ""],
        [
            "rows a second, one process, zero-copy: in order / shuffled",
            f"{found['rows_per_s']:,.0f} / {found['random_rows_per_s']:,.0f}",
            "≥ 100,000",
        ],
        ["growth of anonymous memory by opening and reading", f"{found['anonymous_mib']:.0f} MiB", "≤ 64 MiB"],
        ["`verify` at depth full", f"{found['verify_gb_per_s']:.1f} GB/s", "≥ 3 GB/s"],
        [
            "identity of weights / sha256 in the same run",
            f"{weights['identity_gb_per_s']:.1f} / {weights['sha256_gb_per_s']:.1f} GB/s",
            "≥ 3 GB/s",
        ],
    ]
    steps = [["microseconds a pair", *(f"{step['pairs']:,} pairs" for step in record["sizes"])]]
    for name, label in (
        ("commit_us", "commit"),
        ("lookup_us", "look up all (hash and check every byte)"),
        ("hit_us", "find one pair by its ids"),
        ("write_view_us", "write the view"),
    ):
        steps.append([label, *(f"{step[name]:.3g}" for step in record["sizes"])])
    return f"{_where(record)}:\n\n{_table(reached)}\n\n{_table(steps)}"


def kernels(results: Path) -> str:
    """The head against its alternatives: training and scoring side by side, a table a shape and dtype."""
    tables = []
    for record in read("kernels", results):
        found = {(tuple(r["shape"]), r["dtype"], r["mode"]): r["ways"] for r in record["results"]}
        for vocabulary, width, tokens, dtype in dict.fromkeys((*shape, dtype) for shape, dtype, _ in found):
            train, score = (found[(vocabulary, width, tokens), dtype, mode] for mode in ("train", "score"))
            heads = ["times dpoeng's", "peak MiB"]
            rows = [["", "training, CPU-s", *heads, "scoring, CPU-s", *heads, "log-prob error"]]
            rows += [
                [_HEADS.get(way, f"`{way}`"), *_head(train[way]), *_head(score[way]), f"{train[way]['logp_error']:.1e}"]
                for way in train
            ]
            tables.append(
                f"V = {vocabulary:,}, H = {width}, N = {tokens}, {dtype} ({_count(record['settings']['repeats'])}). "
                f"{_where(record)}:\n\n{_table(rows)}"
            )
    return "\n\n".join(tables)


def plan(results: Path) -> str:
    """Models of four sizes: peaks of phase two, and what each card can do. Calculated."""
    record = _lines(results / "plan-calculated.jsonl")[-1]
    found = {(r["model"], r["quantization"]): r for r in record["results"]}
    models = list(dict.fromkeys(model for model, _ in found))
    eight = [found[model, "8bit"] for model in models]
    rows = [
        ["one pair a forward, GiB", *(model.split("/")[-1] for model in models)],
        ["**8 bits, checkpointing, fused head, cached reference**", *(f"**{r['phase2_gib']:.1f}**" for r in eight)],
    ]
    parts = sorted(eight[0]["breakdown_gib"], key=lambda name: -eight[-1]["breakdown_gib"][name])
    rows += [[f"of it: {part}", *(f"{r['breakdown_gib'].get(part, 0):.1f}" for r in eight)] for part in parts]
    needed = (f"{r['phase2_needed_gib']:.1f}" for r in eight)
    rows.append(["with context, workspaces, fragmentation (estimates)", *needed])
    rows += [
        [_OPTIONS.get(option, option), *(f"{r['options_gib'][option]:.1f}" for r in eight)]
        for option in eight[0]["options_gib"]
    ]
    rows.append(["two models in 8 bits, whole logits", *(f"{r['two_model_gib']:.1f}" for r in eight)])
    cards = [["base", *(card["name"] for card in eight[0]["cards"])]]
    for (model, quantization), result in found.items():
        name = f"{model.split('/')[-1]}, {_BASES[quantization]}"
        cards.append([name, *(_card(card) for card in result["cards"])])
    asked = record["settings"]
    what = f"2 x {asked['max_length']} tokens, LoRA r = {asked['lora_r']}; **calculated**, commit {record['commit']}"
    return (
        f"{what}:\n\n{_table(rows)}\n\nPairs a forward (up to 4 are tried) on a card of this size, estimates included:"
        f"\n\n{_table(cards)}"
    )


_OPTIONS = {
    "quantization none": "bfloat16 base",
    "quantization 4bit": "4-bit base",
    "half of max_length": "2 x 1024 tokens",
    "optim adamw_8bit": "`--optim adamw_8bit`",
    "activation_offloading": "`--activation-offloading`",
}
_BASES = {"8bit": "8 bits", "4bit": "4 bits", "none": "bfloat16"}


def _card(card: Record) -> str:
    if not card["phase2_fits"]:
        return "no"
    return f"{card['pairs_a_forward']}" if card["phase1_fits"] else f"{card['pairs_a_forward']}, not phase one"


def _head(way: Record) -> list[str]:
    ratio = way["cpu_s_ratio"]
    times = f"{ratio['median']:.2f}"
    if ratio["low"] < ratio["high"]:
        times += f" ({ratio['low']:.2f}–{ratio['high']:.2f})"
    seconds = sorted({min(way["cpu_s"]), max(way["cpu_s"])})
    return ["–".join(f"{s:.3g}" for s in seconds), times, f"{way['peak_bytes'] / 2**20:,.0f}"]


def _count(repeats: int) -> str:
    return "one counted round" if repeats == 1 else f"{repeats} counted rounds"


def evidence(results: Path) -> str:
    """README's lines about speed and memory."""
    rows = [["measured", "found", "again with"], *_evidence(results)]
    return _table(rows)


def _evidence(results: Path) -> Iterator[list[str]]:
    for record in read("compare", results):
        settings, command = (
            record["settings"],
            f"`dpoeng bench compare --batch-size {record['settings']['batch_size']}`",
        )
        for peer, found in record["ratios"].items():
            same = f"losses equal to {record['equality']['loss'][peer]:.0e}"
            yield [
                f"a step of {settings['batch_size']} pairs, {settings['dtype']}, {_threads(record)}, against TRL 1.16, "
                f"{_PEERS[peer]}",
                f"{_times(found, 'step_cpu_s', 'train_peak_bytes')}; {same}",
                command,
            ]
            if "reference_cpu_s" in found:
                yield [
                    f"the reference pass over {settings['pairs_count']} pairs, against `precompute_ref_log_probs`",
                    _times(found, "reference_cpu_s", "reference_peak_bytes"),
                    "the same",
                ]
    for record in read("kernels", results):
        for result in record["results"]:
            if result["mode"] == "train" and result["dtype"] == "float32":
                vocabulary, _, tokens = result["shape"]
                ways, ours = result["ways"], result["ways"]["dpoeng"]["peak_bytes"]
                yield [
                    f"log-probs and their gradient, {tokens:,} tokens, V = {vocabulary:,}, {result['dtype']}",
                    f"TRL 1.16's head takes {ways['TRL']['cpu_s_ratio']['median']:.1f} times the CPU time, full logits "
                    f"{ways['naive']['cpu_s_ratio']['median']:.1f} times; memory "
                    f"{100 * ours / ways['naive']['peak_bytes']:.1f} % of full logits'",
                    f"`dpoeng bench kernels --shape {','.join(map(str, result['shape']))} --dtype {result['dtype']}`",
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
            "[docs/results.md](docs/results.md)",
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
    "compare": compare,
    "phases": phases,
    "accuracy": accuracy,
    "sharing": sharing,
    "cache": cache,
    "kernels": kernels,
    "plan": plan,
    "evidence": evidence,
}


# --------------------------------------------------------------------------- pieces


def _times(found: Record, time: str, memory: str) -> str:
    return f"TRL takes **{found[time]['median']:.1f}** times the CPU time, **{found[memory]['median']:.1f}** the memory"


def _where(record: Record) -> str:
    machine, versions = record["machine"], record["versions"]
    return (
        f"{record['device_kind']}, {machine['processor']}, {_threads(record)}, "
        f"torch {versions['torch']}, commit {record['commit']}, {record['date'][:10]}"
    )


def _threads(record: Record) -> str:
    threads = record["machine"]["threads"]
    return f"{threads} thread{'s' if threads > 1 else ''}"


def _range(found: Record, name: str) -> str:
    if name not in found:
        return "–"
    ratio = found[name]
    return f"**{ratio['median']:.2f}** ({ratio['low']:.2f}–{ratio['high']:.2f})"


def _gib(n_bytes: float) -> str:
    return f"{n_bytes / 2**30:.2f} GiB"


def _table(rows: list[list[str]]) -> str:
    head, *body = rows
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *body))


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
