"""Turns the options in a message into arguments of the Python functions: `--beta 0.1` -> `beta=0.1`.

Messages are written once, as the command line prints them, where a field differs from ordinary words: `--model` is a
field, "model" may be prose. `str(error)` translates them here; `dpoeng.cli` prints them as they are. Whole commands,
quoted texts, and options that are not fields (`--force`, torchrun's `--nproc-per-node`) stay as they are.
"""

from __future__ import annotations

import functools
import re
import typing
from typing import Any, Literal

from dpoeng.engine.config.fields import PrecomputeConfig, SweepConfig, TrainConfig, bare_type
from dpoeng.engine.config.plan import PlanConfig

# Python users type commands in a shell, too. A command ends at a backtick or at the end of its clause.
_COMMAND = r"`[^`\n]*`|\b(?:dpoeng|torchrun|pip|make) (?:(?![;:,)](?:\s|$))[^\n])*"
_QUOTED = r"(?<!\w)'[^'\n]*'(?!\w)|(?<!\w)\"[^\"\n]*\"(?!\w)"  # for example a text from the user's file
_OPTION = r"(?<![^\s(])--(?P<name>[a-z][a-z0-9_-]*)(?=[\s,;:.)=]|$)(?:[ =](?P<word>'[^'\n]*'|\"[^\"\n]*\"|[^\s]+))?"
_TOKEN = re.compile(f"{_COMMAND}|{_QUOTED}|{_OPTION}")


@functools.cache
def _kinds() -> dict[str, Any]:
    """Every argument of the Python functions -> its type, without None."""
    kinds = {
        name: bare_type(field.annotation)
        for cls in (PlanConfig, SweepConfig, PrecomputeConfig, TrainConfig)
        for name, field in cls.model_fields.items()
    }
    return {**kinds, "pairs": Literal["held-out", "all"]}  # of `evaluate`; there files are not an option


def as_arguments(text: str) -> str:
    """Translates a message for users of the Python functions.

    >>> as_arguments("leave --eval-view out, or add --quantization none --no-use-peft")
    'leave `eval_view` out, or add quantization="none" use_peft=False'
    """
    return _TOKEN.sub(_argument, text)


def _argument(match: re.Match[str]) -> str:
    if match["name"] is None:
        return match[0]
    name, word, kinds = match["name"].replace("-", "_"), match["word"] or "", _kinds()
    behind = match[0][len(match["name"]) + 2 :]  # the next word, which may also be an option
    if name.startswith("no_") and kinds.get(name[3:]) is bool:
        return f"{name[3:]}=False{as_arguments(behind)}"
    if name not in kinds:
        return f"--{match['name']}{as_arguments(behind)}"
    if kinds[name] is bool:
        return f"{name}=True{as_arguments(behind)}"
    value = re.sub(r"[,;:.)]+$", "", word)
    last = behind.startswith("=") or not match.string[match.end() :].split("\n")[0].strip()
    if value and _is_value(kinds[name], value, last=last):
        return f"{name}={_literal(kinds[name], value)}{word[len(value) :]}"
    in_a_sentence = re.match(r" [a-z]", behind) or re.search(r"\w,? $", match.string[: match.start()])
    return (f"`{name}`" if in_a_sentence else name) + as_arguments(behind)


def _is_value(kind: Any, word: str, *, last: bool) -> bool:
    """Whether the word after an option is its value, not the continuation of the sentence.

    The field's type decides for choices and numbers. Other text is a value if it does not look like a word (`1/4`,
    `DIR`), or if it ends the line, as in "choose one, e.g. --view second".
    """
    if word.startswith("--"):
        return False
    if typing.get_origin(kind) is Literal:
        return word in typing.get_args(kind)
    if kind in (int, float):
        return re.fullmatch(r"-?\d[\d.e+-]*", word) is not None
    if typing.get_origin(kind) is dict:
        return "=" in word
    return word[0] in "'\"" or not re.fullmatch(r"[a-z]+", word) or word in ("cpu", "cuda") or (last and word != "out")


def _literal(kind: Any, word: str) -> str:
    """A value in Python syntax; `DIR` is a placeholder, not text."""
    if kind in (int, float) or word[0] in "'\"" or re.fullmatch(r"[A-Z][A-Z_]*", word):
        return word
    if typing.get_origin(kind) is dict:
        key, _, value = word.partition("=")
        return f'{{"{key}": "{value}"}}'
    return f'"{word}"'
