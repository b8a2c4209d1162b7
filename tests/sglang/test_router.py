"""Tests SGLang's router without SGLang: what goes through it, and the faults of its workers and of itself.

`Double` stands for a worker and `RouterDouble` for a router; test_sglang_engine.py has the real ones.
"""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import anyio
import numpy as np
import pytest
from transformers import PretrainedConfig

from megatron_bicc.config import Config, ModelConfig, RolloutConfig, SglangConfig
from megatron_bicc.errors import UserError
from megatron_bicc.rollout.sglang_engine import NOTHING, generate_body
from megatron_bicc.rollout.types import Request, Sampling
from megatron_bicc.sglang.client import NotSglang, ServerClient, ServerRefusal
from megatron_bicc.sglang.pool import RequestFailed, ServerPool, StaleWeights, start_servers
from megatron_bicc.sglang.router import Worker, listed_workers, routed

HF_CONFIG = PretrainedConfig.from_dict({"architectures": ["Qwen3ForCausalLM"], "vocab_size": 10})
PROMPT = np.array([3, 4], np.int32)


class Handler(BaseHTTPRequestHandler):
    """Answers by the methods of its server."""

    def do_GET(self) -> None:
        self._answer(self.server.got(self.path, {}))

    def do_POST(self) -> None:
        self._answer(
            self.server.got(self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        )

    def _answer(self, answer: tuple[int, Any]) -> None:
        self.server.keys.add(self.headers.get("Authorization"))
        self.send_response(answer[0])
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        with contextlib.suppress(BrokenPipeError):  # nobody waits any more
            self.wfile.write(json.dumps(answer[1]).encode())

    def log_message(self, *_: object) -> None:
        pass


class Double(ThreadingHTTPServer):
    """A worker: samples of its weight version, once `going` is set; /health once `healthy` is."""

    daemon_threads = True

    def __init__(self, **info: Any) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.version, self.info, self.architecture = "3", info, "Qwen3ForCausalLM"
        self.bodies: list[dict[str, Any]] = []
        """Requests for samples"""
        self.aborted: list[str] = []
        self.keys: set[str | None] = set()
        self.going, self.healthy = threading.Event(), threading.Event()
        self.going.set()
        self.healthy.set()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def got(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """Returns status and answer."""
        if path == "/health":
            self.healthy.wait(20)
        if path == "/model_info":
            names = {"architectures": [self.architecture], "weight_version": self.version}
            return 200, {"model_path": "m"} | names
        if path == "/server_info":
            return 200, self.info
        if path == "/abort_request":
            self.aborted.append(body["rid"])
        if path != "/generate":
            return (404 if path == "/workers" else 200), {}
        if "logit_bias" in body["sampling_params"]:
            known = int(*body["sampling_params"]["logit_bias"]) < HF_CONFIG.vocab_size
            return (200, {}) if known else (400, "logit_bias")
        self.bodies.append(body)
        self.going.wait(20)
        return 200, [{"version": self.version, "url": self.url} for _ in body["input_ids"]]

    def end(self) -> None:
        """Closes the port."""
        self.going.set()
        self.healthy.set()
        self.shutdown()
        self.server_close()


class RouterDouble(Double):
    """A router: passes every request for samples on to the first worker that it calls healthy."""

    def __init__(self, *workers: Double) -> None:
        self.workers = list(workers)
        self.unhealthy: set[str] = set()
        super().__init__()

    def got(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """Returns status and answer."""
        if path == "/workers":
            return 200, {
                "workers": [entry(each.url, each.url not in self.unhealthy) for each in self.workers]
            }
        if path == "/generate":
            self.bodies.append(body)
            return next(each for each in self.workers if each.url not in self.unhealthy).got(path, body)
        return (200 if path == "/health" else 404), {}


def entry(url: str, healthy: bool = True, kind: str = "regular") -> dict[str, Any]:
    """Returns a worker as sglang-router 0.3.2 lists it."""
    return {"id": "1-2", "url": url, "worker_type": kind, "is_healthy": healthy, "connection_mode": "HTTP"}


@pytest.fixture
def double() -> Iterator[Callable[..., Double]]:
    """Makes doubles of a class, and ends them."""
    made: list[Double] = []

    def make(kind: type[Double] = Double, *workers: Double, **info: Any) -> Double:
        made.append(kind(*workers, **info))
        return made[-1]

    yield make
    for each in made:
        each.end()


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_bicc.sglang.pool.CHECK_EVERY_S", 0.02)
    monkeypatch.setattr("megatron_bicc.sglang.pool.FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr("megatron_bicc.sglang.pool.POLL_S", 0.02)


def pool_of(router: RouterDouble, *servers: Double, **settings: float) -> ServerPool:
    """A pool at version 3, with health checks."""
    urls = [each.url for each in (router, *servers)]
    config = SglangConfig(**{"retry_timeout_s": 20.0, "health_timeout_s": 5.0} | settings)
    pool = ServerPool(urls, urls, config, routers={router.url: [each.url for each in router.workers]})
    pool.start(HF_CONFIG, colocate=False)
    pool.hold("3", {})
    pool.resume()
    return pool


def body(samples: int = 2, **settings: bool) -> dict[str, Any]:
    """Returns the request for a group."""
    group = [Request(PROMPT, seed) for seed in range(samples)]
    return generate_body(group, Sampling(0.7, 8, **settings), (1,), [NOTHING] * samples)


def current(answer: Any, versions: Collection[str]) -> list[str]:
    """Reads an answer: the URLs of the servers that sampled."""
    for each in answer:
        if each["version"] not in versions:
            raise StaleWeights(f"a sample of weight version {each['version']}")
    return [each["url"] for each in answer]


def asked(pool: ServerPool, request: dict[str, Any] | None = None) -> list[str]:
    """Returns the URLs of the servers that sampled a group."""
    return pool.portal.call(pool.ask, request or body(), current)


def until(true: Callable[[], Any]) -> None:
    end = time.monotonic() + 10
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def reason(pool: ServerPool) -> str:
    """Returns why the router is not used."""
    return pool.servers[0].reason


def answered(workers: Any, make: Callable[..., Double]) -> list[Worker] | None:
    """Returns the workers of a router that answers GET /workers so."""
    server = make()
    server.got = lambda path, _: (200, workers)
    return anyio.run(listed_workers, ServerClient(server.url), 5.0)


def test_workers_are_listed_once_by_their_own_url(double: Callable[..., Double]) -> None:
    """With --dp-aware a router lists each of their data-parallel ranks."""
    some = [entry("http://A:1@0"), entry("http://A:1@1"), entry("http://b:2/", healthy=False)]
    assert answered({"workers": some, "total": 3}, double) == [
        Worker("http://a:1", True),
        Worker("http://b:2", False),
    ]
    assert answered({"workers": []}, double) == []


def test_a_server_is_not_a_router(double: Callable[..., Double]) -> None:
    server = double()
    assert anyio.run(listed_workers, ServerClient(server.url), 5.0) is None
    for other in ({}, [], "workers", {"workers": 3}):
        assert answered(other, double) is None


@pytest.mark.parametrize(
    ("worker", "error", "message"),
    [
        (
            entry("grpc://a:1"),
            ServerRefusal,
            "grpc://a:1 is a worker of type regular; the run needs regular ones",
        ),
        (entry("http://a:1", kind="prefill"), ServerRefusal, "http://a:1 is a worker of type prefill"),
        ({"url": "http://a:1"}, NotSglang, "is not an SGLang server: /workers answered"),
        ("http://a:1", NotSglang, "is not an SGLang server: /workers answered"),
    ],
)
def test_workers_that_cannot_be_used_are_refused(
    double: Callable[..., Double], worker: Any, error: type, message: str
) -> None:
    with pytest.raises(error, match=message):
        answered({"workers": [worker]}, double)


def test_a_group_goes_through_the_router_as_one_request(double: Callable[..., Double]) -> None:
    """As sglang-router takes it: one id, one set of sampling parameters, nothing that it drops."""
    worker = double()
    router = double(RouterDouble, worker)
    with closing(pool_of(router)) as pool:
        assert asked(pool, body() | {"extra_key": "v3"}) == [worker.url] * 2
    (sent,) = router.bodies
    assert worker.bodies == [sent]
    assert sent["input_ids"] == [[3, 4], [3, 4]] and sent["extra_key"] == "v3"
    assert sent["sampling_params"]["temperature"] == 0.7 and "sampling_seed" not in sent["sampling_params"]
    assert isinstance(sent["rid"], str)


def test_a_request_that_the_router_would_change_goes_to_a_worker(double: Callable[..., Double]) -> None:
    worker = double()
    router = double(RouterDouble, worker)
    partial = body()
    partial["sampling_params"][1] = partial["sampling_params"][1] | {"max_new_tokens": 5}
    with closing(pool_of(router)) as pool:
        for request in (body(routing=True), partial):
            assert asked(pool, request) == [worker.url] * 2
    assert router.bodies == []
    first, second = worker.bodies
    assert first["return_routed_experts"] and len(set(first["rid"])) == 2
    assert [each["sampling_seed"] for each in second["sampling_params"]] == [0, 1]


def test_seeds_that_a_worker_uses_do_not_go_through_the_router(
    double: Callable[..., Double], caplog: pytest.LogCaptureFixture
) -> None:
    """All samples of a group would be equal."""
    worker = double(enable_deterministic_inference=True)
    router = double(RouterDouble, worker)
    with closing(pool_of(router)) as pool:
        assert asked(pool) == [worker.url] * 2
    assert router.bodies == [] and routed(body()) is not None
    assert f"router {router.url} passes on neither seeds" in caplog.text


def test_a_router_and_a_server_share_the_groups(double: Callable[..., Double]) -> None:
    """By the samples that each server behind them has."""
    workers, server = [double(), double()], double()
    router = double(RouterDouble, *workers)
    for each in (*workers, server):
        each.going.clear()
    with closing(pool_of(router, server)) as pool:
        groups = [pool.portal.start_task_soon(pool.ask, body(), current) for _ in range(4)]
        until(lambda: len(router.bodies) == 3 and len(server.bodies) == 1)
        for each in (*workers, server):
            each.going.set()
        assert sorted(url for group in groups for url in group.result()) == sorted(
            [workers[0].url] * 6 + [server.url] * 2
        )
        assert [client.url for client in pool.own] == [server.url, workers[0].url, workers[1].url]


def test_an_abort_goes_to_all_workers(double: Callable[..., Double]) -> None:
    """With the ids that SGLang makes of one."""
    workers = [double(), double()]
    router = double(RouterDouble, *workers)
    workers[0].going.clear()
    with closing(pool_of(router)) as pool:
        group = pool.portal.start_task_soon(pool.ask, body(), current)
        until(lambda: router.bodies)
        group.cancel()
        rid = router.bodies[0]["rid"]
        until(lambda: all(each.aborted == [f"{rid}_0", f"{rid}_1"] for each in workers))


def test_the_key_is_sent_to_the_router_and_its_workers(
    double: Callable[..., Double], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SERVERS_KEY", "secret")
    worker = double()
    router = double(RouterDouble, worker)
    with closing(pool_of(router, api_key_variable="SERVERS_KEY")) as pool:
        asked(pool)
        until(lambda: router.keys)
    assert router.keys == worker.keys == {"Bearer secret"}


def test_workers_are_asked_directly_while_one_has_other_weights(double: Callable[..., Double]) -> None:
    """A router may send a prompt to the same worker again and again."""
    stale, good = double(), double()
    router = double(RouterDouble, stale, good)
    with closing(pool_of(router)) as pool:
        stale.version = "2"
        assert asked(pool) == [good.url] * 2
        until(lambda: f"router {router.url}: {stale.url}: its weights are not of version 3" in reason(pool))
        asked_before = len(router.bodies)
        assert asked(pool) == [good.url] * 2 and len(router.bodies) == asked_before
        stale.version = "3"
        until(lambda: not reason(pool))
        assert asked(pool) == [stale.url] * 2


def test_workers_are_asked_directly_until_the_router_knows_that_one_is_dead(
    double: Callable[..., Double],
) -> None:
    dead, good = double(), double()
    router = double(RouterDouble, good, dead)
    with closing(pool_of(router)) as pool:
        good.going.clear()
        group = pool.portal.start_task_soon(pool.ask, body(), current)
        until(lambda: good.bodies)
        dead.end()
        until(lambda: f"{dead.url}: /health did not succeed" in reason(pool))
        good.going.set()
        assert group.result() == [good.url] * 2
        assert len(good.bodies) == 1, "the router answers: nothing is cancelled for a dead worker"
        router.unhealthy.add(dead.url)
        until(lambda: not reason(pool))


def test_requests_are_withdrawn_from_a_router_whose_worker_hangs(double: Callable[..., Double]) -> None:
    hanging, good = double(), double()
    router = double(RouterDouble, hanging, good)
    with closing(pool_of(router, health_timeout_s=0.2)) as pool:
        hanging.going.clear()
        hanging.healthy.clear()
        assert asked(pool) == [good.url] * 2
        assert f"{hanging.url}: /health did not succeed within 0.2 s" in reason(pool)
        router.unhealthy.add(hanging.url)
        until(lambda: not reason(pool))
        good.going.clear()
        group = pool.portal.start_task_soon(pool.ask, body(), current)
        until(lambda: len(router.bodies) == 2)
        time.sleep(0.6)  # two checks of the one that still hangs
        good.going.set()
        assert group.result() == [good.url] * 2 and len(good.bodies) == 2


def test_workers_are_asked_directly_when_the_router_has_ended(double: Callable[..., Double]) -> None:
    worker = double()
    router = double(RouterDouble, worker)
    with closing(pool_of(router)) as pool:
        router.end()
        assert asked(pool) == [worker.url] * 2
        assert f"{router.url}/" in reason(pool)


def test_a_worker_that_joins_is_used_when_it_has_the_weights(double: Callable[..., Double]) -> None:
    first, late = double(), double()
    late.version = "default"
    router = double(RouterDouble, first)
    with closing(pool_of(router)) as pool:
        router.workers.insert(0, late)
        until(lambda: f"{late.url}: its weights are not of version 3" in reason(pool))
        assert asked(pool) == [first.url] * 2
        pool.pause()
        assert [client.url for client in pool.own] == [first.url, late.url]
        late.version = "3"
        pool.hold("3", {})
        pool.resume()
        assert reason(pool) == ""
        assert asked(pool) == [late.url] * 2
        router.workers.remove(late)
        until(lambda: [client.url for client in pool.own] == [first.url])
        assert asked(pool) == [first.url] * 2


def test_a_worker_that_joins_before_a_sync_takes_part_in_it(double: Callable[..., Double]) -> None:
    first, late = double(), double()
    router = double(RouterDouble, first)
    with closing(pool_of(router)) as pool:
        pool.pause()
        router.workers.append(late)
        pool.resume()
        pool.pause()
        assert [client.url for client in pool.own] == [first.url, late.url]
        pool.hold("3", {late.url: f"{late.url}: out of memory"})
        assert reason(pool) == f"router {router.url}: {late.url}: out of memory"


def test_a_worker_of_another_model_that_joins_gets_no_weights(double: Callable[..., Double]) -> None:
    first, other = double(), double()
    other.architecture, other.version = "Llama", "default"
    router = double(RouterDouble, first)
    with closing(pool_of(router)) as pool:
        router.workers.append(other)
        until(lambda: other.url in reason(pool))
        assert [client.url for client in pool.own] == [first.url]
        assert asked(pool) == [first.url] * 2


def test_no_worker_left(double: Callable[..., Double]) -> None:
    router = double(RouterDouble, double())
    with closing(pool_of(router, retry_timeout_s=0.3)) as pool:
        router.workers.clear()
        until(lambda: reason(pool))
        with pytest.raises(RequestFailed, match=f"router {router.url}: it has no healthy worker"):
            asked(pool)


def started(*urls: str, seconds: float = 5.0) -> ServerPool:
    """Returns the pool of rollout.sglang.servers."""
    settings = SglangConfig(servers=",".join(urls), start_timeout_s=seconds)
    config = Config(model=ModelConfig("m"), rollout=RolloutConfig("sglang", "attach", sglang=settings))
    return start_servers(config, HF_CONFIG)


def test_a_router_is_found_at_the_start(
    single_process: None, double: Callable[..., Double], caplog: pytest.LogCaptureFixture
) -> None:
    workers, server = [double(), double()], double()
    router = double(RouterDouble, *workers)
    with caplog.at_level("INFO"), closing(started(router.url, server.url)) as pool:
        assert {client.url for client in pool.own} == {server.url, *(each.url for each in workers)}
    assert f"router {router.url} with 2 workers: {workers[0].url}, {workers[1].url}" in caplog.text


def test_routers_that_cannot_be_used_are_refused_at_the_start(
    single_process: None, double: Callable[..., Double]
) -> None:
    worker, gone = double(), double()
    router, other, empty = double(RouterDouble, worker), double(RouterDouble, worker), double(RouterDouble)
    lost = double(RouterDouble, gone)
    gone.end()
    with pytest.raises(UserError, match=f"{empty.url}/workers: the router has no healthy worker; not ready"):
        started(empty.url, seconds=0.1)
    with pytest.raises(
        UserError, match=f"router {lost.url} has the worker {gone.url}, which the trainer must reach"
    ):
        started(lost.url)
    by_itself = f"has {worker.url} twice, by itself and as a worker of the router {router.url}"
    with pytest.raises(UserError, match=by_itself):
        started(router.url, worker.url)
    by_another = f"has {worker.url} twice, as a worker of the router {router.url} and as .* {other.url}"
    with pytest.raises(UserError, match=by_another):
        started(router.url, other.url)
