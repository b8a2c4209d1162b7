"""Tests the memory of colocated servers: released only by an idle server, taken back in two parts.

`Double` stands for an SGLang server on a GPU. Like SGLang's scheduler it ends, here with status 500, if it is
told to release memory while a batch runs, or to resume memory that it has not released.
"""

import json
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from typing import Any

import anyio
import pytest

from megatron_bicc.config import SglangConfig
from megatron_bicc.errors import UserError
from megatron_bicc.rollout.sglang_engine import SglangEngine
from megatron_bicc.rollout.types import RolloutError
from megatron_bicc.sglang.client import ServerClient, ServerUnavailable
from megatron_bicc.sglang.pool import ServerPool, check_memory_saver, check_routing

ALL = {"weights", "kv_cache", "cuda_graph"}


class Double(BaseHTTPRequestHandler):
    """A server whose last batch is still running when it is paused, as after aborts."""

    server: "DoubleServer"

    def do_GET(self) -> None:
        facts = {"/model_info": {"model_path": "m", "weight_version": self.server.version}}
        self._answer(200, facts.get(self.path, self.server.info))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        state, status = self.server, 200
        state.calls.append(self.path)
        if self.path == "/flush_cache":
            state.batches = max(0, state.batches - ("/pause_generation" in state.calls))
            status = 400 if state.batches else 200
        elif self.path == "/release_memory_occupation":
            status = 500 if state.batches or state.released else 200
            state.released = set(ALL)
        elif self.path == "/resume_memory_occupation":
            status = 200 if set(body["tags"]) <= state.released else 500
            state.released -= set(body["tags"])
        self._answer(status, {})

    def _answer(self, status: int, value: dict[str, Any]) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(value).encode())

    def log_message(self, *_: object) -> None:
        pass


class DoubleServer(HTTPServer):
    """Its state: calls so far, flushes until its last batch is done, released memory, facts."""

    def __init__(self, batches: int = 0, **info: Any) -> None:
        super().__init__(("127.0.0.1", 0), Double)
        self.calls: list[str] = []
        self.batches, self.info, self.version = batches, info, "3"
        self.released: set[str] = set()
        self.url = f"http://127.0.0.1:{self.server_port}"


@contextmanager
def served(batches: int = 0, **info: Any) -> Iterator[tuple[DoubleServer, ServerPool]]:
    """A double, and a pool of it."""
    server = DoubleServer(batches, **info)
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        with closing(ServerPool([server.url], [server.url], SglangConfig())) as pool:
            yield server, pool
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_bicc.sglang.pool.POLL_S", 0.01)


def test_a_server_is_idle_before_it_releases_its_memory() -> None:
    with served(batches=3) as (server, pool):
        pool.release_memory()
    assert server.calls == ["/pause_generation", *["/flush_cache"] * 3, "/release_memory_occupation"]


def test_a_server_that_stays_busy_is_named(monkeypatch: pytest.MonkeyPatch, single_process: None) -> None:
    monkeypatch.setattr("megatron_bicc.sglang.pool.IDLE_TIMEOUT_S", 0.05)
    with served(batches=10**6) as (server, pool):
        engine = SglangEngine.__new__(SglangEngine)
        engine.pool = pool
        with (
            pytest.raises(RolloutError, match=f"{server.url}/flush_cache: not idle within 0.05 s") as error,
            engine.memory_released(),
        ):
            pytest.fail("the memory is not free")
        assert isinstance(error.value.__cause__, ServerUnavailable)
        assert "/release_memory_occupation" not in server.calls


def test_the_weights_memory_comes_back_first_and_the_rest_once() -> None:
    with served() as (server, pool):
        (client,) = pool.own
        pool.portal.call(pool.take_cache, client)
        assert server.calls == []  # nothing was released
        for _ in range(2):
            pool.release_memory()
            pool.take_weights()
            assert server.released == {"kv_cache", "cuda_graph"}
            for _ in range(2):
                pool.portal.call(pool.take_cache, client)
            assert not server.released


def test_a_server_that_was_restarted_meanwhile_has_its_memory() -> None:
    with served() as (server, pool):
        pool.release_memory()
        server.released, server.version = set(), "default"
        pool.take_weights()
        pool.portal.call(pool.take_cache, pool.own[0])
        assert "/resume_memory_occupation" not in server.calls


def test_all_memory_is_taken_back_when_training_raises(single_process: None) -> None:
    """An attached server outlives the run; and the error of training is the one that is reported."""
    with served() as (server, pool):
        engine = SglangEngine.__new__(SglangEngine)
        engine.pool, engine._server_bytes = pool, 0
        with pytest.raises(KeyError, match="training"), engine.memory_released():
            assert server.released == ALL
            raise KeyError("training")
        assert not server.released
        assert "its memory was released; it needs new weights" in pool.reasons()


@pytest.mark.parametrize(
    ("info", "refused"),
    [
        ({"device": "cuda", "enable_memory_saver": False}, True),
        ({"device": "cuda", "enable_memory_saver": True}, False),
        ({"device": "cpu", "enable_memory_saver": False}, False),
        ({}, True),
    ],
)
def test_an_attached_server_that_would_keep_its_memory_is_refused(info: dict, refused: bool) -> None:
    with served(**info) as (server, _):
        if refused:
            with pytest.raises(UserError, match=f"{server.url} was started without --enable-memory-saver"):
                anyio.run(check_memory_saver, ServerClient(server.url))
        else:
            anyio.run(check_memory_saver, ServerClient(server.url))


def test_an_attached_server_that_returns_no_routing_is_refused() -> None:
    with served(enable_return_routed_experts=True) as (server, _):
        anyio.run(check_routing, ServerClient(server.url))
    with (
        served(enable_return_routed_experts=False) as (server, _),
        pytest.raises(UserError, match="was started without --enable-return-routed-experts"),
    ):
        anyio.run(check_routing, ServerClient(server.url))


@pytest.mark.parametrize("colocate", [False, True])
def test_colocation_is_checked_at_the_start(colocate: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fits(*_: object) -> None:
        pass

    for name in ("wait_until_ready", "check_model"):
        monkeypatch.setattr(f"megatron_bicc.sglang.pool.{name}", fits)
    with served(device="cuda") as (_, pool):
        if colocate:
            with pytest.raises(UserError, match="--enable-memory-saver"):
                pool.start(None, colocate)
        else:
            pool.start(None, colocate)
