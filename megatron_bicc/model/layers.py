"""What the layers are built of: Transformer Engine's modules, apex's norm, or megatron-core's own."""

from importlib.util import find_spec
from typing import Any, Literal

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    HAVE_TE,
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_bicc.model.attention import SharedPrefixCoreAttention

Backend = Literal["Transformer Engine", "apex", "local"]


def backend() -> Backend:
    """The best that is installed. Attention is this package's under each of them."""
    if HAVE_TE:
        return "Transformer Engine"
    return "apex" if find_spec("apex") else "local"


class RMSNorm:
    """apex's or torch's RMSNorm as megatron-core builds it.

    Its weight's gradient is summed over the tensor-parallel group under sequence parallel.
    """

    def __new__(
        cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any
    ) -> torch.nn.Module:
        if backend() == "apex":
            from apex.normalization import FusedRMSNorm as Norm
        else:
            from torch.nn import RMSNorm as Norm
        norm = Norm(hidden_size, eps=eps).to(config.params_dtype)
        norm.weight.sequence_parallel = config.sequence_parallel
        return norm


def layer_specs(megatron_config: TransformerConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
    """This stage's layers and the final norm."""
    c = megatron_config
    if backend() == "Transformer Engine":
        from megatron.core.extensions.transformer_engine import TENorm as Norm

        layer = get_gpt_layer_with_transformer_engine_spec(
            c.num_moe_experts, c.moe_grouped_gemm, c.qk_layernorm
        )
    else:
        layer, Norm = _local_layer(c), RMSNorm
    layer.submodules.self_attention.submodules.core_attention = SharedPrefixCoreAttention
    layers = get_num_layers_to_build(c, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=Norm)


def _local_layer(c: TransformerConfig) -> ModuleSpec:
    layer = get_gpt_layer_local_spec(
        c.num_moe_experts, c.moe_grouped_gemm, c.qk_layernorm, normalization="RMSNorm"
    )
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
    if c.qk_layernorm:
        attention = layer.submodules.self_attention.submodules
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return layer
