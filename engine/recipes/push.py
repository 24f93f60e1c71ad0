"""A finished result on the Hugging Face hub: adapter or checkpoint with its model card, one commit.

What the folder says of this machine stays here: a base or an adapter named by a path must get its name on the hub.
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
_OURS = frozenset({".gitattributes"})  # the hub makes it with the repository


@dataclass(frozen=True, slots=True)
class Pushed:
    """What the hub has now. `commit` is its hash, `replaced` are files that an earlier commit has too."""

    repo: str
    url: str
    commit: str
    files: list[str]
    replaced: list[str]


def check_target(repo: str, *, force: bool = False) -> list[str]:
    """See that a result can be pushed there: before hours of training, not after them.

    Returns:
        the files that are there already.

    Raises:
        UserError: the name is none, there is no token, the hub cannot be reached, or the repository has files and
            `force` is not set.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import RepositoryNotFoundError

    if not _REPO.fullmatch(repo):
        raise UserError(
            "this is not the name of a repository",
            code="hub-name",
            where=repo,
            expected="organisation/name, or your user name and a name",
            remedy="for example: --push-to my-name/my-adapter",
        )
    if get_token() is None:
        raise UserError(
            "there is no token for the hub",
            code="hub-failed",
            where=repo,
            expected="a token that may write",
            remedy="run `hf auth login`, or set HF_TOKEN",
        )
    api = HfApi(endpoint=hub_endpoint())
    try:
        api.whoami()
        found = sorted(set(api.list_repo_files(repo)) - _OURS)
    except RepositoryNotFoundError:
        return []
    except Exception as error:
        raise hub_error(error, repo, "the hub does not answer as it should") from error
    if found and not force:
        raise UserError(
            "the repository has files already",
            code="output-exists",
            where=repo,
            expected="a new or empty repository",
            found=", ".join(found[:5]) + (f" and {len(found) - 5} more" if found[5:] else ""),
            remedy="name another one, or add --force: a commit then replaces them, and the hub keeps the earlier one",
        )
    return found


def push(
    folder: Path, repo: str, *, private: bool = True, force: bool = False, rename: Mapping[str, str] | None = None
) -> Pushed:
    """Uploads a result in one commit; the repository is made if it is not there.

    Args:
        folder: of an adapter or a checkpoint, or the output folder of a run.
        repo: organisation/name.
        private: of a repository that is made here.
        force: whether files that are there already may be replaced.
        rename: path on this machine -> its name on the hub, for the model card and the adapter's config.

    Raises:
        UserError: the folder holds no result, names paths of this machine, or the hub refuses.
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
            raise hub_error(error, repo, "the hub has not taken the result") from error
    return Pushed(repo, str(done.commit_url), done.oid, files, sorted(set(files) & set(there)))


def find_result(folder: Path) -> Path:
    """The folder of an adapter or a checkpoint, which may be in the output folder of a run.

    Raises:
        UserError: there is none.
    """
    for path in (folder, folder / ADAPTER_FOLDER, folder / MODEL_FOLDER):
        if any((path / name).is_file() for name in _CONFIGS) and any(path.glob("*.safetensors")):
            return path
    raise UserError(
        "there is no adapter and no checkpoint",
        code="run-not-found",
        where=str(folder),
        expected="the folder of a complete run, of its adapter, or of a merged checkpoint",
        found="no such folder" if not folder.is_dir() else "a folder without one",
        remedy="name the --output-dir of a run that is complete, or what `dpoeng merge --into` wrote",
    )


def _refuse_paths(result: Path, repo: str, text: str, where: str) -> None:
    """Raises UserError where a text that is made public names a path of this machine."""
    paths = sorted({path for path in _PATH.findall(text) if Path(path).expanduser().exists()})
    if paths:
        raise UserError(
            f"{where} names paths of this machine",
            code="hub-paths",
            where=str(result),
            expected="names on the hub, which others can load",
            found=", ".join(paths),
            remedy="say what they are called there: "
            + shlex.join(["dpoeng", "push", str(result), repo, *(f"--rename={path}=ORG/NAME" for path in paths)]),
        )


def _renamed(result: Path, repo: str, rename: Mapping[str, str], scratch: Path) -> dict[str, Path]:
    """Copies of the texts that name models, with their names on the hub: file name -> copy."""
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
    """The card with `base_model` in its header, by which the hub links it to its base."""
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
