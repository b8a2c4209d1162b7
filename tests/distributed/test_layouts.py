"""The same step under every parallel layout: loss, gradient norm and updated weights."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.models import make_model
from support.steps import make_examples, perturb

WORKER = Path(__file__).with_name("step_worker.py")
LAYOUTS = {
    "tp2": (2, ["parallel.tensor=2"]),
    "tp2_sp": (2, ["parallel.tensor=2", "parallel.sequence=True"]),
    "dp2": (2, []),
    "pp2": (2, ["parallel.pipeline=2"]),
    "tp2_sp_pp2_recompute": (
        4,
        ["parallel.tensor=2", "parallel.sequence=True", "parallel.pipeline=2", "model.recompute='full'"],
    ),
    "tp2_dp2": (4, ["parallel.tensor=2"]),
}


def run(inputs: dict[str, Path], out: Path, processes: int, overrides: list[str]) -> dict:
    """What step_worker.py writes."""
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes), str(WORKER), *map(str, inputs.values()), str(out)]
    done = subprocess.run(command + overrides, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(out)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The reference policy, the policy in training, and the groups that they learn from."""
    root = tmp_path_factory.mktemp("layouts")
    model = make_model("qwen3_tied")
    model.save_pretrained(root / "model")
    perturb(model).save_pretrained(root / "moved")
    torch.save(make_examples(model, 0.8), root / "examples.pt")
    return {"model": root / "model", "moved": root / "moved", "examples": root / "examples.pt"}


@pytest.fixture(scope="module")
def one_process(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Every case in a single process."""
    return run(inputs, tmp_path_factory.mktemp("one") / "out.pt", 1, [])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_equals_one_process(
    layout: str, inputs: dict[str, Path], one_process: dict, tmp_path: Path
) -> None:
    found = run(inputs, tmp_path / "out.pt", *LAYOUTS[layout])
    assert found.keys() == one_process.keys()
    for case, one in one_process.items():
        # terms of size |A| cancel in the loss
        assert found[case]["loss"] == pytest.approx(one["loss"], rel=1e-5, abs=1e-6), case
        assert found[case]["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5), case
        for name, weight in one["weights"].items():
            difference = (found[case]["weights"][name] - weight).abs().max()
            assert difference <= 1e-5, f"{case}: {name} differs by {difference:.1e}"
