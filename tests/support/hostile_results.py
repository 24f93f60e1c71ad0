"""Hostile ranked rows, names on the hub, quantised bases, scripts, and edited results of judges, rounds and sweeps.

`prepare` adds what they edit to the folder of `attacks.py`: a run that held pairs out, what a judge and a round said
of it, and a sweep that ended runs early.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hostile_files import Attack, edited, held, lines
from stored_checkpoints import write_stored

Make = Callable[[Path], object]

RULE = "def score(prompt, answer):\n    return float(sum(map(ord, answer)) % 97)\n"
TRAIN = "--max-steps 4 --eval-share 0.4 --eval-steps 1 --per-device-train-batch-size 2"
JUDGE = "judge tried --judge rule.py:score --max-new-tokens 4 --temperature 1 --count 3"
ROUND = (
    "round tried --judge rule.py:score --max-new-tokens 4 --count 6 --keep-cut --reference first --output-dir rounds"
)
SWEEP = f"sweep --cache cache --output-dir sweep --vary beta=0.1,0.2 --halving-factor 2 {TRAIN}"
PREPARED = (f"train --cache cache --output-dir tried {TRAIN}", JUDGE, ROUND, SWEEP)
"""Commands whose results are edited."""


def rewritten(name: str, change: Callable[[dict[str, Any]], object]) -> Make:
    """Changes every line of a file of JSON lines."""

    def make(folder: Path) -> None:
        rows = [json.loads(line) for line in (folder / name).read_text().splitlines()]
        for row in rows:
            change(row)
        (folder / name).write_bytes(lines(*rows))

    return make


def linked(name: str, *, empty: bool = False) -> Make:
    """A link in the place of a file of the folder, to one outside of it with the same content."""

    def make(folder: Path) -> None:
        path, outside = folder / name, folder.parent / "outside.out"
        outside.write_bytes(b"" if empty or not path.exists() else path.read_bytes())
        path.unlink(missing_ok=True)
        path.parent.mkdir(exist_ok=True, parents=True)
        path.symlink_to(outside)

    return make


def linked_folder(name: str) -> Make:
    """A link in the place of a folder, to an empty one outside."""

    def make(folder: Path) -> None:
        (folder.parent / "outside").mkdir()
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).symlink_to(folder.parent / "outside")

    return make


def quantised(name: str, record: Mapping[str, Any] | None = None, **parts: Callable[[Any], Any]) -> Make:
    """A base in a stored format, with fields of its quantization_config and tensors of its first layers changed."""

    def make(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        write_stored(folder / "model", folder / "coded", name)
        file = folder / "coded" / "config.json"
        config = json.loads(file.read_text())
        config["quantization_config"].update(record or {})
        file.write_text(json.dumps(config))
        tensors = load_file(folder / "coded" / "model.safetensors")
        for key in tensors:
            if (part := key.rpartition(".")[2]) in parts:
                tensors[key] = parts[part](tensors[key]).contiguous()
        save_file(tensors, folder / "coded" / "model.safetensors", metadata={"format": "pt"})

    return make


def script(text: str) -> Make:
    return held("s.py", text.encode())


def trainer(model: str) -> str:
    return f"from trl import DPOTrainer\nDPOTrainer(model={model}, args=DPOConfig(beta=0.1))\n"


def _ranked() -> list[Attack]:
    def rows(responses: Any, scores: Any) -> Make:
        return held("t.jsonl", lines({"prompt": "p", "responses": responses, "scores": scores}))

    many = [f"r{number}" for number in range(10**6)]
    keep = "check t.jsonl"
    return [
        Attack("ranked rows", "100,000 responses", keep, rows(many[:100_000], list(range(100_000))), sound=True),
        Attack("ranked rows", "10^6 responses", keep, rows(many, list(range(10**6)))),
        Attack(
            "ranked rows", "10^6 responses, best", "check t.jsonl --ranked-pairs best", rows(many, list(range(10**6)))
        ),
        Attack("ranked rows", "100,000 equal responses", keep, rows(["r"] * 100_000, list(range(100_000)))),
        Attack("ranked rows", "lists of lists of responses", keep, rows([[["a"]], [["b"]]], [1, 2])),
        Attack("ranked rows", "objects as responses", keep, rows([{"a": 1}, {"b": 1}], [1, 2])),
        Attack("ranked rows", "true and false as scores", keep, rows(["a", "b"], [True, False])),
        Attack("ranked rows", "nested scores", keep, rows(["a", "b"], [[1], [2]])),
        Attack("ranked rows", "nan and infinity as scores", keep, rows(["a", "b"], [float("nan"), float("inf")])),
        Attack("ranked rows", "texts nan and 1e999 as scores", keep, rows(["a", "b"], ["nan", "1e999"])),
        Attack("ranked rows", "a score of 400 digits, ranked", keep, rows(["a", "b"], [10**400, 1])),
        Attack("ranked rows", "100,000 brackets as a text", keep, rows("[" * 100_000, "[1, 2]")),
        Attack("ranked rows", "as many brackets as scores", keep, rows(["a", "b"], "[" * 100_000)),
    ]


def _names() -> list[Attack]:
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": "hub"}

    def view_of(name: str) -> Make:
        from hostile_files import resealed

        return resealed("cache/views/pairs.json", lambda body: body["meta"].update(files={name: "0" * 32}))

    return [
        *(
            Attack("hub name", name.encode("unicode_escape").decode()[:40], f"check '{name}'", lambda _: None, offline)
            for name in (
                "hf://../..",
                "hf://a/..",
                "hf://a/b@..",
                "hf://a/b/../../../outside.txt",
                "hf://a/b\x1b[2J",
                "hf://a/b?split=../x",
                "hf://" + "a" * 10_000 + "/b",
            )
        ),
        Attack(
            "hub name",
            "a view's file is ../outside.txt at the hub",
            JUDGE + " --output-dir j",
            view_of("hf://datasets/a/b@c/../../../../../outside.txt"),
            offline,
            sound=True,
        ),
    ]


def _judged() -> list[Attack]:
    again, key = f"{ROUND} --rounds 2", "rounds/verdicts.jsonl"
    verdicts, answers = "tried/judge/verdicts.jsonl", "tried/judge/answers.jsonl"

    def value(name: str, found: Any) -> Make:
        return rewritten(name, lambda row: row.update(value=found))

    wild: dict[str, Any] = {
        "a list": [1],
        "a text": "x",
        "no fields": {},
        "a text as score": {"score": "high"},
        "nan as score": {"score": float("nan")},
        "a score of 400 digits": {"score": 10**400},
        "a list as score": {"score": [1]},
    }
    return [
        *(Attack("verdicts", f"{what}, judge", JUDGE, value(verdicts, found)) for what, found in wild.items()),
        *(
            Attack("answers", f"{what}, judge", JUDGE, value(answers, found))
            for what, found in {
                "empty lists": [],
                "a number": 7,
                "texts": ["a"],
                "no fields": [{}],
                "a number as text": [{"text": 5, "ended": True, "tokens": 1}],
                "a text as tokens": [{"text": "a", "ended": True, "tokens": "x"}],
            }.items()
        ),
        Attack("verdicts", "100,000 brackets, judge", JUDGE, held(verdicts, b"[" * 100_000 + b"\n")),
        Attack("verdicts", "a list as score, round", again, value(key, {"score": [1]})),
        Attack("answers", "no fields, round", again, value("rounds/round-1/answers.jsonl", [{}]), sound=True),
        Attack("verdicts", "a link outside, judge", f"{JUDGE} --seed 3", linked(verdicts)),
        Attack("answers", "a link outside, judge", f"{JUDGE} --seed 3", linked(answers)),
        Attack("verdicts", "a pipe, judge", f"{JUDGE} --seed 3", _piped(verdicts)),
        Attack("judge", "the folder is a link outside", JUDGE, _judge_elsewhere),
        Attack("rounds", "a list of settings", again, edited("rounds/rounds.json", settings=[1])),
        Attack("rounds", "a list as record", again, held("rounds/rounds.json", b"[]")),
        Attack("rounds", "100,000 brackets", again, held("rounds/rounds.json", b"[" * 100_000)),
        Attack("rounds", "a text for each number", again, _in_rounds(str)),
        Attack("rounds", "null for each number", again, _in_rounds(lambda _: None)),
        Attack("rounds", "a list for each field", again, _in_rounds(lambda _: [], of=object)),
        Attack("rounds", "numbers of 400 digits", again, _in_rounds(lambda _: 10**400)),
    ]


def _judge_elsewhere(folder: Path) -> None:
    (folder / "tried" / "judge").rename(folder.parent / "outside")
    (folder / "tried" / "judge").symlink_to(folder.parent / "outside")
    (folder / "tried" / "judge" / "verdicts.jsonl").rename(folder.parent / "outside.jsonl")


def _piped(name: str) -> Make:
    def make(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return make


def _in_rounds(change: Callable[[Any], Any], of: type = int) -> Make:
    def make(folder: Path) -> None:
        file = folder / "rounds" / "rounds.json"
        record = json.loads(file.read_text())
        record["rounds"] = [
            {name: change(value) if isinstance(value, of) else value for name, value in one.items()}
            for one in record["rounds"]
        ]
        file.write_text(json.dumps(record))

    return make


def _sweeps() -> list[Attack]:
    made = "sweep/beta=0.1"

    def decided(*decisions: Any) -> Make:
        def make(folder: Path) -> None:
            file = folder / "sweep" / "promotions.jsonl"
            file.write_bytes(file.read_bytes().splitlines(keepends=True)[0] + lines(*decisions))

        return make

    return [
        Attack("sweep", "a decision without fields", SWEEP, decided({})),
        Attack("sweep", "a decision of a number", SWEEP, decided({"run": 1, "rung": "x", "score": 7, "among": []})),
        Attack(
            "sweep",
            "a decision on a run outside",
            SWEEP,
            decided({"run": "../../outside", "rung": 1, "score": [1.0], "among": 2}),
        ),
        Attack(
            "sweep",
            "a decision for rung 10^9",
            SWEEP,
            decided({"run": "beta=0.1", "rung": 10**9, "score": [1.0], "among": 2}),
        ),
        Attack("sweep", "100,000 brackets as decisions", SWEEP, held("sweep/promotions.jsonl", b"[" * 100_000 + b"\n")),
        Attack("sweep", "evaluations without metrics", SWEEP, _everywhere("evaluations.jsonl", _without("metrics"))),
        Attack(
            "sweep",
            "evaluations with texts",
            SWEEP,
            _everywhere("evaluations.jsonl", lambda row: row.update(metrics={"rewards/accuracies": "x"})),
        ),
        Attack(
            "sweep",
            "evaluations whose intervals are numbers",
            SWEEP,
            _everywhere("evaluations.jsonl", lambda row: row.update(intervals={"rewards/margins": 3})),
        ),
        Attack("sweep", "evaluations of other steps", SWEEP, _everywhere("evaluations.jsonl", _later), sound=True),
        Attack("sweep", "held-out pairs without fields", SWEEP, _everywhere("held_out.jsonl", dict.clear)),
        Attack(
            "sweep", "held-out pairs of texts", SWEEP, _everywhere("held_out.jsonl", lambda row: row.update(loss="x"))
        ),
        Attack(
            "sweep",
            "no held-out pairs in one run",
            SWEEP,
            lambda folder: [path.write_bytes(b"") for path in sorted(folder.glob("sweep/*/held_out.jsonl"))[:1]],
        ),
        Attack(
            "sweep",
            "other held-out pairs in one run",
            SWEEP,
            lambda folder: [
                rewritten(str(path.relative_to(folder)), lambda row: row.update(prompt="other"))(folder)
                for path in sorted(folder.glob("sweep/*/held_out.jsonl"))[:1]
            ],
            sound=True,
        ),
        Attack("run", "evaluations without metrics, report", "report tried", _tried("evaluations.jsonl", "metrics")),
        Attack("run", "held-out pairs without fields, report", "report tried", _tried("held_out.jsonl", "loss")),
        Attack("sweep", "a run's folder is a link outside", SWEEP, _run_outside(made)),
    ]


def _without(field: str) -> Callable[[dict[str, Any]], object]:
    return lambda row: row.pop(field, None)


def _later(row: dict[str, Any]) -> None:
    row["step"] += 10**15


def _everywhere(name: str, change: Callable[[dict[str, Any]], object]) -> Make:
    def make(folder: Path) -> None:
        for path in folder.glob(f"sweep/*/{name}"):
            rewritten(str(path.relative_to(folder)), change)(folder)

    return make


def _tried(name: str, field: str) -> Make:
    return rewritten(f"tried/{name}", _without(field))


def _run_outside(name: str) -> Make:
    """An unfinished run of a sweep is a link to a folder outside, whose log would grow."""

    def make(folder: Path) -> None:
        run = next(path for path in sorted((folder / "sweep").iterdir()) if (path / "metrics.jsonl").is_file())
        linked(str(run.relative_to(folder) / "metrics.jsonl"))(folder)
        for result in (run / "adapter", run / "model"):
            if result.is_dir():
                result.rename(run / "gone")

    return make


def _exports() -> list[Attack]:
    plain = "--check-pairs 0"
    return [
        Attack(
            "export",
            "a GGUF file that is a link outside, with --force",
            f"export run --to gguf-adapter --into run/out.gguf --force {plain}",
            linked("run/out.gguf"),
            sound=True,
        ),
        Attack(
            "export",
            "a target folder that is a link outside",
            f"export run --to vllm --into run/vllm {plain}",
            linked_folder("run/vllm"),
        ),
        Attack("merge", "a target folder that is a link outside", "merge run --into run/m", linked_folder("run/m")),
        Attack(
            "run",
            "a log that is a link outside, trained on",
            "train --cache cache --output-dir run --max-steps 4",
            linked("run/metrics.jsonl"),
            sound=True,
        ),
    ]


def _quantised() -> list[Attack]:
    import torch

    def command(more: str = "") -> str:
        return f"precompute-ref pairs.jsonl --model coded --cache new{more}"

    wild: tuple[tuple[str, dict[str, Any]], ...] = (
        ("fp8 blocks", {"weight_block_size": [0, 0]}),
        ("fp8 blocks", {"weight_block_size": ["a", {}]}),
        ("fp8 blocks", {"weight_block_size": [10**30, 1]}),
        ("fp8 blocks", {"weight_block_size": 7, "modules_to_not_convert": 5}),
        ("gptq", {"bits": 0}),
        ("gptq", {"bits": 10**12, "group_size": 10**40}),
        ("gptq", {"bits": [4]}),
        ("gptq", {"modules_to_not_convert": [["a"]]}),
        ("gptq", {"modules_to_not_convert": ["re:(a+)+$"]}),
        ("awq", {"group_size": -5}),
        ("pack-quantized", {"config_groups": [1]}),
        ("pack-quantized", {"config_groups": {"g": 5}}),
        ("pack-quantized", {"config_groups": {"g": {"weights": {"num_bits": 0}}}}),
        ("pack-quantized", {"config_groups": {"g": {"weights": {"num_bits": 4, "strategy": [1]}, "targets": 7}}}),
        ("pack-quantized", {"config_groups": {"g": {"weights": {"num_bits": 4, "group_size": "x"}}}}),
        ("pack-quantized", {"sparsity_config": 3}),
    )
    shapes: tuple[tuple[str, str, str, Callable[[Any], Any]], ...] = (
        ("fp8 blocks", "no scales", "weight_scale_inv", lambda t: t[:0]),
        ("fp8 blocks", "scales of three dimensions", "weight_scale_inv", lambda t: t[None, None]),
        ("fp8 blocks", "scales that are codes", "weight_scale_inv", lambda t: t.to(torch.int64)),
        ("fp8 blocks", "scales of nan", "weight_scale_inv", lambda t: t * float("nan")),
        ("fp8 tensor", "a scale for a column too many", "weight_scale_inv", lambda t: torch.ones(1, 7)),
        ("gptq", "g_idx of 10^9", "g_idx", lambda t: t + 10**9),
        ("gptq", "one g_idx of -1, others of 10^9", "g_idx", lambda t: torch.cat([t[:1] * 0 - 1, t[1:] + 10**9])),
        ("gptq", "no g_idx", "g_idx", lambda t: t[:0]),
        ("gptq", "half of g_idx", "g_idx", lambda t: t[: len(t) // 2]),
        ("gptq", "g_idx that are floats", "g_idx", lambda t: t.float() * float("nan")),
        ("gptq", "flat codes", "qweight", lambda t: t.reshape(-1)),
        ("gptq", "codes of 64 bits", "qweight", lambda t: t.to(torch.int64)),
        ("gptq", "no zero points", "qzeros", lambda t: t[:0]),
        ("awq", "flat zero points", "qzeros", lambda t: t.reshape(-1)),
        ("awq", "a scale too few", "scales", lambda t: t[:-1]),
        ("pack-quantized", "a shape of 10^12 by 10^12", "weight_shape", lambda t: t * 0 + 10**12),
        ("pack-quantized", "a negative shape", "weight_shape", lambda t: -t),
        ("pack-quantized", "a shape of one number", "weight_shape", lambda t: t[:1]),
        ("nvfp4", "a divisor of 0", "weight_global_scale", lambda t: t * 0),
        ("nvfp4", "no divisor", "weight_global_scale", lambda t: t[:0]),
        ("int-quantized", "a flat scale", "weight_scale", lambda t: t.reshape(-1)),
    )
    return [
        *(
            Attack(
                "quantised base", f"{name}, {json.dumps(record)[:60]}", command(), quantised(name, record), sound=True
            )
            for name, record in wild
        ),
        *(
            Attack("quantised base", f"{name}, {what}", command(), quantised(name, None, **{part: change}), sound=True)
            for name, what, part, change in shapes
        ),
    ]


def _scripts() -> list[Attack]:
    def doubled(step: str, times: int = 60) -> str:
        return "x0 = 'a'\n" + "".join(f"x{i} = {step.format(f'x{i - 1}')}\n" for i in range(1, times))

    texts = "f'" + "{{{0}}}" * 40 + "'"
    cases = {
        "a sum of 50,000 terms": trainer("+".join(["1"] * 50_000)),
        "a sum of 2,000 terms": trainer("+".join(["a"] * 2_000)),
        "5,000 attributes": trainer("m" + ".a" * 5_000),
        "80 calls in calls": trainer("f(" * 80 + ")" * 80),
        "60 objects, each made of two": doubled("{0}.map({0})") + trainer("x59"),
        "18 lists, each of the last 40 times": doubled("[" + "{0}, " * 40 + "]", 19) + trainer("x18"),
        "18 texts, each of the last 40 times": doubled(texts, 19) + trainer("x18"),
        "a variable that is itself": "x = x\ny = [y]\n" + trainer("[x, y]"),
        "control characters in a value": trainer(repr("a\x1b[2J\x07")),
    }
    return [Attack("script", what, "migrate s.py", script(text), sound=True) for what, text in cases.items()]


def attacks() -> list[Attack]:
    """All of them."""
    return [*_ranked(), *_names(), *_judged(), *_sweeps(), *_exports(), *_quantised(), *_scripts()]
