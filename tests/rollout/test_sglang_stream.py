"""Tests the stream of groups from servers: order of completion, bounds, aborts."""

import json
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from typing import ClassVar

import anyio
import numpy as np
import pytest
from anyio.abc import TaskGroup
from anyio.from_thread import BlockingPortal, start_blocking_portal

from megatron_bicc.rollout.sglang_engine import group_stream
from megatron_bicc.rollout.types import Request, RolloutError, Sample
from megatron_bicc.sglang.client import ServerClient
from megatron_bicc.sglang.pool import RequestWithdrawn, Server


@pytest.fixture(scope="module")
def portal() -> Iterator[BlockingPortal]:
    with start_blocking_portal() as portal:
        yield portal


class Paced:
    """Test double of a pool of servers: groups finish when they are told to; a prompt is its number."""

    def __init__(self, portal: BlockingPortal) -> None:
        self.portal = portal
        self.begun: list[int] = []
        self.cancelled: list[int] = []
        self.go: dict[int, anyio.Event] = {}

    async def sample(self, requests: list[Request]) -> list[Sample]:
        number = int(requests[0].token_ids[0])
        self.begun.append(number)
        self.go[number] = anyio.Event()
        try:
            await self.go[number].wait()
        except anyio.get_cancelled_exc_class():
            with anyio.CancelScope(shield=True):
                await anyio.sleep(0.2)
            self.cancelled.append(number)
            raise
        if number == 9:
            raise RolloutError("nine")
        return [Sample(np.array([number]), np.zeros(1), "stop", 0) for _ in requests]

    def finish(self, number: int) -> None:
        async def finish() -> None:
            while number not in self.go:
                await anyio.sleep(0.01)
            self.go[number].set()

        self.portal.call(finish)


def group(number: int) -> list[Request]:
    return [Request(np.array([number], np.int32), seed) for seed in range(4)]


def test_groups_come_as_they_finish(portal: BlockingPortal) -> None:
    paced = Paced(portal)
    with group_stream(portal, paced.sample, most_samples=100) as stream:
        for number in (1, 2, 3):
            stream.submit(number, group(number))
        assert stream.next(0.05) is None
        for left, number in ((2, 2), (1, 3), (0, 1)):
            paced.finish(number)
            key, samples = stream.next(None)
            assert (key, [int(s.token_ids[0]) for s in samples]) == (number, 4 * [number])
            assert stream.outstanding() == left


def test_no_more_samples_at_a_time_than_asked_for(portal: BlockingPortal) -> None:
    paced = Paced(portal)
    with group_stream(portal, paced.sample, most_samples=11) as stream:
        for number in range(5):
            stream.submit(number, group(number))
        for number in range(5):
            assert stream.next(0.05) is None
            assert len(paced.begun) == min(number + 2, 5)
            paced.finish(number)
            assert stream.next(None)[0] == number


def test_an_error_reaches_who_asked_and_the_rest_is_given_up(portal: BlockingPortal) -> None:
    paced = Paced(portal)
    with (
        pytest.raises(RolloutError, match="nine"),
        group_stream(portal, paced.sample, most_samples=100) as stream,
    ):
        stream.submit(1, group(1))
        stream.submit(9, group(9))
        paced.finish(9)
        stream.next(None)
    assert paced.cancelled == [1], "it has ended once the context is left"


def test_an_aborted_group_never_comes(portal: BlockingPortal) -> None:
    """While it waits for room, while it runs, and when it has finished. Its key can be used again."""
    paced = Paced(portal)
    with group_stream(portal, paced.sample, most_samples=8) as stream:
        for number in (1, 2, 3):
            stream.submit(number, group(number))
        paced.finish(2)
        portal.call(anyio.sleep, 0.05)
        stream.submit(4, group(4))  # waits: 1 and 3 run
        for number in (1, 2, 4):
            stream.abort(number)
        assert stream.outstanding() == 1
        stream.submit(2, group(5))
        for key, number in ((3, 3), (2, 5)):
            paced.finish(number)
            found, samples = stream.next(5)
            assert (found, samples[0].token_ids.tolist()) == (key, [number])
        assert stream.outstanding() == 0 and stream.next(0.05) is None
    assert paced.cancelled == [1] and sorted(paced.begun) == [1, 2, 3, 5]


class Endless(BaseHTTPRequestHandler):
    """Test double of a server that never finishes: the bodies that it is sent, by path."""

    sent: ClassVar[dict[str, list[dict]]] = {}
    never = Event()

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.sent.setdefault(self.path, []).append(body)
        if self.path == "/generate":
            self.never.wait(30)
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def endless() -> Iterator[Server]:
    http = ThreadingHTTPServer(("127.0.0.1", 0), Endless)
    http.daemon_threads = True
    Thread(target=http.serve_forever, daemon=True).start()
    Endless.sent.clear()
    Endless.never.clear()
    yield Server(ServerClient(f"http://127.0.0.1:{http.server_port}"))
    Endless.never.set()
    http.shutdown()


async def until_asked(server: Server, then: Callable[[TaskGroup], None]) -> None:
    """Asks for three samples and does something once the server has heard of it."""
    with anyio.fail_after(20):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(server.generate, {"input_ids": [[1], [1], [1]]}, 60.0)
            while "/generate" not in Endless.sent:
                await anyio.sleep(0.01)
            then(tasks)
    await server.client.aclose()


def test_a_server_is_told_what_is_not_wanted(portal: BlockingPortal, endless: Server) -> None:
    portal.call(until_asked, endless, lambda tasks: tasks.cancel_scope.cancel())
    (asked,) = Endless.sent["/generate"]
    assert len(set(asked["rid"])) == 3
    assert [body["rid"] for body in Endless.sent["/abort_request"]] == asked["rid"]
    assert endless.outstanding == 0


def test_what_is_taken_from_a_server_says_why_once(portal: BlockingPortal, endless: Server) -> None:
    why = "http://h:1: /health was not answered well within 5 s"
    with pytest.raises(ExceptionGroup) as found:
        portal.call(until_asked, endless, lambda _: endless.withdraw(why))
    (error,) = found.value.exceptions
    assert isinstance(error, RequestWithdrawn) and str(error) == why
