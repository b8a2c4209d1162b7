"""The plan of a step: the micro-batches of every rank, and the prefix that each response is trained under.

Shape suffixes: B groups, R rollouts, S segments, D sides.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from megatron_bicc.packing.types import MicroBatchLayout, PackingSettings, RolloutBatch


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
    """Keys: megatron_bicc.packing.plan.step_stats."""
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
        rank_costs: cost of each rank's micro-batches, in query-key pairs.
        settings: gives the token budget of a micro-batch.

    Returns:
        counts, fill (rows over the budget of these micro-batches) and imbalance (largest over mean cost of a
        rank); both ratios are 1 if nothing is trained.
    """
    budget = counts["microbatches"] * settings.max_tokens_per_microbatch
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
