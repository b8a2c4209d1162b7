"""Tests the file of changed weights: what is in it, and what a server makes of it."""

import os
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from megatron_bicc.config import Config
from megatron_bicc.sglang.in_server.bicc_weights import apply_changes
from megatron_bicc.sglang.process import _command, _environment
from megatron_bicc.weights.changes import LastWeights, write_changes


class Fused(nn.Module):
    """A model that fuses and pads as SGLang does."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Parameter(torch.zeros(10, 4))
        self.norm = nn.Parameter(torch.ones(4))

    def load_weights(self, tensors: list[tuple[str, torch.Tensor]]) -> None:
        """Rows 0 to 3 are q, 4 to 5 are k, 6 to 7 are v, the others padding."""
        places = {
            "q": self.qkv.data[:4],
            "k": self.qkv.data[4:6],
            "v": self.qkv.data[6:8],
            "norm": self.norm.data,
        }
        for name, tensor in tensors:
            buffer = torch.empty_like(tensor).copy_(tensor)  # not a parameter: copied as it is
            places[name].copy_(buffer)


def bf16(**shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}


def test_a_server_has_the_weights_after_any_changes(tmp_path: Path) -> None:
    """Of single elements, of none, and of so many that the tensor is in the file whole."""
    weights = bf16(q=(4, 4), k=(2, 4), v=(2, 4), norm=(4,))
    last, model, file = LastWeights(), Fused(), tmp_path / "changes.safetensors"
    sizes = []
    for step in range(4):
        if step == 1:
            weights["q"][1, 2] += 1
            weights["k"][0] *= -2
            weights["v"][1, 3] = 0.0
        if step == 2:
            weights["v"][1, 3] = -0.0
        if step == 3:
            weights["norm"] += 1
        sizes.append(write_changes(file, last.changes(weights.items())))
        found = set(load_file(file))
        apply_changes(model, [(str(file), torch.empty(0))])
        served = [model.qkv.data[:4], model.qkv.data[4:6], model.qkv.data[6:8], model.norm.data]
        for (name, tensor), own in zip(weights.items(), served, strict=True):
            assert torch.equal(own.bfloat16().view(torch.int16), tensor.view(torch.int16)), (step, name)
        assert not model.qkv.data[8:].any()
        if step == 1:
            of_some = {f"{name}:{part}" for name in "qv" for part in ("positions", "values", "shape")}
            assert found == of_some | {"k"}
        if step == 2:
            assert found == {f"v:{part}" for part in ("positions", "values", "shape")}
        if step == 3:
            assert found == {"norm"}
    assert torch.Tensor.copy_ is torch.Tensor.__dict__.get("copy_", torch._C.TensorBase.copy_)


def test_a_server_of_the_run_finds_the_loader() -> None:
    config = Config()
    for config.weight_sync.delta in (False, True):
        path = _environment(config, 0).get("PYTHONPATH", "").split(os.pathsep)
        assert (Path(path[0], "bicc_weights.py").exists() and path[0] != "") == config.weight_sync.delta
        arguments = _command(config, "http://127.0.0.1:1", seed=1)
        assert ("bicc_weights.apply_changes" in arguments) == config.weight_sync.delta


def test_later_weights_do_not_reach_back() -> None:
    """What is found changed is of the weights at that time, though the caller's memory is used again."""
    weights = bf16(a=(8, 8))
    last = LastWeights()
    last.changes(weights.items())
    for _ in range(2):
        weights["a"][0, 0] += 1
        found = last.changes(weights.items())
        assert found["a:positions"].tolist() == [0]
        assert found["a:values"].tolist() == [weights["a"][0, 0].item()]
