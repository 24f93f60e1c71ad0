"""A server that speaks OpenAI's HTTP API, in a thread: what it says is a function of the test's."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, Any]
"""Status, and what the body is made of: text of a message, an object, or bytes."""


class Stub:
    """Attributes: `requests` are (path, headers, body) in the order in which they came; `url` ends in /v1."""

    def __init__(self, answer: Callable[[str, dict[str, Any]], Any], models: list[str]) -> None:
        self.requests: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.answer, self.models, self.url = answer, models, ""

    def paths(self) -> list[str]:
        return [path for path, _, _ in self.requests]

    def asked(self) -> list[str]:
        """The texts of the chat requests."""
        return [body["messages"][0]["content"] for path, _, body in self.requests if path == "/v1/chat/completions"]


@contextmanager
def stub_server(answer: Callable[[str, dict[str, Any]], Any], models: tuple[str, ...] = ("stub",)) -> Iterator[Stub]:
    """Serve until the block ends.

    Args:
        answer: (path, body) -> the text of a message or continuation, or (status, body, headers).
        models: the names that it lists.
    """
    stub = Stub(answer, list(models))

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            stub.requests.append((self.path, dict(self.headers), {}))
            self._send(200, {"data": [{"id": name} for name in stub.models]}, {})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            stub.requests.append((self.path, dict(self.headers), body))
            said = stub.answer(self.path, body)
            if isinstance(said, tuple):
                self._send(*said)
            elif self.path.endswith("/chat/completions"):
                self._send(200, {"choices": [{"message": {"role": "assistant", "content": said}}]}, {})
            else:
                self._send(200, {"choices": [{"text": said, "finish_reason": "stop"}]}, {})

        def _send(self, status: int, body: Any, headers: dict[str, str]) -> None:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    stub.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
