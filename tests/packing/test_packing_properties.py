"""Tests properties of every batch: the C++ packer against its oracle and the definition of the layout."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal as assert_equal
from packing.cases import (
    assert_same_fields,
    assert_same_plan,
    chunk_arrays,
    group_lists,
    make_batch,
    make_settings,
    micro_batches,
    offsets,
    pack_every_rank,
    settings_dicts,
    side_of_segment,
)
from packing.oracle import pack_reference

from megatron_bicc.packing.pack import pack, plan_step
from megatron_bicc.packing.types import Chunks, MicroBatch, PackingSettings, RolloutBatch, StepPlan

many = settings(max_examples=2000, deadline=None, derandomize=True)
some = settings(max_examples=250, deadline=None, derandomize=True)
ranks = st.integers(1, 4)


@many
@given(group_lists, settings_dicts, ranks, st.integers(0, 4))
def test_equals_the_oracle_to_the_bit(groups, changes, dp_size, threads):
    batch, config = make_batch(groups), make_settings(**changes)
    try:
        expected = pack_reference(batch, config, dp_size)
    except ValueError as error:
        with pytest.raises(ValueError) as raised:
            pack_every_rank(batch, config, dp_size, threads)
        assert str(raised.value) == str(error)
        return
    assert_same_plan(pack_every_rank(batch, config, dp_size, threads), expected)


def packed(groups, changes, dp_size) -> tuple[RolloutBatch, PackingSettings, StepPlan]:
    batch, config = make_batch(groups), make_settings(**{**changes, "overlong": "drop"})
    return batch, config, pack_every_rank(batch, config, dp_size)


def wanted_segments(batch: RolloutBatch, config: PackingSettings) -> Counter:
    """Counts, for each rollout, the segments that train it if none is overlong."""
    wanted = Counter()
    for start, stop in zip(batch.group_offsets_B[:-1], batch.group_offsets_B[1:], strict=True):
        right = [r for r in range(start, stop) if batch.rewards_R[r] > 0.5]
        wrong = [r for r in range(start, stop) if batch.rewards_R[r] <= 0.5]
        contrast = bool(right and wrong)
        if config.layout == "plain":
            wanted.update(range(start, stop))
        elif contrast:
            pair = config.context_source == "pair"
            wanted.update({r: len(wrong) if pair else 1 for r in right})
            wanted.update({r: len(right) if pair else 1 for r in wrong})
    return wanted


@some
@given(group_lists, settings_dicts, ranks)
def test_no_response_is_lost_or_doubled(groups, changes, dp_size):
    batch, config, plan = packed(groups, changes, dp_size)
    trained = Counter(r for micro_batch in micro_batches(plan) for r in micro_batch.rollout_S.tolist())
    wanted = wanted_segments(batch, config)
    assert trained <= wanted
    assert wanted.total() - trained.total() == plan.stats["overlong_dropped"]
    for micro_batch in micro_batches(plan):
        expected = [np.float32(1) / np.float32(trained[r]) for r in micro_batch.rollout_S.tolist()]
        assert_equal(micro_batch.scale_S, np.array(expected, np.float32))


@some
@given(group_lists, settings_dicts, ranks)
def test_gather_index_inverts_the_packing(groups, changes, dp_size):
    batch, _, plan = packed(groups, changes, dp_size)
    for micro_batch in micro_batches(plan):
        rows = slice(micro_batch.num_prefix_rows, micro_batch.num_prefix_rows + micro_batch.num_response_rows)
        assert_equal(micro_batch.labels_N[rows], batch.tokens[micro_batch.gather_A])
        for s, rollout in enumerate(micro_batch.rollout_S):
            own = micro_batch.gather_A[micro_batch.cu_response[s] : micro_batch.cu_response[s + 1]]
            assert_equal(own, np.arange(*batch.offsets_R[rollout : rollout + 2]))
            group = np.searchsorted(batch.group_offsets_B, rollout, side="right") - 1
            assert micro_batch.group_S[s] == group


def visible_rows(micro_batch: MicroBatch, segment: int, row: int) -> np.ndarray:
    """Returns the rows that attention shows to `row` of a response: its side's prefix, then its own past."""
    side = side_of_segment(micro_batch)[segment]
    prefix = np.arange(*micro_batch.cu_prefix[side : side + 2])
    own = micro_batch.num_prefix_rows + np.arange(micro_batch.cu_response[segment], row + 1)
    return np.concatenate([prefix, own])


@some
@given(group_lists, settings_dicts, ranks)
def test_every_response_row_sees_its_prefix_and_itself_only(groups, changes, dp_size):
    batch, _, plan = packed(groups, changes, dp_size)
    seen = Counter()
    for micro_batch in micro_batches(plan):
        for s, rollout in enumerate(micro_batch.rollout_S.tolist()):
            first, last = micro_batch.cu_response[s], micro_batch.cu_response[s + 1] - 1
            rows = visible_rows(micro_batch, s, last)
            response = batch.tokens[slice(*batch.offsets_R[rollout : rollout + 2])]
            prefix = micro_batch.tokens_N[rows][: len(rows) - len(response) + 1]
            assert_equal(micro_batch.tokens_N[rows], [*prefix, *response[:-1]])
            assert_equal(micro_batch.positions_N[rows], np.arange(len(rows)))
            assert_equal(visible_rows(micro_batch, s, first), rows[: len(rows) - len(response) + 1])
            seen[rollout, tuple(prefix.tolist())] += 1
    expected = Counter()
    for rollout in range(len(batch.rewards_R)):
        expected.update((rollout, tuple(c.prefix_tokens.tolist())) for c in plan.contexts(rollout))
    assert seen == expected


@some
@given(group_lists, settings_dicts, ranks)
def test_labels_are_the_next_tokens_of_the_same_segment(groups, changes, dp_size):
    _, _, plan = packed(groups, changes, dp_size)
    for micro_batch in micro_batches(plan):
        sides = side_of_segment(micro_batch)
        for start, stop in zip(micro_batch.cu_seqlens[:-1], micro_batch.cu_seqlens[1:], strict=True):
            inner = micro_batch.labels_N[start : max(start, stop - 1)]
            assert_equal(inner, micro_batch.tokens_N[start + 1 : stop])
        for s, side in enumerate(sides):
            start, stop = micro_batch.cu_prefix[side : side + 2]
            if start < stop:
                first_input = micro_batch.tokens_N[micro_batch.num_prefix_rows + micro_batch.cu_response[s]]
                assert micro_batch.labels_N[stop - 1] == first_input


@some
@given(group_lists, settings_dicts, ranks)
def test_segments_cover_the_rows(groups, changes, dp_size):
    _, config, plan = packed(groups, changes, dp_size)
    for micro_batch in micro_batches(plan):
        used = micro_batch.num_prefix_rows + micro_batch.num_response_rows
        prefixes = micro_batch.cu_prefix
        responses = micro_batch.num_prefix_rows + micro_batch.cu_response[1:]
        padding = [len(micro_batch.tokens_N)] if len(micro_batch.tokens_N) > used else []
        assert_equal(micro_batch.cu_seqlens, [*prefixes, *responses, *padding])
        assert micro_batch.cu_prefix[-1] == micro_batch.num_prefix_rows
        assert micro_batch.cu_response[-1] == micro_batch.cu_response_side[-1] == len(micro_batch.gather_A)
        for array in (micro_batch.tokens_N, micro_batch.positions_N, micro_batch.labels_N):
            assert not array[used:].any()
        for rank in micro_batch.chunks:
            assert 0 <= rank.num_rows - max(rank.length_W.sum(), 1) < config.alignment


@some
@given(group_lists, settings_dicts, ranks)
def test_budgets_hold(groups, changes, dp_size):
    batch, config, plan = packed(groups, changes, dp_size)
    for micro_batch in micro_batches(plan):
        assert len(micro_batch.chunks) == config.context_ranks
        for rank in micro_batch.chunks:
            assert rank.num_rows <= config.max_tokens_per_microbatch
            assert rank.num_rows % config.alignment == 0
    for rollout in range(len(batch.rewards_R)):
        for context in plan.contexts(rollout):
            prompt = batch.prompt_offsets_B[context.group + 1] - batch.prompt_offsets_B[context.group]
            length = batch.offsets_R[rollout + 1] - batch.offsets_R[rollout]
            assert len(context.prefix_tokens) + length <= config.max_sequence_tokens
            assert len(context.prefix_tokens) - prompt <= config.context_ratio * config.max_sequence_tokens
            assert all(part.ranges for part in context.parts)


@some
@given(group_lists, settings_dicts, ranks)
def test_ranks_get_equal_counts_and_one_rank_no_needless_bin(groups, changes, dp_size):
    _, config, plan = packed(groups, changes, dp_size)
    assert len({len(rank) for rank in plan.ranks}) == 1
    filled = [m for m in micro_batches(plan) if m.num_response_rows > 0]
    assert len(filled) == plan.stats["microbatches"]
    if dp_size == 1:
        assert len(filled) == len(plan.ranks[0])
        used = sorted(m.num_prefix_rows + m.num_response_rows for m in filled)
        capacity = config.max_tokens_per_microbatch // config.alignment * config.alignment
        assert len(used) < 2 or used[0] + used[1] > capacity * config.context_ranks


def ranks_in_order(micro_batch: MicroBatch) -> list[list[tuple[int, int]]]:
    """Returns (context rank, rows) of the chunks of every segment, in the order of their rows."""
    sides = len(micro_batch.cu_prefix) - 1
    found = [[] for _ in range(sides + len(micro_batch.rollout_S))]
    for rank, chunks in enumerate(micro_batch.chunks):
        for segment, start, length in zip(*chunk_arrays(chunks), strict=True):
            found[segment].append((int(start), rank, int(length)))
    return [[(rank, length) for _, rank, length in sorted(chunks)] for chunks in found]


@some
@given(group_lists, settings_dicts, ranks)
def test_segments_lie_whole_or_in_zigzag_on_the_context_ranks(groups, changes, dp_size):
    _, config, plan = packed(groups, changes, dp_size)
    last = config.context_ranks - 1
    for micro_batch in micro_batches(plan):
        for chunks in micro_batch.chunks:
            order = list(zip(chunks.segment_W.tolist(), chunks.start_W.tolist(), strict=True))
            assert order == sorted(set(order))
            assert (chunks.length_W > 0).all()
        for segment in ranks_in_order(micro_batch):
            # 0, 1, .., last, .., 1, 0: a rank's two chunks are as long, to one row
            places = [rank for rank, _ in segment]
            peak = places.index(max(places)) if places else 0
            assert all(a < b for a, b in pairwise(places[: peak + 1]))
            assert all(a > b for a, b in pairwise(places[peak:]))
            assert len(places) <= 2 * last + 1
            rows = Counter()
            for rank, length in segment:
                rows[rank] += length
            for rank, length in segment[:peak]:
                assert length == (rows[rank] + 1) // 2


@some
@given(group_lists, settings_dicts, ranks)
def test_context_ranks_together_pack_as_one_that_holds_as_much(groups, changes, dp_size):
    batch, config, plan = packed(groups, changes, dp_size)
    capacity = config.max_tokens_per_microbatch // config.alignment * config.alignment
    one = replace(
        config, context_ranks=1, alignment=1, max_tokens_per_microbatch=capacity * config.context_ranks
    )
    expected = pack_every_rank(batch, one, dp_size)
    assert_same_fields(plan.sides, expected.sides)
    for whole, other in zip(micro_batches(plan), micro_batches(expected), strict=True):
        used = whole.num_prefix_rows + whole.num_response_rows
        for name in ("tokens_N", "positions_N", "labels_N"):
            assert_equal(getattr(whole, name)[:used], getattr(other, name)[:used])
        for name in ("cu_prefix", "cu_response_side", "cu_response", "rollout_S", "scale_S", "gather_A"):
            assert_equal(getattr(whole, name), getattr(other, name))
        lengths = [*np.diff(other.cu_prefix).tolist(), *np.diff(other.cu_response).tolist()]
        assert_same_fields(other.chunks[0], Chunks.of_whole(lengths, other.num_rows))


def reordered(batch: RolloutBatch, order: list[int]) -> RolloutBatch:
    """Returns the batch with its groups in another order."""
    rollouts = [r for g in order for r in range(*batch.group_offsets_B[g : g + 2])]
    prompts = [batch.prompt_tokens[slice(*batch.prompt_offsets_B[g : g + 2])] for g in order]
    responses = [batch.tokens[slice(*batch.offsets_R[r : r + 2])] for r in rollouts]
    return RolloutBatch(
        prompt_tokens=np.concatenate(prompts),
        prompt_offsets_B=offsets([len(prompt) for prompt in prompts]),
        tokens=np.concatenate(responses),
        offsets_R=offsets([len(response) for response in responses]),
        group_offsets_B=offsets(np.diff(batch.group_offsets_B)[order].tolist()),
        rewards_R=batch.rewards_R[rollouts],
    )


def conditioned_responses(plan: StepPlan) -> Counter:
    """Counts every (prefix, response) that is trained, as tokens."""
    content = Counter()
    for rollout in range(len(plan.batch.rewards_R)):
        response = plan.batch.tokens[slice(*plan.batch.offsets_R[rollout : rollout + 2])].tolist()
        prefixes = (context.prefix_tokens.tolist() for context in plan.contexts(rollout))
        content.update((tuple(prefix), tuple(response)) for prefix in prefixes)
    return content


@some
@given(group_lists, settings_dicts, ranks, st.randoms(use_true_random=False))
def test_order_of_groups_does_not_change_what_a_response_sees(groups, changes, dp_size, random):
    batch, config, plan = packed(groups, changes, dp_size)
    order = list(range(len(groups)))
    random.shuffle(order)
    other = pack_every_rank(reordered(batch, order), config, dp_size)
    assert conditioned_responses(plan) == conditioned_responses(other)
    for key in ("tokens_rows", "tokens_context", "overlong_dropped", "groups_skipped"):
        assert plan.stats[key] == other.stats[key]


@some
@given(group_lists, settings_dicts, ranks)
def test_threads_and_repetition_change_nothing(groups, changes, dp_size):
    batch, config, plan = packed(groups, changes, dp_size)
    for threads in (1, 2, 7):
        assert_same_plan(pack_every_rank(batch, config, dp_size, threads), plan)


@some
@given(group_lists, settings_dicts, ranks)
def test_a_plan_alone_is_that_of_every_rank(groups, changes, dp_size):
    batch, config, _ = packed(groups, changes, dp_size)
    planned = plan_step(batch, config, dp_size)
    for rank in range(dp_size):
        assert_same_plan(pack(batch, config, dp_size, rank).plan, planned)
