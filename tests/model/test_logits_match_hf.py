"""Tests that megatron-core and transformers compute the same logits from the same weights, in fp32."""

from functools import partial
from pathlib import Path

import pytest
import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from support.layout import causal_batch
from support.models import MODELS
from support.steps import make_config
from transformers import AutoModelForCausalLM

from megatron_bicc import device
from megatron_bicc.weights.hf_weights import load_policy

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.parametrize("name", [*MODELS, "tiny_policy"])
def test_logits_equal_transformers(name: str, model_dirs: dict[str, Path], single_process: None) -> None:
    path = REPOSITORY / "examples/tiny_policy" if name == "tiny_policy" else model_dirs[name]
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokens = torch.randint(0, model.config.vocab_size, (150,), generator=torch.Generator().manual_seed(0))
    module = load_policy(make_config(path, "grpo")).modules[0]
    # the product never makes logits of all rows; this is the output layer that it inherits
    module._postprocess = partial(GPTModel._postprocess, module)
    with torch.no_grad(), device.megatron():
        ours = module(tokens[None], torch.arange(150)[None], None, packed_seq_params=causal_batch(tokens))
        theirs = model(tokens[None]).logits
    assert (ours - theirs).abs().max() < 1e-5 * max(1.0, float(theirs.abs().max()))
