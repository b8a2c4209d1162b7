"""Tests which parameters weight decay applies to."""

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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("clip_grad", [1.0, 0.0])
def test_update_is_megatron_cores_step_with_one_pass_over_the_gradients(
    dtype: str,
    clip_grad: float,
    model_dirs: dict[str, Path],
    single_process: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Weights, moments and norm are equal to the bit."""
    results, calls = [], []
    for update in (lambda policy: policy.update(), lambda policy: policy.optimizer.step()[1]):
        config = make_config(model_dirs["qwen3_tied"], "grpo")
        config.model.dtype, config.optimizer.clip_grad, config.optimizer.lr = dtype, clip_grad, 1e-3
        policy = load_policy(config)
        torch.manual_seed(5)
        for parameter in policy.chunks[0].parameters():
            parameter.main_grad.normal_()
        for name in ("prepare_grads", "get_grad_norm"):
            whole = getattr(policy.optimizer, name)
            count = lambda whole=whole, name=name: calls.append(name) or whole()  # noqa: E731
            monkeypatch.setattr(policy.optimizer, name, count)
        with device.megatron():
            norm = update(policy)
        adam = policy.optimizer.chained_optimizers[0].optimizer
        moments = [x for state in adam.state.values() for x in (state["exp_avg"], state["exp_avg_sq"])]
        results.append([torch.tensor(norm), *policy.modules[0].parameters(), *moments])
    assert calls == ["prepare_grads", "get_grad_norm"] * 2
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))


class FusedAdam(torch.optim.Optimizer):
    """Test double of Transformer Engine's and apex's Adam, which make their state at the first step."""

    def __init__(self, params: list, adam_w_mode: bool, **defaults: object) -> None:
        super().__init__(params, defaults)


def test_a_fused_adam_has_its_state_before_the_first_step(
    model_dirs: dict[str, Path], single_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Colocated servers take a share of the memory that is free when they start."""
    monkeypatch.setattr("megatron.core.optimizer.USING_PYTORCH_OPTIMIZER", False)
    for module in ("megatron.core.optimizer", "megatron.core.optimizer.distrib_optimizer"):
        monkeypatch.setattr(f"{module}.Adam", FusedAdam)
    policy = load_policy(make_config(model_dirs["qwen3_tied"], "grpo"))
    (part,) = policy.optimizer.chained_optimizers
    assert isinstance(part.optimizer, FusedAdam)
    own = [p for group in part.optimizer.param_groups for p in group["params"]]
    for parameter in own:
        state = part.optimizer.state[parameter]
        assert set(state) == {"exp_avg", "exp_avg_sq"}
        assert all(not value.any() and value.shape == parameter.shape for value in state.values())
