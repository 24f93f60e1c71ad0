"""A client of OpenAI's HTTP API (vLLM, SGLang, llama.cpp, OpenAI and others) with parallel requests.

A request with a temporary failure (429, 5xx, no connection, timeout) is sent again after a growing pause. The
key comes from the environment and is only in one header, never in a record, message or log. Redirects are not followed,
because they would send it elsewhere. Independent of the questions.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import queue
import random
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from dpoeng.cache.errors import UserError

LONGEST_PAUSE_S = 60.0
_LONGEST_ANSWER = 64 << 20  # bytes


class Refused(NamedTuple):
    """The server refuses this request permanently, for example because a text is too long."""

    why: str


class _AgainError(Exception):
    """A temporary failure; `after_s` is the pause that the server requests."""

    def __init__(self, why: str, after_s: float = 0.0) -> None:
        super().__init__(why)
        self.after_s = after_s


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A server.

    Attributes:
        url: address up to `/v1`, without a final slash.
        key: key for the Authorization header; empty for none.
        timeout_s: a request without an answer after these seconds is sent again.
        retries: maximum number of repetitions.
        concurrency: number of parallel requests.
    """

    url: str
    key: str = field(default="", repr=False)
    timeout_s: float = 300.0
    retries: int = 6
    concurrency: int = 8

    @staticmethod
    def of(url: str, key_variable: str, option: str, **settings: Any) -> Endpoint:
        """The server at the user's address.

        Args:
            url: the address.
            key_variable: the environment variable with the key; unset means no key.
            option: the option with the address, for messages.
            settings: `timeout_s`, `retries`, `concurrency`.

        Raises:
            UserError: it is not an address, or contains a secret, which would end up in records.
        """
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
            secret = parts.username or parts.query
            raise UserError(
                "unusable address",
                code="endpoint-address",
                where=option,
                expected="http(s)://HOST[:PORT]/v1" + (", without user name, key or query" if secret else ""),
                found=f"{parts.scheme}://{parts.hostname}" if secret else url,
                remedy=f"give only the address; put the key into the environment variable {key_variable}",
            )
        return Endpoint(url.rstrip("/"), os.environ.get(key_variable, "").strip(), **settings)

    def at(self, url: str) -> Endpoint:
        """The same server at another address, without retries."""
        return replace(self, url=url, retries=0)

    def models(self) -> list[str]:
        """The names of the server's models; asked once, without retries.

        Raises:
            UserError: the server is unreachable, or refuses the key.
        """
        try:
            found = self._send("/models", None)
        except _AgainError as error:
            raise self._failed(str(error), "/models") from error
        data = found.get("data") if isinstance(found, dict) else None
        return [str(one["id"]) for one in data or () if isinstance(one, dict) and "id" in one]

    def post(self, path: str, body: Mapping[str, Any], stopped: threading.Event | None = None) -> Any:
        """Returns the answer to one request as JSON, or as text if it is not JSON; or `Refused`.

        Args:
            path: path after the address, `/chat/completions`.
            body: body of the request.
            stopped: ends pauses and retries.

        Raises:
            UserError: the server fails repeatedly, or refuses the key or the path.
        """
        stopped = stopped or threading.Event()
        for attempt in itertools.count():
            try:
                return self._send(path, body)
            except _AgainError as error:
                if attempt >= self.retries or stopped.is_set():
                    raise self._failed(str(error), path) from error
                # Random, so that requests that failed together are not repeated together.
                pause = min(LONGEST_PAUSE_S, 2.0**attempt) * random.uniform(0.5, 1.0)
                stopped.wait(min(max(pause, error.after_s), 5 * LONGEST_PAUSE_S))
        raise AssertionError

    def post_all(self, path: str, bodies: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, Any]]:
        """Yields (place, answer) of many requests as the answers come; see `post`.

        The threads end with the iterator. They are daemons, so an interrupted program does not wait for answers.
        """
        stopped, todo, done = threading.Event(), iter(range(len(bodies))), queue.SimpleQueue[tuple[int, Any]]()
        taking = threading.Lock()

        def work() -> None:
            while not stopped.is_set():
                with taking:
                    number = next(todo, None)
                if number is None:
                    return
                try:
                    done.put((number, self.post(path, bodies[number], stopped)))
                except BaseException as error:
                    done.put((number, error))

        for _ in range(min(self.concurrency, len(bodies))):
            threading.Thread(target=work, daemon=True).start()
        try:
            for _ in bodies:
                number, answer = done.get()
                if isinstance(answer, BaseException):
                    raise answer
                yield number, answer
        finally:
            stopped.set()

    def _send(self, path: str, body: Mapping[str, Any] | None) -> Any:
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "dpoeng"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            with urllib.request.build_opener(_NoRedirect).open(request, timeout=self.timeout_s) as answer:
                text = answer.read(_LONGEST_ANSWER)
        except urllib.error.HTTPError as error:
            return self._refused(error, path)
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            raise _AgainError(f"{type(reason).__name__}: {reason}") from error
        try:
            return json.loads(text)
        except ValueError:  # vLLM answers some requests in plain text
            return self._shown(text)

    def _refused(self, error: urllib.error.HTTPError, path: str) -> Refused:
        """Returns `Refused` if only this request failed, permanently; raises for all other failures."""
        with error:
            text = b""
            with contextlib.suppress(OSError, http.client.HTTPException):
                text = error.read(1 << 16)
        answer = f"HTTP {error.code}: {self._shown(text)}"
        if error.code in (408, 409, 425, 429) or error.code >= 500:
            after = error.headers.get("Retry-After") or ""
            raise _AgainError(answer, float(after) if after.isdecimal() else 0.0)
        if error.code in (400, 413, 422):
            return Refused(answer)
        if error.code in (401, 403):
            raise UserError(
                "the server refuses the key",
                code="endpoint-key",
                where=self.url,
                found=answer + ("" if self.key else "; no key was sent"),
                remedy="put a valid key into the environment variable; --api-key-env names another variable",
                exit_status=5,
            )
        raise UserError(
            "the server does not support this request",
            code="endpoint-refused",
            where=self.url + path,
            expected="an OpenAI-compatible server and the name of one of its models",
            found=answer,
            remedy="check the address (it usually ends in /v1) and the model's name",
            exit_status=5,
        )

    def _failed(self, why: str, path: str) -> UserError:
        return UserError(
            "the server does not answer",
            code="endpoint-failed",
            where=self.url + path,
            found=why,
            remedy="start the server or wait, then run the same command again: received answers are stored",
            exit_status=5,
        )

    def _shown(self, text: bytes) -> str:
        """The beginning of an answer. The key is removed, because some servers repeat it."""
        shown = " ".join(text.decode(errors="replace").split())
        return (shown.replace(self.key, "***") if self.key else shown)[:300]
