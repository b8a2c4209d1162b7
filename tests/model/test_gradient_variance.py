"""Tests the gradient's variance over groups: formula and sketch, against exact gradients.

Shape suffixes: B groups, V vocabulary, H hidden size, A response rows.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support.hf_reference import Example, reference_loss
from support.models import VOCAB, make_model
from support.steps import CASES, REGULARISED, TOKENIZER, make_config, make_examples, perturb, to_groups
from transformers import PreTrainedModel

from megatron_bicc.algorithms.statistics import gradient_statistics
from megatron_bicc.config import Config
from megatron_bicc.metrics import Stopwatch
from megatron_bicc.model import gradient_sketch
from megatron_bicc.model.gradient_sketch import GradientSketch, sketch_directions
from megatron_bicc.model.log_probs import VocabShard
from megatron_bicc.training.learner import Learner
from megatron_bicc.weights.hf_weights import load_policy

VARIANCE, NOISE = "train/gradient_variance", "train/gradient_noise"


def plain_variance(parts: np.ndarray) -> float:
    """M times the sample variance of the parts, all coordinates added up."""
    return len(parts) * float(parts.var(axis=0, ddof=1).sum())


def test_is_the_sample_variance_of_the_sum() -> None:
    parts = np.random.default_rng(1).normal(size=(5, 3, 4)) + 0.3
    found = gradient_statistics(torch.from_numpy(parts), 5)
    assert found[VARIANCE] == pytest.approx(plain_variance(parts))
    assert found[NOISE] == pytest.approx(plain_variance(parts) / (parts.sum(0) ** 2).sum())


def test_groups_without_contrast_are_parts_of_zero() -> None:
    parts = np.random.default_rng(2).normal(size=(3, 7))
    found = gradient_statistics(torch.from_numpy(parts), 5)
    assert found[VARIANCE] == pytest.approx(plain_variance(np.concatenate([parts, np.zeros((2, 7))])))


def test_of_equal_parts_is_not_below_0() -> None:
    for seed in range(20):
        part = np.random.default_rng(seed).normal(size=(1, 9))
        assert 0 <= gradient_statistics(torch.from_numpy(np.repeat(part, 7, axis=0)), 7)[VARIANCE] < 1e-12


def test_is_unbiased_for_the_variance_of_the_summed_gradient() -> None:
    random = np.random.default_rng(3)
    draws = random.normal(size=(4000, 6, 3)) * [1.0, 0.2, 3.0] + [0.5, 0.0, -1.0]
    found = np.mean([gradient_statistics(torch.from_numpy(parts), 6)[VARIANCE] for parts in draws])
    assert found == pytest.approx(6 * (1.0 + 0.04 + 9.0), rel=0.03)


def test_of_one_group_or_a_gradient_of_zero() -> None:
    assert gradient_statistics(torch.ones(1, 2), 1) == {}
    assert gradient_statistics(torch.tensor([[1.0], [-1.0]]), 2) == {VARIANCE: 4.0}


def test_sketch_keeps_inner_products_in_the_mean() -> None:
    """Over 300 draws of the directions, each entry of the Gram matrix is met within 5 standard errors."""
    random = torch.Generator().manual_seed(4)
    groups, vocab, hidden_size, rows, draws = 3, 150, 300, 30, 300
    grad_AV = torch.randn(rows, vocab, generator=random) + 0.2
    hidden_AH = torch.randn(rows, hidden_size, generator=random) + 0.5
    group_rows = [(0, slice(0, 4)), (2, slice(4, 11)), (1, slice(11, 25)), (0, slice(25, 30))]
    exact_BVH = torch.zeros(groups, vocab, hidden_size)
    for group, own in group_rows:
        exact_BVH[group] += grad_AV[own].t() @ hidden_AH[own]

    grams = []
    for seed in range(draws):
        shard = VocabShard(0, vocab, dist.group.WORLD)
        directions = sketch_directions(vocab, hidden_size, seed)
        sketch = GradientSketch(groups, directions, shard, torch.float32, torch.device("cpu"))
        for chunk in (slice(0, 7), slice(7, 13), slice(13, 30)):
            sketch.add(group_rows, chunk.start, grad_AV[chunk], hidden_AH[chunk])
        values = sketch.values_BXY.flatten(1)
        assert values.shape[1] == gradient_sketch.VOCAB_DIRECTIONS * gradient_sketch.HIDDEN_DIRECTIONS
        grams.append(values @ values.t())
    mean, error = torch.stack(grams).mean(0), torch.stack(grams).std(0) / draws**0.5
    exact = exact_BVH.flatten(1) @ exact_BVH.flatten(1).t()
    assert ((mean - exact).abs() < 5 * error).all()
    assert (error < 0.05 * exact.diag().mean()).all()


def exact_parts(model: PreTrainedModel, examples: list[Example], config: Config) -> np.ndarray:
    """[B, V * H]: gradient of the output layer of each group's part of the step's loss, one after another."""
    reference, moved, parts = model, perturb(model), []
    rollouts = sum(len(example.responses) for example in examples)
    for example in examples:
        moved.zero_grad()
        loss = reference_loss(moved, perturb(model), reference, [example], config)
        if loss.requires_grad:
            (loss * len(example.responses) / rollouts).backward()
        weight = moved.lm_head.weight
        parts.append(torch.zeros_like(weight) if weight.grad is None else weight.grad.clone())
    return torch.stack(parts).flatten(1).double().numpy()


@pytest.mark.parametrize("case", ["grpo", "bicc_plain", "bicc_rcc_mixed_conditioned", "bicc_kl_entropy"])
def test_step_measures_the_output_layers_gradient(
    case: str,
    model_dirs: dict[str, Path],
    single_process: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With as many directions as dimensions nothing is estimated; the head is not tied to the embedding."""
    monkeypatch.setattr(gradient_sketch, "VOCAB_DIRECTIONS", VOCAB)
    algorithm, settings = (CASES | REGULARISED)[case]
    model = make_model("llama3")
    config = make_config(model_dirs["llama3"], algorithm, **settings)
    perturb(model).save_pretrained(tmp_path)
    examples = make_examples(model, config.rollout.temperature)

    policy = load_policy(config)
    learner = Learner(config, policy, TOKENIZER)
    policy.set_weights(load_policy(make_config(tmp_path, algorithm)).host_copy())
    found = learner.step(to_groups(examples), Stopwatch())[0].gradient

    parts = exact_parts(model, examples, config)
    assert found[VARIANCE] == pytest.approx(plain_variance(parts), rel=1e-4)
    assert found[NOISE] == pytest.approx(plain_variance(parts) / (parts.sum(0) ** 2).sum(), rel=1e-4)
