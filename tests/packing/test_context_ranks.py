"""Tests which rows of a micro-batch each context rank holds, in cases that are worked out by hand."""

import numpy as np
import pytest
from numpy.testing import assert_array_equal as assert_equal
from packing.cases import Group, Rollout, chunk_arrays, make_batch, make_settings, pack_every_rank

from megatron_bicc.packing.pack import pack
from megatron_bicc.packing.types import MicroBatch, RolloutBatch


def chunks_of_ranks(micro_batch: MicroBatch) -> list[list[tuple[int, int, int]]]:
    """Returns (segment, first row, rows) of every chunk of every context rank."""
    arrays = ([array.tolist() for array in chunk_arrays(rank)] for rank in micro_batch.chunks)
    return [list(zip(*lists, strict=True)) for lists in arrays]


def plain_batch(prompt: int, *responses: int) -> RolloutBatch:
    return make_batch([Group(prompt, [Rollout(length, True) for length in responses])])


def packed_whole(batch: RolloutBatch, **changes: object) -> MicroBatch:
    """Returns the only micro-batch, with the rows of all context ranks."""
    defaults = {"layout": "plain", "context_ranks": 4, "token_cost": 0}
    plan = pack_every_rank(batch, make_settings(**{**defaults, **changes}), dp_size=1)
    ((micro_batch,),) = plan.ranks
    return micro_batch


def test_a_response_longer_than_a_rank_is_cut_in_zigzag():
    # a prompt of one token has no rows; the ranks hold 91, 98, 105 and 112 pairs before the short response
    micro_batch = packed_whole(plain_batch(1, 28, 1), max_tokens_per_microbatch=8)
    assert chunks_of_ranks(micro_batch) == [
        [(1, 0, 4), (1, 25, 3), (2, 0, 1)],
        [(1, 4, 4), (1, 22, 3)],
        [(1, 8, 4), (1, 19, 3)],
        [(1, 12, 7)],
    ]


def test_chunks_differ_where_the_length_is_no_multiple():
    micro_batch = packed_whole(plain_batch(1, 13, 1), max_tokens_per_microbatch=8, context_ranks=3)
    # rows 4, 4, 5: what does not divide evenly goes to the last of equally full ranks
    assert chunks_of_ranks(micro_batch) == [
        [(1, 0, 2), (1, 11, 2), (2, 0, 1)],
        [(1, 2, 2), (1, 9, 2)],
        [(1, 4, 5)],
    ]


def test_a_prefix_longer_than_a_rank_is_cut():
    micro_batch = packed_whole(plain_batch(18, 2, 2), max_tokens_per_microbatch=8, context_ranks=3)
    prefix = [[c for c in rank if c[0] == 0] for rank in chunks_of_ranks(micro_batch)]
    assert prefix == [[(0, 0, 3), (0, 15, 2)], [(0, 3, 3), (0, 12, 3)], [(0, 6, 6)]]
    assert micro_batch.num_prefix_rows == 17


def test_one_token_leaves_ranks_with_padding_only():
    batch = make_batch([Group(1, [Rollout(1, True), Rollout(1, True)])])
    settings = make_settings(layout="plain", context_ranks=4, max_tokens_per_microbatch=4, alignment=4)
    parts = [pack(batch, settings, 1, 0, context_rank=rank).micro_batches[0] for rank in range(4)]
    assert chunks_of_ranks(parts[0]) == [[], [], [(2, 0, 1)], [(1, 0, 1)]]
    for rank, part in enumerate(parts):
        held = int(part.chunks[rank].length_W.sum())
        assert len(part.gather_A) == held
        assert_equal(part.tokens_N[held:], np.zeros(4 - held))
        assert (len(part.tokens_N), part.num_rows, part.num_response_rows) == (4, 16, 2)


def test_a_micro_batch_of_padding_only_is_on_every_context_rank():
    batch = make_batch([Group(2, [Rollout(3, True), Rollout(2, True)])])
    settings = make_settings(layout="plain", context_ranks=2, alignment=2)
    for context_rank in range(2):
        packed = pack(batch, settings, 2, 1, context_rank=context_rank)
        (empty,) = packed.micro_batches
        assert_equal(empty.tokens_N, [0, 0])
        assert chunks_of_ranks(empty) == [[], []]


def test_a_short_response_is_cut_where_no_rank_has_room():
    micro_batch = packed_whole(plain_batch(1, *[3] * 17), max_tokens_per_microbatch=26, context_ranks=2)
    whole = [[(segment, 0, 3) for segment in range(first, 17, 2)] for first in (1, 2)]
    assert chunks_of_ranks(micro_batch) == [[*whole[0], (17, 0, 1)], [*whole[1], (17, 1, 2)]]


def test_many_short_responses_stay_whole():
    micro_batch = packed_whole(plain_batch(1, *[5] * 64), max_tokens_per_microbatch=100)
    expected = [[(segment, 0, 5) for segment in range(first, 65, 4)] for first in range(1, 5)]
    assert chunks_of_ranks(micro_batch) == expected


def test_a_chunk_inside_a_response_starts_with_the_token_before_it():
    batch = plain_batch(3, 28, 1)
    settings = make_settings(layout="plain", context_ranks=4, max_tokens_per_microbatch=8, token_cost=0)
    part = pack(batch, settings, 1, 0, context_rank=1).micro_batches[0]
    chunks = [c for c in chunks_of_ranks(part)[1] if c[0] == 1]
    assert chunks and all(start > 0 for _, start, _ in chunks)
    first = part.chunks[1].length_W[part.chunks[1].segment_W == 0].sum()
    for _, start, rows in chunks:
        own = slice(first, first + rows)
        assert_equal(part.tokens_N[own], batch.tokens[start - 1 : start - 1 + rows])
        assert_equal(part.labels_N[own], batch.tokens[start : start + rows])
        assert_equal(part.positions_N[own], np.arange(start, start + rows) + 2)
        first += rows


def test_an_overlong_response_is_refused_with_the_number_of_ranks():
    settings = make_settings(layout="plain", context_ranks=2, max_tokens_per_microbatch=9, alignment=2)
    assert pack(plain_batch(3, 14, 1), settings, 1, 0).micro_batches
    with pytest.raises(ValueError) as raised:
        pack(plain_batch(3, 15, 1), settings, 1, 0)
    assert str(raised.value) == (
        "group 0, rollout 0: a prompt of 3 and a response of 15 tokens exceed max_tokens_per_microbatch 9 "
        "on each of 2 context ranks; raise it, or set overlong to drop"
    )
