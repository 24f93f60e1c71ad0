"""Runs each hostile file against the command line, in a process with limits, and prints what became of it.

    make attacks                                          # some minutes; ends with status 1 if one gets through
    python tests/support/attacks.py --tree ../other       # against other sources
    python tests/support/attacks.py --only template       # of one kind

Each command runs in a process and a folder of its own with a sound model, adapter, cache and run, may take 60 s and 2
GiB, and finds files outside of its folder that it must neither read nor change. The process is a fork of this one,
since imports take longer than most commands. Commands with another environment are started anew.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE)]
import hostile_files  # noqa: E402 - found by the line above
import hostile_results  # noqa: E402
from hostile_files import Attack  # noqa: E402

MAX_SECONDS = 60
MAX_MIB = 2048
BAD = ("crash", "hang", "memory", "internal error", "outside")


@dataclass(frozen=True)
class Outcome:
    """What a command did: `verdict` is one of `BAD`, `read`, or `refused` with the code."""

    verdict: str
    seconds: float
    mib: int
    said: str

    @property
    def bad(self) -> bool:
        return self.verdict.split(":")[0] in BAD


def prepare(folder: Path) -> None:
    """A model, an adapter, a cache and a run, by the command line itself."""
    import torch
    from dpoeng_testing import pair_rows, save_tiny_model, write_jsonl
    from peft import LoraConfig, get_peft_model
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    words = {word: at for at, word in enumerate(("</s>", "<unk>", *(chr(letter) for letter in range(32, 127))))}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    save_tiny_model(folder / "model", tokenizer)
    write_jsonl(folder / "pairs.jsonl", pair_rows(24))
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(folder / "adapter")
    (folder / "rule.py").write_text(hostile_results.RULE)
    for command in (
        "precompute-ref pairs.jsonl --model model --cache cache",
        "train --cache cache --output-dir run --max-steps 2",
        *hostile_results.PREPARED,
    ):
        with tempfile.TemporaryFile() as said:
            _, status = os.waitpid(forked(command, folder, said.fileno()), 0)
            said.seek(0)
            if status:
                sys.exit(f"dpoeng {command}:\n{said.read().decode('utf-8', 'replace')}")


def dpoeng(command: str) -> list[str]:
    return [sys.executable, "-c", "from dpoeng.cli.main import main; main()", *shlex.split(command)]


def environment(tree: Path) -> dict[str, str]:
    plain = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return {
        **plain,
        "PYTHONPATH": str(tree / "src"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "RUST_BACKTRACE": "0",
    }


def outside_of(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Files beside the folder, each with what a read or a write would change: size, and times of access and change."""
    files = (path for path in folder.parent.iterdir() if path.is_file())
    return {path.name: (path.stat().st_size, path.stat().st_atime_ns, path.stat().st_mtime_ns) for path in files}


def run(attack: Attack, folder: Path, tree: Path, seconds: int) -> Outcome:
    for path in folder.parent.iterdir():
        if path.is_file():
            os.utime(path, (1, 2))  # an access older than the change: the next read is noted whatever the mount says
    before, began = outside_of(folder), time.monotonic()
    with tempfile.TemporaryFile() as said:
        if attack.environment:
            process = subprocess.Popen(
                dpoeng(attack.command),
                cwd=folder,
                stdout=said,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**environment(tree), **attack.environment},
                start_new_session=True,
            )
            verdict, peak, status = watch(process.pid, process.poll, began, seconds)
        else:
            pid = forked(attack.command, folder, said.fileno())
            verdict, peak, status = watch(pid, lambda: poll(pid), began, seconds)
        said.seek(0)
        text = said.read(1 << 20).decode("utf-8", "replace")
    code = re.search(r"\[([a-z0-9-]+)\]\n", text)
    if not verdict and status < 0:
        verdict = f"crash: signal {-status}"
    elif not verdict and ("internal-error]" in text or "Traceback (most recent call last)" in text):
        verdict = "internal error"
    elif not verdict and outside_of(folder) != before:
        verdict = "outside: " + ", ".join(sorted(dict(outside_of(folder).items() ^ before.items())))
    elif not verdict:
        verdict = f"refused: {code[1]}" if status and code else f"read, status {status}"
    return Outcome(verdict, time.monotonic() - began, peak >> 20, text)


def import_all(tree: Path) -> None:
    """What commands import, from the sources to attack."""
    sys.path.insert(0, str(tree / "src"))
    os.environ.update({"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"})
    import dpoeng

    for module in pkgutil.walk_packages(dpoeng.__path__, "dpoeng."):
        if module.name.startswith(("dpoeng.cli", "dpoeng.engine", "dpoeng.cache")):
            importlib.import_module(module.name)
    import transformers

    for name in ("LlamaForCausalLM", "PreTrainedTokenizerFast", "AutoModelForCausalLM", "AutoTokenizer"):
        getattr(transformers, name)


def forked(command: str, folder: Path, said: int) -> int:
    """Starts a command in a copy of this process; returns the process's number."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    status = 1
    try:
        os.setsid()
        os.chdir(folder)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(said, 1)
        os.dup2(said, 2)
        sys.argv = ["dpoeng", *shlex.split(command)]
        importlib.import_module("dpoeng.cli.main").main()
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def poll(pid: int) -> int | None:
    """The status of a process that has ended, negative for a signal; else None."""
    ended, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None


def watch(pid: int, ended: Callable[[], int | None], began: float, seconds: int) -> tuple[str, int, int]:
    """Ends a process that passes a limit. Returns what it passed, or nothing, its most resident bytes, its status."""
    peak, base = 0, resident(os.getpid())
    while (status := ended()) is None:
        peak = max(peak, resident(pid))
        late = time.monotonic() - began > seconds
        if late or peak > base + (MAX_MIB << 20):
            os.killpg(pid, signal.SIGKILL)
            while ended() is None:
                time.sleep(0.02)
            return ("hang" if late else "memory"), peak, 0
        time.sleep(0.02)
    return "", peak, status


def resident(pid: int) -> int:
    """Bytes that are this process's own: mapped files do not count."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"RssAnon:\s+(\d+)", status)
    return int(found[1]) * 1024 if found else 0


def main() -> None:
    parser = argparse.ArgumentParser(description="Run hostile files against the command line.")
    parser.add_argument("--tree", type=Path, default=ROOT, help="the sources to attack (default: these)")
    parser.add_argument("--seconds", type=int, default=MAX_SECONDS, help=f"that each may take (default: {MAX_SECONDS})")
    parser.add_argument("--only", help="only attacks whose kind or name holds this; several are parted by |")
    parser.add_argument("--json", type=Path, help="also write the outcomes here")
    options = parser.parse_args()
    words = (options.only or "").split("|")
    every = [*hostile_files.attacks(), *hostile_results.attacks()]
    chosen = [one for one in every if any(word in f"{one.kind} {one.name}" for word in words)]
    outcomes = []
    import_all(options.tree.resolve())
    with tempfile.TemporaryDirectory(prefix="dpoeng-attacks-") as scratch:
        sound = Path(scratch) / "sound"
        sound.mkdir()
        prepare(sound)
        print("| kind | file | outcome | s | MiB |\n|---|---|---|---|---|", flush=True)
        for number, attack in enumerate(chosen):
            folder = Path(scratch) / f"attack{number}" / "work"
            shutil.copytree(sound, folder)
            (folder.parent / "outside.txt").write_text("not to be read")
            attack.make(folder)
            found = run(attack, folder, options.tree.resolve(), options.seconds)
            outcomes.append({"kind": attack.kind, "name": attack.name, "verdict": found.verdict})
            print(
                f"| {attack.kind} | {attack.name} | {found.verdict} | {found.seconds:.0f} | {found.mib} |", flush=True
            )
            if found.bad:
                print(f"    $ dpoeng {attack.command}\n    " + "\n    ".join(found.said.splitlines()[-12:]), flush=True)
            shutil.rmtree(folder.parent)
    bad = sum(str(one["verdict"]).split(":")[0] in BAD for one in outcomes)
    print(f"\n{len(outcomes)} attacks, {bad} got through")
    if options.json:
        options.json.write_text(json.dumps(outcomes, indent=1))
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
