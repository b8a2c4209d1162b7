"""Tests conversion by several processes, a checkpoint under other layouts, and the memory it needs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import load_file, save_file
from support.models import make_model
from transformers import PretrainedConfig, Qwen3Config, Qwen3MoeConfig

from megatron_bicc.weights.hf_files import expected_shapes

WORKER = Path(__file__).with_name("convert_worker.py")
HEADS = {"vocab_size": 8000, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 128}
LARGE = {
    "large": (
        Qwen3Config(
            **HEADS,
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=5,
            tie_word_embeddings=True,
            architectures=["Qwen3ForCausalLM"],
        ),
        "40MB",
    ),
    "large_experts": (
        Qwen3MoeConfig(
            **HEADS,
            hidden_size=512,
            moe_intermediate_size=64,
            num_experts=128,
            num_hidden_layers=4,
            architectures=["Qwen3MoeForCausalLM"],
        ),
        "20MB",
    ),
}
"""Policies of 350 and 260 MB: configuration, largest file"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What convert_worker.py reports, exit statuses and peaks of memory; the directory as "out"."""
    out = tmp_path_factory.mktemp("convert")
    make_model("qwen3_tied").save_pretrained(out / "small", max_shard_size="50kB")
    make_model("qwen3_moe").save_pretrained(out / "experts", max_shard_size="50kB")
    bounds = {name: save_random(out / name, config, limit) for name, (config, limit) in LARGE.items()}
    # glibc keeps up to 64 MB of freed memory for itself, which is much beside tensors of 30 MB
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"}
    command = [sys.executable, "-W", "ignore", str(WORKER), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads((out / "report.json").read_text())
    return report | {"out": out, "bounds": bounds, "print": done.stdout, "err": done.stderr}


def same(ours: Path, theirs: Path) -> bool:
    """Whether all tensors of the safetensors files are equal to the bit."""
    mine, his = (
        {n: x for f in p.glob("*.safetensors") for n, x in load_file(f).items()} for p in (ours, theirs)
    )
    return mine.keys() == his.keys() and all(torch.equal(mine[name], his[name]) for name in his)


def test_command_by_several_processes(found: dict) -> None:
    assert (found["import"], found["export"], found["verify"]) == (0, 0, 0), found["err"]
    assert same(found["out"] / "back", found["out"] / "small")
    assert found["print"].count("largest difference of a logit ") == 2
    assert found["other"] == 1
    assert found["taken"] == 2
    assert "back: already exists; choose another directory or delete it" in found["err"]


def test_resharding(found: dict) -> None:
    """Imported by four processes, loaded and saved at TP=2 PP=2, then at TP=1: every export is the source."""
    assert found["reshard"] == 0, found["err"]
    for layout in ("tp2_pp2", "tp1"):
        assert same(found["out"] / f"small_{layout}_back", found["out"] / "small"), layout


def test_resharding_of_experts(found: dict) -> None:
    """Likewise at EP=2, then at TP=2 EP=2."""
    assert (found["import experts"], found["reshard experts"]) == (0, 0), found["err"]
    for layout in ("ep2", "tp2_ep2"):
        assert same(found["out"] / f"experts_{layout}_back", found["out"] / "experts"), layout


@pytest.mark.parametrize("name", LARGE)
def test_memory_is_bounded_by_shards(name: str, found: dict) -> None:
    """Peak memory: no more than two of the input's shards and its largest tensor above that at the start."""
    source, bound = found["out"] / name, found["bounds"][name]
    assert sum(file.stat().st_size for file in source.iterdir()) > 3 * bound
    assert max(found["memory"][name].values()) < bound, f"{found['memory'][name]}, bound {bound} bytes"
    assert same(found["out"] / f"{name}_back", source)


def save_random(path: Path, config: PretrainedConfig, limit: str) -> int:
    """Saves a random policy in files of at most `limit`; returns the documented bound on memory in bytes."""
    config.save_pretrained(path)
    shapes = expected_shapes(config).items()
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes}
    split = split_torch_state_dict_into_shards(state, max_shard_size=limit)
    for file, names in split.filename_to_tensors.items():
        save_file({name: torch.rand(state[name].shape) for name in names}, path / file)
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    largest_file = max(file.stat().st_size for file in path.glob("*.safetensors"))
    return 2 * largest_file + max(tensor.nbytes for tensor in state.values())
