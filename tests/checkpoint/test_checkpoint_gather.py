"""Tests what a checkpoint takes on each process: host memory, and collectives of the training's groups."""

import json
from pathlib import Path

import pytest
from support.models import make_model
from support.torchrun import torchrun

WORKER = Path(__file__).with_name("gather_worker.py")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What two data-parallel processes report."""
    out = tmp_path_factory.mktemp("gather")
    make_model("qwen3_tied").save_pretrained(out / "hf")
    torchrun(2, WORKER, out / "hf", out)
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(2)]


def test_one_process_of_a_data_parallel_group_holds_the_optimizers_state(ranks: list[dict]) -> None:
    """fp32 main weights and Adam's two moments."""
    assert ranks[0]["optimizer_bytes"] == 12 * ranks[0]["parameters"]
    assert ranks[1]["optimizer_bytes"] == 0


def test_no_process_but_that_one_receives_it(ranks: list[dict]) -> None:
    """On GPUs an all_gather would go over NCCL, into the memory of every GPU. The three gathers here are of
    the main weights and Adam's moments, each process's half of them."""
    for rank in ranks:
        large = [call for call in rank["calls"] if call[2] > rank["parameters"]]
        assert [name for name, _, _ in large] == ["gather"] * 3
        assert {backend for _, backend, _ in large} == {"gloo"}
