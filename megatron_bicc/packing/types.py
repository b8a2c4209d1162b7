"""What goes into the packer and what comes out of it.

Shape suffixes: G groups, R rollouts, S response segments, T rows of a micro-batch, K channels.
All arrays are C-contiguous NumPy arrays.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from megatron_bicc.config import ContextSource, Keep, OverlongAction, Truncation


@dataclass(frozen=True)
class RolloutBatch:
    """Scored groups as flat arrays; rollouts of a group lie next to each other."""

    prompt_tokens: np.ndarray
    """int32 [sum of prompt lengths]"""
    prompt_offsets_G: np.ndarray
    """int64 [G + 1]"""
    tokens: np.ndarray
    """int32 [sum of response lengths]: the responses, end token included"""
    offsets_R: np.ndarray
    """int64 [R + 1]"""
    group_offsets_G: np.ndarray
    """int64 [G + 1], into the rollouts"""
    rewards_R: np.ndarray
    """float32 [R]"""


@dataclass(frozen=True)
class PackingSettings:
    """How groups become micro-batches; names and meanings are those of megatron_bicc.config."""

    layout: Literal["plain", "bilateral"]
    """plain: prefix = prompt, every rollout a response. bilateral: the two sides of a group."""
    max_sequence_tokens: int
    max_tokens_per_microbatch: int
    vocab_size: int
    """Token ids must be in [0, vocab_size)."""
    contrast_only: bool = False
    """plain layout: leave out groups without both right and wrong rollouts (bilateral always does)."""
    reward_threshold: float = 0.5
    context_ratio: float = 0.4
    """Share of max_sequence_tokens that a context may take, headers included. It gets less, down to nothing,
    where prompt, context and the side's longest response would exceed max_sequence_tokens or a
    micro-batch."""
    context_source: ContextSource = "partition"
    truncation: Truncation = "equal"
    keep: Keep = "head"
    wrong_header: tuple[int, ...] = ()
    """Token ids before each incorrect rollout of a context."""
    right_header: tuple[int, ...] = ()
    answer_header: tuple[int, ...] = ()
    """Token ids after the last rollout of a context."""
    end_token_ids: tuple[int, ...] = ()
    """Tokens that end a response; a trailing one is left out where a rollout stands in a context."""
    overlong: OverlongAction = "error"
    """For a response that, after its prompt, exceeds max_sequence_tokens or a micro-batch."""
    alignment: int = 1
    """Every micro-batch's rows are padded to a multiple of this."""
    token_cost: int = 24576
    """Cost of a row outside attention in units of one query-key pair, for the balance between ranks.
    About 6 x hidden size: 24 h^2 FLOPs of dense layers against 4 h a pair."""


@dataclass(frozen=True)
class MicroBatch:
    """One packed micro-batch, prefix-major: all prefix rows, all response rows, padding.

    A side with prefix P and response o gives prefix rows P[:-1] at positions 0.. and response rows
    [P[-1], o[0], .., o[-2]] at positions |P| - 1 .., whose labels are o[0], .., o[-1].
    A micro-batch without responses exists only to equalise counts between ranks: it is padding only.
    """

    tokens_T: np.ndarray
    """int32 [T]"""
    positions_T: np.ndarray
    """int32 [T]"""
    labels_T: np.ndarray
    """int32 [T]: the next token of the row's own segment; 0 on padding"""
    num_prefix_rows: int
    num_response_rows: int
    cu_seqlens: np.ndarray
    """int32 [sides + S + (1 if padded) + 1]: prefixes, then responses, then the padding segment.
    A one-token prefix makes an empty segment."""
    cu_prefix: np.ndarray
    """int32 [sides + 1]: prefix rows of each side, the keys of the cross attention"""
    cu_response_side: np.ndarray
    """int32 [sides + 1]: response rows of each side, counted from num_prefix_rows, its queries"""
    cu_response: np.ndarray
    """int32 [S + 1]: response rows of each response, counted from num_prefix_rows"""
    rollout_S: np.ndarray
    """int32 [S]: index in the batch of the rollout that each response segment is"""
    group_S: np.ndarray
    """int32 [S]"""
    scale_S: np.ndarray
    """float32 [S]: 1 / number of segments in the whole step that train this rollout (pair source)"""
    gather: np.ndarray
    """int64 [num_response_rows]: index into RolloutBatch.tokens of each response row's label"""
    channels: np.ndarray
    """float32 [K, num_response_rows]: the per-token channels given to the packer, gathered; K may be 0"""
