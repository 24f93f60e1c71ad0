"""Tables of dpoeng's own measurements for README and docs: sharing, cache, kernels, memory, scale, plans."""

from __future__ import annotations

import re
from pathlib import Path

from dpoeng.bench.figure_text import BASES, Record, lines_of, read, table, where
from dpoeng.cache.words import MIB, number

_HEADS = {"dpoeng": "dpoeng", "naive": "full logits", "TRL": "TRL 1.16's head"}
_OPTIONS = {
    "quantization none": "bfloat16 base",
    "quantization 4bit": "4-bit base",
    "half of max_length": "2 x 1024 tokens",
    "the upper third trained": "`--train-last-layers` a third of all, from a trunk",
    "optim adamw_8bit": "`--optim adamw_8bit`",
    "activation_offloading": "`--activation-offloading`",
}


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
        f"{where(record)}:\n\n{table(by_share)}\n\n{table(by_pairs)}"
    )


def responses(results: Path) -> str:
    """Tokens of several responses to a prompt, from `dpoeng bench sharing --responses`."""
    record = read("responses", results)[-1]
    ways = ("prompt once", "beginnings once")
    rows = [
        ["responses", "tokens, a row each", *(f"{way}: tokens" for way in ways), "times faster"],
        *(
            [
                str(point["responses"]),
                f"{point['tokens']['a response']:,}",
                *(
                    f"{point['tokens'][way]:,} ({point['tokens']['a response'] / point['tokens'][way]:.1f} times fewer)"
                    for way in ways
                ),
                " and ".join(f"{point['speedup'][way]:.1f}" for way in ways),
            ]
            for point in record["responses"]
        ),
    ]
    settings = record["settings"]
    return (
        f"A prompt of {settings['prompt']:,} tokens and responses of {settings['response']}, which begin alike for a "
        f"quarter of them and two by two for half, in one forward. {where(record)}:"
        f"\n\n{table(rows)}"
    )


def cache(results: Path) -> str:
    """Results of `dpoeng bench cache` beside the required ones."""
    record = read("cache", results)[-1]
    found, weights = record["read"], record["weights"]
    reached = [
        ["", "reached", "asked for"],
        [f"open {found['pairs']:,} pairs, structure checked", f"{found['open_ms'] / 1e3:.2f} s", "≤ 1 s"],
        ["the same, every byte hashed and every log-prob checked", f"{found['open_verified_ms'] / 1e3:.2f} s", ""],
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
        steps.append([label, *(number(step[name], 3) for step in record["sizes"])])
    return f"{where(record)}:\n\n{table(reached)}\n\n{table(steps)}"


def kernels(results: Path) -> str:
    """The head against its alternatives: training and scoring side by side, one table per shape and dtype."""
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
                f"{where(record)}:\n\n{table(rows)}"
            )
    return "\n\n".join(tables)


def _without_layer(option: str) -> str:
    """The trunk's option without the number of its layer, which depends on the model's depth."""
    return re.sub(r"^trunk_layer \d+, ", "", option)


def plan(results: Path) -> str:
    """Models of four sizes: peaks of phase two, and the batch that fits on each card. Calculated."""
    record = lines_of(results / "plan-calculated.jsonl")[-1]
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
    options = [{_without_layer(name): gib for name, gib in r["options_gib"].items()} for r in eight]
    rows += [[_OPTIONS.get(name, name), *(f"{one[name]:.1f}" for one in options)] for name in options[0]]
    rows.append(["two models in 8 bits, whole logits", *(f"{r['two_model_gib']:.1f}" for r in eight)])
    cards = [["base", *(card["name"] for card in eight[0]["cards"])]]
    for (model, quantization), result in found.items():
        name = f"{model.split('/')[-1]}, {BASES[quantization]}"
        cards.append([name, *(_card(card) for card in result["cards"])])
    settings = record["settings"]
    what = (
        f"2 x {settings['max_length']} tokens, LoRA r = {settings['lora_r']}; **calculated**, commit {record['commit']}"
    )
    return (
        f"{what}:\n\n{table(rows)}\n\nPairs a forward (up to 4 are tried) on a card of this size, estimates included:"
        f"\n\n{table(cards)}"
    )


def memory(results: Path) -> str:
    """Each recorded batch with each kind of reference: predicted and measured memory."""
    return "\n\n".join(_memory(record) for record in read("memory", results))


def _memory(record: Record) -> str:
    settings, lengths = record["settings"], record["lengths"]
    cached = next(case["measured_bytes"] for case in record["results"] if case["case"] == "cached reference")
    rows = [["peak, MiB", "predicted", "measured", "difference", "process", "over the cached reference"]]
    for case in record["results"]:
        names = ("predicted_bytes", "measured_bytes", "process_bytes")
        predicted, measured, process = (f"{case[name] / MIB:,.1f}" for name in names)
        over = "" if case["case"] == "phase one" else f"{case['measured_bytes'] / cached:.2f} times"
        rows.append([case["case"], predicted, measured, f"{100 * case['difference']:+.2f} %", process, over])
    model = settings["model"] or "The embedded model"
    base = BASES[settings["quantization"]] if settings["quantization"] != "none" else record["versions"]["dtype"]
    pairs = f"{len(lengths)} pair{'s' if len(lengths) > 1 else ''} of {sum(map(sum, lengths)):,} tokens"
    recomputed = "with" if settings["gradient_checkpointing"] else "without"
    return f"{model}, {base}, {pairs}, {recomputed} gradient checkpointing. {where(record)}:\n\n{table(rows)}"


def scale(results: Path) -> str:
    """The curves of `dpoeng bench scale`, one table per varied size; then several processes. Every record."""
    return "\n\n".join(_scale(record) for record in read("scale", results))


def _scale(record: Record) -> str:
    by_ranks = [curve for curve in record["curves"] if "speedup" in curve]
    grows = [curve for curve in record["curves"] if curve not in by_ranks]
    tables = []
    for over, *sizes in dict.fromkeys((curve["over"], *curve["sizes"]) for curve in grows):
        rows = [[f"by {over}", *(f"{size:,}" for size in sizes), "exponent", "last"]]
        for curve in grows:
            if [curve["over"], *curve["sizes"]] == [over, *sizes]:
                fit, in_mib = curve["exponent"], curve["unit"] == "bytes"
                cells = [number(cost / MIB) if in_mib else number(cost, 3) for cost in curve["medians"]]
                name = f"{curve['name']}, {'MiB' if in_mib else curve['unit']}"
                exponent = f"{fit['value']:.2f} ± {fit['standard_error']:.2f}"
                rows.append(
                    [name + (" (calculated)" if curve["simulated"] else ""), *cells, exponent, f"{fit['last']:.2f}"]
                )
        tables.append(table(rows))
    if by_ranks:
        tables.append(table(_ranks(by_ranks)))
    return f"{_count(record['settings']['repeats'])}. {where(record)}:\n\n" + "\n\n".join(tables)


def _ranks(curves: list[Record]) -> list[list[str]]:
    sizes, shared = curves[0]["sizes"], curves[0]["sharing"]
    rows = [
        [
            f"{curves[0]['pairs']} pairs by processes, one thread each",
            *(f"{size}{', sharing cores' if size in shared else ''}" for size in sizes),
        ]
    ]
    for curve in curves:
        rows.append([f"{curve['name']}, pairs/s", *(f"{speed:.2f}" for speed in curve["pairs_per_s"])])
        rows.append(["speed-up", *(f"{times:.2f}" for times in curve["speedup"])])
        rows.append(["efficiency", *(f"{100 * share:.0f} %" for share in curve["efficiency"])])
        rows.append(["evenly", *(f"{100 * share:.0f} %" for share in curve["busy"])])
    return rows


def step(results: Path) -> str:
    """Work that a training step's layer gives a GPU, one row per model and size. Calculated."""
    records = lines_of(results / "step-calculated.jsonl")
    rows = [["base", "tokens", "recomputed", "launches a layer", "GB a layer", "a step, estimated"]]
    for record in records:
        settings = record["settings"]
        rows.append(
            [
                f"{settings['model'].split('/')[-1]}, {BASES[settings['quantization']]}",
                f"{record['tokens']:,}",
                "yes" if settings["gradient_checkpointing"] else "no",
                str(sum(record["layer_launches"].values())),
                f"{sum(record['layer_n_bytes'].values()) / 1e9:.1f}",
                f"{record['estimated_s']:.2f} s, {record['gpu']}",
            ]
        )
    return f"**Calculated**, commit {records[-1]['commit']}:\n\n{table(rows)}"


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
    return ["–".join(number(s, 3) for s in seconds), times, f"{way['peak_bytes'] / MIB:,.0f}"]


def _count(repeats: int) -> str:
    return "one counted round" if repeats == 1 else f"{repeats} counted rounds"
