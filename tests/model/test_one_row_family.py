"""Tests that one row of FAMILIES adds a Llama-like family: weights, logits and export."""

from pathlib import Path

import pytest
import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from support.layout import causal_batch
from support.models import SHAPE
from support.steps import make_config
from transformers import MistralConfig, MistralForCausalLM

from megatron_bicc import device
from megatron_bicc.errors import UserError
from megatron_bicc.model.families import FAMILIES, Family, supported_config
from megatron_bicc.weights.hf_files import checked_tensors
from megatron_bicc.weights.hf_weights import hf_tensors, load_policy


@pytest.fixture
def mistral(tmp_path: Path) -> Path:
    """A random model of a family that FAMILIES does not have."""
    torch.manual_seed(3)
    shape = SHAPE | {"num_hidden_layers": 2, "hidden_size": 48, "intermediate_size": 80}
    config = MistralConfig(**shape, head_dim=16, sliding_window=None, tie_word_embeddings=False)
    MistralForCausalLM(config).float().save_pretrained(tmp_path / "mistral")
    return tmp_path / "mistral"


def test_without_the_row_it_is_refused(mistral: Path) -> None:
    with pytest.raises(UserError, match="architecture MistralForCausalLM is not supported"):
        supported_config(mistral)


def test_the_row_is_enough(mistral: Path, single_process: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "MistralForCausalLM", Family())
    theirs = MistralForCausalLM.from_pretrained(mistral, dtype=torch.float32).eval()
    checked_tensors(mistral, supported_config(mistral))
    policy = load_policy(make_config(mistral, "grpo"))
    module = policy.modules[0]
    tokens = torch.randint(0, theirs.config.vocab_size, (60,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), device.megatron():
        module._postprocess = GPTModel._postprocess.__get__(module)  # logits of all rows
        ours = module(tokens[None], torch.arange(60)[None], None, packed_seq_params=causal_batch(tokens))
        expected = theirs(tokens[None]).logits
    assert (ours - expected).abs().max() < 1e-5 * max(1.0, float(expected.abs().max()))
    exported, state = dict(hf_tensors(policy.modules, policy.hf_config)), theirs.state_dict()
    assert exported.keys() == state.keys()
    assert all(torch.equal(exported[name], state[name]) for name in state)
