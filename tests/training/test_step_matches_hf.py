"""Tests a packed step on megatron-core against the Hugging Face reference: loss and every gradient."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from support.hf_reference import reference_loss
from support.steps import (
    CASES,
    CORRECTED,
    OUTCOMES,
    REGULARISED,
    ROUTED,
    TOKENIZER,
    hf_gradients,
    make_config,
    make_examples,
    named_gradients,
    perturb,
    second_update,
    to_groups,
)
from transformers import AutoModelForCausalLM, PreTrainedModel

from megatron_bicc.metrics import Stopwatch
from megatron_bicc.model.policy import Policy
from megatron_bicc.training.learner import Learner, StepResult
from megatron_bicc.weights.hf_weights import load_policy

EXPERTS = [
    ("qwen3_moe", "bicc_rcc_mixed_conditioned"),
    ("qwen3_moe", "bicc_routers_mixed"),
    ("qwen3_moe_raw_gates", "grpo"),
    ("qwen2_moe", "bicc_rcc_mixed_conditioned"),
    ("qwen3_moe_top1", "grpo"),
    ("qwen3_moe_top1", "grpo_routers"),
    ("qwen3_moe_top1_raw_gates", "grpo"),
]
WINDOWS = [("gemma3", "bicc_rcc_mixed_conditioned")]


@pytest.mark.parametrize("moves", [False, True])
@pytest.mark.parametrize(("family", "case"), [*product(["qwen3_tied", "llama3"], CASES), *WINDOWS, *EXPERTS])
def test_step_equals_reference(
    case: str, family: str, moves: bool, model_dirs: dict[str, Path], single_process: None, tmp_path: Path
) -> None:
    check_step(case, model_dirs[family], tmp_path, moves, graded=False)


@pytest.mark.parametrize("case", ["grpo", "bicc_rcc_mixed"])
def test_rewards_that_are_not_binary(
    case: str, model_dirs: dict[str, Path], single_process: None, tmp_path: Path
) -> None:
    """Sides by the threshold, advantages by value; a group that is all right teaches nothing."""
    check_step(case, model_dirs["qwen3_tied"], tmp_path, moves=False, graded=True)


@pytest.mark.parametrize(("case", "moves"), [*product(REGULARISED, [False]), ("bicc_kl_entropy_mixed", True)])
def test_kl_and_entropy_are_of_every_rollout_given_its_prompt_alone(
    case: str, moves: bool, model_dirs: dict[str, Path], single_process: None, tmp_path: Path
) -> None:
    """Whatever bicc.weight and the denominator are; a group that is all right takes part."""
    check_step(case, model_dirs["qwen3_tied"], tmp_path, moves, graded=False)


@pytest.mark.parametrize("case", CORRECTED)
def test_a_correction_weighs_the_policy_loss_alone(
    case: str, model_dirs: dict[str, Path], single_process: None, tmp_path: Path
) -> None:
    """By ratios given the prompt alone, also under BICC; KL and entropy have no such weight."""
    found = check_step(case, model_dirs["qwen3_tied"], tmp_path, moves=False, graded=False).corrections
    changed_T = found.truncated_T | found.masked_T
    assert 0 < changed_T.mean() < 1
    assert found.vetoed_T.any() == ("loss__correction_veto" in CORRECTED[case][1])


@pytest.mark.parametrize("case", ["grpo_kl", "bicc_kl_entropy"])
def test_a_step_without_contrast_is_still_regularised(
    case: str, model_dirs: dict[str, Path], single_process: None, tmp_path: Path
) -> None:
    check_step(case, model_dirs["qwen3_tied"], tmp_path, False, graded=False, outcomes=((1, 1, 1), (0, 0)))


@pytest.mark.parametrize("weight", [1.0, 0.5])
@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_kl_at_the_reference_is_nothing(
    estimator: str, weight: float, model_dirs: dict[str, Path], single_process: None
) -> None:
    """Under BICC the contexts must not count as a distance from the reference."""
    losses, gradients = [], []
    for coefficient in (0.0, 100.0):
        settings = {"loss__kl_coefficient": coefficient, "loss__kl_estimator": estimator}
        config = make_config(model_dirs["qwen3_tied"], "grpo+bicc", bicc__weight=weight, **settings)
        policy = load_policy(config)
        examples = make_examples(
            AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32), 0.8
        )
        (result,) = Learner(config, policy, TOKENIZER).step(to_groups(examples), Stopwatch())
        losses.append(result.loss)
        gradients.append(hf_gradients(policy))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5, abs=1e-6)
    for name, without in gradients[0].items():
        assert (gradients[1][name] - without).norm() < 1e-5 * without.norm(), name


def set_weights(policy: Policy, model: PreTrainedModel, path: Path) -> None:
    model.save_pretrained(path)
    policy.set_weights(load_policy(make_config(path, "grpo")).host_copy())


def check_step(
    case: str,
    model: Path,
    tmp_path: Path,
    moves: bool,
    graded: bool,
    outcomes: Sequence[Sequence[int]] = OUTCOMES,
) -> StepResult:
    """`moves`: it is the second update of a batch of rollouts; the first has moved the policy."""
    algorithm, settings = (CASES | REGULARISED | CORRECTED | ROUTED)[case]
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    old = perturb(reference)
    config = make_config(model, algorithm, **settings)
    examples = make_examples(reference, config.rollout.temperature, outcomes)
    if graded:
        examples = [
            replace(e, rewards=[0.6 * r + 0.1 * (i % 4) for i, r in enumerate(e.rewards)]) for e in examples
        ]

    policy = load_policy(config)
    learner = Learner(config, policy, TOKENIZER)
    set_weights(policy, old, tmp_path / "old")
    if moves:
        result, moved = second_update(learner, to_groups(examples), tmp_path)
        policy = learner.policy
    else:
        (result,), moved = learner.step(to_groups(examples), Stopwatch()), old

    expected = reference_loss(moved, copy.deepcopy(old), reference, examples, config)
    expected.backward()
    # terms of size |A| cancel in the loss, and a log-prob's rounding, up to 1e-6, is in every ratio
    assert result.loss == pytest.approx(expected.item(), rel=1e-5, abs=3e-6)
    gradients = hf_gradients(policy)
    truth = named_gradients(moved)
    assert gradients.keys() == truth.keys()
    for name, gradient in truth.items():
        # a router that chooses one expert, whose gate is always 1, has no gradient but for rounding
        size = gradient.norm().clamp(min=0.1 * ("gate.weight" in name))
        difference = (gradients[name] - gradient).norm()
        # both are 0 for an expert that no token reaches
        assert difference <= 1e-5 * size, f"{name}: relative error {difference / size:.1e}"
    return result
