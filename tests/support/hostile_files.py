"""Files that strangers might send: each is made in a folder, and one command is pointed at it. Run by `attacks.py`."""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
import struct
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import ipc, parquet

sys.path[:0] = [str(Path(__file__).parents[1] / "cache")]
from test_foreign_tables import FILES, arrow, mutated  # noqa: E402 - found by the line above

PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}
DOUBLING = [{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}] * 40
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@dataclass(frozen=True)
class Attack:
    """One hostile file.

    Attributes:
        kind: of the file.
        name: what is wrong with it.
        command: of `dpoeng`, in the folder of the file; `model`, `adapter`, `cache` and `run` are sound there.
        make: makes it.
        environment: more variables.
        sound: whether the command may end well.
    """

    kind: str
    name: str
    command: str
    make: Callable[[Path], object]
    environment: Mapping[str, str] = field(default_factory=dict)
    sound: bool = False


def lines(*rows: Any) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def held(name: str, content: bytes | Callable[[], bytes]) -> Callable[[Path], object]:
    def make(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content())

    return make


def edited(name: str, **changes: Any) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


def tabled(name: str, table: Callable[[], Any], **options: Any) -> Callable[[Path], object]:
    def make(folder: Path) -> None:
        if name.endswith(".parquet"):
            parquet.write_table(table(), folder / name, **options)
        else:
            (folder / name).write_bytes(arrow(table(), **options))

    return make


def repeated(size: int, times: int) -> Any:
    return pa.table(
        {
            "prompt": pa.DictionaryArray.from_arrays(pa.array([0] * times, pa.int32()), ["x" * size]),
            **{name: pa.array([name] * times) for name in ("chosen", "rejected")},
        }
    )


def claimed_rows() -> bytes:
    return arrow(pa.table({"nothing": pa.nulls(1000)})).replace(struct.pack("<q", 5), struct.pack("<q", 2**40))


def runs() -> bytes:
    column = pa.RunEndEncodedArray.from_arrays(pa.array([2**31 - 1], pa.int32()), pa.array(["x"]))
    sink = pa.BufferOutputStream()
    with ipc.new_stream(sink, pa.schema({"prompt": column.type})) as writer:
        writer.write_batch(pa.record_batch({"prompt": column}))
    return bytes(sink.getvalue())


def of_billion_laughs() -> bytes:
    rows = ["a0: &a0 [lol, lol]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    return "\n".join(rows).encode()


def gz_of_empty_lists() -> bytes:
    return gzip.compress(b"[" + b"[]," * (83 << 20) + b"[]]", 9)


def gz_of_long_lines() -> bytes:
    line = json.dumps(PAIR)[:-1].encode() + b', "x": [' + b"[]," * (5 << 20) + b"[]]}\n"
    return gzip.compress(line * 5 + lines(PAIR), 9)


def beside(folder: Path) -> None:
    """An index that names a file outside of the model's folder."""
    (folder / "model" / "model.safetensors").rename(folder.parent / "outside.safetensors")
    index = {"weight_map": {"lm_head.weight": "../../outside.safetensors"}}
    (folder / "model" / "model.safetensors.index.json").write_text(json.dumps(index))


def long_header(folder: Path) -> None:
    with (folder / "model" / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", 80 << 20))
        file.write(b"{" + b" " * ((80 << 20) - 2) + b"}")


def gguf(kind: int, length: int) -> bytes:
    key = struct.pack("<Q", 1) + b"k"
    return struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + key + struct.pack("<IIQ", 9, kind, length) + bytes(100)


def templated(template: str) -> Callable[[Path], object]:
    def make(folder: Path) -> None:
        (folder / "model" / "chat_template.jinja").write_text(template)
        sides = {"chosen": "a", "rejected": "b"}
        row = {name: [{"role": "assistant", "content": text}] for name, text in sides.items()}
        (folder / "chat.jsonl").write_bytes(lines({"prompt": [{"role": "user", "content": "q"}], **row}))

    return make


def without(name: str, *fields: str) -> Callable[[Path], object]:
    def make(folder: Path) -> None:
        record = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({key: value for key, value in record.items() if key not in fields}))

    return make


def deep(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


def link_out(folder: Path) -> None:
    """An object of the cache that is a link to a file outside."""
    victim = next((folder / "cache" / "objects").rglob("*.arrow"))
    outside = folder.parent / "outside.arrow"
    shutil.copyfile(victim, outside)
    victim.unlink()
    victim.symlink_to(outside)


CHECK, IMPORT = "check", "cache import"
MODEL = "precompute-ref pairs.jsonl --model model --cache new"
ADAPTER = MODEL + " --adapter adapter"
CHAT = "check chat.jsonl --model model"


def _pairs() -> list[Attack]:
    names = {
        "markup": "[/x]",
        "prompt format": "[INST]",
        "emoji": ":smile:",
        "escape": "\x1b[2J\x1b]0;x\x07",
        "NUL": "\0",
    }
    rows = [{**PAIR, "prompt": f"p{i}", text: text} for i, text in enumerate(names.values())]
    found = [
        Attack(
            "text",
            "markup, emoji and control characters in columns and values",
            "check t.jsonl",
            held("t.jsonl", lines(*rows)),
            sound=True,
        ),
        Attack("text", "markup as the name of a file", "check [/x].jsonl", held("[/x].jsonl", lines(PAIR)), sound=True),
        Attack("text", "markup in a filter", "check t.jsonl --where [/INST]", held("t.jsonl", lines(PAIR))),
        Attack(
            "JSON",
            "250 kB of gzip that are 249 MiB of empty lists",
            "check t.json.gz",
            held("t.json.gz", gz_of_empty_lists),
        ),
        Attack(
            "JSON Lines",
            "lines of five million empty lists",
            "check t.jsonl.gz --max-reject-share 1",
            held("t.jsonl.gz", gz_of_long_lines),
            sound=True,
        ),
        Attack("JSON Lines", "100,000 brackets", "check t.jsonl", held("t.jsonl", deep(100_000) + b"\n")),
        Attack(
            "JSON Lines",
            "a number of 100,000 digits",
            "check t.jsonl",
            held("t.jsonl", b'{"prompt": ' + b"9" * 100_000 + b"}\n"),
        ),
        Attack(
            "JSON Lines",
            "48,000 columns",
            "check t.jsonl",
            held("t.jsonl", lines({f"c{i}": i for i in range(48_000)} | PAIR)),
            sound=True,
        ),
        Attack(
            "CSV",
            "48,000 columns",
            "check t.csv",
            held("t.csv", ",".join(f"c{i}" for i in range(48_000)).encode() + b"\n"),
        ),
        Attack(
            "CSV",
            "a quote that never ends, 200 MB",
            "check t.csv",
            held("t.csv", b'prompt,chosen,rejected\n"' + b"x,\n" * (66 << 20)),
        ),
        Attack("file", "a pipe", "check t.jsonl", lambda folder: os.mkfifo(folder / "t.jsonl")),
        Attack(
            "file", "a link to /dev/zero", "check t.jsonl", lambda folder: (folder / "t.jsonl").symlink_to("/dev/zero")
        ),
    ]
    for command in (CHECK, IMPORT):
        more = " --model model --cache new" if command == IMPORT else ""
        for suffix in ("arrow", "parquet"):
            for what, content in (("text", b"text\n"), ("nothing", b""), ("no UTF-8", b"\xff\xfe\xff")):
                found.append(
                    Attack(
                        suffix,
                        f"{what} under this name, {command}",
                        f"{command} t.{suffix}{more}",
                        held(f"t.{suffix}", content),
                    )
                )
        for name, make in FILES.items():
            for seed in range(3):
                content = mutated(make(), random.Random(f"attack {name} {seed}"))
                found.append(
                    Attack(
                        name.rsplit(".", 1)[1],
                        f"{name} with wild offsets, {seed}, {command}",
                        f"{command} {name}{more}",
                        held(name, content),
                        sound=True,
                    )
                )
        bombs: list[tuple[str, str, Callable[[Path], object]]] = [
            ("arrow", "352 bytes with 2^40 rows", held("t.arrow", claimed_rows)),
            ("arrow", "2^31 rows in one run", held("t.arrow", runs)),
            (
                "arrow",
                "34 kB of zstd that are 1 GiB",
                tabled("t.arrow", lambda: pa.table({"prompt": ["x" * (1 << 30)]}), compression="zstd"),
            ),
            ("arrow", "64 MiB 100,000 times by dictionary", tabled("t.arrow", lambda: repeated(64 << 20, 100_000))),
            (
                "parquet",
                "64 MiB 100,000 times by dictionary",
                tabled("t.parquet", lambda: repeated(64 << 20, 100_000), store_schema=False),
            ),
            (
                "parquet",
                "34 kB of zstd that are 1 GiB",
                tabled(
                    "t.parquet",
                    lambda: pa.table({"prompt": ["x" * (1 << 30)]}),
                    compression="zstd",
                    use_dictionary=False,
                ),
            ),
            (
                "parquet",
                "a list of 2^26 values in some bytes",
                tabled(
                    "t.parquet",
                    lambda: pa.table(
                        {
                            "prompt": pa.ListArray.from_arrays(
                                pa.array([0, 1 << 26], pa.int32()),
                                pa.array([7]).take(pa.nulls(1 << 26, pa.int32()).fill_null(0)),
                            )
                        }
                    ),
                ),
            ),
        ]
        for suffix, name, maker in bombs:
            found.append(Attack(suffix, f"{name}, {command}", f"{command} t.{suffix}{more}", maker, sound=True))
    return found


def _configs() -> list[Attack]:
    return [
        Attack("YAML", "billion laughs", "check pairs.jsonl --config c.yaml", held("c.yaml", of_billion_laughs)),
        Attack("YAML", "50 MB", "check pairs.jsonl --config c.yaml", held("c.yaml", b"- a\n" * (12 << 20))),
        Attack("YAML", "a pipe", "check pairs.jsonl --config c.yaml", lambda folder: os.mkfifo(folder / "c.yaml")),
        Attack(
            "YAML",
            "an object of Python's",
            "check pairs.jsonl --config c.yaml",
            held("c.yaml", b"model: !!python/object/apply:os.system ['touch ../outside']\n"),
        ),
        Attack("YAML", "100,000 brackets", "check pairs.jsonl --config c.yaml", held("c.yaml", b"a: " + deep(100_000))),
        Attack("set-up", "billion laughs, migrate", "migrate c.yaml", held("c.yaml", of_billion_laughs)),
        Attack("set-up", "100,000 brackets, migrate", "migrate c.py", held("c.py", deep(100_000))),
        Attack("set-up", "100,000 brackets of JSON, migrate", "migrate c.json", held("c.json", deep(100_000))),
        Attack(
            "options",
            "--seed of 70 bits",
            "train --cache cache --output-dir o --seed 1180591620717411303424",
            lambda _: None,
        ),
        Attack("options", "--lora-r 10^9", "train --cache cache --output-dir o --lora-r 1000000000", lambda _: None),
        Attack(
            "options",
            "--max-steps 10^19",
            "train --cache cache --output-dir o --max-steps 10000000000000000000",
            lambda _: None,
        ),
        Attack(
            "options",
            "PYTHONWARNINGS=error",
            "check pairs.jsonl --model model",
            lambda _: None,
            {"PYTHONWARNINGS": "error"},
            sound=True,
        ),
    ]


def _models() -> list[Attack]:
    split = {"type": "Split", "pattern": {"Regex": r"(a+)+\1b"}, "behavior": "Isolated", "invert": False}
    return [
        Attack("model", "an index that names ../outside", MODEL, beside),
        Attack(
            "model",
            "an index whose map is a list",
            MODEL,
            held("model/model.safetensors.index.json", lines({"weight_map": [1]})),
        ),
        Attack("model", "vocab_size 10^12", MODEL, edited("model/config.json", vocab_size=10**12)),
        Attack("model", "head_dim 0", MODEL, edited("model/config.json", head_dim=0)),
        Attack("model", "num_hidden_layers 10^9", MODEL, edited("model/config.json", num_hidden_layers=10**9)),
        Attack("model", "100,000 brackets as config.json", MODEL, held("model/config.json", deep(100_000))),
        Attack("model", "a safetensors header of 80 MB", MODEL, long_header),
        *(
            Attack(
                "GGUF",
                f"an array of 2^63, type {kind}",
                "precompute-ref pairs.jsonl --model m.gguf --cache new",
                held("m.gguf", gguf(kind, 2**63)),
            )
            for kind in (4, 8, 9, 10)
        ),
        Attack(
            "adapter",
            "a pattern that never ends",
            ADAPTER,
            edited("adapter/adapter_config.json", target_modules="(a+)+$"),
        ),
        Attack(
            "adapter",
            "rank_pattern that never ends",
            ADAPTER,
            edited("adapter/adapter_config.json", rank_pattern={"(([a-z._0-9])+.)+qq": 4}),
        ),
        Attack(
            "adapter",
            "layer_replication of ten million",
            ADAPTER,
            edited("adapter/adapter_config.json", layer_replication=[[0, 10**7]]),
        ),
        Attack("adapter", "lora_alpha 1e308", ADAPTER, edited("adapter/adapter_config.json", lora_alpha=1e308)),
        Attack(
            "adapter",
            "pissa_niter_1000000",
            ADAPTER,
            edited("adapter/adapter_config.json", init_lora_weights="pissa_niter_1000000"),
            sound=True,
        ),
        Attack("template", "loops of 10^10", CHAT, templated(ENDLESS)),
        Attack("template", "ten billion letters", CHAT, templated("{{ 'x' * 9999999999 }}")),
        Attack(
            "template",
            "a text doubled 60 times",
            CHAT,
            templated(
                "{% set n = namespace(s='ab') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}"
            ),
        ),
        Attack(
            "template", "reaches for Python's own", CHAT, templated("{{ ''.__class__.__mro__[1].__subclasses__() }}")
        ),
        Attack(
            "tokenizer",
            "a normalizer that doubles 40 times",
            "check pairs.jsonl --model model",
            edited("model/tokenizer.json", normalizer={"type": "Sequence", "normalizers": DOUBLING}),
        ),
        Attack(
            "tokenizer",
            "a pattern with too many ways",
            "check pairs.jsonl --model model",
            edited("model/tokenizer.json", pre_tokenizer=split),
        ),
    ]


def _records() -> list[Attack]:
    return [
        Attack("run", "run.json without its configuration", "report run", without("run/run.json", "config")),
        Attack(
            "run",
            "run.json without its reference, eval",
            "eval --cache cache --adapter run",
            without("run/run.json", "reference"),
        ),
        Attack(
            "run",
            "run.json without its configuration, merge",
            "merge run --into o",
            without("run/run.json", "config", "reference"),
        ),
        Attack(
            "run",
            "metrics of 400 digits",
            "report run",
            held("run/metrics.jsonl", b'{"step": 1, "loss": ' + b"9" * 400 + b"}\n"),
        ),
        Attack(
            "run",
            "metrics of null and no steps",
            "report run",
            held("run/metrics.jsonl", b'{"step": null}\n{"loss": 1}\n'),
        ),
        Attack(
            "run",
            "metrics that lack steps",
            "report run",
            held("run/metrics.jsonl", b'{"step": 1, "loss": 1}\n{"step": 9, "loss": null}\n'),
            sound=True,
        ),
        Attack(
            "run",
            "100,000 brackets as metrics, compare",
            "watch run",
            held("run/metrics.jsonl", deep(100_000) + b"\n"),
        ),
        Attack("cache", "an object that is a link outside", "cache verify cache", link_out),
        Attack(
            "cache",
            "a view that is text",
            "cache info cache",
            lambda folder: next((folder / "cache/views").glob("*.json")).write_text("[/x]"),
        ),
        Attack("cache", "a FORMAT of the future", "cache info cache", held("cache/FORMAT", b"dpoeng-cache 999\n")),
    ]


def resealed(name: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """A record of the cache, changed and sealed again: its checksum is right."""

    def make(folder: Path) -> None:
        from dpoeng.cache.records import seal

        body = json.loads((folder / name).read_bytes().partition(b"\n")[0])
        change(body)
        (folder / name).write_bytes(seal(body))

    return make


def with_extra(extra: bytes) -> Callable[[Path], object]:
    """A view whose rows have these bytes as the user's other columns, with checksums that are right."""

    def make(folder: Path) -> None:
        import xxhash

        views = folder / "cache" / "views"
        with ipc.open_file(next(views.glob("*.arrow")).read_bytes()) as reader:
            batch = reader.get_batch(0)
        columns = [*batch.columns[:-1], pa.array([extra] * batch.num_rows, batch.schema.field("extra").type)]
        sink = pa.BufferOutputStream()
        with ipc.new_file(sink, batch.schema) as writer:
            writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=batch.schema))
        data = bytes(sink.getvalue())
        digest = xxhash.xxh3_128_hexdigest(data)
        (views / f"{digest}.arrow").write_bytes(data)
        table = [digest, batch.num_rows, len(data)]
        resealed("cache/views/pairs.json", lambda body: body.update(table=table))(folder)

    return make


def rejects_outside(folder: Path) -> None:
    """A link in the place of the folder of rejects, and a row to reject."""
    (folder / "cache" / "rejects").symlink_to(folder.parent)
    with (folder / "pairs.jsonl").open("a") as file:
        file.write("{}\n")


def split_outside(folder: Path) -> None:
    """A saved data set whose split lies outside of its folder."""
    (folder.parent / "outside").mkdir()
    (folder.parent / "outside" / "train.jsonl").write_bytes(lines(PAIR))
    held("set/dataset_dict.json", lines({"splits": ["../../outside"]}))(folder)


def piped(name: str) -> Callable[[Path], object]:
    def make(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return make


def _later() -> list[Attack]:
    """On what came later: saved data sets, ranked and unpaired rows, selections, mixtures, trunks, own losses."""
    train, select = "train --cache cache --output-dir o --max-steps 1", "select --cache cache --output o"
    many = {"prompt": "p", "responses": ["r"] * 20_000, "scores": list(range(20_000))}
    huge = {"prompt": "p", "responses": ["a", "b"], "scores": [10**400, 1]}
    label = {"prompt": "p", "completion": "c", "label": 10**400}
    named = {"loss_type": ["evil.py:loss"]}

    def evil(folder: Path) -> None:
        (folder / "evil.py").write_text("open('../outside-made.txt', 'w')\ndef loss(inputs): return 0\n")
        record = json.loads((folder / "run/run.json").read_text())
        record["config"] = {**record.get("config", {}), **named}
        (folder / "run/run.json").write_text(json.dumps(record))

    return [
        Attack("saved data set", "a split outside of the folder", "check set", split_outside),
        Attack(
            "saved data set",
            "a split that is the folder",
            "check set",
            held("set/dataset_dict.json", lines({"splits": ["."]})),
        ),
        Attack("saved data set", "100,000 brackets", "check set", held("set/dataset_dict.json", deep(100_000))),
        Attack(
            "ranked rows",
            "20,000 responses, all pairs",
            "check t.jsonl --ranked-pairs all",
            held("t.jsonl", lines(many)),
        ),
        Attack("ranked rows", "a score of 400 digits", "check t.jsonl", held("t.jsonl", lines(huge))),
        Attack("unpaired rows", "a label of 400 digits", "check t.jsonl", held("t.jsonl", lines(label))),
        Attack(
            "view",
            "no reference, train",
            train,
            resealed("cache/views/pairs.json", lambda body: body["meta"].pop("reference")),
        ),
        Attack(
            "view",
            "another kind of rows, train",
            train,
            resealed("cache/views/pairs.json", lambda body: body["meta"].update(rows=["x"])),
        ),
        Attack("view", "100,000 brackets as columns, select", f"{select} --by column:x", with_extra(deep(100_000))),
        Attack("view", "a list as columns, train", f"{train} --eval-share 0.5 --eval-group-by x", with_extra(b"[]")),
        Attack(
            "view",
            "a score of 400 digits, select",
            f"{select} --by column:x",
            with_extra(b'{"x": 1' + b"0" * 400 + b"}"),
        ),
        Attack("options", "select --share nan", f"{select} --rule large --share nan", lambda _: None),
        Attack("options", "select --min-score nan", f"{select} --min-score nan", lambda _: None),
        Attack("options", "--mix nan", f"{train} --mix-with pairs --mix nan,1", lambda _: None),
        Attack(
            "cache",
            "the folder of rejects is a link outside",
            "precompute-ref pairs.jsonl --model model --cache cache --max-reject-share 1",
            rejects_outside,
        ),
        Attack("run", "run.json names a loss in a file, eval", "eval --cache cache --adapter run", evil, sound=True),
        Attack("run", "run.json names a loss in a file, report", "report run", evil, sound=True),
        Attack("run", "metrics that are a pipe, watch", "watch run", piped("run/metrics.jsonl")),
        Attack(
            "run",
            "a step of 10^18, report",
            "report run",
            held("run/metrics.jsonl", lines({"step": 1, "loss": 1.0}, {"step": 10**18, "loss": 1.0})),
            sound=True,
        ),
    ]


def attacks() -> list[Attack]:
    """All of them."""
    return [*_pairs(), *_configs(), *_models(), *_records(), *_later()]
