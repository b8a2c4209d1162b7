"""Random batches and settings for the packer's tests, and properties that all packings share."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import product

import numpy as np
from hypothesis import strategies as st

from megatron_bicc.packing.pack import pack
from megatron_bicc.packing.types import Chunks, MicroBatch, PackingSettings, RolloutBatch, StepPlan

ENDS = (0, 9)
HEADERS = {"wrong_header": (1, 2), "right_header": (3,), "answer_header": (4, 5, 6)}
FIRST_TOKEN = 10
VOCAB_SIZE = 100_000


@dataclass(frozen=True)
class Rollout:
    """Shape of one rollout of a group."""

    length: int
    right: bool
    ended: bool = False
    """The last token is an end token: the first of ENDS for a right rollout, else the second."""


@dataclass(frozen=True)
class Group:
    """Shape of one group."""

    prompt: int
    rollouts: list[Rollout]


def make_batch(groups: list[Group]) -> RolloutBatch:
    """Returns a batch of those shapes in which no two tokens are equal but for end tokens."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    prompt_offsets_B = offsets([group.prompt for group in groups])
    offsets_R = offsets([rollout.length for rollout in rollouts])
    tokens = np.arange(offsets_R[-1] + prompt_offsets_B[-1], dtype=np.int32) + FIRST_TOKEN
    prompt_tokens, tokens = np.split(tokens, [prompt_offsets_B[-1]])
    for rollout, stop in zip(rollouts, offsets_R[1:], strict=True):
        tokens[stop - 1] = ENDS[not rollout.right] if rollout.ended else tokens[stop - 1]
    return RolloutBatch(
        prompt_tokens=prompt_tokens,
        prompt_offsets_B=prompt_offsets_B,
        tokens=tokens,
        offsets_R=offsets_R,
        group_offsets_B=offsets([len(group.rollouts) for group in groups]),
        rewards_R=np.array([rollout.right for rollout in rollouts], np.float32),
    )


def offsets(lengths: list[int]) -> np.ndarray:
    """Returns the int64 offsets of arrays of those lengths laid end to end."""
    return np.cumsum([0, *lengths], dtype=np.int64)


def make_settings(**changes: object) -> PackingSettings:
    """Returns roomy bilateral settings with `changes`."""
    defaults = {
        "layout": "bilateral",
        "max_sequence_tokens": 1000,
        "max_tokens_per_microbatch": 1000,
        "vocab_size": VOCAB_SIZE,
        "reward_threshold": 0.5,
        "context_ratio": 0.4,
        "context_source": "partition",
        "truncation": "equal",
        "keep": "head",
        "token_cost": 24576,
        "end_token_ids": ENDS,
        **HEADERS,
    }
    return PackingSettings(**{**defaults, **changes})


# One draw a rollout: drawing, not packing, is what the tests spend their time on.
ALL_ROLLOUTS = [Rollout(*shape) for shape in product(range(1, 13), (False, True), (False, True))]
rollouts = st.sampled_from(ALL_ROLLOUTS)
groups = st.builds(Group, st.integers(1, 6), st.lists(rollouts, min_size=2, max_size=5))
group_lists = st.lists(groups, min_size=1, max_size=4)
settings_dicts = st.fixed_dictionaries(
    {
        "layout": st.sampled_from(["bilateral", "bilateral", "plain"]),
        "max_sequence_tokens": st.integers(1, 60),
        "max_tokens_per_microbatch": st.integers(16, 100),
        "context_ratio": st.floats(0, 1),
        "context_source": st.sampled_from(["partition", "pair"]),
        "truncation": st.sampled_from(["equal", "in_order"]),
        "keep": st.sampled_from(["head", "tail", "both_ends"]),
        "wrong_header": st.sampled_from([(), (1, 2)]),
        "answer_header": st.sampled_from([(), (4, 5, 6)]),
        "end_token_ids": st.sampled_from([(), ENDS, ENDS[:1], ENDS[1:]]),
        "overlong": st.sampled_from(["drop", "drop", "error"]),
        "alignment": st.sampled_from([1, 1, 2, 16]),
        "token_cost": st.sampled_from([0, 7]),
        "context_ranks": st.sampled_from([1, 1, 2, 3, 4]),
    }
)


def pack_every_rank(
    batch: RolloutBatch,
    settings: PackingSettings,
    dp_size: int,
    threads: int = 0,
) -> StepPlan:
    """Packs on every rank, as the processes of a run do; returns the plan with all rows filled in.

    A data-parallel rank's micro-batches have the rows of its context ranks together. Asserts that all ranks
    plan the same step and that a rank's micro-batches are those of the plan.
    """
    plan = pack(batch, settings, dp_size, 0, threads).plan
    ranks = []
    for rank in range(dp_size):
        parts = []
        for context_rank in range(settings.context_ranks):
            own = pack(batch, settings, dp_size, rank, threads, context_rank)
            assert_same_plan(own.plan, plan)
            for planned, filled in zip(plan.ranks[rank], own.micro_batches, strict=True):
                assert_same_fields(planned, filled)
                assert filled.context_rank == context_rank
            parts.append(own.micro_batches)
        ranks.append([joined(parts_of_one) for parts_of_one in zip(*parts, strict=True)])
    return replace(plan, ranks=ranks)


def joined(parts: Sequence[MicroBatch]) -> MicroBatch:
    """Returns a micro-batch with the rows of all its context ranks, of which `parts` has one's each.

    Asserts that every row is on one of them and that they are padded with zeros.
    """
    whole = parts[0]
    starts = np.concatenate([whole.cu_prefix[:-1], whole.num_prefix_rows + whole.cu_response[:-1]])
    names = ("tokens_N", "positions_N", "labels_N")
    rows = {name: np.zeros(whole.num_rows, np.int32) for name in names}
    gather_A = np.zeros(whole.num_response_rows, np.int64)
    held = np.zeros(whole.num_prefix_rows + whole.num_response_rows, int)
    for part in parts:
        own = part.chunks[part.context_rank]
        places = [np.arange(n) + starts[s] + a for s, a, n in zip(*chunk_arrays(own), strict=True)]
        at = np.concatenate([np.zeros(0, int), *places])
        np.add.at(held, at, 1)
        for name in names:
            local = getattr(part, name)
            assert len(local) == own.num_rows
            assert not local[len(at) :].any()
            rows[name][at] = local[: len(at)]
        gather_A[at[at >= whole.num_prefix_rows] - whole.num_prefix_rows] = part.gather_A
    assert (held == 1).all()
    return replace(whole, **rows, gather_A=gather_A)


def chunk_arrays(chunks: Chunks) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns segment, first row in it and length of every chunk."""
    return chunks.segment_W, chunks.start_W, chunks.length_W


def micro_batches(plan: StepPlan) -> list[MicroBatch]:
    """Returns the micro-batches of all ranks."""
    return [micro_batch for rank in plan.ranks for micro_batch in rank]


def side_of_segment(micro_batch: MicroBatch) -> np.ndarray:
    """Returns the side of every response segment: int64 [S]."""
    return np.searchsorted(micro_batch.cu_response_side, micro_batch.cu_response[:-1], side="right") - 1


def assert_same_plan(ours: StepPlan, theirs: StepPlan) -> None:
    """Asserts equality to the bit: values, shapes and types."""
    assert ours.stats == theirs.stats
    assert [len(rank) for rank in ours.ranks] == [len(rank) for rank in theirs.ranks]
    for mine, other in zip(micro_batches(ours), micro_batches(theirs), strict=True):
        assert_same_fields(mine, other)
    assert_same_fields(ours.sides, theirs.sides)


def assert_same_fields(ours: object, theirs: object) -> None:
    """Asserts that two dataclasses of arrays and integers are equal to the bit."""
    for field in fields(ours):
        mine, other = getattr(ours, field.name), getattr(theirs, field.name)
        assert type(mine) is type(other), field.name
        if field.name == "chunks":
            assert len(mine) == len(other)
            for own, their in zip(mine, other, strict=True):
                assert_same_fields(own, their)
        elif isinstance(mine, np.ndarray):
            assert (mine.dtype, mine.shape) == (other.dtype, other.shape), field.name
            assert mine.tobytes() == other.tobytes(), (field.name, mine, other)
        else:
            assert mine == other, field.name
