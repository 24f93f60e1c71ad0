"""Both phases with whichever dpoeng is on the path, in two threads, and digests of what they leave.

As a script, `golden_run.py MODEL PAIRS FOLDER [OPTION=VALUE ...]` prints the digests as JSON; it must run with every
release that is compared, so it uses the command line alone.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

THREADS = 2


def run(model: Path, pairs: Path, folder: Path, options: dict[str, str]) -> dict[str, str]:
    """Phase one in float32 and phase two with `options`, in `folder`; returns the digests of `digests`."""
    import torch

    from dpoeng.cli.main import main

    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    cache, out = str(folder / "cache"), str(folder / "out")
    settings = [word for name, value in options.items() for word in (f"--{name}", value)]
    try:
        for words in (
            ["precompute-ref", str(pairs), "--model", str(model), "--cache", cache, "--dtype", "float32"],
            ["train", "--cache", cache, "--output-dir", out, *settings],
        ):
            status = status_of(main, words)
            assert not status, f"dpoeng {' '.join(words)} ended with status {status}"
    finally:
        torch.set_num_threads(before)
    return digests(folder)


def status_of(main: Callable[[list[str]], object], words: list[str]) -> object:
    """The exit status of a command of dpoeng that runs in this process."""
    try:
        main(words)
    except SystemExit as ended:
        return ended.code
    return 0


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every object of the cache and of the adapter's weights and config, without the base's path.

    The card and the tokenizer, which lie beside them since, hold no number of the training.
    """
    found = {}
    for path in sorted([*(folder / "cache" / "objects").rglob("*"), *(folder / "out" / "adapter").glob("adapter_*")]):
        if path.is_file():
            data = path.read_bytes()
            if path.name == "adapter_config.json":
                config = {**json.loads(data), "base_model_name_or_path": ""}
                config["target_modules"].sort()  # the old commit left them in the order of a set
                data = json.dumps(config, sort_keys=True).encode()
            found[str(path.relative_to(folder))] = hashlib.sha256(data).hexdigest()
    return found


def machine() -> dict[str, Any]:
    """What the last bits of a sum of float32 depend on: the processor, the libraries that multiply, the threads."""
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0] if Path("/proc/cpuinfo").exists() else ""
    lines = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    cpu = {name.strip(): value.strip() for name, value in lines.items()}
    kept = ("model name", "cpu family", "model", "stepping")
    libraries = ("torch", "transformers", "peft", "safetensors", "tokenizers", "pyarrow", "numpy")
    return {
        "architecture": platform.machine(),
        "processor": {name: cpu.get(name, "") for name in kept},
        "flags": " ".join(sorted(cpu.get("flags", cpu.get("Features", "")).split())),
        "versions": {name: version(name) for name in libraries},
        "threads": THREADS,
    }


if __name__ == "__main__":
    model, pairs, folder = map(Path, sys.argv[1:4])
    digest = run(model, pairs, folder, dict(word.split("=", 1) for word in sys.argv[4:]))
    import dpoeng

    print(json.dumps({"code": dpoeng.__path__[0], "machine": machine(), "digests": digest}, indent=1))
