"""Reads the settings of a TRL training script from its syntax tree, without running or importing it.

Constants are followed through variables, dictionaries, and defaults of command-line arguments. Computed values are not
guessed but passed on as text. Public scripts set the scope: calls with literals and constants at the top of the file,
and in one of three `args.beta` from argparse or a dataclass.
"""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpoeng.cache.errors import UserError

# class -> the source that `foreign_names` uses for its arguments
CLASSES = {
    "DPOTrainer": "trl",
    "DPOConfig": "trl",
    "TrainingArguments": "trl",
    "ModelConfig": "trl",
    "ScriptArguments": "trl",
    "LoraConfig": "peft",
    "BitsAndBytesConfig": "bitsandbytes",
}
# Arguments of DPOTrainer that are objects: followed to where they are made, or read separately.
_OBJECTS = frozenset("model ref_model args train_dataset eval_dataset peft_config".split())
# Arguments of from_pretrained that do not describe the model, or are read elsewhere.
_LOADING = frozenset(
    "pretrained_model_name_or_path model_name quantization_config device_map token low_cpu_mem_usage is_trainable "
    "cache_dir local_files_only max_seq_length".split()
)
_FILE_KINDS = ("json", "csv", "parquet", "arrow")


@dataclass(frozen=True, slots=True)
class Unread:
    """A value computed when the script runs; `text` is its expression."""

    text: str


@dataclass(frozen=True, slots=True)
class Given:
    """One setting.

    Attributes:
        name, value: as in the script.
        owner: a class, an argument of DPOTrainer, or a kind of file.
        source: the table of `foreign_names` that explains the name.
        line: its line.
        default: whether the value is the default of a command-line argument, which the user may have overridden.
    """

    name: str
    value: Any
    owner: str
    source: str
    line: int | None = None
    default: bool = False


@dataclass(slots=True)
class _Script:
    steps: int = 0  # of following constants
    assigned: dict[str, list[ast.expr]] = field(default_factory=dict)
    defaults: dict[str, list[ast.expr]] = field(default_factory=dict)  # of command-line arguments


def read_script(text: str, path: Path) -> list[Given]:
    """Everything in a script that matters for DPO, in the order of its lines.

    Raises:
        UserError: not Python, or nested too deeply.
    """
    try:
        return _read(ast.parse(textwrap.dedent(text), str(path)))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = getattr(error, "lineno", None)
        raise UserError(
            "cannot read the script",
            code="migrate-unreadable",
            where=f"{path}:{line}" if line else str(path),
            expected="Python",
            found=str(getattr(error, "msg", error)),
            remedy="pass the whole script, or only its calls of DPOConfig, TrainingArguments and DPOTrainer",
        ) from error


def _read(tree: ast.Module) -> list[Given]:
    script = _collect(tree)
    given: list[Given] = []
    trainers = [call for call in _calls(tree) if _called(call) == "DPOTrainer"]
    for call in _calls(tree):
        owner = _called(call)
        if owner not in CLASSES:
            continue
        if not call.args and not call.keywords:
            given.append(Given(owner, None, owner, "script", call.lineno))  # all defaults
        for name, node in _arguments(call, owner, script):
            if owner != "DPOTrainer" or name not in _OBJECTS:
                given.append(_setting(name, node, owner, CLASSES[owner], script))
    for trainer in trainers:
        arguments = dict(_arguments(trainer, "DPOTrainer", script))
        given += _model(arguments.get("model"), script)
        given += _reference(arguments.get("ref_model"), script)
        given += _peft(arguments.get("peft_config"), script)
        for name in ("train_dataset", "eval_dataset"):
            given += _data(name, arguments.get(name), script)
        if "args" in arguments and any(
            _called(made) == "TrainingArguments" for made in _made_by(arguments["args"], script)
        ):
            given.append(Given("args", "TrainingArguments", "DPOTrainer", "script", arguments["args"].lineno))
    if not any(item.name in ("model", "adapter") and item.source == "script" for item in given):
        for call in _calls(tree):
            if _called(call) == "from_pretrained" and "CausalLM" in ast.unparse(call.func):
                given += _model(call, script)
                break
    if not any(item.owner == "train_dataset" for item in given):
        for call in _calls(tree):
            if _called(call) in ("load_dataset", "from_json"):
                given += _data("train_dataset", call, script)
                break
    return given


# --------------------------------------------------------------------------- names and calls


def _collect(tree: ast.Module) -> _Script:
    script = _Script()
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    script.assigned.setdefault(target.id, []).append(node.value)
        elif isinstance(node, ast.Call) and _called(node) == "add_argument" and node.args:
            if isinstance(node.args[-1], ast.Constant):  # the long name comes last
                name = str(node.args[-1].value).lstrip("-").replace("-", "_")
                script.defaults.setdefault(name, []).extend(k.value for k in node.keywords if k.arg == "default")
        elif isinstance(node, ast.ClassDef):
            for line in node.body:  # a dataclass for HfArgumentParser or TrlParser
                if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and line.value is not None:
                    value = line.value
                    if isinstance(value, ast.Call):
                        value = next((k.value for k in value.keywords if k.arg == "default"), value)
                    script.defaults.setdefault(line.target.id, []).append(value)
    return script


def _calls(tree: ast.AST) -> list[ast.Call]:
    return sorted((n for n in ast.walk(tree) if isinstance(n, ast.Call)), key=lambda n: (n.lineno, n.col_offset))


def _last_name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _called(call: ast.Call) -> str:
    return _last_name(call.func)


def _arguments(call: ast.Call, owner: str, script: _Script) -> Iterator[tuple[str, ast.expr]]:
    """Names and expressions of a call; unfolds `**settings` if it is a dictionary in the script."""
    positions = {"DPOTrainer": ("model", "ref_model", "args"), "DPOConfig": ("output_dir",)}
    positions["TrainingArguments"] = positions["DPOConfig"]
    yield from zip(positions.get(owner, ()), call.args, strict=False)
    for keyword in call.keywords:
        if keyword.arg is not None:
            yield keyword.arg, keyword.value
            continue
        for made in _values(keyword.value, script):
            if isinstance(made, ast.Dict):
                for key, value in zip(made.keys, made.values, strict=True):
                    if isinstance(key, ast.Constant) and isinstance(key.value, str):
                        yield key.value, value
            elif isinstance(made, ast.Call) and _called(made) == "dict":
                yield from ((k.arg, k.value) for k in made.keywords if k.arg is not None)
            else:
                yield f"**{ast.unparse(made)}", made


def _values(node: ast.expr, script: _Script) -> list[ast.expr]:
    """The expressions assigned to a variable; other expressions are returned as they are."""
    return script.assigned.get(node.id, [node]) if isinstance(node, ast.Name) else [node]


def _made_by(node: ast.expr | None, script: _Script) -> list[ast.Call]:
    """The calls that created an object: followed through variables, subscripts, and methods that return it changed.

    Each variable is followed once: of 60 that are each made of two of the one before, no path but one is new.
    """
    calls: list[ast.Call] = []
    seen: set[str] = set()
    left = [node]
    while left:
        one = left.pop()
        if isinstance(one, ast.Name) and one.id not in seen:
            seen.add(one.id)
            left += reversed(script.assigned.get(one.id, []))
        elif isinstance(one, ast.Subscript | ast.Attribute):
            left.append(one.value)
        elif isinstance(one, ast.Call):
            calls.append(one)
            left += reversed(one.args[:1])
            if isinstance(one.func, ast.Attribute):
                left.append(one.func.value)
    return calls


# --------------------------------------------------------------------------- constants


def _evaluate(node: ast.expr, script: _Script, depth: int = 0) -> Any:
    """The constant value of an expression, or Unread."""
    script.steps = 0
    try:
        return _constant(node, script, depth)
    except (LookupError, TypeError, ValueError):
        return Unread(ast.unparse(node))


def _setting(name: str, node: ast.expr, owner: str, source: str, script: _Script) -> Given:
    value = _evaluate(node, script)
    default = isinstance(node, ast.Attribute) and node.attr in script.defaults and not isinstance(value, Unread)
    return Given(name, value, owner, source, node.lineno, default)


_MAX_STEPS = 10_000
"""Expressions that one value may be made of: variables that hold variables many times grow without end."""


def _constant(node: ast.expr, script: _Script, depth: int) -> Any:
    script.steps += 1
    if depth > 20 or script.steps > _MAX_STEPS:
        raise LookupError

    def inner(part: ast.expr) -> Any:
        return _constant(part, script, depth + 1)

    match node:
        case ast.Constant():
            return node.value
        case ast.Name():
            (value,) = script.assigned.get(node.id, [])  # ValueError: never assigned, or more than once
            return inner(value)
        case ast.UnaryOp(op=ast.USub()):
            return -inner(node.operand)
        case ast.List() | ast.Tuple():
            return [inner(part) for part in node.elts]
        case ast.Dict():
            return {inner(k): inner(v) for k, v in zip(node.keys, node.values, strict=True) if k is not None}
        case ast.Attribute(value=ast.Name(id="torch")):
            return f"torch.{node.attr}"
        case ast.Attribute():
            (value,) = script.defaults.get(node.attr, [])  # args.beta: the default of --beta
            return inner(value)
        case ast.JoinedStr():
            parts = [part.value if isinstance(part, ast.FormattedValue) else part for part in node.values]
            return "".join(str(inner(part)) for part in parts)
    raise LookupError


# --------------------------------------------------------------------------- models and data


def _model(node: ast.expr | None, script: _Script) -> list[Given]:
    """Base, SFT adapter and how they are loaded."""
    if node is None:
        return []
    if isinstance(_evaluate(node, script), str):
        return [_setting("model", node, "DPOTrainer", "script", script)]
    given: list[Given] = []
    bases, adapters = [], []
    for call in dict.fromkeys(_made_by(node, script)):
        if _called(call) != "from_pretrained":
            continue
        kind = ast.unparse(call.func)
        keywords = {k.arg: k.value for k in call.keywords if k.arg}
        if "AutoPeft" in kind:
            adapters.append(call.args[0] if call.args else keywords.get("pretrained_model_name_or_path"))
        elif "PeftModel" in kind:
            adapters.append(call.args[1] if len(call.args) > 1 else keywords.get("model_id"))
            continue
        elif "Tokenizer" not in kind and "Config" not in kind:
            names = ("pretrained_model_name_or_path", "model_name")
            bases.append(call.args[0] if call.args else next((keywords[n] for n in names if n in keywords), None))
        given += [
            _setting(name, part, "from_pretrained", "trl", script)
            for name, part in keywords.items()
            if name not in _LOADING
        ]
    for name, paths in (("model", bases), ("adapter", adapters)):
        for part in paths:
            if part is not None:
                given.append(_setting(name, part, "from_pretrained", "script", script))
    if not bases and not adapters:
        given.append(Given("model", Unread(ast.unparse(node)), "DPOTrainer", "script", node.lineno))
    return given


def _peft(node: ast.expr | None, script: _Script) -> list[Given]:
    """peft_config if it is computed; a LoraConfig is read separately."""
    value = _evaluate(node, script) if node is not None else None
    if node is None or value is None or any(_called(made) == "LoraConfig" for made in _made_by(node, script)):
        return []
    return [Given("peft_config", value, "DPOTrainer", "trl", node.lineno)]


def _reference(node: ast.expr | None, script: _Script) -> list[Given]:
    """ref_model: None, a path, or the path that it was loaded from."""
    if node is None or (isinstance(node, ast.Constant) and node.value is None):
        return []
    value = _evaluate(node, script)
    if isinstance(value, Unread):
        for call in _made_by(node, script):
            if _called(call) == "from_pretrained" and call.args and "Tokenizer" not in ast.unparse(call.func):
                value = _evaluate(call.args[-1] if "PeftModel" in ast.unparse(call.func) else call.args[0], script)
                break
    return [Given("ref_model", value, "DPOTrainer", "script", node.lineno)]


def _data(name: str, node: ast.expr | None, script: _Script) -> list[Given]:
    """The files of a data set, or its name on the hub, and the script's changes to it."""
    if node is None or (isinstance(node, ast.Constant) and node.value is None):
        return []
    field_name = "pairs" if name == "train_dataset" else "eval_pairs"
    calls = list(dict.fromkeys(_made_by(node, script)))
    cut = next((call for call in calls if _called(call) == "train_test_split"), None)
    if cut is not None and name == "eval_dataset":  # a part of the training pairs, without its own file
        share = next((k.value for k in cut.keywords if k.arg == "test_size"), cut.args[0] if cut.args else None)
        value = _evaluate(share, script) if share is not None else 0.25  # the default of `datasets`
        return [Given("eval_share", value, name, "script", cut.lineno)]
    given: list[Given] = []
    for call in calls:
        if _called(call) in ("map", "filter", "select"):
            text = f".{_called(call)}({', '.join(map(ast.unparse, call.args))[:60]})"
            given.append(Given("dataset_code", Unread(text), name, "script", call.lineno))
        elif _called(call) in ("from_json", "from_csv", "from_parquet") and call.args:
            given.append(Given(field_name, _evaluate(call.args[0], script), name, "script", call.lineno))
        elif _called(call) == "load_dataset" and call.args:
            kind = _evaluate(call.args[0], script)
            keywords = {k.arg: k.value for k in call.keywords if k.arg}
            files = keywords.get("data_files") or (call.args[2] if len(call.args) > 2 else None)
            if kind in _FILE_KINDS and files is not None:
                value = _evaluate(files, script)
                if isinstance(value, dict):
                    train = field_name == "pairs"
                    value = value.get("train") if train else value.get("test") or value.get("validation")
                given.append(Given(field_name, value, name, "script", call.lineno))
            else:
                given.append(Given("dataset_name", kind, name, "script", call.lineno))
    if not given:
        given.append(Given(field_name, Unread(ast.unparse(node)), name, "script", node.lineno))
    return given
