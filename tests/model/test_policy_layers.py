"""Tests, by construction, the layers that Transformer Engine or apex provide if installed."""

import logging
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from megatron.core.extensions import transformer_engine as te
from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.moe.experts import TEGroupedMLP
from safetensors.torch import load_file, save_file
from support.models import LLAMA3_ROPE, YARN_ROPE
from support.steps import make_config
from transformers import AutoConfig, Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from megatron_bicc.errors import UserError
from megatron_bicc.model import build
from megatron_bicc.model.attention import SharedPrefixCoreAttention
from megatron_bicc.model.build import PositionRotary, describe, transformer_config
from megatron_bicc.model.families import family_of, rotary_frequencies
from megatron_bicc.weights.hf_mapping import rule_for
from megatron_bicc.weights.hf_weights import load_policy


def specs(path: Path) -> Any:
    hf_config, config = AutoConfig.from_pretrained(path), make_config(path, "grpo")
    return build.layer_specs(transformer_config(hf_config, config), family_of(hf_config), None)


@pytest.fixture
def transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Test double for an installed Transformer Engine: specs name its classes, none is made."""
    monkeypatch.setattr(build, "HAVE_TE", True)
    monkeypatch.setattr(gpt_layer_specs, "TESpecProvider", TESpecProvider, raising=False)
    provider = sys.modules[TESpecProvider.__module__]
    for name in ("TEColumnParallelGroupedLinear", "TERowParallelGroupedLinear"):
        monkeypatch.setattr(provider, name, type(name, (), {}))
    for module in (te, provider):
        monkeypatch.setattr(module, "is_te_min_version", lambda *args, **kwargs: True)


@pytest.mark.parametrize("family", ["qwen3_tied", "qwen2"])
def test_transformer_engine_keeps_its_linears_and_norms(
    family: str, model_dirs: dict[str, Path], single_process: None, transformer_engine: None
) -> None:
    found = specs(model_dirs[family])
    attention = found.layer_specs[0].submodules.self_attention.submodules
    mlp = found.layer_specs[0].submodules.mlp.submodules
    assert attention.core_attention is SharedPrefixCoreAttention
    assert attention.linear_qkv is mlp.linear_fc1 is te.TELayerNormColumnParallelLinear
    assert attention.linear_proj is mlp.linear_fc2 is te.TERowParallelLinear
    assert found.layer_norm is te.TENorm
    if family == "qwen3_tied":
        assert attention.q_layernorm is attention.k_layernorm is te.TENorm


def test_transformer_engine_groups_the_experts(
    model_dirs: dict[str, Path], single_process: None, transformer_engine: None
) -> None:
    experts = specs(model_dirs["qwen3_moe"]).layer_specs[0].submodules.mlp.submodules.experts
    assert experts.module is TEGroupedMLP
    assert experts.submodules.linear_fc2.__name__ == "TERowParallelGroupedLinear"


def test_local_layers_without_either(model_dirs: dict[str, Path], single_process: None) -> None:
    found = specs(model_dirs["qwen3_tied"])
    attention = found.layer_specs[0].submodules.self_attention.submodules
    assert (attention.linear_qkv, attention.linear_proj) == (ColumnParallelLinear, RowParallelLinear)
    assert attention.core_attention is SharedPrefixCoreAttention


@pytest.mark.parametrize("module", ["normalization", "forms"])
def test_nvidias_apex_makes_the_norms(
    module: str, monkeypatch: pytest.MonkeyPatch, model_dirs: dict[str, Path], tmp_path: Path
) -> None:
    """The project of that name on PyPI, which has forms and no normalization, does not."""

    class NormDouble(torch.nn.RMSNorm):
        """Test double for apex.normalization.FusedRMSNorm."""

    double = ModuleType("apex.normalization")
    double.FusedRMSNorm = NormDouble
    monkeypatch.setitem(sys.modules, "apex.normalization", double)
    (tmp_path / "apex").mkdir()
    for name in ("__init__", module):
        (tmp_path / f"apex/{name}.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    path = model_dirs["qwen3_tied"]
    hf_config = AutoConfig.from_pretrained(path)
    config = transformer_config(hf_config, make_config(path, "grpo"))
    norm = build.rms_norm(family_of(hf_config))
    assert isinstance(norm(config, 8), NormDouble) == (module == "normalization")


@pytest.mark.parametrize(
    ("name", "hf"),
    [
        ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
        ("mlp.linear_fc1.layer_norm_weight", "post_attention_layernorm.weight"),
        ("pre_mlp_layernorm.weight", "post_attention_layernorm.weight"),
        ("mlp.experts.linear_fc2.weight1", "mlp.experts.5.down_proj.weight"),
        ("mlp.experts.local_experts.1.linear_fc2.weight", "mlp.experts.5.down_proj.weight"),
    ],
)
def test_rules_know_the_names_of_both(name: str, hf: str) -> None:
    rule = rule_for(f"decoder.layers.1.{name}", first_layer=2)
    assert rule.hf_names(first_expert=4) == (f"model.layers.3.{hf}",)


def test_choice_and_dropout_are_one_line_of_the_log(
    model_dirs: dict[str, Path], single_process: None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "megatron_bicc"):
        load_policy(make_config(model_dirs["qwen2"], "grpo"))
    assert caplog.messages == [
        "policy: Qwen2ForCausalLM on megatron-core's own linears and torch's norms, "
        "shared-prefix attention, dropout 0"
    ]


def test_dropout_of_the_model_is_said_not_to_be_used(model_dirs: dict[str, Path]) -> None:
    hf_config = AutoConfig.from_pretrained(model_dirs["qwen3_tied"])
    hf_config.attention_dropout = 0.1
    assert describe(hf_config).endswith("dropout 0 (config.json's attention_dropout of 0.1 is not used)")


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("qwen3_tied", {"tensor": 8}, "parallel.tensor=8 does not divide the model's num_attention_heads=4"),
        ("qwen3_tied", {"pipeline": 3}, "does not divide the model's num_hidden_layers=2"),
        ("qwen3_tied", {"expert": 2}, "parallel.expert=2: the model has no experts"),
        ("gemma3", {"context": 2}, "parallel.context=2: sliding windows are not computed"),
        ("qwen3_moe", {"expert": 3}, "parallel.expert=3 does not divide the model's num_experts=4"),
        ("qwen3_moe", {"tensor": 2}, "parallel.sequence=false"),
    ],
)
def test_unusable_layout_is_one_line(
    family: str, settings: dict, message: str, model_dirs: dict[str, Path]
) -> None:
    config = make_config(model_dirs[family], "grpo")
    for name, value in settings.items():
        setattr(config.parallel, name, value)
    with pytest.raises(UserError, match=message.replace("*", r"\*")) as error:
        transformer_config(AutoConfig.from_pretrained(model_dirs[family]), config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["load_balancing_coefficient", "z_loss_coefficient"])
def test_losses_of_routers_need_routers(name: str, model_dirs: dict[str, Path]) -> None:
    config = make_config(model_dirs["qwen3_tied"], "grpo", **{f"loss__{name}": 0.01})
    with pytest.raises(UserError, match=f"^loss.{name} is 0.01; the model has no experts: set it to 0$"):
        transformer_config(AutoConfig.from_pretrained(model_dirs["qwen3_tied"]), config)


def test_tensor_parallel_divides_a_shared_expert(model_dirs: dict[str, Path]) -> None:
    hf_config = AutoConfig.from_pretrained(model_dirs["qwen2_moe"])
    hf_config.shared_expert_intermediate_size = 55
    config = make_config(model_dirs["qwen2_moe"], "grpo", parallel__tensor=2, parallel__sequence=True)
    with pytest.raises(UserError, match="2 does not divide the model's shared_expert_intermediate_size=55"):
        transformer_config(hf_config, config)


@pytest.mark.parametrize(("experts", "chosen"), [(4, 5), (1, 2)])
def test_more_experts_a_token_than_there_are_is_one_line(
    experts: int, chosen: int, model_dirs: dict[str, Path]
) -> None:
    hf_config = AutoConfig.from_pretrained(model_dirs["qwen3_moe"])
    hf_config.num_experts, hf_config.num_experts_per_tok = experts, chosen
    message = f"num_experts_per_tok is {chosen} in config.json; it must be at most num_experts = {experts}"
    with pytest.raises(UserError, match=message):
        family_of(hf_config)


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_refused_by_name(
    bad: float, model_dirs: dict[str, Path], tmp_path: Path, single_process: None
) -> None:
    name = "model.layers.1.self_attn.v_proj.weight"
    path = shutil.copytree(model_dirs["qwen3_tied"], tmp_path / "model")
    tensors = load_file(path / "model.safetensors")
    tensors[name][-1, -1] = bad
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=f"model: {re.escape(name)}: contains NaN or infinite values"):
        load_policy(make_config(path, "grpo"))


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 10000.0},
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
        LLAMA3_ROPE,
        YARN_ROPE,
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_rotary_angles_are_transformers(rope: dict) -> None:
    hf_config = Qwen3Config(hidden_size=64, num_attention_heads=4, head_dim=32, rope_parameters=rope)
    positions = torch.tensor([0, 1, 2, 7, 300, 3, 4, 3])
    frequencies, factor = rotary_frequencies(hf_config)
    angles = PositionRotary(frequencies)(positions)[:, 0, 0]
    expected = Qwen3RotaryEmbedding(hf_config)(torch.zeros(1), positions[None])
    for ours, theirs in zip((angles.cos(), angles.sin()), expected, strict=True):
        torch.testing.assert_close(factor * ours, theirs[0], rtol=1e-6, atol=1e-6)
