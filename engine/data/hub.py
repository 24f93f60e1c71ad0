"""Finds and downloads the files of a data set on the Hugging Face hub, `hf://org/name`, at one commit.

The files are in the hub's local cache. Records call them `hf://datasets/org/name@commit/path`, which identifies their
bytes on any machine. Independent of their rows.
"""

from __future__ import annotations

import fnmatch
import functools
import os
import re
import urllib.parse
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from dpoeng.cache.errors import UserError
from dpoeng.engine.data.data_folders import check_parts, split_of

# A pathlib.Path turns the two slashes into one.
_SOURCE = re.compile(
    r"hf:/{1,2}(?:datasets/)?(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^/?]+))?(?:/(?P<path>[^?]+))?(?:\?(?P<query>.*))?"
)
_IN_CACHE = re.compile(r".*/datasets--(?P<repo>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40})/(?P<path>.+)")
_NAMED = re.compile(r"hf://datasets/(?P<repo>[^/]+/[^/@]+)@(?P<commit>[^/]+)/(?P<path>.+)")
_SECRET = re.compile(r"hf_\w{8,}")
CONVERTED = "refs/convert/parquet"
"""The branch with the hub's own Parquet copy of each data set, config/split/0000.parquet."""


@dataclass(frozen=True, slots=True)
class HubSource:
    """A data set as the user named it.

    Attributes:
        repo: organisation/name.
        revision: branch, tag or commit.
        path: a file or folder in the data set.
        config, split: their names in the data set's card or in its file names.
    """

    repo: str
    revision: str | None = None
    path: str | None = None
    config: str | None = None
    split: str | None = None

    def url(self, **changed: str) -> str:
        """The address as a user writes it, with some fields replaced."""
        fields = {"config": self.config, "split": self.split, **changed}
        query = urllib.parse.urlencode({name: value for name, value in fields.items() if value})
        at, path = f"@{self.revision}" if self.revision else "", f"/{self.path}" if self.path else ""
        return f"hf://{self.repo}{at}{path}" + (f"?{query}" if query else "")


def is_hub(path: Path | str) -> bool:
    """Whether this is the address of a data set on the hub."""
    return re.match(r"hf:/", str(path)) is not None


def parse(path: Path | str) -> HubSource:
    """Parses `hf://org/name@revision/path?config=C&split=S`.

    Raises:
        UserError: it has another form.
    """
    match = _SOURCE.fullmatch(str(path))
    query = urllib.parse.parse_qs(match["query"] or "", keep_blank_values=True) if match else {}
    if (
        match is None
        or _leads_up(match)
        or set(query) - {"config", "split"}
        or any(len(values) > 1 for values in query.values())
    ):
        raise UserError(
            "invalid address of a data set on the hub",
            code="hub-name",
            where=str(path),
            expected="hf://org/name, optionally with @revision, /path and ?config=C&split=S",
            remedy="for example: hf://org/name?split=train",
            exit_status=3,
        )
    values = {name: query[name][0] or None for name in query}
    return HubSource(match["repo"], match["revision"], (match["path"] or "").strip("/") or None, **values)


def _leads_up(match: re.Match[str]) -> bool:
    """Whether a part of a name is `..`, which is another folder in the hub's cache."""
    parts = [*match["repo"].split("/"), match["revision"], *(match["path"] or "").split("/")]
    return any(part in (".", "..") for part in parts)


@functools.cache
def hub_files(path: Path, is_data: Callable[[Path], bool]) -> tuple[Path, ...]:
    """Returns the local files of one split of a data set, and downloads those that are missing.

    Later calls in the same process return the same files, even if the hub gets a new commit. Without a network it uses
    a downloaded commit: the given one, else the newest.

    Raises:
        UserError: the hub has no such data set or is not reachable, or the address does not select one split.
    """
    source = parse(path)
    with _Hub(source) as hub:
        names = _choose(source, hub.names, hub.card, is_data)
        if not names and source.path is None:
            hub.take(CONVERTED)
            names = _choose(source, hub.names, {}, is_data)
        if not names:
            raise _no_files(source, hub.names)
        check_parts(source.url(), [Path(name) for name in names])
        return tuple(hub.file(name) for name in names)


def shown_name(path: Path) -> str:
    """The name of a file in records: its path, or its hf:// address if it is in the hub's cache."""
    match = _IN_CACHE.fullmatch(path.absolute().as_posix())
    return (
        f"hf://datasets/{match['repo'].replace('--', '/', 1)}@{match['commit']}/{match['path']}" if match else str(path)
    )


def local_file(name: str) -> Path | None:
    """The file with this `shown_name`; None if it is not in the hub's cache."""
    match = _NAMED.fullmatch(name)
    if match is None:
        return Path(name)
    if any(part in (".", "..") for part in re.split("[/@]", name)):  # not a name that `shown_name` gives
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(match["repo"], match["path"], revision=match["commit"], repo_type="dataset")
    return Path(found) if isinstance(found, str) else None


def hub_view_name(path: Path | str) -> str:
    """The default view name: `pairs-train` for `hf://org/pairs?split=train`."""
    source = parse(path)
    parts = [source.repo.rpartition("/")[2], source.config, source.split, PurePosixPath(source.path or "").name]
    return "-".join(part for part in parts if part)


# --------------------------------------------------------------------------- one data set


class _Hub:
    """One data set at one commit: its file names, its card, its files."""

    def __init__(self, source: HubSource) -> None:
        self._source = source
        self.names: list[str] = []
        self.card: Mapping[str, Any] = {}
        self._commit = source.revision

    def __enter__(self) -> _Hub:
        """Reads the list of files. Errors here and in the `with` block become a UserError."""
        try:
            self.take(self._source.revision)
        except Exception as error:
            raise self._failed(error) from error
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        """See `__enter__`."""
        if isinstance(error, Exception) and not isinstance(error, UserError):
            raise self._failed(error) from error

    def take(self, revision: str | None) -> None:
        """Switches to a revision: reads its list of files and its card."""
        from huggingface_hub import HfApi, metadata_load
        from huggingface_hub.errors import HfHubHTTPError

        try:
            info = HfApi(endpoint=hub_endpoint()).dataset_info(self._source.repo, revision=revision)
        except HfHubHTTPError as error:
            if error.response.status_code < 500:  # the hub answered: there is no such data set
                raise
            self._take_from_disk(revision, error)
        except Exception as error:  # no network; the type depends on the HTTP library
            self._take_from_disk(revision, error)
        else:
            self._commit, self.names = info.sha, [file.rfilename for file in info.siblings or []]
        self.card = (metadata_load(self.file("README.md")) or {}) if "README.md" in self.names else {}

    def _take_from_disk(self, revision: str | None, error: Exception) -> None:
        """Uses a downloaded commit; raises `error`, the hub's failure, if there is none."""
        from huggingface_hub import constants

        downloaded = Path(constants.HF_HUB_CACHE) / f"datasets--{self._source.repo.replace('/', '--')}"
        commits = [downloaded / "snapshots" / revision] if revision else downloaded.glob("snapshots/*")
        found = sorted((path for path in commits if path.is_dir()), key=lambda path: path.stat().st_mtime)
        if not found:
            raise error
        folder = found[-1]
        self._commit = folder.name
        self.names = [file.relative_to(folder).as_posix() for file in sorted(folder.rglob("*")) if file.is_file()]

    def file(self, name: str) -> Path:
        """The local path of one file, after a download if it is missing."""
        from huggingface_hub import hf_hub_download

        return Path(
            hf_hub_download(
                self._source.repo, name, repo_type="dataset", revision=self._commit, endpoint=hub_endpoint()
            )
        )

    def _failed(self, error: Exception) -> UserError:
        return hub_error(error, self._source.url(), "the hub has no such data set, or is not reachable")


def hub_endpoint() -> str | None:
    """The hub's address from HF_ENDPOINT, read at each call; huggingface_hub reads it only once, at import."""
    return os.environ.get("HF_ENDPOINT")


def hub_error(error: Exception, where: str, message: str) -> UserError:
    """The UserError for the hub's answer, on one line and without tokens."""
    answer = " ".join(str(error).split())[:300]
    return UserError(
        message,
        code="hub-failed",
        where=where,
        found=f"{type(error).__name__}: {_SECRET.sub('hf_...', answer)}",
        remedy="check the name and the network; private and gated repositories need a token: run `hf auth login`, or "
        "set HF_TOKEN",
        exit_status=3,
    )


# --------------------------------------------------------------------------- which files


def _choose(
    source: HubSource, names: Sequence[str], card: Mapping[str, Any], is_data: Callable[[Path], bool]
) -> list[str]:
    """Selects the files of one split: by the given path, by the data set's card, or by its file names.

    Raises:
        UserError: the address must name a config or split and does not, or names one that is missing.
    """
    files = sorted(name for name in names if is_data(Path(name)))
    if not files:
        return []
    if source.path is not None:
        inside = [name for name in files if name == source.path or name.startswith(f"{source.path}/")]
        return _one_split(source, {name: split_of(Path(name)) for name in inside}, inside)
    configs = [entry for entry in card.get("configs") or [] if isinstance(entry, Mapping) and entry.get("data_files")]
    if not configs:
        return _by_names(source, files)
    by_name = {str(entry.get("config_name", "default")): entry for entry in configs}
    defaults = [name for name, entry in by_name.items() if entry.get("default")] or ["default"]
    name = source.config or (next(iter(by_name)) if len(by_name) == 1 else defaults[0])
    if name not in by_name:
        raise _unclear(source, "config", by_name)
    splits = _data_files(by_name[name]["data_files"])
    of_split = {file: split for split, patterns in splits.items() for file in _matching(files, patterns)}
    return _one_split(source, of_split, sorted(of_split))


def _by_names(source: HubSource, files: Sequence[str]) -> list[str]:
    """Selects as the hub does without a card: folders are configs, file or folder names contain the split."""
    if source.config is not None:
        inside = [name for name in files if source.config in PurePosixPath(name).parts[:-1]]
        if not inside:
            raise _unclear(source, "config", sorted({PurePosixPath(name).parts[0] for name in files if "/" in name}))
        files = inside
    return _one_split(source, {name: split_of(Path(name)) for name in files}, files)


def _one_split(source: HubSource, of_split: Mapping[str, str | None], files: Sequence[str]) -> list[str]:
    splits = sorted({split or "train" for split in of_split.values()})
    if source.split is None and len(splits) <= 1:
        return list(files)
    if source.split not in splits:
        raise _unclear(source, "split", splits)
    return [name for name in files if (of_split[name] or "train") == source.split]


def _data_files(value: Any) -> dict[str, list[str]]:
    """Patterns by split from a card's `data_files`: one pattern, several, or several with their splits."""
    entries = value if isinstance(value, list) else [value]
    found: dict[str, list[str]] = {}
    for entry in entries:
        split, path = (
            (entry.get("split", "train"), entry.get("path")) if isinstance(entry, Mapping) else ("train", entry)
        )
        found.setdefault(str(split), []).extend(map(str, path if isinstance(path, list) else [path]))
    return found


def _matching(files: Iterable[str], patterns: Sequence[str]) -> list[str]:
    return [name for name in files if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]


def _unclear(source: HubSource, kind: str, names: Iterable[str]) -> UserError:
    found = list(names)
    named = getattr(source, kind)
    example = source.url(**{kind: found[0]}) if found else source.url()
    return UserError(
        f"the data set has no {kind} {named}" if named else f"the data set has several {kind}s",
        code="data-splits",
        where=source.url(),
        expected=f"one {kind}, so that you do not train on test data" if kind == "split" else f"one {kind}",
        found=", ".join(found) or "none",
        remedy=f"name one, for example {example}",
        exit_status=3,
    )


def _no_files(source: HubSource, names: Sequence[str]) -> UserError:
    return UserError(
        "the data set has no readable file",
        code="data-no-files",
        where=source.url(),
        expected="files ending in .jsonl, .json, .csv, .parquet or .arrow, or the hub's own Parquet files",
        found=", ".join(names[:5]) or "no files",
        remedy="name one of its files, for example hf://org/name/data/train.jsonl",
        exit_status=3,
    )
