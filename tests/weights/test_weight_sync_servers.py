"""Tests weight sync into real SGLang servers: every transport, both checks, and faults during a sync.

The order of the tests matters: the last ones end the second server.
"""

import asyncio
import copy
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from anyio.from_thread import BlockingPortal
from support.faulty_proxy import FaultyProxy
from support.models import make_model
from support.sglang_server import PYTHON, SglangServer
from support.steps import TOKENIZER, make_config
from support.two_steps import assert_engine_followed, train_on
from support.weight_sync import TOKENS, greedy, hf_log_probs, make_sync, move, served, stream, tamper
from transformers import PreTrainedModel

from megatron_bicc.config import SglangConfig
from megatron_bicc.sglang.client import ServerClient
from megatron_bicc.sglang.pool import ServerPool
from megatron_bicc.training.learner import Learner
from megatron_bicc.weights.hf_weights import load_policy
from megatron_bicc.weights.sync import ServerWeightSync
from megatron_bicc.weights.transport import WeightSyncError, live
from megatron_bicc.weights.verify import SHARES, server_name

pytestmark = [
    pytest.mark.timeout(900),  # a busy machine needs minutes to start a server
    pytest.mark.skipif(not PYTHON.exists(), reason="there is no .venv-sglang: make sglang"),
]
BUCKET_MB = 0.03
METHODS = ("tensor", "disk", "distributed")


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """What the servers start with."""
    return make_model("qwen3_tied")


@pytest.fixture(scope="module")
def path(model_dirs: dict[str, Path]) -> Path:
    """Its directory."""
    return model_dirs["qwen3_tied"]


@pytest.fixture(scope="module")
def servers(path: Path) -> Iterator[list[SglangServer]]:
    """Two; the second starts while the first is tested, and is killed by a test."""
    both = [SglangServer(path, path.parent / f"server{i}.log") for i in (0, 1)]
    try:
        for server in both:
            server.start()
        both[0].wait()
        yield both
    finally:
        for server in both:
            server.kill()


@pytest.fixture(scope="module")
def pool(servers: list[SglangServer]) -> Iterator[ServerPool]:
    """Both servers, without health checks; a test says which get weights (`push`)."""
    urls = [server.url for server in servers]
    pool = ServerPool(urls, urls, SglangConfig())
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def portal(pool: ServerPool) -> BlockingPortal:
    """The event loop of the clients."""
    return pool.portal


@pytest.fixture(scope="module")
def clients(pool: ServerPool) -> list[ServerClient]:
    """Of both servers."""
    return [server.client for server in pool.servers]


def push(
    sync: ServerWeightSync, clients: list[ServerClient], tensors: Iterable, version: int
) -> dict[str, str]:
    """Syncs to these servers; the reasons of those that failed."""
    sync.pool.own = clients
    sync.methods |= {client.url: sync._config.weight_sync.method for client in clients}
    return sync.push(tensors, version)


@pytest.fixture
def both(servers: list[SglangServer], clients: list[ServerClient]) -> list[ServerClient]:
    """When the second server can serve, too."""
    servers[1].wait()
    return clients


@pytest.fixture(scope="module")
def learner(path: Path, single_process: None) -> Learner:
    """Of the policy in training."""
    config = make_config(path, "grpo")
    config.weight_sync.keep_files = True
    return Learner(config, load_policy(config), TOKENIZER)


@pytest.fixture
def sync(learner: Learner, pool: ServerPool, tmp_path: Path) -> Iterator[Callable[..., ServerWeightSync]]:
    """Makes a weight sync by a method; buckets of three tensors or so."""
    made = []

    def make(method: str) -> ServerWeightSync:
        config = learner.config
        config.weight_sync.method, config.weight_sync.bucket_mb = method, BUCKET_MB
        config.weight_sync.path = str(tmp_path / "weights")
        made.append(make_sync(config, learner, pool))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture(scope="module")
def lasting(learner: Learner, pool: ServerPool, path: Path) -> Iterator[ServerWeightSync]:
    """One for several tests, by broadcast."""
    config = copy.deepcopy(learner.config)
    config.weight_sync.method, config.weight_sync.bucket_mb = "distributed", BUCKET_MB
    config.weight_sync.path = str(path.parent / "lasting")
    one = make_sync(config, learner, pool)
    yield one
    one.close()


def counted(learner: Learner, held: list[int]) -> Iterator[tuple[str, torch.Tensor]]:
    """The policy's tensors; held is [bytes of those that somebody still holds, their most]."""

    def release(nbytes: int) -> None:
        held[0] -= nbytes

    for name, tensor in stream(learner):
        tensor = tensor.clone()
        held[0] += tensor.nbytes
        held[1] = max(held)
        weakref.finalize(tensor, release, tensor.nbytes)
        yield name, tensor


def weights_into(model: PreTrainedModel, learner: Learner) -> PreTrainedModel:
    """The model, with the policy's weights."""
    own = dict(stream(learner))
    for name, parameter in model.named_parameters():
        parameter.data.copy_(own[name])
    return model


def agrees(portal: BlockingPortal, client: ServerClient, learner: Learner, model: PreTrainedModel) -> bool:
    """Whether a server has the policy's weights: log-probs of 39 tokens to 1e-4."""
    found, _ = served(portal, client, TOKENS)
    return bool(np.abs(found - hf_log_probs(weights_into(model, learner), TOKENS)).max() < 1e-4)


NORM = "model.layers.1.self_attn.k_norm.weight"


class Tampering(ServerWeightSync):
    """Has one parameter overwritten on the first server between the weights' arrival and their check."""

    def _stream(self, receivers: list, *rest: Any) -> None:
        super()._stream(receivers, *rest)
        client, portal = live(receivers)[0].client, self.pool.portal
        portal.call(client.post, "/end_weight_update", {})
        tamper(portal, client, NORM, [16])
        portal.call(client.post, "/begin_weight_update", {"selector": "all"})


@pytest.mark.parametrize("known", [True, False])
def test_a_wrong_parameter_is_named(
    known: bool,
    sync: Callable[..., ServerWeightSync],
    learner: Learner,
    clients: list[ServerClient],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By its checksum; where that is not comparable, by log-probs, and the kept files tell its name."""
    if not known:
        monkeypatch.setattr("megatron_bicc.weights.sync.comparable", lambda receiver: False)
    one = sync("tensor")
    assert push(one, clients[:1], stream(learner), 1) == {}
    one.__class__ = Tampering
    with pytest.raises(WeightSyncError, match=f"{clients[0].url} has other weights than the policy: {NORM}$"):
        push(one, clients[:1], stream(learner), 2)


def test_every_parameter_is_compared_in_turn(
    sync: Callable[..., ServerWeightSync],
    learner: Learner,
    clients: list[ServerClient],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without files a sync compares a share of the parameters, on both sides; the first one compares all."""
    monkeypatch.setattr(learner.config.weight_sync, "keep_files", False)
    monkeypatch.setattr("megatron_bicc.weights.sync.disagreeing", lambda *_: [])  # nobody asks the log-probs
    one = sync("tensor")
    for version in range(1, 2 + SHARES):
        assert push(one, clients[:1], stream(learner), version) == {}
        (checksums,) = one._checksums.values()
        assert len(checksums.of_rank(0)) == len(checksums.share.names if checksums.share else names(one))
    one.__class__ = Tampering
    found = []
    for version in range(SHARES):
        try:
            assert push(one, clients[:1], stream(learner), version) == {}
        except WeightSyncError as error:
            found.append(str(error))
    assert len(found) == 1 and found[0].endswith(f"has other weights than the policy: {NORM}")


def names(sync: ServerWeightSync) -> set[str]:
    """The server's parameters."""
    return {server_name(name) for name in sync.expected}


def test_an_unknown_name_is_refused_though_the_server_would_take_it(
    sync: Callable[..., ServerWeightSync],
    learner: Learner,
    clients: list[ServerClient],
    portal: BlockingPortal,
) -> None:
    """And the server goes on after it, its weights called incomplete."""
    assert tamper(portal, clients[0], "model.layers.1.no_such.weight", [16])["success"]
    extra = [*stream(learner), ("model.layers.1.no_such.weight", torch.zeros(16))]
    with pytest.raises(WeightSyncError, match="no_such.weight is not a parameter of the servers' model"):
        push(sync("tensor"), clients[:1], extra, 3)
    assert served(portal, clients[0], TOKENS)[1] == "incomplete"


@pytest.mark.parametrize(
    ("name", "shape"), [("model.norm.weight", (63,)), ("model.embed_tokens.weight", (100, 64))]
)
def test_a_wrong_shape_never_reaches_the_server(
    name: str,
    shape: tuple[int, ...],
    sync: Callable[..., ServerWeightSync],
    learner: Learner,
    clients: list[ServerClient],
    portal: BlockingPortal,
) -> None:
    wrong = ((n, torch.zeros(shape) if n == name else t) for n, t in stream(learner))
    one = sync("tensor")
    with pytest.raises(WeightSyncError, match=f"{name} has shape"):
        push(one, clients[:1], wrong, 4)
    assert push(one, clients[:1], stream(learner), 5) == {}
    assert served(portal, clients[0], TOKENS)[1] == "5"


def test_a_server_that_a_killed_trainer_left_paused_goes_on(
    sync: Callable[..., ServerWeightSync],
    learner: Learner,
    clients: list[ServerClient],
    portal: BlockingPortal,
) -> None:
    portal.call(clients[0].pause, "abort")
    portal.call(clients[0].post, "/begin_weight_update", {"selector": "all"})
    assert push(sync("tensor"), clients[:1], stream(learner), 6) == {}
    assert served(portal, clients[0], TOKENS)[1] == "6"


def test_no_sequence_is_of_two_versions(
    sync: Callable[..., ServerWeightSync],
    learner: Learner,
    model: PreTrainedModel,
    clients: list[ServerClient],
    portal: BlockingPortal,
) -> None:
    """What runs is aborted, and keys and values that the old weights left are forgotten."""
    one, client = sync("tensor"), clients[0]
    greedy(portal, client, TOKENS)
    sampling = {"max_new_tokens": 440, "ignore_eos": True}
    running = portal.start_task_soon(
        client.generate, {"input_ids": [TOKENS] * 8, "sampling_params": sampling}, 60
    )
    portal.call(asyncio.sleep, 0.3)
    move(learner, 9)
    assert push(one, [client], stream(learner), 9) == {}
    assert {answer["meta_info"]["finish_reason"]["type"] for answer in running.result()} == {"abort"}
    token, log_prob = greedy(portal, client, TOKENS)
    expected = hf_log_probs(weights_into(model, learner), [*TOKENS, token])[-1]
    assert log_prob == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_servers_get_the_policys_weights(
    method: str,
    sync: Callable[..., ServerWeightSync],
    learner: Learner,
    model: PreTrainedModel,
    both: list[ServerClient],
    portal: BlockingPortal,
) -> None:
    """Twice each: the second time over what the first left, such as the process group. In memory there are
    never more tensors than two buckets', the one after them and the one that is made."""
    one = sync(method)
    sizes = [tensor.nbytes for _, tensor in stream(learner)]
    for version in (7, 8):
        move(learner, version)
        held = [0, 0]
        assert push(one, both, counted(learner, held), version) == {}
        assert one._confirmed == {(1, torch.float32)}
        assert held[1] <= 2 * BUCKET_MB * 2**20 + 2 * max(sizes) < sum(sizes) / 2
        for client in both:
            assert agrees(portal, client, learner, model)
            assert served(portal, client, TOKENS)[1] == str(version)
            assert portal.call(client.model_info)["weight_version"] == str(version)


def test_late_servers_get_the_newest_weights(
    lasting: ServerWeightSync,
    sync: Callable[..., ServerWeightSync],
    learner: Learner,
    model: PreTrainedModel,
    both: list[ServerClient],
    portal: BlockingPortal,
) -> None:
    """From the files at once. A server that started again is not in the process group: it is in the next
    sync's."""
    assert push(lasting, both, stream(learner), 11) == {}
    # every checksum is that of the stream; only the log-probs show that these are not the policy's weights
    with pytest.raises(WeightSyncError, match=f"{both[1].url} has other weights than the policy"):
        push(sync("tensor"), both[1:], ((name, 2 * x) for name, x in stream(learner)), 12)
    assert not agrees(portal, both[1], learner, model)
    portal.call(lasting.restore, both[1])
    assert agrees(portal, both[1], learner, model)
    assert served(portal, both[1], TOKENS)[1] == "11"

    group = {"group_name": lasting.transports["distributed"]._group.name}
    portal.call(both[1].post, "/destroy_weights_update_group", group)
    move(learner, 13)
    assert push(lasting, both, stream(learner), 13) == {}
    assert lasting.transports["distributed"]._group.name != group["group_name"]
    assert all(agrees(portal, client, learner, model) for client in both)


def test_files_that_were_spoiled_restore_nobody(
    lasting: ServerWeightSync, learner: Learner, clients: list[ServerClient], portal: BlockingPortal
) -> None:
    """The proof is of the policy's weights, not of the files'."""
    assert push(lasting, clients[:1], stream(learner), 15) == {}
    shard = sorted(lasting.files.complete.glob("*.safetensors"))[-1]
    content = bytearray(shard.read_bytes())
    content[-4:] = bytes(4)
    shard.write_bytes(content)
    with pytest.raises(WeightSyncError, match="has other weights than the policy"):
        portal.call(lasting.restore, clients[0])
    assert served(portal, clients[0], TOKENS)[1] == "incomplete"


def test_a_restarted_server_needs_the_files(
    sync: Callable[..., ServerWeightSync],
    learner: Learner,
    clients: list[ServerClient],
    portal: BlockingPortal,
) -> None:
    one = sync("disk")
    learner.config.weight_sync.keep_files = False
    push(one, clients[:1], stream(learner), 14)
    learner.config.weight_sync.keep_files = True
    assert not one.files.root.exists()
    with pytest.raises(WeightSyncError, match="weight_sync.keep_files=true would have kept them"):
        portal.call(one.restore, clients[1])


def test_two_steps_of_training(
    servers: list[SglangServer], path: Path, single_process: None, tmp_path: Path
) -> None:
    assert_engine_followed(train_on(servers[0].url, path, tmp_path))


def dying(learner: Learner, die: Callable[[], None]) -> Iterator[tuple[str, torch.Tensor]]:
    """The policy's tensors; a server dies amidst them."""
    for i, item in enumerate(stream(learner)):
        if i == 8:
            die()
        yield item


def test_a_lost_server_is_no_matter_for_the_others(
    sync: Callable[..., ServerWeightSync],
    learner: Learner,
    model: PreTrainedModel,
    both: list[ServerClient],
    portal: BlockingPortal,
) -> None:
    """By HTTP: in mid-sync, and in the sync after that, when it is not there from the start."""
    proxy = FaultyProxy(both[1].url)
    lost = ServerClient(proxy.url)
    one = sync("tensor")
    for version in (30, 31):
        move(learner, version)
        assert list(push(one, [both[0], lost], dying(learner, proxy.close), version)) == [proxy.url]
        assert agrees(portal, both[0], learner, model)
    portal.call(lost.aclose)
    portal.call(both[1].resume)  # it is as the first of the two syncs left it


def test_a_server_dies_in_mid_sync(
    lasting: ServerWeightSync,
    learner: Learner,
    model: PreTrainedModel,
    servers: list[SglangServer],
    both: list[ServerClient],
    portal: BlockingPortal,
) -> None:
    """By broadcast, the process group breaks: the other server gets the weights in a new one."""
    assert push(lasting, both, stream(learner), 40) == {}
    move(learner, 41)
    assert list(push(lasting, both, dying(learner, servers[1].kill), 41)) == [both[1].url]
    assert agrees(portal, both[0], learner, model)
    assert served(portal, both[0], TOKENS)[1] == "41"
