"""Which tokens' experts the rows of a micro-batch replay (model.routing_replay; docs/policy.md).

A table of experts has a row for every token that was read to sample a response, whatever the packing. Rows of
a micro-batch find theirs by the token that they read; a row without one, such as a context's, has the last.

Shape suffixes: N rows of a micro-batch, B groups, R rollouts, T response tokens. L and K in text: layers;
experts per token.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_bicc import device
from megatron_bicc.model.families import free_mark
from megatron_bicc.model.packed_batch import PackedBatch
from megatron_bicc.packing.types import MicroBatchLayout, PackedSide, RolloutBatch, StepPlan, packed_sides
from megatron_bicc.rollout.types import Group

FREE = -1
"""Row of a table, its last: of a token that no engine or earlier pass has read, `free_mark` throughout"""


@dataclass(frozen=True)
class TokenRows:
    """The rows of a table of experts.

    First the T tokens that were read to sample each response token: a response's first is the prompt's last
    token. Then every prompt's other tokens, group by group. Then FREE.
    """

    rollouts: RolloutBatch

    @property
    def count(self) -> int:
        """Number of rows."""
        r = self.rollouts
        return len(r.tokens) + len(r.prompt_tokens) - (len(r.prompt_offsets_B) - 1) + 1

    def prompt(self, group: int) -> np.ndarray:
        """Returns the rows of a prompt's tokens but its last: int64 [P - 1]."""
        start, stop = self.rollouts.prompt_offsets_B[group : group + 2]
        first = len(self.rollouts.tokens) - group
        return np.arange(first + start, first + stop - 1)

    def response(self, rollout: int) -> np.ndarray:
        """Returns the rows of a response: int64 [its tokens]."""
        return np.arange(*self.rollouts.offsets_R[rollout : rollout + 2])

    def of(self, layout: MicroBatchLayout, context_rank: int) -> np.ndarray:
        """Returns the table's row of each row of a micro-batch that a context rank holds: int64 [N]."""
        return _held(self.segments(layout), layout, context_rank)

    def segments(self, layout: MicroBatchLayout) -> list[np.ndarray]:
        """Returns the table's rows of each segment of a micro-batch, prefixes before responses.

        A context is FREE, and so is the first row of a response after one, which reads its last token: no
        engine has read them. The response's other tokens have theirs, although the engine read them without
        the context: numerator and denominator of the ratio then pass the same experts.
        """
        sides = packed_sides(layout)
        responses = [rows for side in sides for rows in self._responses(side)]
        return [*map(self._prefix, sides), *responses]

    def _prefix(self, side: PackedSide) -> np.ndarray:
        """Returns the rows of a prefix but its last token."""
        prompt = self.prompt(side.group)
        if side.prefix_rows > len(prompt):  # the prompt's last token is followed by a context
            first = self.rollouts.group_offsets_B[side.group]
            prompt = np.append(prompt, self.rollouts.offsets_R[first])
        return np.append(prompt, np.full(side.prefix_rows - len(prompt), FREE))

    def _responses(self, side: PackedSide) -> list[np.ndarray]:
        found = [self.response(rollout) for rollout in side.rollouts]
        if side.prefix_rows > len(self.prompt(side.group)):
            for rows in found:
                rows[0] = FREE
        return found


def engine_table(groups: list[Group], rollouts: RolloutBatch) -> np.ndarray | None:
    """Returns the table of the experts that the engine chose: [rows, L, K]; None if samples have none.

    Raises ValueError if only some have, or not for every token.
    """
    samples = [sample for group in groups for sample in group.samples]
    parts = [sample.experts for sample in samples]
    if all(part is None for part in parts):
        return None
    parts += [group.samples[0].prompt_experts for group in groups]
    rows = TokenRows(rollouts)
    lengths = [*np.diff(rollouts.offsets_R), *(np.diff(rollouts.prompt_offsets_B) - 1)]
    for place, (part, length) in enumerate(zip(parts, lengths, strict=True)):
        if part is None or len(part) != length:
            what = f"rollout {place}" if place < len(samples) else f"prompt of group {place - len(samples)}"
            raise ValueError(
                f"{what} has {length} tokens with experts, not {0 if part is None else len(part)}"
            )
    table = np.empty((rows.count, *parts[0].shape[1:]), parts[0].dtype)
    np.concatenate(parts, out=table[:FREE])
    table[FREE] = np.iinfo(table.dtype).max
    return table


def select_experts(table: np.ndarray, rollouts: RolloutBatch, groups: np.ndarray) -> np.ndarray:
    """Returns the table of the given groups, in their order."""
    rows, offsets_B = TokenRows(rollouts), rollouts.group_offsets_B
    members = [r for b in groups for r in range(offsets_B[b], offsets_B[b + 1])]
    chosen = [*map(rows.response, members), *map(rows.prompt, groups), np.array([FREE])]
    return table[np.concatenate(chosen)]


def with_engine_experts(
    plan: StepPlan, batches: list[PackedBatch], table: np.ndarray, layers: list[int]
) -> list[PackedBatch]:
    """Returns this rank's micro-batches of a plan with the engine's experts, uploaded in one copy.

    table: engine_table of the plan's batch. layers: numbers of this pipeline stage's layers.
    """
    rows = TokenRows(plan.batch)
    experts = [table[_routed(rows.of(layout, _context_rank()))][:, layers] for layout in _own_layouts(plan)]
    uploaded = device.upload(experts, device.device())
    return [replace(packed, experts=own) for packed, own in zip(batches, uploaded, strict=True)]


def with_recorded_experts(
    plan: StepPlan, batches: list[PackedBatch], earlier: StepPlan, recorded: list[Tensor]
) -> list[PackedBatch]:
    """Returns this rank's micro-batches of a plan with the experts of a pass over another plan. Collective.

    earlier: the other plan, in the plain layout, which has every response once. recorded: the experts of this
    rank's micro-batches in that pass (Policy.recorded_experts).
    """
    rows = TokenRows(plan.batch)
    sources = _sources(earlier)
    targets = [_routed(rows.of(layout, _context_rank())) for layout in _own_layouts(plan)]
    indices = device.upload([*sources, *targets], device.device())
    table = recorded[0].new_zeros(rows.count, *recorded[0].shape[1:])
    for index, experts in zip(indices[: len(sources)], recorded, strict=True):
        table[index] = experts
    table[FREE] = 0
    # Every row comes from one rank, so a sum of bytes is exact; NCCL has no 16-bit integers.
    group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
    dist.all_reduce(table.view(torch.uint8), group=group)
    table[FREE] = free_mark(table.dtype)
    wanted = [table[index] for index in indices[len(sources) :]]
    return [replace(packed, experts=own) for packed, own in zip(batches, wanted, strict=True)]


def _sources(plan: StepPlan) -> list[np.ndarray]:
    """Returns the table's row of each of this rank's rows, by micro-batch of a plan in the plain layout.

    A prompt whose responses are in several micro-batches has its rows from the first, on one rank.
    """
    rows, seen, found = TokenRows(plan.batch), set[int](), []
    for rank, layouts in enumerate(plan.ranks):
        for layout in layouts:
            segments = rows.segments(layout)
            for prefix, side in zip(segments, packed_sides(layout), strict=False):
                if side.group in seen:
                    prefix[:] = FREE
                seen.add(side.group)
            if rank == parallel_state.get_data_parallel_rank():
                found.append(_routed(_held(segments, layout, _context_rank())))
    return found


def _own_layouts(plan: StepPlan) -> list[MicroBatchLayout]:
    return plan.ranks[parallel_state.get_data_parallel_rank()]


def _context_rank() -> int:
    return parallel_state.get_context_parallel_rank()


def _routed(held_N: np.ndarray) -> np.ndarray:
    """Returns the part of its context rank's rows that this rank routes: sequence parallel divides them."""
    size = parallel_state.get_tensor_model_parallel_world_size()
    return np.split(held_N, size)[parallel_state.get_tensor_model_parallel_rank()]


def _held(segments: list[np.ndarray], layout: MicroBatchLayout, context_rank: int) -> np.ndarray:
    """Returns what segments say of the rows that a context rank holds, FREE for padding: int64 [N]."""
    own = layout.chunks[context_rank]
    chunks = zip(own.segment_W, own.start_W, own.length_W, strict=True)
    parts = [segments[segment][start : start + length] for segment, start, length in chunks]
    held = np.concatenate([*parts, np.zeros(0, np.int64)])
    return np.concatenate([held, np.full(own.num_rows - len(held), FREE)])
