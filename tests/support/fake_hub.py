"""A hub on this machine: the routes that huggingface_hub asks for data sets, their files, and commits of models."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONVERTED_COMMIT = "fedcba9876543210fedcba9876543210fedcba98"
TOKEN = "hf_" + "secret" * 5


@dataclass
class FakeHub:
    """What it holds, and what it was asked.

    Attributes:
        datasets: name -> revision -> file -> bytes.
        models: name -> file -> bytes.
        requests: method and path of each.
        tokens: that requests came with.
    """

    url: str = ""
    datasets: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    models: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)
    broken: bool = False

    def files_of(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """The commit that a revision means, and its files."""
        revisions = self.datasets.get(repo, {})
        name = {"main": "main", COMMIT: "main", CONVERTED_COMMIT: "refs/convert/parquet"}.get(revision, revision)
        if name not in revisions:
            return None
        return (COMMIT if name == "main" else CONVERTED_COMMIT), revisions[name]


@contextlib.contextmanager
def serving() -> Iterator[FakeHub]:
    """A hub for as long as the block lasts."""
    hub = FakeHub()

    class Handler(_Handler):
        served = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    served: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing is printed."""

    def _answer(self, status: int, body: Any = b"", **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Connection", "close")  # else a later hub at the same port would be asked through this one
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _missing(self, code: str = "RepoNotFound") -> None:
        self._answer(404, {"error": "no such thing"}, X_Error_Code=code, X_Error_Message="no such thing")

    def _begin(self) -> tuple[str, bytes]:
        self.served.requests.append(f"{self.command} {self.path}")
        if said := self.headers.get("Authorization"):
            self.served.tokens.add(said.removeprefix("Bearer "))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return unquote(urlsplit(self.path).path), body

    def do_GET(self) -> None:
        """Data sets' lists of files, files, who somebody is, a model's files."""
        path, _ = self._begin()
        hub = self.served
        if hub.broken:
            return self._answer(503, {"error": "busy"})
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "datasets"]:
            repo, revision = "/".join(parts[2:4]), "/".join(parts[5:]) or "main"
            found = hub.files_of(repo, revision)
            if repo not in hub.datasets:
                return self._missing()
            if found is None:
                return self._missing("RevisionNotFound")
            commit, files = found
            return self._answer(200, {"id": repo, "sha": commit, "siblings": [{"rfilename": name} for name in files]})
        if parts[0] == "datasets" and "resolve" in parts:
            at = parts.index("resolve")
            repo, rest = "/".join(parts[1:at]), "/".join(parts[at + 1 :])
            for revision in ("refs/convert/parquet", *(COMMIT, CONVERTED_COMMIT, "main")):
                found = hub.files_of(repo, revision)
                if rest.startswith(f"{revision}/") and found is not None:
                    name = rest.removeprefix(f"{revision}/")
                    if name not in found[1]:
                        return self._missing("EntryNotFound")
                    data = found[1][name]
                    etag = f'"{hashlib.sha1(data).hexdigest()}"'
                    return self._answer(200, data, ETag=etag, X_Repo_Commit=found[0], Accept_Ranges="bytes")
            return self._missing("RevisionNotFound")
        if path == "/api/whoami-v2":
            return self._answer(200, {"name": "me", "type": "user", "auth": {"accessToken": {"role": "write"}}})
        if parts[:2] == ["api", "models"]:
            repo = "/".join(parts[2:4])
            if repo not in hub.models:
                return self._missing()
            files = hub.models[repo]
            if "tree" in parts:
                return self._answer(
                    200, [{"type": "file", "path": n, "size": len(d), "oid": "0"} for n, d in files.items()]
                )
            return self._answer(200, {"id": repo, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]})
        return self._missing()

    do_HEAD = do_GET  # noqa: N815

    def do_POST(self) -> None:
        """Repositories, uploads and commits."""
        path, body = self._begin()
        hub = self.served
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
            hub.private[repo] = asked.get("visibility") == "private" or bool(asked.get("private"))
            status = 409 if repo in hub.models else 200
            hub.models.setdefault(repo, {".gitattributes": b""})
            return self._answer(status, {"url": f"{hub.url}/{repo}", "error": "exists"})
        if path == "/api/validate-yaml":
            return self._answer(200, {"errors": [], "warnings": []})
        if "/preupload/" in path:
            files = json.loads(body)["files"]
            modes = [
                {"path": file["path"], "uploadMode": "lfs" if file["path"].endswith("safetensors") else "regular",
                 "shouldIgnore": False}
                for file in files
            ]  # fmt: skip
            return self._answer(200, {"files": modes})
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                {"oid": one["oid"], "size": one["size"],
                 "actions": {"upload": {"href": f"{hub.url}/lfs/{one['oid']}", "header": {}}}}
                for one in json.loads(body)["objects"]
            ]  # fmt: skip
            return self._answer(200, {"transfer": "basic", "objects": objects})
        if "/commit/" in path:
            repo = "/".join(path.strip("/").split("/")[2:4])
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    hub.models[repo][value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    hub.models[repo][value["path"]] = hub.large[value["oid"]]
            answer = {"success": True, "commitOid": COMMIT, "commitUrl": f"{hub.url}/{repo}/commit/{COMMIT}"}
            return self._answer(200, {**answer, "hookOutput": ""})
        return self._missing()

    def do_PUT(self) -> None:
        """The bytes of a large file."""
        path, body = self._begin()
        self.served.large[path.rpartition("/")[2]] = body
        self._answer(200)
