"""Requests to a server: sent again while that may help, refused with a message where not, and the key nowhere else."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
from stub_server import stub_server

from dpoeng.cache.errors import UserError
from dpoeng.engine.runtime import endpoint
from dpoeng.engine.runtime.endpoint import Endpoint, Refused

KEY = "sk-very-secret"


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "LONGEST_PAUSE_S", 0.01)


def of(url: str, **settings: Any) -> Endpoint:
    return Endpoint.of(url, "DPOENG_TEST_KEY", "--judge", **settings)


def test_failures_that_may_pass_are_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DPOENG_TEST_KEY", KEY)
    left = iter([(429, {"error": "slow down"}, {"Retry-After": "0"}), (503, b"", {}), (500, b"<html>", {})])
    with stub_server(lambda path, body: next(left, "yes")) as stub:
        found = of(stub.url).post("/chat/completions", {"messages": [{"content": "?"}]})
    assert found["choices"][0]["message"]["content"] == "yes"
    assert len(stub.requests) == 4
    assert {headers["Authorization"] for _, headers, _ in stub.requests} == {f"Bearer {KEY}"}


def test_it_gives_up_with_what_the_server_said_without_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DPOENG_TEST_KEY", KEY)
    with stub_server(lambda path, body: (429, {"error": f"quota of {KEY} is used up"}, {})) as stub:
        with pytest.raises(UserError) as caught:
            of(stub.url, retries=2).post("/chat/completions", {})
        assert len(stub.requests) == 3
    assert caught.value.code == "endpoint-failed"
    assert "quota of *** is used up" in str(caught.value)
    assert KEY not in str(caught.value) + repr(of(stub.url))


@pytest.mark.parametrize(("status", "code"), [(401, "endpoint-key"), (403, "endpoint-key"), (404, "endpoint-refused"),
                                              (302, "endpoint-refused")])  # fmt: skip
def test_a_permanent_failure_stops_at_once(status: int, code: str) -> None:
    """A redirect too: it could lead the key elsewhere."""
    with stub_server(lambda path, body: (status, {}, {"Location": "http://127.0.0.1:9/"})) as stub:
        with pytest.raises(UserError) as caught:
            of(stub.url).post("/chat/completions", {})
        assert (caught.value.code, len(stub.requests)) == (code, 1)


def test_one_text_that_is_refused_stops_no_other() -> None:
    with stub_server(lambda path, body: (400, {"error": "too long"}, {}) if body["n"] == 1 else "fine") as stub:
        found = dict(of(stub.url).post_all("/chat/completions", [{"n": n} for n in range(3)]))
    assert isinstance(found[1], Refused)
    assert "too long" in found[1].why
    assert [found[n]["choices"][0]["message"]["content"] for n in (0, 2)] == ["fine", "fine"]


def test_no_server_and_no_answer_in_time_are_messages() -> None:
    with stub_server(lambda path, body: time.sleep(0.3) or "late") as stub:
        with pytest.raises(UserError, match="endpoint-failed") as caught:
            of(stub.url, timeout_s=0.05, retries=1).post("/chat/completions", {})
        assert "timed out" in str(caught.value)
        gone = stub.url
    with pytest.raises(UserError, match="endpoint-failed"):
        of(gone).models()


def test_requests_run_side_by_side_and_no_more_than_allowed() -> None:
    now, most, gate = 0, 0, threading.Lock()

    def answer(path: str, body: dict[str, Any]) -> str:
        nonlocal now, most
        with gate:
            now += 1
            most = max(most, now)
        time.sleep(0.05)
        with gate:
            now -= 1
        return "x"

    with stub_server(answer) as stub:
        assert len(list(of(stub.url, concurrency=3).post_all("/chat/completions", [{}] * 9))) == 9
    assert most == 3


def test_one_failure_ends_the_others() -> None:
    with stub_server(lambda path, body: (401, {}, {}) if body["n"] == 0 else "x") as stub:
        with pytest.raises(UserError, match="endpoint-key"):
            list(of(stub.url, concurrency=1).post_all("/chat/completions", [{"n": n} for n in range(20)]))
        time.sleep(0.05)
        assert len(stub.requests) < 5


@pytest.mark.parametrize("url", ["ftp://h/v1", "https://", "https://me:pass@h/v1", "https://h/v1?key=secret"])
def test_addresses_with_secrets_or_without_a_host_are_refused(url: str) -> None:
    with pytest.raises(UserError, match="endpoint-address") as caught:
        of(url)
    assert not {"pass", "secret"} & set(str(caught.value).replace("=", " ").replace(":", " ").split())
