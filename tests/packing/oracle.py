"""The packer's oracle: slow, obvious, and equal to csrc to the bit.

It takes the same arguments as `pack` and checks nothing but overlong responses. It chooses a side's context
one token at a time and builds micro-batches from Python lists.
"""

from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np

from megatron_bicc.packing.types import (
    Chunks,
    ContextPart,
    MicroBatch,
    PackingSettings,
    RolloutBatch,
    SideTable,
    StepPlan,
    attempt_length,
    is_right,
    prefix_tokens,
    step_stats,
)

PAIR_CANDIDATES = 32
"""First partners tried for a pair, as in csrc/binpack.cpp."""
WHOLE = 8
"""A segment of more than this part of a context rank's mean cost is cut, as in csrc/divide.cpp."""


def make_bins(rows: list[int], budget: int, dp_size: int) -> list[list[int]]:
    """Returns bins of pieces (indices into `rows`), a multiple of `dp_size` of them.

    One rank takes as few bins as the search finds. Several ranks share that number, rounded up, evenly: the
    budget shrinks, by bisection, as long as the bins suffice.
    """
    bins = fill_bins(rows, budget)
    if dp_size == 1 or not bins:
        return bins
    wanted = -(-len(bins) // dp_size) * dp_size
    low, high = max(max(rows), -(-sum(rows) // wanted)), budget
    while low < high:
        middle = (low + high) // 2
        if len(fill_bins(rows, middle)) <= wanted:
            high = middle
        else:
            low = middle + 1
    bins = fill_bins(rows, high)
    return bins + [[] for _ in range(wanted - len(bins))]


def fill_bins(rows: list[int], limit: int) -> list[list[int]]:
    """Returns bins of pieces: each starts with the largest left and takes what fills its gap best."""
    left = sorted(range(len(rows)), key=lambda piece: (-rows[piece], piece))
    bins = []
    while left:
        bin_ = [left.pop(0)]
        while chosen := best_choice(rows, left, limit - sum(rows[piece] for piece in bin_)):
            bin_ += chosen
            left = [piece for piece in left if piece not in chosen]
        bins.append(bin_)
    return bins


def best_choice(rows: list[int], left: list[int], gap: int) -> list[int]:
    """Returns the piece, or the pair with one of the first PAIR_CANDIDATES pieces, that fills `gap` best."""
    fitting = [piece for piece in left if rows[piece] <= gap]
    best = fitting[:1]
    for i, first in enumerate(fitting[:PAIR_CANDIDATES]):
        for second in fitting[i + 1 :]:
            if rows[first] + rows[second] <= gap:
                if rows[first] + rows[second] > sum(rows[piece] for piece in best):
                    best = [first, second]
                break
    return best


def assign_to_ranks(costs: list[int], dp_size: int) -> list[list[int]]:
    """Returns the bins of each rank: costliest first, to the cheapest rank that has a slot left."""
    ranks: list[list[int]] = [[] for _ in range(dp_size)]
    for b in sorted(range(len(costs)), key=lambda b: (-costs[b], b)):
        open_ranks = [rank for rank in ranks if len(rank) < len(costs) // dp_size]
        min(open_ranks, key=lambda rank: sum(costs[other] for other in rank)).append(b)
    return ranks


def divide(lengths: list[int], prefix_rows: list[int], settings: PackingSettings) -> list[list[int]]:
    """Returns the context rank of every row of every segment of a micro-batch.

    lengths: of the segments. prefix_rows: those that the segment's rows see besides their own segment.
    """
    ranks, capacity = range(settings.context_ranks), rank_capacity(settings)
    costs = [
        [settings.token_cost + prefix + row + 1 for row in range(length)]
        for length, prefix in zip(lengths, prefix_rows, strict=True)
    ]
    largest_whole = sum(map(sum, costs)) // (WHOLE * len(ranks))
    owners: list[list[int]] = [[] for _ in lengths]
    used, spent = [0 for _ in ranks], [0 for _ in ranks]
    for segment in sorted(range(len(lengths)), key=lambda s: (-sum(costs[s]), s)):
        length = lengths[segment]
        fitting = [rank for rank in ranks if used[rank] + length <= capacity]
        if sum(costs[segment]) <= largest_whole and fitting:
            owners[segment] = [min(fitting, key=lambda rank: spent[rank])] * length
        else:
            owners[segment] = cut(length, used, capacity)
        for rank, cost in zip(owners[segment], costs[segment], strict=True):
            used[rank] += 1
            spent[rank] += cost
    return owners


def cut(length: int, used: list[int], capacity: int) -> list[int]:
    """Returns the rank of every row of a segment: two chunks a rank, the first from either end, and so on.

    Row by row, the rank that has fewest of the segment gets one more, if it has room; then the emptier one.
    """
    ranks = range(len(used))
    shares = [0 for _ in ranks]
    for _ in range(length):
        open_ranks = [rank for rank in ranks if used[rank] + shares[rank] < capacity]
        shares[min(open_ranks, key=lambda rank: (shares[rank], used[rank], -rank))] += 1
    early = [rank for rank in ranks for _ in range((shares[rank] + 1) // 2)]
    return early + [rank for rank in reversed(ranks) for _ in range(shares[rank] // 2)]


def rank_capacity(settings: PackingSettings) -> int:
    """Returns the most rows of a micro-batch that one context rank may hold."""
    return settings.max_tokens_per_microbatch // settings.alignment * settings.alignment


def chunks_of_rank(owners: list[list[int]], rank: int, alignment: int) -> Chunks:
    """Returns the rows of one context rank, given that of every row of every segment."""
    found = []
    for segment, owner_of_row in enumerate(owners):
        start = 0
        for owner, rows in groupby(owner_of_row):
            length = len(list(rows))
            if owner == rank:
                found.append((segment, start, length))
            start += length
    segment_W, start_W, length_W = np.array(found, np.int32).reshape(-1, 3).T
    rows = max(1, int(length_W.sum()))
    return Chunks(-(-rows // alignment) * alignment, segment_W, start_W, length_W)


def rows_of_rank(whole: MicroBatch, context_rank: int) -> MicroBatch:
    """Returns the micro-batch with the rows of one context rank, picked from those of all."""
    own = whole.chunks[context_rank]
    starts = np.concatenate([whole.cu_prefix[:-1], whole.num_prefix_rows + whole.cu_response[:-1]])
    rows: list[int] = []
    for segment, start, length in zip(own.segment_W, own.start_W, own.length_W, strict=True):
        rows += range(starts[segment] + start, starts[segment] + start + length)
    padding = [0] * (own.num_rows - len(rows))
    response_rows = [row - whole.num_prefix_rows for row in rows if row >= whole.num_prefix_rows]
    return replace(
        whole,
        context_rank=context_rank,
        tokens_N=np.array([*whole.tokens_N[rows], *padding], np.int32),
        positions_N=np.array([*whole.positions_N[rows], *padding], np.int32),
        labels_N=np.array([*whole.labels_N[rows], *padding], np.int32),
        gather_A=whole.gather_A[response_rows],
    )


@dataclass
class Side:
    """A prefix and the rollouts trained under it; `parts` are (rollout, head, tail) as in SideTable."""

    group: int
    parts: list[tuple[int, int, int]]
    prefix: list[int]
    rollouts: list[int]


def pack_reference(batch: RolloutBatch, settings: PackingSettings, dp_size: int) -> StepPlan:
    """Does what megatron_bicc.packing.pack does on every rank, with the same result to the bit.

    plan.ranks holds MicroBatches with the rows of all context ranks; rows_of_rank picks those of one.

    Args:
        batch: the scored groups.
        settings: layout, contexts and budgets.
        dp_size: number of data-parallel ranks.

    Raises:
        ValueError: a response is overlong and settings.overlong is "error".
    """
    return _Packer(batch, settings).pack(dp_size)


class _Packer:
    def __init__(self, batch: RolloutBatch, settings: PackingSettings):
        self.batch = batch
        self.settings = settings
        self.budget = settings.context_ranks * rank_capacity(settings)
        self.dropped = 0
        self.skipped = 0

    def pack(self, dp_size: int) -> StepPlan:
        groups = range(len(self.batch.group_offsets_B) - 1)
        sides = [side for group in groups for side in self.sides_of(group)]
        pieces = [piece for side in sides for piece in self.split(side)]
        bins = make_bins([self.rows(piece) for piece in pieces], self.budget, dp_size)
        costs = [sum(self.cost(pieces[p]) for p in bin_) for bin_ in bins]
        rank_bins = assign_to_ranks(costs, dp_size)
        trained = [r for piece in pieces for r in piece.rollouts]
        segments = np.bincount(trained, minlength=len(self.batch.rewards_R))
        ranks = [
            [self.micro_batch([pieces[p] for p in sorted(bins[b])], segments) for b in rank]
            for rank in rank_bins
        ]
        rank_costs = [
            sum(self.cost_of_rank(micro_batch, context_rank) for micro_batch in rank)
            for rank in ranks
            for context_rank in range(self.settings.context_ranks)
        ]
        stats = step_stats(self.counts(sides, pieces, ranks), rank_costs, self.settings)
        return StepPlan(ranks, stats, side_table(sides), self.batch, self.settings)

    def sides_of(self, group: int) -> list[Side]:
        rollouts = list(range(*self.batch.group_offsets_B[group : group + 2].tolist()))
        right = [r for r in rollouts if is_right(self.batch, self.settings, r)]
        wrong = [r for r in rollouts if r not in right]
        bilateral = self.settings.layout == "bilateral"
        if not (right and wrong) and bilateral:
            self.skipped += 1
            return []
        if not bilateral:
            wanted = [(rollouts, [])]
        elif self.settings.context_source == "partition":
            wanted = [(right, wrong), (wrong, right)]
        else:
            wanted = [(right, [w]) for w in wrong] + [(wrong, [r]) for r in right]
        sides = [self.side(group, trained, shown) for trained, shown in wanted]
        return [side for side in sides if side.rollouts]

    def side(self, group: int, trained: list[int], shown: list[int]) -> Side:
        prompt = len(prefix_tokens(self.batch, self.settings, group, ()))
        rollouts = self.without_overlong(trained, prompt)
        if not rollouts:
            return Side(group, [], [], [])
        share = int(self.settings.context_ratio * self.settings.max_sequence_tokens)
        longest_sequence = min(self.settings.max_sequence_tokens, self.budget + 1)
        room = longest_sequence - prompt - max(map(self.length, rollouts))
        parts = self.context(shown, min(share, room))
        return Side(group, parts, self.prefix(group, parts), rollouts)

    def length(self, rollout: int) -> int:
        return int(self.batch.offsets_R[rollout + 1] - self.batch.offsets_R[rollout])

    def without_overlong(self, rollouts: list[int], prompt: int) -> list[int]:
        overlong = {}
        for r in rollouts:
            if prompt + self.length(r) > self.settings.max_sequence_tokens:
                overlong[r] = "max_sequence_tokens"
            elif prompt - 1 + self.length(r) > self.budget:
                overlong[r] = "max_tokens_per_microbatch"
        if overlong and self.settings.overlong == "error":
            r, setting = next(iter(overlong.items()))
            group = int(np.searchsorted(self.batch.group_offsets_B, r, side="right")) - 1
            limit = f"{setting} {getattr(self.settings, setting)}"
            if setting == "max_tokens_per_microbatch" and self.settings.context_ranks > 1:
                limit += f" on each of {self.settings.context_ranks} context ranks"
            raise ValueError(
                f"group {group}, rollout {r}: a prompt of {prompt} and a response of {self.length(r)} tokens "
                f"exceed {limit}; raise it, or set overlong to drop"
            )
        self.dropped += len(overlong)
        return [r for r in rollouts if r not in overlong]

    def context(self, shown: list[int], budget: int) -> list[tuple[int, int, int]]:
        wanted = {r: attempt_length(self.batch, self.settings, r) for r in shown}
        wanted = {r: length for r, length in wanted.items() if length > 0}
        left = budget - len(self.settings.answer_header)
        kept: dict[int, int] = {}
        if self.settings.truncation == "equal":
            self.share_equally(wanted, left, kept)
        else:
            self.fill_in_order(wanted, left, kept)
        return [(r, *self.head_and_tail(n)) for r, n in kept.items()]

    def header(self, rollout: int) -> int:
        right = is_right(self.batch, self.settings, rollout)
        return len(self.settings.right_header if right else self.settings.wrong_header)

    def share_equally(self, wanted: dict[int, int], left: int, kept: dict[int, int]) -> None:
        for r in wanted:
            if left < self.header(r) + 1:
                break
            kept[r] = 1
            left -= self.header(r) + 1
        while left > 0 and any(kept[r] < wanted[r] for r in kept):
            for r in kept:
                if left > 0 and kept[r] < wanted[r]:
                    kept[r] += 1
                    left -= 1

    def fill_in_order(self, wanted: dict[int, int], left: int, kept: dict[int, int]) -> None:
        for r, length in wanted.items():
            if left < self.header(r) + 1:
                break
            kept[r] = min(length, left - self.header(r))
            left -= self.header(r) + kept[r]

    def head_and_tail(self, kept: int) -> tuple[int, int]:
        tail = {"head": 0, "tail": kept, "both_ends": kept // 2}[self.settings.keep]
        return kept - tail, tail

    def prefix(self, group: int, parts: list[tuple[int, int, int]]) -> list[int]:
        shown = []
        for rollout, head, tail in parts:
            length = attempt_length(self.batch, self.settings, rollout)
            shown.append(ContextPart(rollout, ((0, head), (length - tail, length))))
        return prefix_tokens(self.batch, self.settings, group, tuple(shown)).tolist()

    def rows(self, piece: Side) -> int:
        return len(piece.prefix) - 1 + sum(map(self.length, piece.rollouts))

    def cost(self, piece: Side) -> int:
        prefix = len(piece.prefix) - 1
        pairs = prefix * (prefix + 1) // 2
        for length in map(self.length, piece.rollouts):
            pairs += length * prefix + length * (length + 1) // 2
        return self.settings.token_cost * self.rows(piece) + pairs

    def split(self, side: Side) -> list[Side]:
        if self.rows(side) <= self.budget:
            return [side]
        shares: list[list[int]] = []
        for rollout in sorted(side.rollouts, key=lambda r: (-self.length(r), r)):
            for share in shares:
                if self.rows(Side(side.group, [], side.prefix, [*share, rollout])) <= self.budget:
                    share.append(rollout)
                    break
            else:
                shares.append([rollout])
        return [Side(side.group, side.parts, side.prefix, sorted(share)) for share in shares]

    def micro_batch(self, sides: list[Side], segments: np.ndarray) -> MicroBatch:
        tokens, positions, labels, gather = [], [], [], []
        cu_seqlens, cu_prefix, cu_side, cu_response, rollouts, groups = [0], [0], [0], [0], [], []
        for side in sides:
            tokens += side.prefix[:-1]
            labels += side.prefix[1:]
            positions += range(len(side.prefix) - 1)
            cu_prefix.append(len(tokens))
            cu_seqlens.append(len(tokens))
        prefix_rows = len(tokens)
        for side in sides:
            for r in side.rollouts:
                start, stop = self.batch.offsets_R[r : r + 2].tolist()
                response = self.batch.tokens[start:stop].tolist()
                tokens += side.prefix[-1:] + response[:-1]
                labels += response
                positions += range(len(side.prefix) - 1, len(side.prefix) - 1 + len(response))
                gather += range(start, stop)
                cu_seqlens.append(len(tokens))
                cu_response.append(len(gather))
                rollouts.append(r)
                groups.append(side.group)
            cu_side.append(len(gather))
        chunks = self.chunks(sides)
        padding = sum(rank.num_rows for rank in chunks) - len(tokens)
        if padding:
            cu_seqlens.append(len(tokens) + padding)
        return MicroBatch(
            num_rows=len(tokens) + padding,
            tokens_N=np.array(tokens + [0] * padding, np.int32),
            positions_N=np.array(positions + [0] * padding, np.int32),
            labels_N=np.array(labels + [0] * padding, np.int32),
            num_prefix_rows=prefix_rows,
            num_response_rows=len(gather),
            cu_seqlens=np.array(cu_seqlens, np.int32),
            cu_prefix=np.array(cu_prefix, np.int32),
            cu_response_side=np.array(cu_side, np.int32),
            cu_response=np.array(cu_response, np.int32),
            rollout_S=np.array(rollouts, np.int32),
            group_S=np.array(groups, np.int32),
            scale_S=np.float32(1) / segments[rollouts].astype(np.float32),
            gather_A=np.array(gather, np.int64),
            chunks=chunks,
            context_rank=0,
        )

    def chunks(self, sides: list[Side]) -> tuple[Chunks, ...]:
        prefixes = [len(side.prefix) - 1 for side in sides]
        responses = [(self.length(r), len(side.prefix) - 1) for side in sides for r in side.rollouts]
        lengths = prefixes + [length for length, _ in responses]
        owners = divide(lengths, [0 for _ in sides] + [prefix for _, prefix in responses], self.settings)
        ranks = range(self.settings.context_ranks)
        return tuple(chunks_of_rank(owners, rank, self.settings.alignment) for rank in ranks)

    def cost_of_rank(self, micro_batch: MicroBatch, context_rank: int) -> int:
        rows = rows_of_rank(micro_batch, context_rank)
        own = rows.chunks[context_rank]
        # a row sees as many rows as its position says, and itself
        seen = rows.positions_N[: own.length_W.sum()].astype(np.int64) + 1
        return int((self.settings.token_cost + seen).sum())

    def counts(self, sides: list[Side], pieces: list[Side], ranks: list[list[MicroBatch]]) -> dict[str, int]:
        responses = [(side, r) for side in sides for r in side.rollouts]
        prompt_tokens = [len(prefix_tokens(self.batch, self.settings, side.group, ())) for side in sides]
        return {
            "tokens_packed": sum(map(self.rows, pieces)),
            "tokens_prefix": sum(len(piece.prefix) - 1 for piece in pieces),
            "tokens_rows": sum(len(side.prefix) + self.length(r) for side, r in responses),
            "tokens_context": sum(len(side.prefix) for side in sides) - sum(prompt_tokens),
            "overlong_dropped": self.dropped,
            "groups_skipped": self.skipped,
            "microbatches": sum(micro_batch.num_response_rows > 0 for rank in ranks for micro_batch in rank),
        }


def side_table(sides: list[Side]) -> SideTable:
    """Returns the flat form of `sides`."""
    return SideTable(
        group_D=np.array([side.group for side in sides], np.int64),
        part_offsets_D=np.cumsum([0, *(len(side.parts) for side in sides)], dtype=np.int64),
        parts=np.array([part for side in sides for part in side.parts], np.int64).reshape(-1, 3),
        response_offsets_D=np.cumsum([0, *(len(side.rollouts) for side in sides)], dtype=np.int64),
        responses=np.array([r for side in sides for r in side.rollouts], np.int64),
    )
