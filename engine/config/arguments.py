"""Turn the options in a message into the arguments of the Python functions: `--beta 0.1` -> `beta=0.1`.

Messages are written once, as the command line prints them, because there a field cannot be mistaken for a word:
`--model` is a field, "model" may be prose. `str(error)` sends them through here; `dpoeng.cli` prints them as they are.
Whole commands, quoted texts, and options that are no field (`--force`, torchrun's `--nproc-per-node`) stay as they are.
"""

from __future__ import annotations

import functools
import re
import typing
from typing import Any, Literal

from dpoeng.engine.config.fields import PrecomputeConfig, SweepConfig, TrainConfig, bare_type
from dpoeng.engine.config.plan import PlanConfig

# Commands are typed in a shell, also by users of Python. They end at a backtick or at the end of their clause.
_COMMAND = r"`[^`\n]*`|\b(?:dpoeng|torchrun|pip|make) (?:(?![;:,)](?:\s|$))[^\n])*"
_QUOTED = r"(?<!\w)'[^'\n]*'(?!\w)|(?<!\w)\"[^\"\n]*\"(?!\w)"  # what was found in a file, for example
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
    return {**kinds, "pairs": Literal["held-out", "all"]}  # of `evaluate`; files are never given as an option


def as_arguments(text: str) -> str:
    """Writes a message as a user of the Python functions reads it.

    >>> as_arguments("leave --eval-view out, or add --quantization none --no-use-peft")
    'leave `eval_view` out, or add quantization="none" use_peft=False'
    """
    return _TOKEN.sub(_argument, text)


def _argument(match: re.Match[str]) -> str:
    if match["name"] is None:
        return match[0]
    name, word, kinds = match["name"].replace("-", "_"), match["word"] or "", _kinds()
    behind = match[0][len(match["name"]) + 2 :]  # the next word, which may be an option too
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
    """Whether the word behind an option is its value, and not the sentence going on.

    The field's type tells choices and numbers. A bare text is a value if it does not look like a word (`1/4`, `DIR`),
    or if the line ends with it, as in "choose one, e.g. --view second".
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
    """A value as Python has it; `DIR` stands for something and is no text."""
    if kind in (int, float) or word[0] in "'\"" or re.fullmatch(r"[A-Z][A-Z_]*", word):
        return word
    if typing.get_origin(kind) is dict:
        key, _, value = word.partition("=")
        return f'{{"{key}": "{value}"}}'
    return f'"{word}"'
