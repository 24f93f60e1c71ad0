"""Uploads a finished adapter or checkpoint with its model card to the Hugging Face hub, in one commit.

Paths of this machine are not published: a base or adapter that is named by a path must get its name on the hub.
"""

from __future__ import annotations

import json
import re
import shlex
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dpoeng.cache.errors import UserError
from dpoeng.engine.data.hub import hub_endpoint, hub_error
from dpoeng.engine.runs.card import CARD_FILE
from dpoeng.engine.runs.folder import ADAPTER_FOLDER, MODEL_FOLDER

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd

_CONFIGS = ("adapter_config.json", "config.json")
_PATH = re.compile(r"(?<![\w:/.~-])~?(?:/[\w.+@-]+){2,}")
_REPO = re.compile(r"[\w.-]+/[\w.-]+")
_OURS = frozenset({".gitattributes"})  # the hub creates it in every new repository


@dataclass(frozen=True, slots=True)
class Pushed:
    """Result of a push. `commit` is its hash; `replaced` are the files that an earlier commit already had."""

    repo: str
    url: str
    commit: str
    files: list[str]
    replaced: list[str]


def check_target(repo: str, *, force: bool = False) -> list[str]:
    """Checks before training, which may take hours, that its result can be pushed.

    Returns:
        The repository's files; empty if it does not exist yet.

    Raises:
        UserError: the name is invalid, no token is set, the hub is not reachable, or the repository has files and
            `force` is not set.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import RepositoryNotFoundError

    if not _REPO.fullmatch(repo):
        raise UserError(
            "invalid repository name",
            code="hub-name",
            where=repo,
            expected="organisation/name, or your user name and a name",
            remedy="write it like my-name/my-adapter",
        )
    if get_token() is None:
        raise UserError(
            "no token for the hub",
            code="hub-failed",
            where=repo,
            expected="a token with write access",
            remedy="run `hf auth login`, or set HF_TOKEN",
        )
    api = HfApi(endpoint=hub_endpoint())
    try:
        api.whoami()
        found = sorted(set(api.list_repo_files(repo)) - _OURS)
    except RepositoryNotFoundError:
        return []
    except Exception as error:
        raise hub_error(error, repo, "cannot check the repository on the hub") from error
    if found and not force:
        raise UserError(
            "the repository already has files",
            code="output-exists",
            where=repo,
            expected="a new or empty repository",
            found=", ".join(found[:5]) + (f" and {len(found) - 5} more" if found[5:] else ""),
            remedy="choose another repository, or replace the files in a new commit with --force (the hub keeps both)",
        )
    return found


def push(
    folder: Path, repo: str, *, private: bool = True, force: bool = False, rename: Mapping[str, str] | None = None
) -> Pushed:
    """Uploads a result in one commit, into a new repository if there is none.

    Args:
        folder: folder of an adapter or a checkpoint, or the output folder of a run.
        repo: organisation/name.
        private: whether a new repository is private.
        force: replace existing files.
        rename: hub name of each path on this machine, for the model card and the adapter's config.

    Raises:
        UserError: the folder has no result, its texts contain paths of this machine, or the hub refuses.
    """
    from huggingface_hub import HfApi

    result = find_result(folder)
    there = check_target(repo, force=force)
    with tempfile.TemporaryDirectory(prefix="dpoeng-push-") as scratch:
        changed = _renamed(result, repo, rename or {}, Path(scratch))
        files = sorted(file.name for file in result.iterdir() if file.is_file())
        api = HfApi(endpoint=hub_endpoint())
        try:
            api.create_repo(repo, private=private, exist_ok=True)
            done = api.create_commit(
                repo, _operations(result, changed), commit_message=f"{result.name} trained with dpoeng"
            )
        except Exception as error:
            raise hub_error(error, repo, "the upload to the hub failed") from error
    return Pushed(repo, str(done.commit_url), done.oid, files, sorted(set(files) & set(there)))


def find_result(folder: Path) -> Path:
    """Finds the adapter or checkpoint in a folder, or in the output folder of a run.

    Raises:
        UserError: there is none.
    """
    for path in (folder, folder / ADAPTER_FOLDER, folder / MODEL_FOLDER):
        if any((path / name).is_file() for name in _CONFIGS) and any(path.glob("*.safetensors")):
            return path
    raise UserError(
        "no adapter or checkpoint found",
        code="run-not-found",
        where=str(folder),
        expected="the folder of a complete run, of its adapter, or of a merged checkpoint",
        found="no such folder" if not folder.is_dir() else "a folder without weights or config",
        remedy="give the --output-dir of a complete run, or a folder that `dpoeng merge --into` wrote",
    )


def _refuse_paths(result: Path, repo: str, text: str, where: str) -> None:
    """Raises UserError if a text to publish contains a path that exists on this machine."""
    paths = sorted({path for path in _PATH.findall(text) if Path(path).expanduser().exists()})
    if paths:
        raise UserError(
            f"{where} contains paths of this machine",
            code="hub-paths",
            where=str(result),
            expected="names on the hub, so that others can load them",
            found=", ".join(paths),
            remedy="give their names on the hub: "
            + shlex.join(["dpoeng", "push", str(result), repo, *(f"--rename={path}=ORG/NAME" for path in paths)]),
        )


def _renamed(result: Path, repo: str, rename: Mapping[str, str], scratch: Path) -> dict[str, Path]:
    """Writes copies of the model card and configs with hub names instead of paths; returns them by file name."""
    changed = {}
    for name in (CARD_FILE, *_CONFIGS):
        source = result / name
        if not source.is_file():
            continue
        text = source.read_text(encoding="utf-8")
        for path, hub_name in sorted(rename.items(), key=lambda item: -len(item[0])):
            text = text.replace(path, hub_name)
        _refuse_paths(result, repo, text, name)
        if name == CARD_FILE:
            text = _with_base(text, result, rename)
        (scratch / name).write_text(text, encoding="utf-8")
        changed[name] = scratch / name
    return changed


def _with_base(card: str, result: Path, rename: Mapping[str, str]) -> str:
    """Adds `base_model` to the card's header, so that the hub links the adapter to its base."""
    config = result / "adapter_config.json"
    if not config.is_file() or re.search(r"^base_model:", card, re.MULTILINE) or not card.startswith("---\n"):
        return card
    base = str(json.loads(config.read_text(encoding="utf-8")).get("base_model_name_or_path", ""))
    name = rename.get(base, base)
    return card.replace("---\n", f"---\nbase_model: {name}\n", 1) if _REPO.fullmatch(name) else card


def _operations(result: Path, changed: Mapping[str, Path]) -> list[CommitOperationAdd]:
    from huggingface_hub import CommitOperationAdd

    files = sorted(file for file in result.iterdir() if file.is_file())
    return [CommitOperationAdd(file.name, str(changed.get(file.name, file))) for file in files]
