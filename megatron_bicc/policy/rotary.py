"""Rotary embedding indexed by position id, with the Hugging Face configuration's scaling."""

from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_bicc.policy.packed import PackedBatch


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
    """Raises ValueError for a scaling that is not built here, or numbers that make no frequencies."""
    parameters = hf_config.rope_parameters or {}
    kind = parameters.get("rope_type", "default")
    if kind not in ("default", "linear", "llama3", "yarn"):
        # the frequencies of dynamic and longrope depend on the sequence's length
        raise ValueError(f"rope_type {kind!r} is not supported; use default, linear, llama3 or yarn")
    if parameters.get("partial_rotary_factor") not in (None, 1.0):
        raise ValueError(
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
        raise ValueError(f"the rotary embedding of config.json is damaged: {parameters}")


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
        return packed.positions_T

    def forward(self, positions_T: Tensor, packed_seq: bool = False, cp_group: Any = None) -> Tensor:
        """Angles float32 [T, 1, 1, head_dim]."""
        angles = torch.outer(positions_T.float(), self.inverse_frequencies.to(positions_T.device))
        return torch.cat([angles, angles], dim=-1)[:, None, None, :]
