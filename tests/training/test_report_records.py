"""Tests a step's metrics and report when KL and entropy include groups without contrast."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from support.models import make_model
from support.steps import REGULARISED, TOKENIZER, make_config, make_examples, to_groups

from megatron_bicc.metrics import Stopwatch
from megatron_bicc.training.learner import Learner, StepResult
from megatron_bicc.training.step_metrics import report_groups, update_metrics
from megatron_bicc.weights.hf_weights import load_policy

OUTCOMES = ((1, 1, 1), (1, 0, 0), (0, 0), (1, 0))
WORDS = SimpleNamespace(decode=lambda ids: " ".join(map(str, ids)))
"""Test double for a tokenizer: a token is its number"""


@pytest.mark.parametrize("case", ["grpo_kl", "bicc_kl_entropy", "bicc_kl_entropy_mixed"])
def test_groups_without_contrast_move_no_figure_of_those_with(
    case: str, model_dirs: dict[str, Path], single_process: None
) -> None:
    algorithm, settings = REGULARISED[case]
    config = make_config(model_dirs["qwen3_tied"], algorithm, **settings)
    examples = make_examples(make_model("qwen3_tied"), config.rollout.temperature, OUTCOMES)
    groups = [
        replace(group, texts=[f"{g}.{i}" for i in range(len(group.samples))])
        for g, group in enumerate(to_groups(examples))
    ]
    policy = load_policy(config)
    learner = Learner(config, policy, TOKENIZER)

    def step(chosen: list[int]) -> tuple[StepResult, dict[str, float], list[dict]]:
        (result,) = learner.step([groups[i] for i in chosen], Stopwatch())
        shown = report_groups(result, WORDS, config)
        return result, update_metrics(result, config, 0), shown

    result, everything, shown = step([0, 1, 2, 3])
    _, of_contrast, expected = step([1, 3])
    assert [[r["text"] for r in group["rollouts"]] for group in shown] == [
        ["1.0", "1.1", "1.2"],
        ["3.0", "3.1"],
        ["0.0", "0.1", "0.2"],
        ["2.0", "2.1"],
    ]
    assert shown[:2] == expected
    for most, left in ((0, []), (1, [shown[0], *shown[2:]]), (2, shown)):
        fewer = replace(config, monitoring=replace(config.monitoring, report_groups=most))
        assert report_groups(result, WORDS, fewer) == left
    assert {r["advantage"] for group in shown[2:] for r in group["rollouts"]} == {0.0}
    same = [key for key in everything if key.startswith(("ratio/", "clip/", "delta/", "rcc/", "kl/old_new"))]
    assert len(same) > 18
    for key in same:
        assert everything[key] == pytest.approx(of_contrast[key], rel=1e-5, abs=1e-6), key
    assert everything["train/entropy"] == pytest.approx(float(result.log_probs.entropy_T.mean()))
    assert len(result.log_probs.entropy_T) == sum(len(o) for e in examples for o in e.responses)
    np.testing.assert_array_equal(result.taken, range(4))
    _, nothing, _ = step([0, 2])
    assert not any(key.startswith(("ratio/", "clip/", "delta/", "rcc/")) for key in nothing)
    assert "train/entropy" in nothing and "kl/rollout_old" in nothing
