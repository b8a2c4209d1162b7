"""Maps Hugging Face tensors to megatron-core parameters, and defines how tensor parallel cuts each.

A parameter's whole form has one dimension along which tensor parallel cuts it evenly:

    vocab       [padded vocabulary, hidden]    along 0
    qkv         [G, H / G + 2, C, hidden]      along 0   (each key-value head with its query heads)
    gate_up     [2, inner, hidden]             along 1
    row         [out, in]                      along 1
    replicated  unchanged                      not cut

Expert parallel gives each rank whole experts, which tensor parallel does not cut; it cuts a shared expert.

Shape letters: H query heads, G key-value heads, C channels of a head.
"""

import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PretrainedConfig

from megatron_bicc.model.families import head_dim, padded_vocab_size

Kind = Literal["vocab", "qkv", "gate_up", "row", "replicated"]
CUT_DIMENSION: dict[Kind, int] = {"vocab": 0, "qkv": 0, "gate_up": 1, "row": 1}


@dataclass(frozen=True)
class TensorRule:
    """A parameter's megatron-core name, the Hugging Face tensors that it is made of, and its kind.

    `{i}` is the layer and `{e}` the expert: counted on this rank in `megatron`, in the whole model in `hf`.
    """

    megatron: str
    hf: tuple[str, ...]
    kind: Kind
    expert: int | None = None
    """Index on this rank of the expert that it belongs to; None outside of the experts"""

    def hf_names(self, first_expert: int) -> tuple[str, ...]:
        """Returns the Hugging Face names on the rank whose first expert is `first_expert`."""
        return tuple(name.replace("{e}", str(first_expert + (self.expert or 0))) for name in self.hf)


_LAYER, _HF_LAYER = "decoder.layers.{i}.", "model.layers.{i}."
_ATTENTION, _HF_ATTENTION = _LAYER + "self_attention.", _HF_LAYER + "self_attn."
_EXPERTS, _HF_EXPERT = _LAYER + "mlp.experts.", _HF_LAYER + "mlp.experts.{e}."
_SHARED, _HF_SHARED = _LAYER + "mlp.shared_experts.", _HF_LAYER + "mlp.shared_expert."
_HF_EXPERT_GATE_UP = (_HF_EXPERT + "gate_proj.weight", _HF_EXPERT + "up_proj.weight")


def _qkv(suffix: str) -> tuple[str, ...]:
    return tuple(f"{_HF_ATTENTION}{x}_proj.{suffix}" for x in "qkv")


RULES = (
    TensorRule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), "vocab"),
    TensorRule(_ATTENTION + "linear_qkv.weight", _qkv("weight"), "qkv"),
    TensorRule(_ATTENTION + "linear_qkv.bias", _qkv("bias"), "qkv"),
    TensorRule(_ATTENTION + "linear_proj.weight", (_HF_ATTENTION + "o_proj.weight",), "row"),
    TensorRule(_ATTENTION + "q_layernorm.weight", (_HF_ATTENTION + "q_norm.weight",), "replicated"),
    TensorRule(_ATTENTION + "k_layernorm.weight", (_HF_ATTENTION + "k_norm.weight",), "replicated"),
    # Transformer Engine fuses a norm with the linear that follows it
    TensorRule(_LAYER + "input_layernorm.weight", (_HF_LAYER + "input_layernorm.weight",), "replicated"),
    TensorRule(
        _ATTENTION + "linear_qkv.layer_norm_weight", (_HF_LAYER + "input_layernorm.weight",), "replicated"
    ),
    TensorRule(
        _LAYER + "mlp.linear_fc1.weight",
        (_HF_LAYER + "mlp.gate_proj.weight", _HF_LAYER + "mlp.up_proj.weight"),
        "gate_up",
    ),
    TensorRule(_LAYER + "mlp.linear_fc2.weight", (_HF_LAYER + "mlp.down_proj.weight",), "row"),
    TensorRule(_LAYER + "mlp.router.weight", (_HF_LAYER + "mlp.gate.weight",), "replicated"),
    TensorRule(_EXPERTS + "local_experts.{e}.linear_fc1.weight", _HF_EXPERT_GATE_UP, "gate_up"),
    TensorRule(_EXPERTS + "local_experts.{e}.linear_fc2.weight", (_HF_EXPERT + "down_proj.weight",), "row"),
    TensorRule(
        _SHARED + "linear_fc1.weight",
        (_HF_SHARED + "gate_proj.weight", _HF_SHARED + "up_proj.weight"),
        "gate_up",
    ),
    TensorRule(_SHARED + "linear_fc2.weight", (_HF_SHARED + "down_proj.weight",), "row"),
    TensorRule(_SHARED + "gate_weight", (_HF_LAYER + "mlp.shared_expert_gate.weight",), "replicated"),
    # Transformer Engine has one grouped linear for all experts of a rank
    TensorRule(_EXPERTS + "linear_fc1.weight{e}", _HF_EXPERT_GATE_UP, "gate_up"),
    TensorRule(_EXPERTS + "linear_fc2.weight{e}", (_HF_EXPERT + "down_proj.weight",), "row"),
    TensorRule("decoder.final_layernorm.weight", ("model.norm.weight",), "replicated"),
    TensorRule("output_layer.weight", ("lm_head.weight",), "vocab"),
)


def _norm(megatron: str, hf: str) -> TensorRule:
    return TensorRule(_LAYER + megatron, (f"{_HF_LAYER}{hf}.weight",), "replicated")


NORM_RULES = {
    False: (
        _norm("pre_mlp_layernorm.weight", "post_attention_layernorm"),
        _norm("mlp.linear_fc1.layer_norm_weight", "post_attention_layernorm"),
    ),
    True: (
        _norm("self_attn_bda.norm.weight", "post_attention_layernorm"),
        _norm("pre_mlp_layernorm.weight", "pre_feedforward_layernorm"),
        _norm("mlp.linear_fc1.layer_norm_weight", "pre_feedforward_layernorm"),
        _norm("mlp_bda.norm.weight", "post_feedforward_layernorm"),
    ),
}
"""By Family.output_norms, since families give the name post_attention_layernorm to different norms"""


def rule_for(megatron_name: str, first_layer: int, output_norms: bool = False) -> TensorRule:
    """Returns the rule of a parameter, with its names filled in, on a stage that starts at `first_layer`.

    output_norms: Family.output_norms. Raises LookupError for a parameter without a rule: RULES has no entry
    for a family in FAMILIES.
    """
    layer = re.search(r"layers\.(\d+)\.", megatron_name)
    expert = re.search(r"(?:local_experts\.|experts\.linear_fc[12]\.weight)(\d+)", megatron_name)
    here = {"{i}": layer and layer[1], "{e}": expert and expert[1]}
    for rule in (*RULES, *NORM_RULES[output_norms]):
        if _fill(rule.megatron, here) == megatron_name:
            i = layer and str(int(layer[1]) + first_layer)
            names = tuple(_fill(name, {"{i}": i}) for name in rule.hf)
            return TensorRule(megatron_name, names, rule.kind, expert and int(expert[1]))
    raise LookupError(f"no rule of RULES matches the policy's parameter {megatron_name}")


def _fill(name: str, values: dict[str, str | None]) -> str:
    for place, value in values.items():
        name = name.replace(place, value or place)
    return name


def to_whole(kind: Kind, tensors: list[Tensor], hf_config: PretrainedConfig, tensor_parallel: int) -> Tensor:
    """Converts Hugging Face tensors to the parameter's whole form."""
    if kind == "vocab":
        missing = padded_vocab_size(hf_config, tensor_parallel) - tensors[0].shape[0]
        return torch.nn.functional.pad(tensors[0], (0, 0, 0, missing))
    if kind == "qkv":
        kv_heads, channels = hf_config.num_key_value_heads, head_dim(hf_config)
        return torch.cat([x.reshape(kv_heads, -1, channels, *x.shape[1:]) for x in tensors], dim=1)
    return torch.stack(tensors) if kind == "gate_up" else tensors[0]


def from_whole(kind: Kind, whole: Tensor, hf_config: PretrainedConfig) -> list[Tensor]:
    """Converts the parameter's whole form to Hugging Face tensors; the inverse of `to_whole`."""
    if kind == "vocab":
        return [whole[: hf_config.vocab_size]]
    if kind == "qkv":
        heads = hf_config.num_attention_heads // hf_config.num_key_value_heads
        return [x.reshape(-1, *whole.shape[3:]) for x in whole.split([heads, 1, 1], dim=1)]
    return list(whole) if kind == "gate_up" else [whole]


def cut(kind: Kind, whole: Tensor, rank: int, size: int, local_shape: torch.Size) -> Tensor:
    """Returns one tensor-parallel rank's part of the whole form, in the parameter's own shape."""
    if kind in CUT_DIMENSION:
        whole = whole.chunk(size, dim=CUT_DIMENSION[kind])[rank]
    return whole.reshape(local_shape)


def join(kind: Kind, parts: list[Tensor], hf_config: PretrainedConfig) -> Tensor:
    """Joins the parts of all ranks, in rank order, to the whole form; the inverse of `cut`."""
    if kind == "replicated":
        return parts[0]
    if len(parts) == 1:  # a view: one copy less
        return _unflatten(kind, parts[0], hf_config)
    return torch.cat([_unflatten(kind, part, hf_config) for part in parts], dim=CUT_DIMENSION[kind])


def _unflatten(kind: Kind, part: Tensor, hf_config: PretrainedConfig) -> Tensor:
    if kind == "qkv":
        heads = hf_config.num_attention_heads // hf_config.num_key_value_heads + 2
        return part.reshape(-1, heads, head_dim(hf_config), *part.shape[1:])
    return part.reshape(2, -1, *part.shape[1:]) if kind == "gate_up" else part
