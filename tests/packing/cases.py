"""Random batches and settings for the packer's tests, and properties that all packings share."""

from dataclasses import dataclass, fields, replace
from itertools import product

import numpy as np
from hypothesis import strategies as st

from megatron_bicc.packing.pack import pack
from megatron_bicc.packing.types import MicroBatch, PackingSettings, RolloutBatch, StepPlan

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
    }
)


def pack_every_rank(
    batch: RolloutBatch,
    settings: PackingSettings,
    dp_size: int,
    threads: int = 0,
) -> StepPlan:
    """Packs on every rank, as the processes of a run do; returns the plan with each rank's rows filled in.

    Asserts that all ranks plan the same step and that a rank's micro-batches are those of the plan.
    """
    packed = [pack(batch, settings, dp_size, 0, threads)]
    packed += [pack(batch, settings, dp_size, rank, threads) for rank in range(1, dp_size)]
    for rank, own in enumerate(packed):
        assert_same_plan(own.plan, packed[0].plan)
        for planned, filled in zip(own.plan.ranks[rank], own.micro_batches, strict=True):
            assert_same_fields(planned, filled)
            rows = [filled.tokens_N, filled.positions_N, filled.labels_N]
            assert {len(array) for array in rows} == {planned.num_rows}
            assert len(filled.gather_A) == planned.num_response_rows
    return replace(packed[0].plan, ranks=[own.micro_batches for own in packed])


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
        if isinstance(mine, np.ndarray):
            assert (mine.dtype, mine.shape) == (other.dtype, other.shape), field.name
            assert mine.tobytes() == other.tobytes(), (field.name, mine, other)
        else:
            assert mine == other, field.name
