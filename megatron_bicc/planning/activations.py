"""Bytes that the forward pass of a micro-batch keeps for its backward pass, on one rank.

Counted term by term over what the layers save; tests compare with the storages of a real forward pass.
Names of sizes follow `Sizes`; all are of one rank where tensor parallel cuts them.
"""

from dataclasses import dataclass
from typing import Literal

from megatron_bicc.config import Config
from megatron_bicc.planning.architecture import Sizes

Norms = Literal["fused", "composite"]
"""fused: CUDA's norm keeps its input; composite: torch's on a CPU keeps two fp32 tensors of that size."""


@dataclass(frozen=True)
class Saved:
    """Bytes kept for a micro-batch of so many rows."""

    layer: int
    """By a layer, until its backward pass, under model.recompute"""
    layer_whole: int
    """By a layer whose forward pass was just computed again: the same without recompute"""
    first_stage: int
    """Beside the layers, on the first pipeline stage"""
    last_stage: int
    """Beside the layers and without logits, on the last"""


def saved_bytes(sizes: Sizes, config: Config, rows: int, response_rows: int, norms: Norms = "fused") -> Saved:
    """What a micro-batch keeps. Experts are supposed to be evenly loaded."""
    element = 4 if config.model.dtype == "float32" else 2
    shares = config.parallel.tensor if config.parallel.sequence else 1
    own_rows = rows // shares
    norm = _norm(sizes.hidden, element, norms)
    attention = _attention(sizes, config, element, norms)
    layer_input = own_rows * element * sizes.hidden
    whole = (
        own_rows * 2 * (norm + element * sizes.hidden) + rows * attention + _mlp(sizes, config, rows, element)
    )
    lse = rows * 4 * sizes.heads // config.parallel.tensor
    layer = {"none": whole, "selective": whole - lse, "full": layer_input}[config.model.recompute]
    last = own_rows * norm + rows * element * sizes.hidden + response_rows * (8 + 3 * 4)
    return Saved(layer, whole, first_stage=8 * rows, last_stage=last)


def _norm(size: int, element: int, norms: Norms) -> int:
    """A norm's input and its statistic, a row."""
    return (8 if norms == "composite" else element) * size + 4


def _attention(sizes: Sizes, config: Config, element: int, norms: Norms) -> int:
    """A row's queries, keys and values before and after the rotary embedding, its cosines and sines, the
    output, which is also the next product's input, and the log-sum-exp."""
    heads, groups = sizes.heads // config.parallel.tensor, sizes.groups // config.parallel.tensor
    mixed = (heads + 2 * groups) * sizes.head_dim
    rotated = (heads + groups) * sizes.head_dim
    out = heads * sizes.head_dim
    kept = element * (mixed + rotated + out + 4 * sizes.head_dim) + 4 * heads
    if sizes.qk_norm:
        kept += (heads + groups) * _norm(sizes.head_dim, element, norms)
    return kept


def _mlp(sizes: Sizes, config: Config, rows: int, element: int) -> int:
    """Gate and up in one tensor, silu's result, up's copy, their product: five widths. With experts, that and
    the expert's input and output for every row that is routed here."""
    if not sizes.experts:
        return rows * element * 5 * sizes.ffn // config.parallel.tensor
    routed = rows // (config.parallel.tensor if config.parallel.sequence else 1) * sizes.experts_a_token
    return routed * element * (5 * sizes.ffn + 2 * sizes.hidden)
