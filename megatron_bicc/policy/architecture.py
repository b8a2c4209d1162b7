"""From a Hugging Face configuration to megatron-core's: what each supported family is made of."""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    HAVE_TE,
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from transformers import PretrainedConfig

from megatron_bicc.config import Config
from megatron_bicc.policy.rotary import head_dim, rotary_frequencies
from megatron_bicc.policy.shared_prefix_attention import SharedPrefixCoreAttention


@dataclass(frozen=True)
class Family:
    """What a Hugging Face architecture does that its configuration does not say."""

    qk_norm: bool = False
    qkv_bias: bool = False


FAMILIES = {
    "Qwen3ForCausalLM": Family(qk_norm=True),
    "Qwen2ForCausalLM": Family(qkv_bias=True),
    "LlamaForCausalLM": Family(),
}


def family_of(hf_config: PretrainedConfig) -> Family:
    """Raises ValueError for an architecture, or a feature of one, that is not built here."""
    name = (hf_config.architectures or ["unknown"])[0]
    if name not in FAMILIES:
        raise ValueError(
            f"model.path: architecture {name} is not supported; use one of {', '.join(FAMILIES)}"
        )
    if getattr(hf_config, "use_sliding_window", False):
        raise ValueError("model.path: use_sliding_window is true; sliding-window attention is not supported")
    if getattr(hf_config, "attention_bias", False) or getattr(hf_config, "mlp_bias", False):
        raise ValueError("model.path: attention_bias or mlp_bias is true; these biases are not supported")
    if hf_config.hidden_act != "silu":
        raise ValueError(f"model.path: hidden_act is {hf_config.hidden_act}; only silu is supported")
    return FAMILIES[name]


def check_divisible(hf_config: PretrainedConfig, tensor: int) -> None:
    """Raises ValueError naming the dimension that parallel.tensor does not divide."""
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size", "hidden_size"):
        size = getattr(hf_config, name)
        if size % tensor:
            raise ValueError(f"parallel.tensor={tensor} does not divide the model's {name}={size}")


def padded_vocab_size(hf_config: PretrainedConfig, tensor: int) -> int:
    """Vocabulary rounded up to a multiple of the tensor-parallel size."""
    return -(-hf_config.vocab_size // tensor) * tensor


def transformer_config(hf_config: PretrainedConfig, config: Config) -> TransformerConfig:
    """megatron-core's configuration of the policy; dropout is zero throughout."""
    family = family_of(hf_config)
    check_divisible(hf_config, config.parallel.tensor)
    dtype = getattr(torch, config.model.dtype)
    _, rope_factor = rotary_frequencies(hf_config)
    return TransformerConfig(
        num_layers=hf_config.num_hidden_layers,
        hidden_size=hf_config.hidden_size,
        num_attention_heads=hf_config.num_attention_heads,
        num_query_groups=hf_config.num_key_value_heads,
        kv_channels=head_dim(hf_config),
        ffn_hidden_size=hf_config.intermediate_size,
        # yarn scales cos and sin, of queries and keys both
        softmax_scale=rope_factor**2 / head_dim(hf_config) ** 0.5,
        normalization="RMSNorm",
        layernorm_epsilon=hf_config.rms_norm_eps,
        qk_layernorm=family.qk_norm,
        add_bias_linear=False,
        add_qkv_bias=family.qkv_bias,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        pipeline_dtype=dtype,
        use_cpu_initialization=True,
        # the loss arrives fully normalised: megatron-core only sums it over micro-batches and ranks
        calculate_per_token_loss=True,
        variable_seq_lengths=config.parallel.pipeline > 1,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        **_parallel(config),
        **_recompute(config),
    )


def _parallel(config: Config) -> dict[str, Any]:
    parallel = config.parallel
    virtual = parallel.virtual_pipeline
    return {
        "tensor_model_parallel_size": parallel.tensor,
        "sequence_parallel": parallel.sequence,
        "pipeline_model_parallel_size": parallel.pipeline,
        "virtual_pipeline_model_parallel_size": virtual if virtual > 1 else None,
        "moe_token_dispatcher_type": "alltoall",
    }


def _recompute(config: Config) -> dict[str, Any]:
    if config.model.recompute == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    if config.model.recompute == "selective":
        return {"recompute_granularity": "selective"}
    return {}


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm as megatron-core builds it; its weight's gradient is summed under sequence parallel."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel


def layer_specs(megatron_config: TransformerConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
    """This stage's layers: our attention; linears and norms of Transformer Engine where it is installed."""
    qk_norm = megatron_config.qk_layernorm
    if HAVE_TE:
        from megatron.core.extensions.transformer_engine import TENorm

        layer, norm = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=qk_norm), TENorm
    else:
        layer, norm = _local_layer_spec(qk_norm), RMSNorm
    layer.submodules.self_attention.submodules.core_attention = SharedPrefixCoreAttention
    layers = get_num_layers_to_build(megatron_config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=norm)


def _local_layer_spec(qk_norm: bool) -> ModuleSpec:
    layer = get_gpt_layer_local_spec(qk_layernorm=qk_norm, normalization="RMSNorm")
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
    if qk_norm:
        attention = layer.submodules.self_attention.submodules
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return layer
