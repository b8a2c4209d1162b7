"""Tests that a policy on Transformer Engine's layers is the one on megatron-core's own.

The layers are those of tests/te_stand_in: what is tested is how megatron-core and this package call them.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from model.te_worker import LAYOUTS, SAVED
from support import te_stand_in
from support.models import make_model
from support.steps import make_examples, perturb
from support.torchrun import torchrun

WORKER = Path(__file__).with_name("te_worker.py")
# several processes; a busy machine needs minutes for that
pytestmark = pytest.mark.timeout(900)
MODELS = {
    "dense": "qwen3_tied",
    "biased": "qwen2",
    "windows": "gemma3",
    "moe": "qwen3_moe",
    "shared": "qwen2_moe",
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What te_worker.py reports of megatron-core's own layers, "local", and of Transformer Engine's, "te"."""
    inputs = tmp_path_factory.mktemp("te")
    for name, family in MODELS.items():
        model = make_model(family)
        model.save_pretrained(inputs / name)
        perturb(model).save_pretrained(inputs / f"{name}_moved")
        torch.save(make_examples(model, 0.8), inputs / f"{name}.pt")
    local, te = inputs / "local", inputs / "te"
    for out in (local, te):
        out.mkdir()
    torchrun(2, WORKER, inputs, local)
    reports = {"local": torch.load(local / "report.pt")}
    te_stand_in.run_job(2, WORKER, inputs, te, local)
    reports["te"] = torch.load(te / "report.pt")
    torchrun(2, WORKER, inputs, local, te)  # only resumes: its directory is not empty
    reports["local"]["second"] = torch.load(local / "report.pt")["second"]
    return reports


def test_each_runs_on_its_own_layers(found: dict[str, dict[str, Any]]) -> None:
    te = {"TELayerNormColumnParallelLinear", "TERowParallelLinear", "RMSNorm"}
    experts = {"TEGroupedMLP", "TEColumnParallelGroupedLinear", "TERowParallelGroupedLinear"}
    assert (found["local"]["backend"], found["te"]["backend"]) == ("local", "Transformer Engine")
    for name, (model, _) in LAYOUTS.items():
        classes = found["te"]["first"][name]["classes"]
        assert te | (experts if model in ("moe", "shared") else set()) <= classes
        assert not any(other.startswith("TE") for other in found["local"]["first"][name]["classes"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_equal(layout: str, found: dict[str, dict[str, Any]]) -> None:
    """To the bit without tensor parallel; with it, sums over ranks may have another order."""
    local, te = found["local"]["first"][layout], found["te"]["first"][layout]
    own, expected = te["metrics"], local["metrics"]
    assert own["train/loss"] == expected["train/loss"]
    assert own["train/grad_norm"] == pytest.approx(expected["train/grad_norm"], rel=1e-6)
    assert te["gradients"].keys() == local["gradients"].keys()
    largest = max(float(gradient.abs().max()) for gradient in local["gradients"].values())
    for name, gradient in local["gradients"].items():
        assert gradient.abs().max() > 0, name
        if "parallel.tensor" in LAYOUTS[layout][1]:
            assert (te["gradients"][name] - gradient).abs().max() <= 1e-6 * largest, name
        else:
            assert torch.equal(te["gradients"][name], gradient), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_equal_after_a_step(layout: str, found: dict[str, dict[str, Any]]) -> None:
    """But for rounding: the optimizers are torch's AdamW and the stand-in's FusedAdam."""
    assert_same_step(found["te"]["first"][layout], found["local"]["first"][layout])


@pytest.mark.parametrize("layout", SAVED)
@pytest.mark.parametrize(("reader", "writer"), [("local", "te"), ("te", "local"), ("te", "te")])
def test_the_step_after_a_checkpoint(
    layout: str, reader: str, writer: str, found: dict[str, dict[str, Any]]
) -> None:
    """Weights, moments and the step count are the same: the next step is that of its own layers."""
    assert_same_step(found[reader]["second"][writer][layout], found["local"]["second"]["local"][layout])


def assert_same_step(step: dict[str, Any], expected: dict[str, Any]) -> None:
    """Equal loss, norm and weights, but for rounding."""
    own, truth = step["metrics"], expected["metrics"]
    assert own["train/loss"] == pytest.approx(truth["train/loss"], rel=1e-5, abs=1e-6)
    assert own["train/grad_norm"] == pytest.approx(truth["train/grad_norm"], rel=1e-5)
    assert step["weights"].keys() == expected["weights"].keys()
    for name, weight in expected["weights"].items():
        assert (step["weights"][name] - weight).abs().max() <= 1e-6, name
    assert not step["unequal"]
