"""The packer's input and output: a batch of rollouts, its settings, packed micro-batches.

Shape suffixes: B groups, R rollouts, T response tokens of the step; N rows, A response rows and S segments
(responses) of a micro-batch; F features. All arrays are C-contiguous NumPy arrays.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from megatron_bicc.config import ContextSource, Keep, OverlongAction, Truncation

Layout = Literal["plain", "bilateral"]
"""plain: the prefix is the prompt, every rollout of the group is a response. bilateral: two sides per group,
right and wrong, each with rollouts of the other in its prefix (arXiv 2603.13134)."""


@dataclass(frozen=True)
class RolloutBatch:
    """Scored groups as flat arrays; the rollouts of a group are adjacent.

    Offsets run from 0 to the length of the array that they cut; every group, prompt and response has at least
    one item. training.batch.collate ensures both.
    """

    prompt_tokens: np.ndarray
    """int32 [sum of prompt lengths]"""
    prompt_offsets_B: np.ndarray
    """int64 [B + 1]"""
    tokens: np.ndarray
    """int32 [T]: the responses, end token included"""
    offsets_R: np.ndarray
    """int64 [R + 1], into the tokens"""
    group_offsets_B: np.ndarray
    """int64 [B + 1], into the rollouts"""
    rewards_R: np.ndarray
    """float32 [R]"""


@dataclass(frozen=True)
class PackingSettings:
    """Settings of the packer; names and meanings are those of megatron_bicc.config."""

    layout: Layout
    max_sequence_tokens: int
    max_tokens_per_microbatch: int
    vocab_size: int
    """Token ids must be in [0, vocab_size)."""
    reward_threshold: float
    context_ratio: float
    """Share of max_sequence_tokens that a context may take, headers included. It is cut further, down to
    nothing, where prompt, context and the side's longest response would exceed max_sequence_tokens or a
    micro-batch."""
    context_source: ContextSource
    truncation: Truncation
    keep: Keep
    token_cost: int
    """Cost of a row outside attention, in query-key pairs, for the balance between ranks. About 6 x hidden
    size: 24 h^2 FLOPs of dense layers against 4 h per pair."""
    wrong_header: tuple[int, ...] = ()
    """Token ids before each incorrect rollout of a context"""
    right_header: tuple[int, ...] = ()
    answer_header: tuple[int, ...] = ()
    """Token ids after the last rollout of a context"""
    end_token_ids: tuple[int, ...] = ()
    """Tokens that end a response; a context omits a rollout's trailing one."""
    overlong: OverlongAction = "error"
    """Action for a response that, after its prompt, exceeds max_sequence_tokens or a micro-batch"""
    alignment: int = 1
    """Every micro-batch's rows are padded to a multiple of this."""


@dataclass(frozen=True)
class MicroBatchLayout:
    """Boundaries and segments of a micro-batch; every rank has those of all ranks.

    Rows are prefix-major: all prefix rows, all response rows, padding. A micro-batch of padding only
    gives all ranks the same number of micro-batches.
    """

    num_rows: int
    """N, padding included"""
    num_prefix_rows: int
    num_response_rows: int
    """A"""
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
    """int32 [S]: index in the batch of its group"""
    scale_S: np.ndarray
    """float32 [S]: 1 / number of segments in the whole step that train this rollout (pair source)"""


@dataclass(frozen=True)
class MicroBatch(MicroBatchLayout):
    """A micro-batch with its rows.

    A side with prefix P and response o gives prefix rows P[:-1] at positions 0.. and response rows
    [P[-1], o[0], .., o[-2]] at positions |P| - 1 .., whose labels are o[0], .., o[-1].
    """

    tokens_N: np.ndarray
    """int32 [N]"""
    positions_N: np.ndarray
    """int32 [N]"""
    labels_N: np.ndarray
    """int32 [N]: the next token of the row's own segment; 0 on padding"""
    gather_A: np.ndarray
    """int64 [A]: index into RolloutBatch.tokens of each response row's label"""
    features_FA: np.ndarray
    """float32 [F, A]: the per-token features given to the packer, gathered; F may be 0"""
