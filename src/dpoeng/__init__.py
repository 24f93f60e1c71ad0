"""Offline-reference DPO: score the reference once, train against its log-probs.

These functions are what a notebook or script needs; docs/python.md shows them. Each is imported on first use, so that
`import dpoeng` takes a few milliseconds and loads no libraries.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dpoeng.cache.errors import UserError

if TYPE_CHECKING:
    from dpoeng.api import (
        check,
        compare,
        evaluate,
        export,
        judge,
        open_cache,
        open_responses,
        plan,
        precompute_reference,
        token_logps,
        train,
        train_rounds,
    )

    __version__: str

__all__ = [
    "UserError",
    "__version__",
    "check",
    "compare",
    "evaluate",
    "export",
    "judge",
    "open_cache",
    "open_responses",
    "plan",
    "precompute_reference",
    "token_logps",
    "train",
    "train_rounds",
]


if not TYPE_CHECKING:  # hidden from type checkers, which would then accept unknown names

    def __getattr__(name: str) -> Any:
        if name == "__version__":
            from importlib.metadata import version

            value: Any = version("dpoeng")
        elif name in __all__:
            value = getattr(import_module("dpoeng.api"), name)
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value  # the next access needs no call
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _name_fields(text: str) -> str:
    from dpoeng.engine.config.arguments import as_arguments

    return as_arguments(text)


UserError.name_fields = staticmethod(_name_fields)
