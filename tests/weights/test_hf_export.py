"""Tests the export as a Hugging Face directory: shards, one tensor at a time, complete or absent."""

import json
import resource
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.models import make_model
from transformers import AutoModelForCausalLM

from megatron_bicc import device
from megatron_bicc.config import Config
from megatron_bicc.errors import UserError
from megatron_bicc.model.policy import Policy
from megatron_bicc.weights.hf_files import write_model
from megatron_bicc.weights.hf_weights import hf_tensors, load_policy, save_hf


@pytest.fixture
def policy(tmp_path: Path, single_process: None) -> Policy:
    """A random tied Qwen3, loaded from tmp_path/hf."""
    make_model("qwen3_tied").save_pretrained(tmp_path / "hf")
    config = Config()
    config.model.path, config.model.dtype = str(tmp_path / "hf"), "float32"
    return load_policy(config)


@pytest.mark.parametrize("largest_file", [50_000, 5_000_000_000])
def test_files_hold_what_transformers_loads(policy: Policy, largest_file: int, tmp_path: Path) -> None:
    source, target = tmp_path / "hf", tmp_path / "out"
    save_hf(policy.modules, policy.hf_config, source, target, True, largest_file)
    files = sorted(target.glob("*.safetensors"))
    state = load_file(source / "model.safetensors")
    if largest_file < 10**6:
        assert len(files) > 2
        for file in files:
            held = load_file(file)
            assert len(held) == 1 or sum(x.nbytes for x in held.values()) <= largest_file
        index = json.loads((target / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == state.keys()
    else:
        assert [file.name for file in files] == ["model.safetensors"]
    ours, theirs = (AutoModelForCausalLM.from_pretrained(p).state_dict() for p in (target, source))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_tensors_are_copies_unless_views_will_do(tmp_path: Path, single_process: None) -> None:
    """An engine may keep what it gets; what is sent at once need not be copied."""
    make_model("qwen3_moe").save_pretrained(tmp_path / "hf")
    config = Config()
    config.model.path, config.model.dtype = str(tmp_path / "hf"), "float32"
    policy = load_policy(config)
    own = {p.untyped_storage().data_ptr() for module in policy.modules for p in module.parameters()}
    with device.megatron():
        copies, views = (dict(hf_tensors(policy.modules, policy.hf_config, views=v)) for v in (False, True))
    assert copies.keys() == views.keys()
    for name, copy in copies.items():
        assert copy.untyped_storage().data_ptr() not in own
        assert torch.equal(copy, views[name])
    made = {name for name, view in views.items() if view.untyped_storage().data_ptr() not in own}
    assert {name.split(".")[-2] for name in made} == {"q_proj", "k_proj", "v_proj"}


def test_one_tensor_in_memory(tmp_path: Path) -> None:
    """When the next one is made, at most the one before it is still there."""
    described = {f"t{i}": torch.empty(8, device="meta") for i in range(6)}
    alive: list[weakref.ref] = []

    def make() -> Iterator[tuple[str, torch.Tensor]]:
        for name in described:
            assert sum(tensor() is not None for tensor in alive) <= 1
            tensor = torch.full((8,), float(name[1]))
            alive.append(weakref.ref(tensor))
            yield name, tensor
            del tensor

    write_model(tmp_path, described, make(), largest_file=96)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    assert load_file(tmp_path / "model-00002-of-00002.safetensors")["t5"].tolist() == [5.0] * 8


def test_full_disk_keeps_the_export_before(policy: Policy, tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "earlier").write_text("")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"out\.new: cannot be written: File too large"):
            save_hf(policy.modules, policy.hf_config, tmp_path / "hf", target, True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.name for p in target.iterdir()] == ["earlier"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "out"]
