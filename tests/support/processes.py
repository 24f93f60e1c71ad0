"""Processes of their own for a few seconds' worth of imports in all: forked from a server that has them.

The server's environment is strange on purpose, and so is that of whatever it forks: another hash seed, locale, text
encoding and time zone than those of the tests. What such a process leaves behind must all the same be, byte for byte,
what this process leaves.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest

STRANGE = {
    "PYTHONHASHSEED": "4242",
    "LC_ALL": "POSIX",
    "PYTHONUTF8": "0",
    "PYTHONCOERCECLOCALE": "0",
    "TZ": "Asia/Kathmandu",
    "TOKENIZERS_PARALLELISM": "true",
}
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    [
        "dpoeng.engine.recipes.precompute",
        "dpoeng.engine.recipes.train",
        "hypothesis",
        "peft",
        "pytest",
        "torch.distributed.device_mesh",
        "torch.distributed.fsdp",
        "transformers.models.llama.modeling_llama",
    ]
)


def start_process(target: Callable[..., None], *arguments: Any) -> Any:
    """`target` in a process of its own, which has started; a function of a module that can be imported."""
    with pytest.MonkeyPatch.context() as patched:
        for name in ("LANG", "LC_CTYPE"):
            patched.delenv(name, raising=False)
        for name, value in STRANGE.items():
            patched.setenv(name, value)
        forkserver.ensure_running()
    process = PROCESSES.Process(target=target, args=arguments)
    process.start()
    return process


def quietly(output: Path, folder: Path | None = None) -> None:
    """For the beginning of a target: what is printed goes into `output`.out and .err, as UTF-8."""
    sys.stdout, sys.stderr = (output.with_suffix(end).open("w", encoding="utf-8") for end in (".out", ".err"))
    warnings.simplefilter("ignore")
    if folder is not None:
        os.chdir(folder)


def call_at(owner: Any, name: str, call: int, do: Callable[[], None], *, after: bool = False) -> None:
    """From now on the `call`th call of `owner.name`, counted from 1, also does `do`: before its work, or after it."""
    real, calls = getattr(owner, name), 0

    def wrapped(*arguments: Any, **settings: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call and not after:
            do()
        result = real(*arguments, **settings)
        if calls == call and after:
            do()
        return result

    setattr(owner, name, wrapped)


def kill_myself() -> None:
    """SIGKILL, as the system sends it: nothing is tidied up."""
    os.kill(os.getpid(), signal.SIGKILL)


def sum_of_row(view: Any, i: int) -> Any:
    """What a worker reads of a view. Here, because a spawned process imports what pytest put on the path alone."""
    return view[i].chosen_sum
