"""Tests responses that span weight syncs, with scripted servers: what is joined, what is refused."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import pytest

from megatron_bicc.config import Config, ModelConfig, PauseMode, RolloutConfig, SglangConfig
from megatron_bicc.rollout.sglang_engine import SglangEngine
from megatron_bicc.rollout.types import Request, RolloutError, Sample, Sampling
from megatron_bicc.sglang.pool import ServerPool
from megatron_bicc.startup import read_tokenizer

POLICY = Path(__file__).parents[2] / "examples/tiny_policy"
END = 257
SAMPLING = Sampling(1.0, 6)
Item = dict[str, Any]
Answer = Callable[[dict[str, Any]], list[Item] | int]
"""From the body of POST /generate: the answer, or the HTTP status of an error"""


class Scripted:
    """Test double of a server: each request to /generate gets the next answer of the script."""

    def __init__(self, *script: Answer) -> None:
        self.script = list(script)
        self.asked: list[dict[str, Any]] = []
        self.aborted: list[str] = []
        self.version = "4"
        double = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                known = {"model_path": "", "architectures": None, "weight_version": double.version}
                self.reply(200, known if self.path == "/model_info" else {})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                found: Any = {}
                if self.path == "/abort_request":
                    double.aborted.append(body["rid"])
                if self.path == "/generate":
                    double.asked.append(body)
                    found = double.script.pop(0)(body)
                self.reply(*((found, {}) if isinstance(found, int) else (200, found)))

            def reply(self, status: int, content: Any) -> None:
                with suppress(OSError):  # nobody waits for it any more
                    self.send_response(status)
                    self.send_header("Content-Type", "application/json")
                    self.end_headers()
                    self.wfile.write(json.dumps(content).encode())

            def log_message(self, *_: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


@contextmanager
def engine_of(
    *servers: Scripted, mode: PauseMode = "abort", max_staleness: int = 1, retry_timeout_s: float = 30.0
) -> Iterator[SglangEngine]:
    """An engine whose servers have version 4; with equal loads it asks the first."""
    sglang = SglangConfig(retry_timeout_s=retry_timeout_s)
    rollout = RolloutConfig("sglang", max_staleness=max_staleness, sglang=sglang)
    pool = ServerPool([server.url for server in servers], [], sglang, pause_mode=mode)
    pool.hold("4", {})
    with closing(pool):
        yield SglangEngine(
            Config(model=ModelConfig(str(POLICY)), rollout=rollout), read_tokenizer(str(POLICY)), pool
        )
    for server in servers:
        server.close()


@pytest.fixture(autouse=True)
def soon(single_process: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request is sent again, and a server looked at, without long pauses."""
    for name in ("FIRST_PAUSE_S", "LONGEST_PAUSE_S", "CHECK_EVERY_S"):
        monkeypatch.setattr(f"megatron_bicc.sglang.pool.{name}", 0.05)


def item(reason: str, *spans: tuple[str, list[int]], **meta: Any) -> Item:
    """A sample whose tokens are these, by weight version; a token's log-prob is a tenth of its id."""
    tokens = [token for _, some in spans for token in some]
    ends = np.cumsum([len(some) for _, some in spans]).tolist()
    described = [
        {"version": version, "start": end - len(some), "end": end}
        for (version, some), end in zip(spans, ends, strict=True)
    ]
    known = {
        "finish_reason": {"type": reason},
        "weight_version": spans[-1][0] if spans else "4",
        "weight_versions": described,
        "output_token_logprobs": [[-token / 10, token, None] for token in tokens],
    }
    return {"output_ids": tokens, "meta_info": known | meta}


def group(size: int, prompt: tuple[int, ...] = (7, 8, 9)) -> list[Request]:
    return [Request(np.array(prompt, np.int32), 100 + i) for i in range(size)]


def only(engine: SglangEngine, size: int) -> list[Sample]:
    """The samples of one group, from a stream."""
    with engine.stream(SAMPLING) as stream:
        stream.submit(0, group(size))
        key, samples = stream.next(20)
    assert key == 0 and not stream.outstanding()
    return samples


def syncs(engine: list[SglangEngine], version: str, answer: list[Item]) -> Answer:
    """A weight sync begins before the server answers."""

    def act(body: dict[str, Any]) -> list[Item]:
        engine[0].pool.expect(version)
        return answer

    return act


def test_what_was_aborted_is_continued_from_where_it_was() -> None:
    """Each with the tokens that it has left; what was at its end is not asked for again."""
    first = [
        item("stop", ("4", [11, END])),
        item("abort", ("4", [12, 13])),
        item("abort", ("4", [14, END])),
        item("abort", ("4", [21, 22, 23, 24, 25, 26])),
        item("abort"),
        item("length", ("4", [31, 32, 33, 34, 35, 36])),
    ]
    second = [item("abort", ("5", [15])), item("stop", ("5", [16, END]))]
    third = [item("length", ("5", [17]), ("6", [18, 19]))]
    engine: list[SglangEngine] = []
    server = Scripted(syncs(engine, "5", first), syncs(engine, "6", second), lambda body: third)
    with engine_of(server) as one:
        engine.append(one)
        samples = only(one, 6)
        assert one.counts() == {"rollout/resent": 0, "rollout/stale": 0}
    asked = [
        (body["input_ids"], [s["max_new_tokens"] for s in body["sampling_params"]]) for body in server.asked
    ]
    assert asked == [
        ([[7, 8, 9]] * 6, [6] * 6),
        ([[7, 8, 9, 12, 13], [7, 8, 9]], [4, 6]),
        ([[7, 8, 9, 12, 13, 15]], [3]),
    ]
    seeds = [[s["sampling_seed"] for s in body["sampling_params"]] for body in server.asked]
    assert seeds == [[100, 101, 102, 103, 104, 105], [101, 104], [101]]
    assert [(s.token_ids.tolist(), s.finish_reason) for s in samples] == [
        ([11, END], "stop"),
        ([12, 13, 15, 17, 18, 19], "length"),
        ([14, END], "stop"),
        ([21, 22, 23, 24, 25, 26], "length"),
        ([16, END], "stop"),
        ([31, 32, 33, 34, 35, 36], "length"),
    ]
    for sample in samples:
        assert type(sample) is Sample
        np.testing.assert_array_equal(sample.log_probs, np.float32(-sample.token_ids / 10))
        assert (sample.token_ids.dtype, sample.log_probs.dtype) == (np.int32, np.float32)
    assert samples[1].versions.tolist() == [4, 4, 5, 5, 6, 6] and samples[1].versions.dtype == np.int32
    assert [s.versions is None for s in samples] == [True, False, True, True, True, True]
    assert [s.weight_version for s in samples] == [4, 4, 4, 4, 5, 4]


GOOD = item("stop", ("5", [11, END]))


@pytest.mark.parametrize(
    ("answered", "accepted"),
    [
        (item("stop", ("4", [11, 12]), ("5", [END])), True),
        (item("stop", ("4", [11, 12, END])), True),
        (item("stop", ("5", [11, 12, END])), True),
        (item("stop", ("4", [11]), ("incomplete", [12]), ("5", [END])), False),
        (item("abort", ("incomplete", [11])), False),
        (item("stop", ("3", [11, END])), False),
        (item("stop", ("6", [11, END])), False),
        (item("stop", ("5", [11, END]), weight_versions=None), False),
        (item("stop", ("5", [11, END]), weight_versions=[{"version": "5", "start": 0, "end": 1}]), False),
        (item("stop", ("5", [11, END]), weight_versions=[{"version": "5", "start": 1, "end": 2}]), False),
    ],
)
def test_tokens_are_of_the_versions_since_the_request(answered: Item, accepted: bool) -> None:
    """A weight sync ends while the answer is awaited."""

    def slow(body: dict[str, Any]) -> list[Item]:
        engine.pool.expect("5")
        engine.pool.hold("5", {})
        return [answered]

    server = Scripted(slow, lambda body: [GOOD])
    server.version = "5"
    with engine_of(server) as engine:
        (sample,) = only(engine, 1)
    assert len(server.asked) == (1 if accepted else 2)
    wanted = answered if accepted else GOOD
    assert sample.token_ids.tolist() == wanted["output_ids"]


@pytest.mark.parametrize("max_staleness", [0, 1])
def test_an_evaluation_is_of_one_version(max_staleness: int) -> None:
    """And so is everything without max_staleness; an aborted sample is asked for from its start."""

    def slow(body: dict[str, Any]) -> list[Item]:
        engine.pool.hold("5", {})
        return [item("stop", ("4", [11, 12]), ("5", [END]))]

    aborted = [item("abort", ("5", [11, 12]))]
    server = Scripted(slow, lambda body: aborted, lambda body: [GOOD])
    server.version = "5"
    with engine_of(server, max_staleness=max_staleness) as engine:
        (sample,) = only(engine, 1) if not max_staleness else engine.generate(group(1), SAMPLING)
        assert engine.counts() == {"rollout/resent": 2, "rollout/stale": 1}
    assert sample.token_ids.tolist() == [11, END] and sample.weight_version == 5
    assert [body["input_ids"] for body in server.asked] == [[[7, 8, 9]]] * 3


@pytest.mark.parametrize("status", [500, 503])
def test_another_server_continues_what_one_has_begun(status: int) -> None:
    engine: list[SglangEngine] = []

    def fail(body: dict[str, Any]) -> int:
        failing.version = "unknown"  # a health check finds it, too
        return status

    failing = Scripted(syncs(engine, "5", [item("abort", ("4", [11, 12]))]), fail)
    other = Scripted(lambda body: [item("stop", ("5", [13, END]))])
    with engine_of(failing, other) as one:
        engine.append(one)
        (sample,) = only(one, 1)
        assert one.counts() == {"rollout/resent": 1, "rollout/stale": 0}
    assert failing.asked[1]["input_ids"] == other.asked[0]["input_ids"] == [[7, 8, 9, 11, 12]]
    assert sample.token_ids.tolist() == [11, 12, 13, END] and sample.versions.tolist() == [4, 4, 5, 5]


def test_a_refusal_of_what_follows_ends_the_run() -> None:
    engine: list[SglangEngine] = []
    server = Scripted(syncs(engine, "5", [item("abort", ("4", [11]))]), lambda body: 400)
    with engine_of(server) as one, pytest.raises(RolloutError, match="/generate: HTTP 400"):
        engine.append(one)
        only(one, 1)


def test_requests_that_are_aborted_for_no_reason_are_not_sent_for_ever() -> None:
    """During a weight sync they wait for a server that is paused; else the server is at fault."""
    nothing = [item("abort")]
    engine: list[SglangEngine] = []
    patient = Scripted(syncs(engine, "5", nothing), lambda body: nothing, lambda body: [GOOD])
    with engine_of(patient) as one:
        engine.append(one)
        only(one, 1)
        assert one.counts()["rollout/resent"] == 0
    with (
        engine_of(Scripted(*[lambda body: nothing] * 99), retry_timeout_s=0.3) as one,
        pytest.raises(RolloutError, match="no answer after 0.3 s of attempts; .*the server aborted a sample"),
    ):
        only(one, 1)


def test_a_server_that_fails_a_sync_loses_its_requests() -> None:
    """At once, whatever it would answer; another one is asked for them from the start."""
    engine: list[SglangEngine] = []
    answered = Event()

    def stuck(body: dict[str, Any]) -> list[Item]:
        engine[0].pool.expect("5")
        engine[0].pool.hold("5", {failing.url: "it failed"})
        answered.wait(30)
        return []

    failing, other = Scripted(stuck), Scripted(lambda body: [GOOD])
    other.version = "5"
    with engine_of(failing, other) as one:
        engine.append(one)
        (sample,) = only(one, 1)
        answered.set()
        assert one.counts() == {"rollout/resent": 1, "rollout/stale": 0}
    assert sample.token_ids.tolist() == GOOD["output_ids"]


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def test_one_group_is_aborted_on_its_server() -> None:
    never = Event()

    def by_prompt(body: dict[str, Any]) -> list[Item]:
        if body["input_ids"][0][0] == 5:
            return [item("stop", ("4", [11, END]))] * 2
        never.wait(30)
        return []

    server = Scripted(by_prompt, by_prompt)
    with engine_of(server) as one, one.stream(SAMPLING) as stream:
        stream.submit(3, group(2))
        until(lambda: bool(server.asked))
        stream.abort(3)
        stream.submit(4, group(2, prompt=(5,)))
        key, _ = stream.next(20)
        assert key == 4 and stream.outstanding() == 0
        until(lambda: len(server.aborted) == 2)
        never.set()
    assert server.aborted == server.asked[0]["rid"] and len(set(server.aborted)) == 2


@pytest.mark.parametrize(("mode", "keys"), [("in_place", ["4", "5"]), ("retract", None), ("abort", None)])
def test_prefixes_of_other_weights_are_not_used(mode: PauseMode, keys: list[str] | None) -> None:
    """Where a weight sync keeps the server's cache; it flushes that of the others."""
    server = Scripted(lambda body: [item("stop", ("4", [END]))], lambda body: [item("stop", ("5", [END]))])
    with engine_of(server, mode=mode) as engine:
        only(engine, 1)
        server.version = "5"
        engine.pool.hold("5", {})
        engine.generate(group(1), SAMPLING)
    assert [body.get("extra_key") for body in server.asked] == (keys or [None, None])
