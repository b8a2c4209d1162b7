"""Tests how the groups of a step are divided among its optimizer steps."""

from pathlib import Path

import pytest
import torch
from support.steps import TOKENIZER, make_config, make_examples, to_groups
from transformers import AutoModelForCausalLM

from megatron_bicc.metrics import Stopwatch
from megatron_bicc.training.learner import Learner
from megatron_bicc.weights.hf_weights import load_policy


@pytest.mark.usefixtures("single_process")
def test_fewer_groups_than_were_asked_for_make_no_more_updates(model_dirs: dict[str, Path]) -> None:
    """Groups of which too little could be scored are missing: three are left for two updates."""
    path = model_dirs["qwen3_tied"]
    config = make_config(path, "grpo", train__updates_per_step=2)
    groups = to_groups(make_examples(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), 0.8))
    results = Learner(config, load_policy(config), TOKENIZER).step(groups[:1] * 3, Stopwatch())
    assert [len(result.groups) for result in results] == [2, 1]
