"""Tests the weight sync against scripted servers: what is sent to whom, in which order, and what may fail."""

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from transformers import AutoConfig

from megatron_bicc.config import Config, ModelConfig, WeightSyncConfig
from megatron_bicc.errors import UserError
from megatron_bicc.sglang.client import ServerClient, ServerUnavailable
from megatron_bicc.sglang.pool import ServerPool
from megatron_bicc.weights import transport
from megatron_bicc.weights.hf_weights import step_export
from megatron_bicc.weights.sync import ServerWeightSync
from megatron_bicc.weights.transport import Bucket, DistributedTransport, Receiver, WeightSyncError, buckets
from megatron_bicc.weights.verify import TokenGroup

MODEL = Path(__file__).parents[2] / "examples/tiny_policy"
pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("single_process")]
Answer = Callable[[str, dict[str, Any]], dict[str, Any] | None]
INFO = {"tp_size": 1, "dtype": "float32", "paths": {}, "model_path": "", "architectures": None}
INFO["weight_version"] = "0"
SAMPLE = {"meta_info": {"output_token_logprobs": [[-1.0, 3, None]] * 2}}


@contextmanager
def serving(answer: Answer) -> Iterator[str]:
    """Yields the URL of a server that answers with INFO what `answer` returns no answer for.

    answer: takes path and body. If it raises ConnectionError the connection closes without an answer.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "{}")
            text = json.dumps(answer(self.path, body) or INFO).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *_: None
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@contextmanager
def sync_to(
    urls: list[str], directory: Path, colocate: bool = False, **weight_sync: object
) -> Iterator[ServerWeightSync]:
    """Yields the tiny policy's weight sync. The policy's log-probs are those of SAMPLE."""
    settings = WeightSyncConfig(**weight_sync)
    config = Config(output_dir=str(directory), model=ModelConfig(str(MODEL)), weight_sync=settings)
    config.rollout.colocate = colocate
    policy = SimpleNamespace(hf_config=AutoConfig.from_pretrained(MODEL), modules=[])

    def log_probs(groups: list[TokenGroup]) -> np.ndarray:
        return np.full(sum(len(ids) for group in groups for ids in group.responses), -1, np.float32)

    with closing(ServerPool(urls, urls, config.rollout.sglang)) as pool:
        sync = ServerWeightSync(config, policy, pool, log_probs)
        yield sync
        sync.close()


def zeros(sync: ServerWeightSync) -> list[tuple[str, torch.Tensor]]:
    return [(name, torch.zeros(shape)) for name, shape in sync.expected.items()]


def test_a_bucket_is_gathered_while_the_one_before_is_sent(tmp_path: Path) -> None:
    """And no more than one: a server answers when all tensors of the next bucket have been taken, and finds
    that none has been taken beyond."""
    taken: list[str] = []
    found: list[int] = []
    counts: list[int] = []

    def answer(path: str, body: dict[str, Any]) -> dict[str, Any] | None:
        if path == "/generate":
            return [SAMPLE, SAMPLE]
        if path == "/update_weights_from_tensor":
            expected = counts[min(len(found) + 1, len(counts) - 1)]
            end = time.monotonic() + 20
            while len(taken) < expected and time.monotonic() < end:
                time.sleep(0.01)
            time.sleep(0.1)  # in which a sync that does not wait would take more
            found.append(len(taken))
        return None

    with serving(answer) as url, sync_to([url], tmp_path, bucket_mb=1) as sync:
        tensors = zeros(sync)
        for bucket in buckets(tensors, 2**20):
            counts.append((counts[-1] if counts else 0) + len(bucket.tensors))
        # the tensor that does not fit into a bucket ends it
        counts = [min(count + 1, len(tensors)) for count in counts]
        assert sync.push(((taken.append(name), (name, x))[1] for name, x in tensors), 1) == {}
    assert len(counts) == 3
    assert found == [*counts[1:], counts[-1]]


def test_a_failure_of_the_background_ends_the_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the stream has been read to its end, which other processes take part in."""
    taken: list[str] = []
    resumed: list[str] = []

    def answer(path: str, body: dict[str, Any]) -> None:
        if path == "/continue_generation":
            resumed.append(path)

    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=0))
    with serving(answer) as url, sync_to([url], tmp_path, bucket_mb=1) as sync:
        tensors = zeros(sync)
        with pytest.raises(WeightSyncError, match="MiB needed in /dev/shm"):
            sync.push(((taken.append(name), (name, x))[1] for name, x in tensors), 1)
    assert len(taken) == len(tensors)
    assert resumed


@pytest.mark.parametrize("seconds", [0.1, 0.3])
def test_a_request_of_a_sync_has_its_timeout(tmp_path: Path, seconds: float) -> None:
    """In a sync, and when a restarted server is given the weights that were kept."""
    over = threading.Event()

    def answer(path: str, body: dict[str, Any]) -> None:
        if path == "/update_weight_version":
            over.wait(30)

    with serving(answer) as url, sync_to([url], tmp_path, timeout_s=seconds, keep_files=True) as sync:
        message = f"{url}/update_weight_version: no answer within {seconds} s"
        failed = sync.push(iter(zeros(sync)), 1)
        assert message in failed[url]
        with pytest.raises(ServerUnavailable, match=message):
            sync.pool.portal.call(sync.restore, *sync.pool.own)
        over.set()


def test_auto_is_memory_on_this_host_and_a_broadcast_elsewhere(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One of each: both get every tensor, each its own way, and the log says which."""
    here, there = ({"/update_weights_from_tensor": [], "/update_weights_from_distributed": []} for _ in "ab")
    joined = Joining()

    def answer(path: str, body: dict[str, Any], calls: dict[str, list]) -> Any:
        if path in calls:
            calls[path].append(body)
        return [SAMPLE, SAMPLE] if path == "/generate" else joined.answer(path, body)

    with (
        serving(lambda path, body: answer(path, body, here)) as url,
        serving(lambda path, body: answer(path, body, there)) as other,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr("megatron_bicc.weights.sync.on_this_host", lambda where: where == url)
        with caplog.at_level(logging.INFO), sync_to([url, other], tmp_path, bucket_mb=1) as sync:
            assert sync.push(iter(zeros(sync)), 1) == {}
            names = set(sync.expected)
    assert [len(bodies) for bodies in here.values()] == [3, 0]
    assert [len(bodies) for bodies in there.values()] == [0, 3]
    assert joined.received.keys() == names
    (line,) = [line for line in caplog.messages if line.startswith("weight sync: ")]
    assert line == f"weight sync: distributed to {other}; tensor to {url}"


def test_a_worker_that_joins_a_router_gets_its_own_method(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its method is chosen at the first sync that it takes part in."""
    loaded: list[str] = []

    def answer(path: str, body: dict[str, Any]) -> Any:
        if path == "/update_weights_from_tensor":
            loaded.append(path)
        return [SAMPLE, SAMPLE] if path == "/generate" else None

    with serving(answer) as url, sync_to([], tmp_path) as sync, caplog.at_level(logging.INFO):
        sync.pool.own = [ServerClient(url)]
        assert sync.push(iter(zeros(sync)), 1) == {}
        sync.pool.portal.call(sync.pool.own[0].aclose)
    assert loaded and f"weight sync: tensor to {url}" in caplog.messages


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid"])
def test_a_server_of_another_host_cannot_read_this_ones_memory(host: str, tmp_path: Path) -> None:
    url = f"http://{host}:30000"
    for method in ("auto", "distributed"):
        with sync_to([url], tmp_path, method=method) as sync:
            assert sync.methods == {url: "distributed"}
    with (
        pytest.raises(UserError, match=f"method is tensor, but rollout server {url} is on another.*=auto"),
        sync_to([url], tmp_path, method="tensor"),
    ):
        pass
    with (
        pytest.raises(UserError, match=f"rollout.colocate is true, but rollout server {url} is on another"),
        sync_to([url], tmp_path, colocate=True),
    ):
        pass


class Joining:
    """What a scripted server answers that joins process groups, and what it receives in them."""

    def __init__(self) -> None:
        self.received: dict[str, torch.Tensor] = {}
        self.worlds: list[int] = []
        self._groups: dict[str, dist.ProcessGroupGloo] = {}

    def answer(self, path: str, body: dict[str, Any]) -> dict[str, Any] | None:
        """Joins, receives or leaves; None for other requests."""
        if path == "/init_weights_update_group":
            self.worlds.append(body["world_size"])
            try:
                self._groups[body["group_name"]] = self._join(**body)
            except (RuntimeError, dist.DistError) as error:
                return {"success": False, "message": str(error)}
        if path == "/update_weights_from_distributed":
            group = self._groups[body["group_name"]]
            for name, dtype, shape in zip(body["names"], body["dtypes"], body["shapes"], strict=True):
                self.received[name] = torch.empty(shape, dtype=getattr(torch, dtype))
                group.broadcast(self.received[name], 0).wait()
        if path == "/destroy_weights_update_group":
            self._groups.pop(body["group_name"], None)
        return None

    @staticmethod
    def _join(
        master_address: str, master_port: int, world_size: int, rank_offset: int, group_name: str, **_: str
    ) -> dist.ProcessGroupGloo:
        """As SGLang does; half an hour is its timeout."""
        long = timedelta(minutes=30)
        store = dist.TCPStore(master_address, master_port, world_size, is_master=False, timeout=long)
        prefixed = dist.PrefixStore(
            "cpu/", dist.PrefixStore(f"{group_name}/", dist.PrefixStore(group_name, store))
        )
        return dist.ProcessGroupGloo(prefixed, rank_offset, world_size, long)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("fault", ["never answers", "is killed"])
def test_a_server_that_dies_while_joining_is_left_out(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other comes a little later and waits for it in the same group: it gets the weights in another one.

    One that never answers is waited for no longer than joining may take, not until a request's timeout, which
    is the bound of the broadcast itself. After a failure nobody waits for so long.
    """
    assert transport.JOIN_S + transport.CONNECT_S + transport.ABANDON_S <= 30
    hangs = fault == "never answers"
    monkeypatch.setattr(transport, "JOIN_S", 4.0 if hangs else 200.0)
    monkeypatch.setattr(transport, "CONNECT_S", 3.0)
    monkeypatch.setattr(transport, "ABANDON_S", 4.0)
    over = threading.Event()
    good = Joining()
    asked: list[str] = []

    def dying(path: str, body: dict[str, Any]) -> None:
        asked.append(path)
        if not hangs:
            raise ConnectionError
        over.wait(60)

    def slow(path: str, body: dict[str, Any]) -> dict[str, Any] | None:
        if path == "/init_weights_update_group":
            time.sleep(1)
        if path == "/update_weights_from_distributed" and hangs:
            time.sleep(transport.JOIN_S + 1)
        return good.answer(path, body)

    # more than a connection buffers, so that the broadcast waits for the server
    sent = [("a", torch.rand(3)), ("b", torch.rand(2, 2).bfloat16()), ("c", torch.rand(2**24))]
    with (
        serving(slow) as url,
        serving(dying) as lost,
        closing(ServerPool([], [], Config().rollout.sglang)) as pool,
    ):
        receivers = [Receiver(ServerClient(server), 600.0) for server in (url, lost)]
        for receiver in receivers:
            receiver.info = INFO
        one = DistributedTransport(pool.portal.call)
        one.send(receivers, Bucket(list(sent)))
        one.close()
        over.set()
        for receiver in receivers:
            pool.portal.call(receiver.client.aclose)
    assert receivers[0].error is None and isinstance(receivers[1].error, ServerUnavailable)
    assert good.worlds == [3, 2]
    assert asked == ["/init_weights_update_group"]
    assert good.received.keys() == {"a", "b", "c"}
    assert all(torch.equal(good.received[name], tensor) for name, tensor in sent)


def test_a_late_server_gets_the_weights_of_an_export(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """If that is of exactly the current version and of this run; at version 0, from model.path."""
    loaded: list[str] = []

    def answer(path: str, body: dict[str, Any]) -> Any:
        if path == "/update_weights_from_disk":
            loaded.append(body["model_path"])
        return [SAMPLE, SAMPLE] if path == "/generate" else None

    earlier = step_export(str(tmp_path), 3)
    earlier.mkdir(parents=True)
    with serving(answer) as url, caplog.at_level(logging.INFO), sync_to([url], tmp_path) as sync:
        (client,) = sync.pool.own
        sync._started = earlier.stat().st_mtime + 1e-3
        exported = step_export(str(tmp_path), 2)
        for version, directory in ((0, MODEL), (1, None), (2, exported), (3, None)):
            assert sync.push(iter(zeros(sync)), version) == {}
            if version == 2:
                exported.mkdir()
            if directory is None:
                with pytest.raises(WeightSyncError, match=f"no weights of version {version} until"):
                    sync.pool.portal.call(sync.restore, client)
                assert not loaded
                continue
            sync.pool.portal.call(sync.restore, client)
            assert loaded.pop() == str(directory)
            assert f"{url} loaded the weights of version {version} from {directory}" in caplog.text
