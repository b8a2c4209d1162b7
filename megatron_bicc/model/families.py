"""Rotary embedding indexed by position id, with the Hugging Face configuration's scaling.

From a Hugging Face configuration to megatron-core's: what each supported family is made of.
"""

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_bicc.config import Config, ParallelConfig
from megatron_bicc.errors import UserError
from megatron_bicc.model.batch import PackedBatch
from megatron_bicc.model.layers import backend


def head_dim(hf_config: PretrainedConfig) -> int:
    """Elements of an attention head."""
    return getattr(hf_config, "head_dim", None) or hf_config.hidden_size // hf_config.num_attention_heads


def rotary_frequencies(hf_config: PretrainedConfig) -> tuple[Tensor, float]:
    """(inverse frequencies float32 [head_dim / 2], factor on cos and sin), by transformers' own functions."""
    parameters = hf_config.rope_parameters
    kind = parameters.get("rope_type", "default")
    with torch.device("cpu"):  # arange takes the default device, which a dry run sets to meta
        if kind == "default":
            size = head_dim(hf_config)
            return 1.0 / parameters["rope_theta"] ** (torch.arange(0, size, 2).float() / size), 1.0
        return ROPE_INIT_FUNCTIONS[kind](hf_config, torch.device("cpu"))


def check_rotary(hf_config: PretrainedConfig) -> None:
    """Raises UserError for a scaling that is not built here, or numbers that make no frequencies."""
    parameters = hf_config.rope_parameters or {}
    kind = parameters.get("rope_type", "default")
    if kind not in ("default", "linear", "llama3", "yarn"):
        # the frequencies of dynamic and longrope depend on the sequence's length
        raise UserError(f"rope_type {kind!r} is not supported; use default, linear, llama3 or yarn")
    if parameters.get("partial_rotary_factor") not in (None, 1.0):
        raise UserError(
            f"partial_rotary_factor is {parameters['partial_rotary_factor']!r} in config.json, "
            "which the policy does not compute; only 1.0 is supported"
        )
    try:
        frequencies, factor = rotary_frequencies(hf_config)
        good = bool(frequencies.isfinite().all()) and 0 < factor < float("inf")
        good = good and frequencies.shape == (head_dim(hf_config) // 2,)
    except (KeyError, TypeError, ValueError, ArithmeticError, RuntimeError):  # transformers checks no numbers
        good = False
    if not good:
        raise UserError(f"the rotary embedding of config.json is damaged: {parameters}")


def positions(hf_config: PretrainedConfig) -> int:
    """Tokens of the longest sequence that the model's rotary embedding is made for.

    max_position_embeddings; what yarn and linear scaling stretch it to, where that is more.
    """
    most, parameters = hf_config.max_position_embeddings, hf_config.rope_parameters
    if parameters.get("rope_type") in ("linear", "yarn"):
        original = parameters.get("original_max_position_embeddings") or most
        most = max(most, int(original * parameters["factor"]))
    return most


class PositionRotary(torch.nn.Module):
    """Stands in for GPTModel.rotary_pos_emb: megatron-core asks it for a length and hands that length back.

    Here the "length" is the micro-batch's position ids, so each row gets the angles of its own position.
    """

    def __init__(self, inverse_frequencies: Tensor) -> None:
        super().__init__()
        self.inverse_frequencies = inverse_frequencies

    def get_rotary_seq_len(self, *args: Any) -> Tensor:
        """Position ids int64 [T] of the micro-batch, the last argument that megatron-core passes."""
        packed: PackedBatch = args[-1]
        return packed.positions_N

    def forward(self, positions_T: Tensor, packed_seq: bool = False, cp_group: Any = None) -> Tensor:
        """Angles float32 [T, 1, 1, head_dim]."""
        angles = torch.outer(positions_T.float(), self.inverse_frequencies.to(positions_T.device))
        return torch.cat([angles, angles], dim=-1)[:, None, None, :]


@dataclass(frozen=True)
class Family:
    """What a Hugging Face architecture does that its configuration does not say."""

    qk_norm: bool = False
    qkv_bias: bool = False
    experts: bool = False
    reads: tuple[str, ...] = ()
    """Entries of ACCEPTED that its class in transformers reads, beside those that all read"""


FAMILIES = {
    "Qwen3ForCausalLM": Family(qk_norm=True, reads=("attention_bias",)),
    "Qwen2ForCausalLM": Family(qkv_bias=True),
    "LlamaForCausalLM": Family(reads=("attention_bias", "mlp_bias")),
    "Qwen3MoeForCausalLM": Family(
        qk_norm=True, experts=True, reads=("attention_bias", "decoder_sparse_step", "mlp_only_layers")
    ),
}

ACCEPTED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    # transformers' key-value cache keeps no more than the window, whatever the class says
    "sliding_window": (None,),
    "attention_chunk_size": (None,),
    "layer_types": (None, ["full_attention"]),
    "kv_sharing_modes": (None,),
    "is_causal": (True, None),
    "decoder_sparse_step": (1,),
    "mlp_only_layers": ([], None),
    "is_encoder_decoder": (False, None),
    # without it a model answers tuples
    "return_dict": (True, None),
    # another configuration inside, which transformers reads in place of this one
    **dict.fromkeys(("text_config", "decoder", "generator"), (None,)),
    # other weights than those of the directory's safetensors
    "transformers_weights": (None,),
}
"""Entries of config.json that change what transformers computes; their values that the policy computes, too.

layer_types: the types that occur. Entries that transformers does not read may hold anything.
"""
EVERYWHERE = tuple(name for name in ACCEPTED if not any(name in family.reads for family in FAMILIES.values()))
"""Those that all of transformers' classes read"""

SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)
EXPERT_SIZES = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")


def family_of(hf_config: PretrainedConfig) -> Family:
    """Raises UserError for an architecture, or a feature of one, that is not built here.

    The policy would compute something else than transformers and the rollout engine, unnoticed.
    """
    name = (hf_config.architectures or ["unknown"])[0]
    if name not in FAMILIES:
        raise UserError(f"architecture {name} is not supported; use one of {', '.join(FAMILIES)}")
    family, expected = FAMILIES[name], getattr(transformers, name).config_class
    if type(hf_config) is not expected:
        raise UserError(
            f"model_type is {hf_config.model_type!r}, but architectures names {name}, whose model_type is "
            f"{expected.model_type!r}: they are of different models"
        )
    _check_quantization(hf_config)
    if hf_config.is_heterogeneous:
        raise UserError("per_layer_config in config.json makes layers differ, which is not supported")
    _check_sizes(hf_config, family)
    for key in (*EVERYWHERE, *family.reads):
        # absent entries, and those that transformers itself clears, are as good as an accepted value
        value = vars(hf_config).get(key, ACCEPTED[key][0])
        if key == "layer_types" and isinstance(value, list):
            value = sorted(set(map(str, value)))
        if value not in ACCEPTED[key]:
            raise UserError(
                f"{key} is {value!r} in config.json, which the policy does not compute; "
                f"only {' or '.join(repr(x) for x in ACCEPTED[key])} is supported"
            )
    check_rotary(hf_config)
    return family


def _check_quantization(hf_config: PretrainedConfig) -> None:
    for key in ("quantization_config", "compression_config"):
        found = getattr(hf_config, key, None)
        if found is not None:
            method = found.get("quant_method") if isinstance(found, dict) else None
            raise UserError(
                f"{key} in config.json says that the weights are quantised ({method or 'unknown method'}), "
                "which is not supported; dequantise them first"
            )


def _check_sizes(hf_config: PretrainedConfig, family: Family) -> None:
    for name in SIZES + (EXPERT_SIZES if family.experts else ()):
        size = getattr(hf_config, name)
        if not isinstance(size, int) or size < 1:
            raise UserError(f"{name} is {size!r} in config.json; it must be a number of at least 1")
    hidden, heads, groups = (
        getattr(hf_config, name) for name in ("hidden_size", "num_attention_heads", "num_key_value_heads")
    )
    if heads % groups:
        raise UserError(
            f"num_key_value_heads is {groups} in config.json; it must divide num_attention_heads = {heads}"
        )
    size = getattr(hf_config, "head_dim", None)
    if size is None and hidden % heads:
        raise UserError(
            f"num_attention_heads is {heads} in config.json; without a head_dim it must divide "
            f"hidden_size = {hidden}"
        )
    size = hidden // heads if size is None else size
    if not isinstance(size, int) or size < 2 or size % 2:
        raise UserError(f"head_dim is {size!r} by config.json; it must be an even number of at least 2")
    if family.experts and hf_config.num_experts_per_tok > hf_config.num_experts:
        raise UserError(
            f"num_experts_per_tok is {hf_config.num_experts_per_tok} in config.json; "
            f"it must be at most num_experts = {hf_config.num_experts}"
        )


def describe(hf_config: PretrainedConfig) -> str:
    """One line for the log: architecture, what its layers are built of, and that there is no dropout."""
    layers = {
        "Transformer Engine": "Transformer Engine's linears and norms",
        "apex": "megatron-core's own linears and apex's norms",
        "local": "megatron-core's own linears and torch's norms",
    }[backend()]
    dropout = getattr(hf_config, "attention_dropout", 0.0)
    unused = f" (config.json's attention_dropout of {dropout} is not used)" if dropout else ""
    name = hf_config.architectures[0]
    return f"policy: {name} on {layers}, shared-prefix attention, dropout 0{unused}"


def check_layout(hf_config: PretrainedConfig, parallel: ParallelConfig) -> None:
    """Raises UserError naming the dimension that a parallel size does not divide, or what it lacks."""
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size", "hidden_size"):
        _check_divides("tensor", parallel.tensor, name, getattr(hf_config, name))
    vocab, padded = hf_config.vocab_size, padded_vocab_size(hf_config, parallel.tensor)
    if padded - vocab >= padded // parallel.tensor:
        raise UserError(f"parallel.tensor={parallel.tensor} is too large for a vocabulary of {vocab} tokens")
    stages = parallel.pipeline * parallel.virtual_pipeline
    _check_divides(
        "pipeline * parallel.virtual_pipeline", stages, "num_hidden_layers", hf_config.num_hidden_layers
    )
    if not family_of(hf_config).experts:
        if parallel.expert > 1:
            raise UserError(f"parallel.expert={parallel.expert}: the model has no experts; set it to 1")
        return
    _check_divides("expert", parallel.expert, "num_experts", hf_config.num_experts)
    if parallel.tensor > 1 and not parallel.sequence:
        raise UserError("parallel.sequence=false: a model with experts needs it beside parallel.tensor > 1")


def _check_divides(setting: str, size: int, name: str, dimension: int) -> None:
    if dimension % size:
        raise UserError(f"parallel.{setting}={size} does not divide the model's {name}={dimension}")


def padded_vocab_size(hf_config: PretrainedConfig, tensor: int) -> int:
    """Vocabulary rounded up to a multiple of the tensor-parallel size."""
    return -(-hf_config.vocab_size // tensor) * tensor


def transformer_config(hf_config: PretrainedConfig, config: Config) -> TransformerConfig:
    """megatron-core's configuration of the policy; dropout is zero throughout."""
    family = family_of(hf_config)
    check_layout(hf_config, config.parallel)
    dtype = getattr(torch, config.model.dtype)
    _, rope_factor = rotary_frequencies(hf_config)
    found = TransformerConfig(
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
        **(_experts(hf_config) if family.experts else {}),
    )
    if family.experts:
        # set afterwards: megatron-core refuses one expert a token with gates that sum to 1: its router has no
        # gradient, as it has none in transformers
        found.moe_router_pre_softmax = not hf_config.norm_topk_prob
    return found


def _parallel(config: Config) -> dict[str, Any]:
    parallel = config.parallel
    virtual = parallel.virtual_pipeline
    return {
        "tensor_model_parallel_size": parallel.tensor,
        "sequence_parallel": parallel.sequence,
        "pipeline_model_parallel_size": parallel.pipeline,
        "virtual_pipeline_model_parallel_size": virtual if virtual > 1 else None,
        # one direction a call: two stages are each other's previous and next one
        "overlap_p2p_comm": virtual > 1,
        "batch_p2p_comm": virtual == 1,
        "expert_model_parallel_size": parallel.expert,
        "expert_tensor_parallel_size": 1,
        # megatron-core asks for it wherever sequence lengths vary
        "moe_token_dispatcher_type": "alltoall",
    }


def _experts(hf_config: PretrainedConfig) -> dict[str, Any]:
    return {
        "num_moe_experts": hf_config.num_experts,
        "moe_router_topk": hf_config.num_experts_per_tok,
        "moe_ffn_hidden_size": hf_config.moe_intermediate_size,
        "moe_router_pre_softmax": True,
        "moe_router_dtype": "fp32",
        # the loss is the policy gradient's alone
        "moe_router_load_balancing_type": "none",
        "moe_grouped_gemm": backend() == "Transformer Engine",
    }


def _recompute(config: Config) -> dict[str, Any]:
    if config.model.recompute == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    if config.model.recompute == "selective":
        return {"recompute_granularity": "selective"}
    return {}
