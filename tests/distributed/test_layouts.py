"""The same step under every parallel layout of up to four processes: loss, gradient norm, updated weights."""

import re
from pathlib import Path

import pytest
import torch
from distributed import step_worker
from distributed.step_worker import layouts
from support.models import make_model
from support.steps import make_examples, perturb
from support.torchrun import torchrun

MODELS = {"dense": "qwen3_tied", "moe": "qwen3_moe"}
# the first test starts every process; a busy machine needs minutes for that
pytestmark = pytest.mark.timeout(900)
ALL = [(processes, name) for processes in (1, 2, 4) for name in layouts(processes)]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What step_worker.py reads."""
    root = tmp_path_factory.mktemp("layouts")
    for name, family in MODELS.items():
        model = make_model(family, layers=4)
        model.save_pretrained(root / name)
        perturb(model).save_pretrained(root / f"{name}_moved")
        torch.save(make_examples(model, 0.8), root / f"{name}.pt")
    return root


@pytest.fixture(scope="module")
def one_process(inputs: Path, single_process: None) -> dict[str, dict]:
    """The step of each model without any parallelism or recompute."""
    return {name: step_worker.run_step(inputs, name, {}) for name in MODELS}


@pytest.fixture(scope="module")
def found(inputs: Path, single_process: None) -> dict[tuple[int, str], dict]:
    """The step of every layout; starting a process costs more than its steps, so each number starts once."""
    here = {(1, name): step_worker.run_step(inputs, *layout) for name, layout in layouts(1).items()}
    return here | {(n, name): step for n in (2, 4) for name, step in launch(inputs, n).items()}


def launch(inputs: Path, processes: int) -> dict[str, dict]:
    """What step_worker.py writes."""
    out = inputs / f"out{processes}.pt"
    torchrun(processes, step_worker.__file__, inputs, out)
    return torch.load(out)


@pytest.mark.parametrize(("processes", "layout"), ALL)
def test_layout_equals_one_process(
    processes: int, layout: str, found: dict[tuple[int, str], dict], one_process: dict[str, dict]
) -> None:
    model, _ = layouts(processes)[layout]
    step, one = found[processes, layout], one_process[model]
    # terms of size |A| cancel in the loss
    assert step["loss"] == pytest.approx(one["loss"], rel=1e-5, abs=1e-6)
    assert step["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5)
    assert step["gradient"] == pytest.approx(one["gradient"], rel=1e-4)
    assert step["weights"].keys() == one["weights"].keys()
    assert experts(step["weights"]) == experts(one["weights"])
    for name, weight in one["weights"].items():
        difference = (step["weights"][name] - weight).abs().max()
        assert difference <= 1e-5, f"{name} differs by {difference:.1e}"


@pytest.mark.parametrize(("processes", "layout"), ALL)
def test_a_nan_on_one_rank_is_refused_on_all(
    processes: int, layout: str, found: dict[tuple[int, str], dict]
) -> None:
    refusals = found[processes, layout]["refusals"]
    assert len(refusals) == processes
    assert set(refusals) == {refusals[0]}
    assert re.match(
        r"the gradient is not finite: model\.\S*norm\.weight and .* left as they were$", refusals[0]
    )


def experts(weights: dict) -> list[str]:
    """Their names layer by layer, in the order in which they came."""
    return sorted((n for n in weights if ".experts." in n), key=lambda name: name.partition(".mlp.")[0])


def test_micro_batches_are_unequal_and_some_are_empty(found: dict[tuple[int, str], dict]) -> None:
    bilateral = found[1, "one-none"]["response_rows"][0]
    assert len(set(bilateral)) == 3
    # the virtual pipeline has to round this number up
    assert [len(rank) for rank in found[2, "vpp2-none"]["response_rows"]] == [3, 2]
    assert [0] in found[4, "dp4-none"]["response_rows"]
