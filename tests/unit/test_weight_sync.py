"""Weights on their way to SGLang servers: what needs no server."""

import base64
import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_bicc.weight_sync.buckets import Bucket, buckets, checked, expected_shapes
from megatron_bicc.weight_sync.files import WeightFiles
from megatron_bicc.weight_sync.tensor import encode, request_body

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
    """Also, it is emptied when the next one is made."""
    whole = torch.arange(1000)
    (bucket,) = buckets([("row", whole[:10]), ("column", whole.view(10, 100)[:, 3])], 10**6)
    assert [t.untyped_storage().nbytes() for _, t in bucket.tensors] == [80, 80]
    assert bucket.tensors[1][1].tolist() == list(range(3, 1000, 100))
    cut = buckets(stream(), 1)
    first = next(cut)
    assert first.tensors
    next(cut)
    assert not first.tensors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"c__weight": torch.rand(1)}, "c.weight is no parameter of the servers' model"),
        ({"a__weight": torch.rand(3, 2)}, r"a.weight has shape \(3, 2\), but \(2, 3\)"),
        ({"a__weight": None, "b__bias": None}, "no new weights came for a.weight, b.bias"),
    ],
)
def test_wrong_streams_are_refused_by_name(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(checked(stream(**changes), EXPECTED))


def test_a_tensor_that_comes_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="a.weight came twice"):
        list(checked(stream() + stream()[:1], EXPECTED))


def test_a_wrong_tensor_is_refused_before_its_bucket_is_sent() -> None:
    sent: list[str] = []
    with pytest.raises(ValueError, match="b.bias has shape"):
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


@pytest.mark.parametrize("tensor_parallel", [1, 3])
def test_request_unpickles_to_the_bucket(tensor_parallel: int) -> None:
    sizes = [*range(7), 100_000]
    bucket = Bucket([(f"t{n}", torch.rand(n)) for n in sizes] + [("half", torch.rand(5).bfloat16())])
    body = json.loads(b"".join(request_body(encode(bucket), tensor_parallel)))
    assert len(body["serialized_named_tensors"]) == tensor_parallel
    for text in body["serialized_named_tensors"]:
        found = pickle.loads(base64.b64decode(text, validate=True))
        assert [name for name, _ in found] == [name for name, _ in bucket.tensors]
        assert all(torch.equal(t, b) for (_, t), (_, b) in zip(found, bucket.tensors, strict=True))


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
