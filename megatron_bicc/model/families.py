"""Decides from config.json whether a Hugging Face model can be trained, and reads its dimensions.

A family is a row of FAMILIES. Everything that reads a config.json (training, evaluation, dry run, plan,
conversion, rollout engines) uses `supported_config`, so that all of them accept the same models.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_bicc.config import ParallelConfig
from megatron_bicc.errors import UserError


@dataclass(frozen=True)
class Family:
    """Features of a Hugging Face architecture beyond a Llama layer and its config.json."""

    qk_norm: bool = False
    """RMSNorm of each head's queries and keys"""
    qkv_bias: bool = False
    """Biases of the query, key and value projections"""
    experts: bool = False
    """A router and experts in place of each MLP"""
    windows: bool = False
    """Layers that layer_types calls sliding_attention see the last `sliding_window` tokens only, themselves
    included. Both kinds of layers have rotary frequencies of their own."""
    output_norms: bool = False
    """RMSNorm of the attention's and of the MLP's output, before it is added to the residual"""
    norms_add_one: bool = False
    """Every RMSNorm multiplies by 1 + its weight"""
    scaled_embedding: bool = False
    """Embeddings are multiplied by sqrt(hidden_size)"""
    gelu: bool = False
    """The MLP's activation is gelu in its approximation by tanh, not silu"""
    query_scalar: bool = False
    """Scores are divided by sqrt(query_pre_attn_scalar), not by sqrt(head_dim)"""
    shared_expert: bool = False
    """Beside them an expert that every token passes, weighted by a gate of its own"""
    reads: tuple[str, ...] = ()
    """Entries of ACCEPTED that its class in transformers reads, in addition to EVERYWHERE"""


FAMILIES = {
    "Qwen3ForCausalLM": Family(qk_norm=True, reads=("attention_bias",)),
    "Qwen2ForCausalLM": Family(qkv_bias=True),
    "LlamaForCausalLM": Family(reads=("attention_bias", "mlp_bias")),
    "Qwen3MoeForCausalLM": Family(
        qk_norm=True, experts=True, reads=("attention_bias", "decoder_sparse_step", "mlp_only_layers")
    ),
    # SGLang reads no output layer of its own for this class: tie_word_embeddings must be true
    "Gemma3ForCausalLM": Family(
        qk_norm=True,
        windows=True,
        output_norms=True,
        norms_add_one=True,
        scaled_embedding=True,
        gelu=True,
        query_scalar=True,
        reads=(
            "attention_bias",
            "hidden_activation",
            "attn_logit_softcapping",
            "final_logit_softcapping",
            "use_bidirectional_attention",
            "tie_word_embeddings",
        ),
    ),
    "Qwen2MoeForCausalLM": Family(
        qkv_bias=True,
        experts=True,
        shared_expert=True,
        reads=("qkv_bias", "decoder_sparse_step", "mlp_only_layers"),
    ),
}

ACCEPTED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "hidden_activation": ("gelu_pytorch_tanh",),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "use_bidirectional_attention": (False, None),
    "tie_word_embeddings": (True,),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "qkv_bias": (True,),
    # transformers' key-value cache keeps only the window, even for classes that ignore it
    "sliding_window": (None,),
    "attention_chunk_size": (None,),
    "layer_types": (None, ["full_attention"]),
    "kv_sharing_modes": (None,),
    "is_causal": (True, None),
    "decoder_sparse_step": (1,),
    "mlp_only_layers": ([], None),
    "is_encoder_decoder": (False, None),
    # without it a model returns tuples
    "return_dict": (True, None),
    # a nested configuration, which transformers would read in place of this one
    **dict.fromkeys(("text_config", "decoder", "generator"), (None,)),
    # would load other weights than the directory's safetensors
    "transformers_weights": (None,),
}
"""Entries of config.json that change what transformers computes, and the values that the policy supports.

layer_types: the set of types that occur. Entries that transformers does not read may have any value. A family
with windows has other values of sliding_window and layer_types, which `_check_windows` checks.
"""
EVERYWHERE = tuple(name for name in ACCEPTED if not any(name in family.reads for family in FAMILIES.values()))
"""Entries of ACCEPTED that every class in transformers reads"""

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
SHARED_EXPERT_SIZE = "shared_expert_intermediate_size"


def supported_config(path: str | Path) -> PretrainedConfig:
    """Reads the directory's config.json. Remote code is never run, and no other directory is searched.

    Raises UserError if it is missing or damaged, or describes a model that the policy does not compute.
    """
    hf_config = _read_config(path)
    try:
        family_of(hf_config)
    except UserError as error:
        raise UserError(f"{path}/config.json: {error}") from error
    return hf_config


def _read_config(path: str | Path) -> PretrainedConfig:
    if not (Path(path) / "config.json").is_file():
        raise UserError(f"{path}: there is no Hugging Face config.json in it")
    try:
        hf_config = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers raises many types for a damaged or unknown configuration
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}/config.json: cannot be used: {reason}") from error
    if vars(hf_config).get("head_dim", 0) is None:
        # Some of transformers' classes fail on null; without the entry all use hidden size / heads.
        del hf_config.head_dim
    return hf_config


def family_of(hf_config: PretrainedConfig) -> Family:
    """Returns the row of FAMILIES that a configuration belongs to.

    Raises UserError for an architecture, or a feature of one, that the policy does not compute: it would
    silently differ from transformers and from the rollout engine.
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
    if family.windows:
        _check_windows(hf_config)
    for key in (*EVERYWHERE, *family.reads):
        if family.windows and key in ("sliding_window", "layer_types"):
            continue
        # transformers deletes some entries that do not apply: absent is the same as an accepted value
        value = vars(hf_config).get(key, ACCEPTED[key][0])
        if key == "layer_types" and isinstance(value, list):
            value = sorted(set(map(str, value)))
        if key == "sliding_window" and value == 0 and getattr(hf_config, "layer_types", None):
            value = None  # Qwen2-MoE's class writes 0 for none; beside layer_types the cache does not read it
        if value not in ACCEPTED[key]:
            raise UserError(
                f"{key} is {value!r} in config.json, which the policy does not compute; "
                f"only {' or '.join(repr(x) for x in ACCEPTED[key])} is supported"
            )
    check_rotary(hf_config, family)
    return family


def _check_quantization(hf_config: PretrainedConfig) -> None:
    for key in ("quantization_config", "compression_config"):
        found = getattr(hf_config, key, None)
        if found is not None:
            method = found.get("quant_method") if isinstance(found, dict) else None
            raise UserError(
                f"{key} in config.json says that the weights are quantized ({method or 'unknown method'}), "
                "which is not supported; dequantize them first"
            )


def _check_sizes(hf_config: PretrainedConfig, family: Family) -> None:
    shared = (SHARED_EXPERT_SIZE,) if family.shared_expert else ()
    for name in SIZES + (EXPERT_SIZES if family.experts else ()) + shared:
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
    if family.query_scalar and not hf_config.query_pre_attn_scalar > 0:
        raise UserError(
            f"query_pre_attn_scalar is {hf_config.query_pre_attn_scalar!r} in config.json; it must be "
            "greater than 0: queries are divided by its square root"
        )
    if family.experts and hf_config.num_experts_per_tok > hf_config.num_experts:
        raise UserError(
            f"num_experts_per_tok is {hf_config.num_experts_per_tok} in config.json; "
            f"it must be at most num_experts = {hf_config.num_experts}"
        )


FULL, SLIDING = "full_attention", "sliding_attention"


def _check_windows(hf_config: PretrainedConfig) -> None:
    window, types = hf_config.sliding_window, sorted(set(map(str, hf_config.layer_types)))
    if not isinstance(window, int) or window < 1:
        raise UserError(f"sliding_window is {window!r} in config.json; it must be a number of at least 1")
    if not {FULL, SLIDING}.issuperset(types):
        raise UserError(
            f"layer_types is {types!r} in config.json; the policy computes {FULL} and {SLIDING} only"
        )


def attention_scale(hf_config: PretrainedConfig) -> float:
    """Returns the factor on the product of a query and a key, the rotary embedding's own factor included."""
    scalar = hf_config.query_pre_attn_scalar if family_of(hf_config).query_scalar else head_dim(hf_config)
    # yarn scales cos and sin, for queries and keys alike: their product gets the factor twice
    return rotary_frequencies(hf_config)[1] ** 2 / scalar**0.5


def head_dim(hf_config: PretrainedConfig) -> int:
    """Returns C, the number of channels of an attention head."""
    return getattr(hf_config, "head_dim", None) or hf_config.hidden_size // hf_config.num_attention_heads


def rotary_frequencies(hf_config: PretrainedConfig) -> tuple[Tensor, float]:
    """Returns (inverse frequencies float32, factor on cos and sin), as transformers has them.

    The frequencies are [C / 2], or [2, C / 2] of a family with windows: those of layers that see all tokens,
    then those of sliding layers.
    """
    if SLIDING not in hf_config.rope_parameters:
        return _frequencies(hf_config, None)
    both = [_frequencies(hf_config, layer_type) for layer_type in (FULL, SLIDING)]
    return torch.stack([frequencies for frequencies, _ in both]), 1.0


def _frequencies(hf_config: PretrainedConfig, layer_type: str | None) -> tuple[Tensor, float]:
    """Returns (inverse frequencies float32 [C / 2], factor) of a type of layers; None: of all."""
    parameters = hf_config.rope_parameters if layer_type is None else hf_config.rope_parameters[layer_type]
    kind = parameters.get("rope_type", "default")
    with torch.device("cpu"):  # arange takes the default device, which a dry run sets to meta
        if kind == "default":
            size = head_dim(hf_config)
            return 1.0 / parameters["rope_theta"] ** (torch.arange(0, size, 2).float() / size), 1.0
        return ROPE_INIT_FUNCTIONS[kind](hf_config, torch.device("cpu"), layer_type=layer_type)


def check_rotary(hf_config: PretrainedConfig, family: Family) -> None:
    """Raises UserError for a scaling that is not supported, or parameters that give no finite frequencies."""
    for layer_type in (FULL, SLIDING) if family.windows else (None,):
        _check_rotary(hf_config, layer_type)


def _check_rotary(hf_config: PretrainedConfig, layer_type: str | None) -> None:
    parameters = hf_config.rope_parameters or {}
    where = "" if layer_type is None else f" of {layer_type}"
    # one attention scale serves all layers, so yarn's factor has to be that of all
    supported = ["default", "linear", "llama3"] + (["yarn"] if layer_type is None else [])
    parameters = parameters if layer_type is None else parameters.get(layer_type) or {}
    kind = parameters.get("rope_type", "default")
    if kind not in supported:
        # The frequencies of dynamic and longrope depend on the sequence's length; packed rows have several.
        raise UserError(
            f"rope_type {kind!r}{where} is not supported; use {', '.join(supported[:-1])} or {supported[-1]}"
        )
    if parameters.get("partial_rotary_factor") not in (None, 1.0):
        raise UserError(
            f"partial_rotary_factor{where} is {parameters['partial_rotary_factor']!r} in config.json, "
            "which the policy does not compute; only 1.0 is supported"
        )
    try:
        frequencies, factor = _frequencies(hf_config, layer_type)
        good = bool(frequencies.isfinite().all()) and 0 < factor < float("inf")
        good = good and frequencies.shape == (head_dim(hf_config) // 2,)
    except (KeyError, TypeError, ValueError, ArithmeticError, RuntimeError):  # transformers validates nothing
        good = False
    if not good:
        raise UserError(f"the rotary embedding{where} of config.json is damaged: {parameters}")


def positions(hf_config: PretrainedConfig) -> int:
    """Returns the longest sequence, in tokens, that the model's rotary embedding is made for.

    That is max_position_embeddings, or the length that yarn or linear scaling stretches it to if longer.
    Families with windows count the scaling in max_position_embeddings.
    """
    most, parameters = hf_config.max_position_embeddings, hf_config.rope_parameters
    if parameters.get("rope_type") in ("linear", "yarn"):
        original = parameters.get("original_max_position_embeddings") or most
        most = max(most, int(original * parameters["factor"]))
    return most


def check_layout(hf_config: PretrainedConfig, parallel: ParallelConfig) -> None:
    """Raises UserError if a parallel size does not divide the model's dimension, naming both."""
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size", "hidden_size"):
        _check_divides("tensor", parallel.tensor, name, getattr(hf_config, name))
    vocab, padded = hf_config.vocab_size, padded_vocab_size(hf_config, parallel.tensor)
    if padded - vocab >= padded // parallel.tensor:
        raise UserError(f"parallel.tensor={parallel.tensor} is too large for a vocabulary of {vocab} tokens")
    stages = parallel.pipeline * parallel.virtual_pipeline
    _check_divides(
        "pipeline * parallel.virtual_pipeline", stages, "num_hidden_layers", hf_config.num_hidden_layers
    )
    family = family_of(hf_config)
    if family.windows and parallel.context > 1:
        raise UserError(
            f"parallel.context={parallel.context}: sliding windows are not computed under context parallel; "
            "set it to 1"
        )
    if not family.experts:
        if parallel.expert > 1:
            raise UserError(f"parallel.expert={parallel.expert}: the model has no experts; set it to 1")
        return
    _check_divides("expert", parallel.expert, "num_experts", hf_config.num_experts)
    if family_of(hf_config).shared_expert:
        inner = getattr(hf_config, SHARED_EXPERT_SIZE)
        _check_divides("tensor", parallel.tensor, SHARED_EXPERT_SIZE, inner)
    if parallel.tensor > 1 and not parallel.sequence:
        raise UserError("parallel.sequence=false: a model with experts needs it if parallel.tensor > 1")


def _check_divides(setting: str, size: int, name: str, dimension: int) -> None:
    if dimension % size:
        raise UserError(f"parallel.{setting}={size} does not divide the model's {name}={dimension}")


def experts_type(num_experts: int) -> Literal["uint8", "int16"]:
    """Returns the smallest type for numbers of experts and for `free_mark`."""
    return "uint8" if num_experts <= torch.iinfo(torch.uint8).max else "int16"


def free_mark(dtype: torch.dtype) -> int:
    """Returns what stands in place of every expert of a token whose experts its router chooses."""
    return torch.iinfo(dtype).max


def padded_vocab_size(hf_config: PretrainedConfig, tensor: int) -> int:
    """Returns the vocabulary size rounded up to a multiple of the tensor-parallel size."""
    return -(-hf_config.vocab_size // tensor) * tensor
