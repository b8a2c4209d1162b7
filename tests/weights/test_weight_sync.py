"""Tests the parts of the weight sync that need no server."""

import asyncio
import hashlib
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from megatron_bicc.config import Config, ModelConfig, WeightSyncConfig
from megatron_bicc.errors import UserError
from megatron_bicc.sglang.client import ServerClient, ServerRefusal
from megatron_bicc.sglang.pool import ServerPool
from megatron_bicc.weights.handles import SharedMemory
from megatron_bicc.weights.sync import ServerWeightSync
from megatron_bicc.weights.transport import (
    BroadcastGroup,
    Receiver,
    WeightFiles,
    WeightSyncError,
    buckets,
    checked,
    expected_shapes,
)
from megatron_bicc.weights.verify import (
    SHARES,
    Checksums,
    Probe,
    TokenGroup,
    disagreeing,
    server_name,
    share_of,
    unequal,
)

REPOSITORY = Path(__file__).parents[2]
EXPECTED = {"a.weight": (2, 3), "b.weight": (4,), "b.bias": (4,)}


def stream(**changes: torch.Tensor | None) -> list[tuple[str, torch.Tensor]]:
    """EXPECTED's tensors, some replaced or (None) left out; `__` stands for the dot."""
    tensors = {name: torch.rand(shape) for name, shape in EXPECTED.items()}
    tensors |= {name.replace("__", "."): tensor for name, tensor in changes.items()}
    return [(name, tensor) for name, tensor in tensors.items() if tensor is not None]


def test_buckets_hold_the_stream_in_order_and_no_more_than_their_size() -> None:
    sizes = [10, 90, 30, 40, 31, 500, 1, 99, 100]
    tensors = [(str(i), torch.full((n,), i, dtype=torch.uint8)) for i, n in enumerate(sizes)]
    found = [(bucket.nbytes, [(n, t.clone()) for n, t in bucket.tensors]) for bucket in buckets(tensors, 100)]
    assert [size for size, _ in found] == [100, 70, 31, 500, 100, 100]
    assert [name for _, part in found for name, _ in part] == [name for name, _ in tensors]
    assert all((t == int(name)).all() for _, part in found for name, t in part)


def test_a_bucket_keeps_no_storage_but_its_own() -> None:
    """Views of storages that stay anyway are not copied."""
    whole = torch.arange(1000)
    (bucket,) = buckets([("row", whole[:10]), ("column", whole.view(10, 100)[:, 3])], 10**6)
    assert [t.untyped_storage().nbytes() for _, t in bucket.tensors] == [80, 80]
    assert bucket.tensors[1][1].tolist() == list(range(3, 1000, 100))
    bucket.clear()
    assert not bucket.tensors
    lasting = {whole.untyped_storage().data_ptr()}
    (bucket,) = buckets([("row", whole[:10]), ("column", whole.view(10, 100)[:, 3])], 10**6, lasting=lasting)
    assert bucket.tensors[0][1].data_ptr() == whole.data_ptr()
    assert bucket.tensors[1][1].is_contiguous() and bucket.tensors[1][1].data_ptr() != whole[3:].data_ptr()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"c__weight": torch.rand(1)}, "c.weight is not a parameter of the servers' model"),
        ({"a__weight": torch.rand(3, 2)}, r"a.weight has shape \(3, 2\), but \(2, 3\)"),
        ({"a__weight": None, "b__bias": None}, "missing tensors: a.weight, b.bias"),
    ],
)
def test_wrong_streams_are_refused_by_name(changes: dict, message: str) -> None:
    with pytest.raises(WeightSyncError, match=message):
        list(checked(stream(**changes), EXPECTED))


def test_a_tensor_that_comes_twice_is_refused() -> None:
    with pytest.raises(WeightSyncError, match="a.weight came twice"):
        list(checked(stream() + stream()[:1], EXPECTED))


def test_a_wrong_tensor_is_refused_before_its_bucket_is_sent() -> None:
    sent: list[str] = []
    with pytest.raises(WeightSyncError, match="b.bias has shape"):
        for bucket in buckets(checked(stream(b__bias=torch.rand(5)), EXPECTED), 24):
            sent += [name for name, _ in bucket.tensors]
    assert sent == ["a.weight"]


def test_expected_shapes_are_the_parameters(model_dirs: dict[str, Path]) -> None:
    for path in model_dirs.values():
        config = AutoConfig.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path)
        found = expected_shapes(str(path), config)
        if "moe" in path.name:  # transformers keeps the experts in one parameter
            assert "model.layers.1.mlp.experts.3.down_proj.weight" in found
            continue
        assert found == {name: tuple(p.shape) for name, p in model.named_parameters()}


def test_a_bucket_is_copied_to_the_host_once(
    model_dirs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For its file and its checksums together; a server's memory takes the place of that copy."""
    source = model_dirs["qwen3_tied"]
    (bucket,) = buckets(load_file(source / "model.safetensors").items(), 10**9)
    copies: list[int] = []
    original = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: copies.append(1) or original(tensor))
    files, checksums = (
        WeightFiles(tmp_path / "weights", source),
        Checksums(AutoConfig.from_pretrained(source), 1, torch.float32),
    )
    files.start()
    files.write(bucket)
    for name, tensor in bucket.host:
        checksums.add(name, tensor)
    assert len(copies) == len(bucket.tensors)
    files.remove()

    copies.clear()
    (shared,) = buckets(load_file(source / "model.safetensors").items(), 10**9)
    with closing(SharedMemory()) as memory:
        flat = shared.share(memory)
        assert [name for name, _ in shared.host] == [name for name, _ in bucket.tensors]
        for (_, ours), (_, theirs) in zip(shared.host, bucket.tensors, strict=True):
            assert torch.equal(ours, theirs)
            assert ours.untyped_storage().data_ptr() == flat.buffer.untyped_storage().data_ptr()
        shared.keep_host()
        assert shared.tensors == shared.host
        assert not copies
        del flat, ours
        shared.clear()


def test_files_are_a_hugging_face_directory(model_dirs: dict[str, Path], tmp_path: Path) -> None:
    source = model_dirs["qwen3_tied"]
    tensors = load_file(source / "model.safetensors")
    files = WeightFiles(tmp_path / "weights", source)
    for version in (1, 2):
        files.start()
        for bucket in buckets(((n, t + version) for n, t in tensors.items()), 10_000):
            files.write(bucket)
        assert files.complete is None
        path = files.finish(version)
    assert [p.name for p in (tmp_path / "weights").iterdir()] == ["version_2"]
    assert len(list(path.glob("*.safetensors"))) > 2
    model = AutoModelForCausalLM.from_pretrained(path)
    assert all(torch.equal(p, tensors[name] + 2) for name, p in model.named_parameters())
    files.remove()
    assert not list(tmp_path.iterdir())


def test_no_file_stays_when_the_process_is_killed(tmp_path: Path) -> None:
    program = (
        "import os; from pathlib import Path; from megatron_bicc.weights.transport import WeightFiles\n"
        f"WeightFiles(Path({str(tmp_path / 'weights')!r}), Path('examples/tiny_policy')).start()\n"
        "print(os.listdir(os.sys.argv[1] + '/weights'), flush=True); os.kill(os.getpid(), 9)"
    )
    command = [sys.executable, "-W", "ignore", "-c", program, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == -9 and done.stdout == "['partial']\n", done.stderr
    end = time.monotonic() + 30
    while (tmp_path / "weights").exists():
        assert time.monotonic() < end, "the files are still there"
        time.sleep(0.1)


def as_served(tensors: dict, config: PretrainedConfig, size: int, rank: int) -> dict[str, torch.Tensor]:
    """The parameters of an SGLang server's tensor-parallel rank, written out one by one."""

    def rows(weight: torch.Tensor, height: int) -> torch.Tensor:
        padded = torch.zeros(height, *weight.shape[1:], dtype=weight.dtype)
        padded[: len(weight)] = weight
        return padded.reshape(size, -1, *weight.shape[1:])[rank]

    def columns(weight: torch.Tensor, width: int) -> torch.Tensor:
        return rows(weight.T, width).T

    kv_heads = max(config.num_key_value_heads, size)  # both powers of two
    heads = kv_heads * config.num_attention_heads // config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    inner = getattr(config, "moe_intermediate_size", config.intermediate_size)
    inner = math.ceil(inner / 32 / size) * 32 * size
    found = {"model.embed_tokens.weight": rows(tensors["model.embed_tokens.weight"], 128)}
    found["model.norm.weight"] = tensors["model.norm.weight"]
    if "lm_head.weight" in tensors:
        found["lm_head.weight"] = rows(tensors["lm_head.weight"], 128)
    for i in range(config.num_hidden_layers):
        layer, attention = f"model.layers.{i}.", f"model.layers.{i}.self_attn."
        for name in ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm"):
            if f"{layer}{name}.weight" in tensors:
                found[f"{layer}{name}.weight"] = tensors[f"{layer}{name}.weight"]
        for kind in ("weight", "bias"):
            if f"{attention}q_proj.{kind}" in tensors:
                q, k, v = (tensors[f"{attention}{x}_proj.{kind}"] for x in "qkv")
                found[f"{attention}qkv_proj.{kind}"] = torch.cat(
                    [rows(q, heads * head_dim), *(rows(x, kv_heads * head_dim) for x in (k, v))]
                )
        found[f"{attention}o_proj.weight"] = columns(tensors[f"{attention}o_proj.weight"], heads * head_dim)
        mlp = f"{layer}mlp."
        if f"{mlp}gate.weight" in tensors:
            found[f"{mlp}gate.weight"] = tensors[f"{mlp}gate.weight"]
            each = [f"{mlp}experts.{e}." for e in range(config.num_experts)]
            gate_up = [[rows(tensors[f"{e}{x}_proj.weight"], inner) for x in ("gate", "up")] for e in each]
            found[f"{mlp}experts.w13_weight"] = torch.stack([torch.cat(pair) for pair in gate_up])
            down = [columns(tensors[f"{e}down_proj.weight"], inner) for e in each]
            found[f"{mlp}experts.w2_weight"] = torch.stack(down)
            mlp += "shared_expert."
            if f"{mlp}down_proj.weight" in tensors:
                name = f"{mlp[:-1]}_gate.weight"
                found[name] = tensors[name]
                inner = math.ceil(config.shared_expert_intermediate_size / 32 / size) * 32 * size
        if f"{mlp}down_proj.weight" in tensors:
            gate_up = [rows(tensors[f"{mlp}{x}_proj.weight"], inner) for x in ("gate", "up")]
            found[f"{mlp}gate_up_proj.weight"] = torch.cat(gate_up)
            found[f"{mlp}down_proj.weight"] = columns(tensors[f"{mlp}down_proj.weight"], inner)
    return found


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("family", ["qwen3_tied", "qwen2", "llama3", "qwen3_moe", "qwen2_moe"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checksums_are_those_of_the_servers_parameters(
    family: str, size: int, dtype: torch.dtype, model_dirs: dict[str, Path]
) -> None:
    """tests/weights/test_weight_sync_servers.py compares them with those that a server tells."""
    config = AutoConfig.from_pretrained(model_dirs[family])
    tensors = load_file(model_dirs[family] / "model.safetensors")
    checksums = Checksums(config, size, dtype)
    for name in sorted(tensors, key=in_stream_order):
        checksums.add(name, tensors[name])
    for rank in range(size):
        served = as_served(tensors, config, size, rank)
        raw = {name: t.to(dtype).contiguous().view(torch.uint8).numpy() for name, t in served.items()}
        expected = {name: hashlib.sha256(data.tobytes()).hexdigest()[:16] for name, data in raw.items()}
        assert checksums.of_rank(rank) == expected


def in_stream_order(name: str) -> tuple[str, int, int]:
    """Experts by number; gate before up, q before k before v."""
    *modules, kind, _ = name.split(".")
    module, _, expert = ".".join(modules).partition(".experts.")
    parts = ["gate_proj", "up_proj", "q_proj", "k_proj", "v_proj"]
    return module, int(expert or 0), parts.index(kind) if kind in parts else 9


def test_shares_of_the_checksums_have_every_parameter_once(model_dirs: dict[str, Path]) -> None:
    """In equal parts, of which a sync hashes no more than its own."""
    path = model_dirs["qwen3_moe"]
    tensors = load_file(path / "model.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    shares = [share_of(shapes, turn) for turn in range(SHARES)]
    names = sorted({server_name(name) for name in tensors})
    assert sorted(name for share in shares for name in share.names) == names
    assert share_of(shapes, SHARES) == shares[0]
    whole, sizes = sum(map(math.prod, shapes.values())), []
    for share in shares:
        assert sorted(share.names | share.others) == names
        sizes.append(sum(math.prod(shapes[name]) for name in shapes if server_name(name) in share.names))
        checksums = Checksums(AutoConfig.from_pretrained(path), 1, torch.float32, share)
        for name in sorted(tensors, key=in_stream_order):
            checksums.add(name, tensors[name])
        assert checksums.of_rank(0).keys() == share.names
    assert sum(sizes) == whole
    largest = max(math.prod(shapes[name]) * 4 for name in shapes if "experts" in name)
    assert max(sizes) < whole / SHARES + largest


def test_parameters_that_only_one_side_has_are_unequal() -> None:
    assert unequal({"a": "1", "b": "2", "c": "3"}, {"a": "1", "b": "9", "d": "4"}) == {"b", "c", "d"}


OURS = np.linspace(-3, -1, 9, dtype=np.float32)
EVEN, ONE = np.ones(9, np.float32), np.eye(9, dtype=np.float32)[4]


def probe(number: int, differences: np.ndarray, dtype: torch.dtype) -> Probe:
    """Two samples, of 4 and 5 tokens, whose log-probs are OURS + number and that much more."""
    group = TokenGroup(np.arange(3), [np.arange(length) for length in (4, 5)])
    return Probe(str(number), dtype, group, OURS + number + differences, [])


@pytest.mark.parametrize(
    ("ours", "theirs", "differences", "agree"),
    [
        ("float32", "float32", 5e-5 * EVEN, True),
        ("float32", "float32", 2e-4 * ONE, False),
        ("float32", "float32", np.where(ONE, np.nan, 0), False),
        ("bfloat16", "bfloat16", 0.03 * EVEN + 3 * ONE, True),
        ("bfloat16", "bfloat16", -0.1 * EVEN, False),
        ("bfloat16", "bfloat16", np.where(ONE, np.nan, 0), False),
        ("float32", "bfloat16", 0.03 * EVEN, True),
        ("bfloat16", "float32", 0.03 * EVEN, True),
    ],
)
def test_probes_agree_or_are_named(ours: str, theirs: str, differences: np.ndarray, agree: bool) -> None:
    """The second of three; the others agree."""
    dtype = getattr(torch, theirs)
    probes = [probe(i, differences if i == 1 else 0 * EVEN, dtype) for i in range(3)]

    def log_probs(groups: list[TokenGroup]) -> np.ndarray:
        assert [len(ids) for group in groups for ids in group.responses] == 3 * [4, 5]
        return np.concatenate([OURS + i for i in range(3)])

    found = disagreeing(probes, log_probs, getattr(torch, ours))
    assert [one.url for one in found] == ([] if agree else ["1"])


def no_log_probs(_: list) -> np.ndarray:
    """For syncs without a server that could be asked."""
    return pytest.fail("no server has the weights")


def tiny_config(directory: Path, **weight_sync: object) -> Config:
    path = str(REPOSITORY / "examples/tiny_policy")
    return Config(
        output_dir=str(directory), model=ModelConfig(path), weight_sync=WeightSyncConfig(**weight_sync)
    )


def tiny_policy(config: Config) -> SimpleNamespace:
    return SimpleNamespace(hf_config=AutoConfig.from_pretrained(config.model.path), modules=[])


@pytest.mark.usefixtures("single_process")
def test_a_process_that_sends_nothing_stays_in_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes no tensor of a bucket before all have finished the one before, but the one that ends it; and
    it keeps none."""
    config = tiny_config(tmp_path, bucket_mb=1, method="disk")
    taken: list[int] = []
    at_barriers: list[int] = []
    with closing(ServerPool(["http://127.0.0.1:9"], [], config.rollout.sglang)) as pool:
        sync = ServerWeightSync(config, tiny_policy(config), pool, no_log_probs)
        tensors = [(name, torch.zeros(shape)) for name, shape in sync.expected.items()]

        def taking() -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in tensors:
                taken.append(tensor.nbytes)
                yield name, tensor

        monkeypatch.setattr("torch.distributed.barrier", lambda: at_barriers.append(len(taken)))
        assert sync.push(taking(), 1) == {}
    ends, count = [], 0
    for bucket in buckets(tensors, 2**20):
        count += len(bucket.tensors)
        ends.append(min(count + 1, len(tensors)))
    assert at_barriers == ends and len(ends) == 3
    assert not [tensor for bucket in buckets(tensors, 2**20, holds=False) for tensor in bucket.tensors]


@pytest.fixture
def nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer broadcasts by NCCL 2.29.7."""
    monkeypatch.setattr("megatron_bicc.weights.transport.BACKENDS", {"cpu": "nccl"})
    monkeypatch.setattr("megatron_bicc.weights.sync.BACKENDS", {"cpu": "nccl"})
    monkeypatch.setattr("torch.cuda.nccl.version", lambda: (2, 29, 7))


@pytest.mark.parametrize(("theirs", "refused"), [("2.30.7", True), ("2.29.7", False), ("", False)])
@pytest.mark.usefixtures("single_process", "nccl")
def test_the_servers_nccl_is_compared_with_the_trainers(theirs: str, refused: bool, tmp_path: Path) -> None:
    """An empty version: its Python knows none."""
    installed = tmp_path / f"packages/nvidia_nccl_cu13-{theirs}.dist-info"
    installed.mkdir(parents=True)
    if theirs:
        (installed / "METADATA").write_text(f"Name: nvidia-nccl-cu13\nVersion: {theirs}\n")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path / "packages"} exec {sys.executable} -S "$@"\n')
    python.chmod(0o755)
    config = tiny_config(tmp_path, method="distributed")
    config.rollout.sglang.python = str(python)
    url = "http://127.0.0.1:9"
    with closing(ServerPool([url], [url], config.rollout.sglang)) as pool:
        if not refused:
            ServerWeightSync(config, tiny_policy(config), pool, no_log_probs)
            return
        with pytest.raises(UserError) as refusal:
            ServerWeightSync(config, tiny_policy(config), pool, no_log_probs)
    assert f"NCCL is 2.29.7 here and 2.30.7 in rollout.sglang.python={python}" in str(refusal.value)


@pytest.mark.usefixtures("nccl")
def test_an_error_of_a_group_names_the_trainers_nccl() -> None:
    receiver = Receiver(ServerClient("http://127.0.0.1:9"), 1.0)
    receiver.info = {"tp_size": 1}

    async def refuse() -> None:
        raise ServerRefusal("http://127.0.0.1:9", "/init_weights_update_group", "NCCL error: invalid usage")

    group = BroadcastGroup([receiver], lambda *_: None)
    (error,) = asyncio.run(group._together(lambda: None, [refuse()]))
    assert "invalid usage (the trainer's NCCL is 2.29.7; the server's must be the same)" in str(error)


class Noted:
    """Test double of a server's client: what it is told, in order."""

    def __init__(self, version: str) -> None:
        self.url, self.version = "http://127.0.0.1:9", version
        self.told: list[str] = []

    async def model_info(self) -> dict:
        return {"weight_version": self.version}

    async def server_info(self) -> dict:
        return {}

    async def paths(self) -> set[str]:
        return set()

    async def pause(self, mode: str) -> None:
        self.told.append(mode)

    async def flush_cache(self) -> None:
        self.told.append("flush")

    async def post(self, path: str, body: dict, timeout_s: float) -> None:
        self.told.append(body["new_version"])


@pytest.mark.parametrize("mode", ["in_place", "retract", "abort"])
@pytest.mark.parametrize("version", ["4", "3", "incomplete", "default"])
@pytest.mark.usefixtures("single_process")
def test_a_server_keeps_the_requests_of_the_last_weights(mode: str, version: str, tmp_path: Path) -> None:
    """What one with other weights is generating is of no use, and what it has cached."""
    config = tiny_config(tmp_path, method="disk")
    with closing(ServerPool(["http://127.0.0.1:9"], [], config.rollout.sglang, pause_mode=mode)) as pool:
        pool.hold("4", {})
        pool.expect("5")
        sync = ServerWeightSync(config, tiny_policy(config), pool, no_log_probs)
        receiver = Receiver(Noted(version), 1.0)
        sync.methods[receiver.client.url] = "disk"
        asyncio.run(sync._begin(receiver))
        asyncio.run(receiver.end())
    kept = mode if version == "4" else "abort"
    assert receiver.client.told == [kept, "incomplete"] + ([] if kept == "in_place" else ["flush"])


@pytest.mark.usefixtures("single_process")
def test_every_process_knows_the_version_before_servers_generate_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And none looks at a server that another process has paused."""
    config = tiny_config(tmp_path, method="disk")
    seen: list[tuple[str, bool, bool]] = []
    with closing(ServerPool(["http://127.0.0.1:9"], [], config.rollout.sglang)) as pool:
        policy = SimpleNamespace(**vars(tiny_policy(config)), check_weights=lambda: None)
        sync = ServerWeightSync(config, policy, pool, no_log_probs)

        def note(what: str) -> dict:
            seen.append((what, pool._paused, pool.is_updating))
            return {}

        monkeypatch.setattr("torch.distributed.barrier", lambda: note("barrier"))
        monkeypatch.setattr(sync, "push", lambda stream, version: note("push"))
        sync.pool.resume()
        sync.sync(1)
        assert seen == [("barrier", True, True), ("push", True, True)]
        assert (pool._paused, pool.is_updating, pool.version) == (False, False, "1")
