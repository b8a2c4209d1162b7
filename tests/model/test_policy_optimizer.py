"""Which parameters weight decay shrinks."""

import re
from pathlib import Path

import pytest
import torch
from support.steps import make_config

from megatron_bicc import device
from megatron_bicc.model.policy import Policy
from megatron_bicc.weights.hf_weights import hf_tensors, load_policy

LAYER, EXPERT = "model.layers.N.", "model.layers.N.mlp.experts.N."
ATTENTION = {f"{LAYER}self_attn.{x}_proj.weight" for x in "qkvo"}
MLP = {f"{LAYER}mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
EXPERTS = {f"{EXPERT}{part}_proj.weight" for part in ("gate", "up", "down")} | {f"{LAYER}mlp.gate.weight"}
EMBEDDING, OUTPUT = {"model.embed_tokens.weight"}, {"lm_head.weight"}
NORMS = {f"{LAYER}{norm}_layernorm.weight" for norm in ("input", "post_attention")} | {"model.norm.weight"}
QK_NORMS = {f"{LAYER}self_attn.{x}_norm.weight" for x in "qk"}
BIASES = {f"{LAYER}self_attn.{x}_proj.bias" for x in "qkv"}


@pytest.mark.parametrize(
    ("family", "shrunk", "spared"),
    [
        ("qwen3_tied", EMBEDDING | ATTENTION | MLP, NORMS | QK_NORMS),
        ("qwen3_untied", EMBEDDING | OUTPUT | ATTENTION | MLP, NORMS | QK_NORMS),
        ("qwen2", EMBEDDING | ATTENTION | MLP, NORMS | BIASES),
        ("qwen3_moe", EMBEDDING | OUTPUT | ATTENTION | EXPERTS, NORMS | QK_NORMS),
    ],
)
def test_weight_decay_spares_norms_and_biases(
    family: str, shrunk: set[str], spared: set[str], model_dirs: dict[str, Path], single_process: None
) -> None:
    """An update without a gradient: matrices shrink by lr x weight decay; what has one dimension stays."""
    config = make_config(model_dirs[family], "grpo", optimizer__weight_decay=0.5)
    config.optimizer.lr = 0.1
    policy = load_policy(config)
    before = weights(policy)
    policy.zero_gradients()
    policy.update()
    after = weights(policy)
    found: dict[bool, set[str]] = {True: set(), False: set()}
    for name, weight in before.items():
        torch.testing.assert_close(after[name], weight * (0.95 if weight.dim() > 1 else 1.0))
        found[weight.dim() > 1].add(re.sub(r"\d+", "N", name))
    assert found == {True: shrunk, False: spared}


def weights(policy: Policy) -> dict[str, torch.Tensor]:
    with device.megatron():
        return {n: x.clone() for n, x in hf_tensors(policy.modules, policy.hf_config)}
