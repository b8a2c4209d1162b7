"""Tests the dry run's shards and the plan's memory against real policies on two processes, to the byte."""

import json
from pathlib import Path

import pytest
from planning.state_worker import LAYOUTS, MANY_LAYOUTS
from support.models import make_model
from support.torchrun import torchrun

WORKER = Path(__file__).with_name("state_worker.py")
# several processes or many shards; a busy machine needs minutes for that
pytestmark = pytest.mark.timeout(900)
TINY_POLICY = Path(__file__).parents[2] / "examples/tiny_policy"


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, model_dirs: dict[str, Path]) -> dict:
    """What state_worker.py writes."""
    root = tmp_path_factory.mktemp("state")
    make_model("qwen3_untied", layers=4).save_pretrained(root / "small")
    directories = [str(TINY_POLICY), str(root / "small"), str(model_dirs["qwen3_moe"])]
    torchrun(2, WORKER, *directories, root / "out.json")
    return json.loads((root / "out.json").read_text())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_planned_bytes_equal_measured_bytes(found: dict, layout: str) -> None:
    measured, planned = found["measured"][layout], found["planned"][layout]
    assert [{name: shard[name] for name in measured[0]} for shard in planned] == measured


@pytest.mark.parametrize("layout", MANY_LAYOUTS)
def test_a_dry_run_builds_a_rank_of_every_size(found: dict, layout: str) -> None:
    every, distinct = found["many"][layout]["every"], found["many"][layout]["distinct"]
    sizes = lambda shards: {(s["pipeline_rank"], s["optimizer_bytes"]) for s in shards}  # noqa: E731
    assert sizes(distinct) == sizes(every)
    assert len(distinct) == len(sizes(every)) < len(every)
    assert all(shard in every for shard in distinct)
