"""Tests that no way to split a step changes its gradient, for all presets, with and without BICC and RCC, and
that the gradient of a policy with experts is that of Hugging Face models."""

from pathlib import Path

import numpy as np
import pytest
import torch
from support.contract import ALGORITHMS, EXPERT_CASES, OUTCOMES, Step, Stepper, expert_step, save_inputs
from support.hf_reference import expert_counts, reference_loss, router_losses
from support.steps import make_config, named_gradients
from support.torchrun import torchrun
from training import contract_worker
from training.contract_worker import EXPERT_LAYOUTS, TOKENS
from transformers import AutoModelForCausalLM, PreTrainedModel

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


def load(path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def hugging_face(inputs: Path) -> dict[str, Step]:
    """Each case's step of a policy with experts by Hugging Face models, one row per response."""
    found = {}
    for case, (model, algorithm, settings) in EXPERT_CASES.items():
        examples = torch.load(inputs / f"{model}.pt", weights_only=False)
        mixed = [example for example in examples if len(set(example.rewards)) == 2]
        config = make_config(inputs / model, algorithm, **settings)
        policy, old = load(inputs / f"{model}_moved"), load(inputs / f"{model}_moved")
        loss = reference_loss(policy, old, load(inputs / model), examples, config)
        loss.backward()
        counts = expert_counts(old, mixed)
        layers = counts.amax(1) / counts.mean(1)
        experts = {f"moe/load/layer_{layer}": float(value) for layer, value in enumerate(layers)}
        experts |= {"moe/load/mean": float(layers.mean()), "moe/load/max": float(layers.max())}
        experts["moe/load/unused"] = float((counts == 0).float().mean())
        if case != "off":
            balance, z = router_losses(policy, old, mixed, config)
            experts |= {"moe/load_balancing_loss": float(balance.mean()), "moe/z_loss": float(z.mean())}
        found[case] = Step(loss.item(), named_gradients(policy), [], experts)
    return found


@pytest.mark.parametrize("case", EXPERT_CASES)
@pytest.mark.parametrize("layout", ["one_micro_batch", "ep1", *EXPERT_LAYOUTS])
def test_experts_equal_hugging_face(
    layout: str,
    case: str,
    inputs: Path,
    single_process: None,
    parallel: dict[tuple[str, str], Step],
    hugging_face: dict[str, Step],
) -> None:
    """Loss, every gradient, load of the experts and the routers' losses, on one and on two processes."""
    if layout in EXPERT_LAYOUTS:
        step = parallel[layout, case]
    else:
        step = expert_step(inputs, case, 4096 if layout == "one_micro_batch" else TOKENS)
    assert (sum(step.micro_batches) == 1) == (layout == "one_micro_batch")
    assert_equal(step, hugging_face[case])
    assert step.experts == pytest.approx(hugging_face[case].experts, rel=1e-5)
