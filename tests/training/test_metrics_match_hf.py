"""Tests the metrics of an optimizer step against Hugging Face models, one row per response."""

from pathlib import Path

import numpy as np
import pytest
import torch
from support.hf_reference import Example, baseline, context_of, next_token_log_probs, response_logp
from support.steps import CASES, TOKENIZER, make_config, make_examples, perturb, second_update, to_groups
from transformers import AutoModelForCausalLM, PreTrainedModel

from megatron_bicc.metrics import Stopwatch
from megatron_bicc.training.learner import Learner
from megatron_bicc.training.step_metrics import update_metrics
from megatron_bicc.weights.hf_weights import load_policy

SIDES = ("right", "wrong")


def k3(p: list[np.ndarray], q: list[np.ndarray]) -> float:
    """Of KL(p || q), mean over tokens that p gave."""
    d = np.concatenate(q) - np.concatenate(p)
    return float(np.mean(np.exp(d) - 1 - d))


@pytest.mark.parametrize("moves", [False, True])
@pytest.mark.parametrize("case", ["grpo", "bicc_plain", "bicc_rcc_mixed_conditioned"])
def test_of_the_groups_with_contrast(
    case: str, moves: bool, model_dirs: dict[str, Path], single_process: None, tmp_path: Path
) -> None:
    """`moves`: an earlier update of the step has moved the policy; all is measured before the update."""
    algorithm, settings = CASES[case]
    settings = {"monitoring__reference": True} | settings
    config = make_config(model_dirs["qwen3_tied"], algorithm, **settings)
    reference = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32).eval()
    old = perturb(reference)
    examples = make_examples(reference, config.rollout.temperature)
    policy = load_policy(config)
    learner = Learner(config, policy, TOKENIZER)
    policy.set_weights(weights(old, tmp_path / "old"))
    if moves:
        result, current = second_update(learner, to_groups(examples), tmp_path)
    else:
        (result,), current = learner.step(to_groups(examples), Stopwatch()), old
    found = update_metrics(result, config, 0)

    trained = [(e, i) for e in examples if len(set(e.rewards)) > 1 for i in range(len(e.rewards))]
    right = np.array([e.rewards[i] > 0.5 for e, i in trained])
    plain = [logp_of(old, e, i, False) for e, i in trained]
    ref = [logp_of(reference, e, i, False) for e, i in trained]
    engine = [e.rollout_logp[i].numpy() for e, i in trained]
    new = [logp_of(current, e, i, config.bicc.enabled) for e, i in trained]
    conditioned = config.bicc.enabled and config.bicc.denominator == "conditioned"
    denominator = [logp_of(old, e, i, conditioned) for e, i in trained]
    delta = np.array([float(np.mean(a - b)) for a, b in zip(plain, ref, strict=True)])
    weight = np.exp(np.concatenate(plain) - np.concatenate(engine))
    expected = {
        "kl/old_new": k3(denominator, new),
        "kl/old_ref": k3(plain, ref),
        "kl/rollout_old": k3(engine, plain),
        "kl/old_rollout": float(np.mean(weight * np.log(weight) - weight + 1)),
        "kl/rollout_old/staleness_0": k3(engine, plain),
        "correction/ratio/mean": float(weight.mean()),
        "tokens/staleness_0": sum(map(len, plain)),
        "train/entropy": float(np.mean(np.concatenate([entropy(old, e, i) for e, i in trained]))),
        "delta/gap": float(delta[right].mean() - delta[~right].mean()),
    }
    # rcc's first-order baseline may lie beyond a reward, and a right rollout's advantage be negative
    sign = np.sign([e.rewards[i] - baseline(e, delta_of(e, trained, delta), config) for e, i in trained])
    for side, mask in zip(SIDES, (right, ~right), strict=True):
        ratio = np.exp(np.concatenate([new[i] - denominator[i] for i in np.flatnonzero(mask)]))
        signs = np.concatenate([np.full(len(new[i]), sign[i]) for i in np.flatnonzero(mask)])
        expected[f"ratio/{side}/mean"], expected[f"ratio/{side}/max"] = (
            float(ratio.mean()),
            float(ratio.max()),
        )
        expected[f"clip/{side}/high"] = float(np.mean((signs > 0) & (ratio > 1 + config.loss.clip_high)))
        expected[f"clip/{side}/low"] = float(np.mean((signs < 0) & (ratio < 1 - config.loss.clip_low)))
        expected[f"delta/{side}"] = float(delta[mask].mean())
    if config.rcc.enabled:
        shifts = [2 * c for c in covariances(trained, delta)]
        expected["rcc/baseline_shift"], expected["rcc/cov"] = np.mean(shifts), np.mean(shifts) / 2
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-3, abs=1e-6), name
    if not moves and (conditioned or not config.bicc.enabled):
        assert found["kl/old_new"] < 1e-9, "one update a step: the ratio starts at 1, however far it will go"


def delta_of(example: Example, trained: list[tuple[Example, int]], delta: np.ndarray) -> list[float]:
    """Of the group's rollouts."""
    return [float(d) for (other, _), d in zip(trained, delta, strict=True) if other is example]


def weights(model: PreTrainedModel, path: Path) -> list[torch.Tensor]:
    """A Policy's copy of a model's weights."""
    model.save_pretrained(path)
    return load_policy(make_config(path, "grpo")).host_copy()


def logp_of(model: PreTrainedModel, example: Example, i: int, conditioned: bool) -> np.ndarray:
    """Of a response's tokens, given its prompt and, where `conditioned`, its context."""
    prefix = example.prompt + (context_of(example, i) if conditioned else [])
    with torch.no_grad():
        return response_logp(model, prefix, example.responses[i], 0.8).numpy()


def entropy(model: PreTrainedModel, example: Example, i: int) -> np.ndarray:
    with torch.no_grad():
        log_p = next_token_log_probs(model, example.prompt, example.responses[i], 0.8)
    return -(log_p.exp() * log_p).sum(-1).numpy()


def covariances(trained: list[tuple[Example, int]], delta: np.ndarray) -> list[float]:
    """Cov(reward, delta) of every group."""
    groups = {id(e): e for e, _ in trained}.values()
    return [float(np.cov(e.rewards, delta_of(e, trained, delta), bias=True)[0, 1]) for e in groups]
