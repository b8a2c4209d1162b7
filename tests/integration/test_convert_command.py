"""Conversion by several processes, a checkpoint under other layouts, and the memory that conversion takes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import load_file, save_file
from support.models import make_model
from transformers import Qwen3Config, Qwen3ForCausalLM

WORKER = Path(__file__).with_name("convert_worker.py")


def run(task: str, source: Path, out: Path, processes: int) -> str:
    """What convert_worker.py prints under torchrun."""
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes), str(WORKER), task, str(source), str(out)]
    # glibc keeps up to 64 MB of freed memory for itself, which is much beside tensors of 30 MB
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def same(ours: Path, theirs: Path) -> bool:
    """Whether all tensors of the safetensors files are equal to the bit."""
    mine, his = (
        {n: x for f in p.glob("*.safetensors") for n, x in load_file(f).items()} for p in (ours, theirs)
    )
    return mine.keys() == his.keys() and all(torch.equal(mine[name], his[name]) for name in his)


def test_resharding(tmp_path: Path) -> None:
    """Imported by four processes, loaded and saved at TP=2 PP=2, then at TP=1: every export is the source."""
    make_model("qwen3_tied").save_pretrained(tmp_path / "hf", max_shard_size="50kB")
    run("reshard", tmp_path / "hf", tmp_path, processes=4)
    for name in ("back", "back_tp2_pp2", "back_tp1"):
        assert same(tmp_path / name, tmp_path / "hf"), name


def test_memory_is_bounded_by_shards(tmp_path: Path) -> None:
    """Peak memory: no more than two of the input's shards and its largest tensor above that at the start."""
    shard, largest = large_model(tmp_path / "hf")
    peaks = json.loads(run("memory", tmp_path / "hf", tmp_path, processes=1))
    assert sum(file.stat().st_size for file in (tmp_path / "hf").iterdir()) > 3 * (2 * shard + largest)
    assert max(peaks.values()) < 2 * shard + largest, f"{peaks}, files of {shard}, tensors of {largest} bytes"
    assert same(tmp_path / "back", tmp_path / "hf")


def large_model(path: Path) -> tuple[int, int]:
    """A policy of 350 MB in files of at most 40 MB; bytes of its largest file and tensor."""
    config = Qwen3Config(
        vocab_size=8000,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=128,
        tie_word_embeddings=True,
        architectures=["Qwen3ForCausalLM"],
    )
    config.save_pretrained(path)
    with torch.device("meta"):
        state = Qwen3ForCausalLM(config).state_dict()
    state.pop("lm_head.weight")
    split = split_torch_state_dict_into_shards(state, max_shard_size="40MB")
    for file, names in split.filename_to_tensors.items():
        save_file({name: torch.rand(state[name].shape) for name in names}, path / file)
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    largest_file = max(file.stat().st_size for file in path.glob("*.safetensors"))
    return largest_file, max(tensor.nbytes for tensor in state.values())
