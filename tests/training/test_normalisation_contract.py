"""Tests that no way to split a step changes its gradient, for all presets, with and without BICC and RCC."""

from pathlib import Path

import numpy as np
import pytest
import torch
from support.contract import ALGORITHMS, OUTCOMES, Step, Stepper, save_inputs
from support.torchrun import torchrun
from training import contract_worker

# the first test of the layouts starts the processes; a busy machine needs minutes for that
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("contract")
    save_inputs(root)
    return root


@pytest.fixture(scope="module")
def stepper(inputs: Path, single_process: None) -> Stepper:
    return Stepper(inputs)


@pytest.fixture(scope="module")
def whole(stepper: Stepper) -> dict[str, Step]:
    """Each algorithm's step on one process, in one micro-batch."""
    return {algorithm: stepper.step(algorithm, 1) for algorithm in ALGORITHMS}


@pytest.fixture(scope="module")
def parallel(inputs: Path) -> dict[tuple[str, str], Step]:
    """Its step under each layout of two processes."""
    torchrun(2, contract_worker.__file__, inputs, inputs / "steps.pt")
    return torch.load(inputs / "steps.pt", weights_only=False)


def assert_equal(step: Step, whole: Step) -> None:
    # terms of size |A| cancel in the loss
    assert step.loss == pytest.approx(whole.loss, rel=1e-5, abs=1e-6)
    assert step.gradients.keys() == whole.gradients.keys()
    for name, truth in whole.gradients.items():
        error = (step.gradients[name] - truth).norm() / truth.norm()
        assert error < 1e-5, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("micro_batches", [2, 16])
def test_any_number_of_micro_batches(
    algorithm: str, micro_batches: int, stepper: Stepper, whole: dict[str, Step]
) -> None:
    step = stepper.step(algorithm, micro_batches)
    assert (whole[algorithm].micro_batches, step.micro_batches) == ([1], [micro_batches])
    assert_equal(step, whole[algorithm])


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_any_order_of_the_groups(algorithm: str, stepper: Stepper, whole: dict[str, Step]) -> None:
    order = np.random.default_rng(0).permutation(len(OUTCOMES))
    step = stepper.step(algorithm, 5, order)
    assert step.micro_batches == [5]
    assert_equal(step, whole[algorithm])


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("layout", contract_worker.LAYOUTS)
def test_any_layout(
    algorithm: str, layout: str, parallel: dict[tuple[str, str], Step], whole: dict[str, Step]
) -> None:
    step = parallel[layout, algorithm]
    assert step.micro_batches == [contract_worker.MICRO_BATCHES] * (2 if layout == "dp2" else 1)
    assert_equal(step, whole[algorithm])


@pytest.mark.parametrize("algorithm", contract_worker.KERNELS)
def test_the_kernels_under_context_parallel(
    algorithm: str, parallel: dict[tuple[str, str], Step], whole: dict[str, Step]
) -> None:
    assert_equal(parallel["kernels", algorithm], whole[algorithm])
