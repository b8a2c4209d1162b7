"""What goes into the packer and what comes out: rollouts, settings, micro-batches, and the plan of a step.

Shape suffixes: B groups, R rollouts, T response tokens of the batch, D sides; N rows, A response rows and S
response segments of a micro-batch; W chunks of a context rank. All arrays are C-contiguous NumPy arrays.
"""

from dataclasses import dataclass
from itertools import pairwise
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
    """Most rows of a micro-batch on one context rank, padding included"""
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
    """Every context rank's rows of a micro-batch are padded to a multiple of this."""
    context_ranks: int = 1
    """Ranks that share the rows of each micro-batch, which holds so many times max_tokens_per_microbatch."""


@dataclass(frozen=True)
class Chunks:
    """The rows of a micro-batch on one context rank: chunks of segments, by segment, then by start."""

    num_rows: int
    """Padding included"""
    segment_W: np.ndarray
    """int32: number of the segment in the micro-batch: prefixes of all sides, then responses"""
    start_W: np.ndarray
    """int32: first row of the chunk within its segment"""
    length_W: np.ndarray
    """int32, > 0"""

    @classmethod
    def of_whole(cls, lengths: list[int], num_rows: int) -> "Chunks":
        """Returns the only context rank's rows: whole segments of these lengths; empty ones have no chunk."""
        segment_W = np.flatnonzero(lengths).astype(np.int32)
        return cls(num_rows, segment_W, np.zeros_like(segment_W), np.array(lengths, np.int32)[segment_W])


@dataclass(frozen=True)
class MicroBatchLayout:
    """Boundaries and segments of a micro-batch; every rank has those of all ranks.

    Rows are prefix-major: all prefix rows, all response rows, padding. A micro-batch of padding only
    gives all ranks the same number of micro-batches. `chunks` divides the rows over the context ranks; all
    other fields are of the whole micro-batch.
    """

    num_rows: int
    """Of all context ranks together, padding included"""
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
    """int32 [S]: index in the batch of its group"""
    scale_S: np.ndarray
    """float32 [S]: 1 / number of segments in the whole step that train this rollout (pair source)"""
    chunks: tuple[Chunks, ...]
    """The rows of each context rank; every row but padding belongs to one of them"""

    @property
    def segment_rows(self) -> np.ndarray:
        """int64 [sides + S]: rows of each segment: prefixes of all sides, then responses."""
        return np.concatenate([np.diff(self.cu_prefix), np.diff(self.cu_response)]).astype(np.int64)

    @property
    def side_S(self) -> np.ndarray:
        """int64 [S]: the side of each response."""
        return np.searchsorted(self.cu_response_side, self.cu_response[:-1], side="right") - 1

    @property
    def shared_segments(self) -> np.ndarray:
        """bool [sides + S]: segments whose keys other rows may need: prefixes, and those that are cut."""
        rows = self.segment_rows
        shared = np.arange(len(rows)) < len(self.cu_prefix) - 1
        for own in self.chunks:
            shared[own.segment_W[own.length_W < rows[own.segment_W]]] = True
        return shared


@dataclass(frozen=True)
class MicroBatch(MicroBatchLayout):
    """A micro-batch with the rows that one context rank holds: N, of which A of responses.

    Rows of prefix chunks come first, then those of response chunks, then padding.

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
    context_rank: int


@dataclass(frozen=True)
class SideTable:
    """The sides of a step (a prefix and its responses each), before large ones are split."""

    group_D: np.ndarray
    """int64 [D]"""
    part_offsets_D: np.ndarray
    """int64 [D + 1], into parts"""
    parts: np.ndarray
    """int64 [parts, 3]: rollout shown in the context, tokens kept of its head, tokens kept of its tail,
    without a trailing end token"""
    response_offsets_D: np.ndarray
    """int64 [D + 1], into responses"""
    responses: np.ndarray
    """int64 [responses]: rollouts trained under the side's prefix"""


@dataclass(frozen=True)
class ContextPart:
    """The part of one rollout that a context shows."""

    rollout: int
    ranges: tuple[tuple[int, int], ...]
    """Kept tokens, each [start, stop) within the rollout."""


@dataclass(frozen=True)
class Context:
    """The prefix under which a rollout is trained."""

    group: int
    parts: tuple[ContextPart, ...]
    prefix_tokens: np.ndarray
    """int32 [prefix length]: prompt, then the parts with their headers and the answer header."""


@dataclass(frozen=True)
class StepPlan:
    """Micro-batches of a step for every data-parallel rank."""

    ranks: list[list[MicroBatchLayout]]
    """Equal in number, costliest first; empty lists if nothing is trained"""
    stats: dict[str, float]
    """Keys: megatron_bicc.packing.types.step_stats."""
    sides: SideTable
    batch: RolloutBatch
    settings: PackingSettings

    def contexts(self, rollout: int) -> list[Context]:
        """Returns the prefixes that `rollout` (index in the batch) is trained under.

        One for the plain layout and the partition source, one per opposite rollout for the pair source,
        none for a rollout that is not trained.
        """
        places = np.flatnonzero(self.sides.responses == rollout)
        sides = np.searchsorted(self.sides.response_offsets_D, places, side="right") - 1
        return [self._context(int(side)) for side in sides]

    def _context(self, side: int) -> Context:
        start, stop = self.sides.part_offsets_D[side : side + 2]
        parts = tuple(self._part(*part) for part in self.sides.parts[start:stop].tolist())
        group = int(self.sides.group_D[side])
        return Context(group, parts, prefix_tokens(self.batch, self.settings, group, parts))

    def _part(self, rollout: int, head: int, tail: int) -> ContextPart:
        length = attempt_length(self.batch, self.settings, rollout)
        if head + tail == length:
            return ContextPart(rollout, ((0, length),))
        ranges = ((0, head), (length - tail, length))
        return ContextPart(rollout, tuple((start, stop) for start, stop in ranges if start < stop))


def attempt_length(batch: RolloutBatch, settings: PackingSettings, rollout: int) -> int:
    """Returns the length of a rollout inside a context: without a trailing end token."""
    start, stop = batch.offsets_R[rollout : rollout + 2].tolist()
    return stop - start - int(batch.tokens[stop - 1] in settings.end_token_ids)


def is_right(batch: RolloutBatch, settings: PackingSettings, rollout: int) -> bool:
    """Returns whether a rollout is correct; the threshold is compared in float32, as the rewards are."""
    return bool(batch.rewards_R[rollout] > np.float32(settings.reward_threshold))


def prefix_tokens(
    batch: RolloutBatch, settings: PackingSettings, group: int, parts: tuple[ContextPart, ...]
) -> np.ndarray:
    """Returns the prompt followed by the context made of `parts`: int32 [prefix length]."""
    start, stop = batch.prompt_offsets_B[group : group + 2]
    tokens = batch.prompt_tokens[start:stop].tolist()
    for part in parts:
        right = is_right(batch, settings, part.rollout)
        tokens += settings.right_header if right else settings.wrong_header
        first = int(batch.offsets_R[part.rollout])
        for begin, end in part.ranges:
            tokens += batch.tokens[first + begin : first + end].tolist()
    return np.array(tokens + list(settings.answer_header if parts else ()), np.int32)


def step_stats(counts: dict[str, int], rank_costs: list[int], settings: PackingSettings) -> dict[str, float]:
    """Returns `counts` and the two quality ratios of a packing, fill and imbalance.

    Args:
        counts: tokens_packed (rows without padding), tokens_prefix (those of prefixes), tokens_rows (rows
            of the same training at one row per response: sum of |prefix| + |response|),
            tokens_context (context tokens, each side once), overlong_dropped (response segments),
            groups_skipped (without contrast), microbatches (without those of padding only).
        rank_costs: cost of each context rank of each data-parallel rank, in query-key pairs.
        settings: gives the token budget of a micro-batch.

    Returns:
        counts, fill (rows over the budget of these micro-batches) and imbalance (largest over mean cost of a
        rank, data-parallel and context ranks alike); both ratios are 1 if nothing is trained.
    """
    budget = counts["microbatches"] * settings.context_ranks * settings.max_tokens_per_microbatch
    total = sum(rank_costs)
    return {
        **counts,
        "fill": counts["tokens_packed"] / budget if budget else 1.0,
        "imbalance": max(rank_costs) * len(rank_costs) / total if total else 1.0,
    }


@dataclass(frozen=True)
class PackedSide:
    """A prefix and its responses within one micro-batch."""

    group: int
    prefix_rows: int
    rollouts: tuple[int, ...]
    """Index in the batch of each response's rollout"""
    response_rows: tuple[int, ...]
    """Rows of each response"""


def packed_sides(micro_batch: MicroBatchLayout) -> list[PackedSide]:
    """Returns the sides of a micro-batch in the order of their rows."""
    prefix_rows = np.diff(micro_batch.cu_prefix).tolist()
    response_rows = np.diff(micro_batch.cu_response)
    # segments of side d: those that begin at or after its first response row, before the next side's
    first = np.searchsorted(micro_batch.cu_response[:-1], micro_batch.cu_response_side)
    return [
        PackedSide(
            group=int(micro_batch.group_S[start]),
            prefix_rows=rows,
            rollouts=tuple(micro_batch.rollout_S[start:stop].tolist()),
            response_rows=tuple(response_rows[start:stop].tolist()),
        )
        for rows, (start, stop) in zip(prefix_rows, pairwise(first.tolist()), strict=True)
    ]
