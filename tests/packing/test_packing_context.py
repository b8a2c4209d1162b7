"""Tests packings worked out by hand: contexts, layout, splitting."""

from dataclasses import replace

import numpy as np
import pytest
from packing.cases import ENDS, Group, Rollout, make_batch, make_settings, micro_batches, pack_every_rank

from megatron_bicc.packing.types import PackingSettings, RolloutBatch

WRONG, RIGHT, ANSWER = [1, 2], [3], [4, 5, 6]


def group(prompt: int, right: list[int], wrong: list[int]) -> Group:
    return Group(prompt, [Rollout(n, True) for n in right] + [Rollout(n, False) for n in wrong])


def shown(batch: RolloutBatch, settings: PackingSettings, rollout: int) -> list[tuple[int, list]]:
    (context,) = pack_every_rank(batch, settings, 1).contexts(rollout)
    return [(part.rollout, list(part.ranges)) for part in context.parts]


def test_the_layout_of_one_group_to_the_token():
    batch = RolloutBatch(
        prompt_tokens=np.array([20, 21], np.int32),
        prompt_offsets_B=np.array([0, 2]),
        tokens=np.array([30, 31, ENDS[0], 40, ENDS[1]], np.int32),
        offsets_R=np.array([0, 3, 5]),
        group_offsets_B=np.array([0, 2]),
        rewards_R=np.array([1, 0], np.float32),
    )
    plan = pack_every_rank(batch, make_settings(alignment=8), dp_size=1)
    (micro_batch,) = plan.ranks[0]
    right_prefix = [20, 21, *WRONG, 40, *ANSWER]
    wrong_prefix = [20, 21, *RIGHT, 30, 31, *ANSWER]
    padding = [0] * 5
    tokens = [*right_prefix[:-1], *wrong_prefix[:-1], 6, 30, 31, 6, 40, *padding]
    labels = [*right_prefix[1:], *wrong_prefix[1:], 30, 31, ENDS[0], 40, ENDS[1], *padding]
    positions = [*range(7), *range(7), 7, 8, 9, 7, 8, *padding]
    assert micro_batch.tokens_N.tolist() == tokens
    assert micro_batch.labels_N.tolist() == labels
    assert micro_batch.positions_N.tolist() == positions
    assert (micro_batch.num_prefix_rows, micro_batch.num_response_rows) == (14, 5)
    assert micro_batch.cu_seqlens.tolist() == [0, 7, 14, 17, 19, 24]
    assert micro_batch.cu_prefix.tolist() == [0, 7, 14]
    assert micro_batch.cu_response_side.tolist() == [0, 3, 5]
    assert micro_batch.cu_response.tolist() == [0, 3, 5]
    assert micro_batch.rollout_S.tolist() == [0, 1]
    assert micro_batch.gather_A.tolist() == [0, 1, 2, 3, 4]
    assert plan.stats["tokens_packed"] == 19
    assert plan.stats["tokens_rows"] == (8 + 3) + (8 + 2)
    assert plan.stats["tokens_context"] == 6 + 6


def test_plain_layout_shares_the_prompt_among_all_responses():
    batch = make_batch([group(3, [2], [4, 1])])
    plan = pack_every_rank(batch, make_settings(layout="plain"), dp_size=1)
    (micro_batch,) = plan.ranks[0]
    assert micro_batch.num_prefix_rows == 2
    assert micro_batch.cu_seqlens.tolist() == [0, 2, 4, 8, 9]
    assert micro_batch.positions_N.tolist() == [0, 1, 2, 3, 2, 3, 4, 5, 2]
    assert [micro_batch.tokens_N[row] for row in (2, 4, 8)] == [batch.prompt_tokens[2]] * 3


@pytest.mark.parametrize("layout, trained", [("bilateral", 2), ("plain", 6)])
def test_groups_without_contrast_cost_the_bilateral_layout_no_token(layout, trained):
    groups = [group(3, [2, 2], []), group(3, [2], [2]), group(3, [], [2, 2])]
    plan = pack_every_rank(make_batch(groups), make_settings(layout=layout), dp_size=1)
    assert sum(len(micro_batch.rollout_S) for micro_batch in micro_batches(plan)) == trained
    assert plan.stats["groups_skipped"] == (0 if trained == 6 else 2)


def test_a_reward_at_the_threshold_is_wrong():
    batch = replace(make_batch([group(3, [2], [2])]), rewards_R=np.array([0.7, 0.3], np.float32))
    settings = make_settings(reward_threshold=0.3)
    assert shown(batch, settings, 0) == [(1, [(0, 2)])]
    assert pack_every_rank(batch, make_settings(reward_threshold=0.7), 1).stats["groups_skipped"] == 1


def test_a_batch_without_contrast_packs_into_nothing():
    plan = pack_every_rank(make_batch([group(3, [2, 2], [])]), make_settings(), dp_size=2)
    assert plan.ranks == [[], []]
    assert (plan.stats["fill"], plan.stats["imbalance"]) == (1.0, 1.0)


@pytest.mark.parametrize(
    "truncation, kept",
    [("equal", [7, 7, 2, 6]), ("in_order", [9, 9, 2, 2])],
)
def test_a_budget_of_33_tokens_is_shared(truncation, kept):
    # 33 = 3 (answer header) + 4 * 2 (headers) + 22. Equal shares: 2 are left by the short one, and what
    # the division leaves over goes to the first ones.
    batch = make_batch([group(3, [4], [9, 9, 2, 9])])
    settings = make_settings(max_sequence_tokens=100, context_ratio=0.33, truncation=truncation)
    expected = [(rollout, [(0, length)]) for rollout, length in zip((1, 2, 3, 4), kept, strict=True)]
    assert shown(batch, settings, 0) == expected


@pytest.mark.parametrize("truncation", ["equal", "in_order"])
@pytest.mark.parametrize("budget, rollouts", [(5, []), (6, [1]), (8, [1]), (9, [1, 2])])
def test_attempts_that_do_not_fit_are_left_out(truncation, budget, rollouts):
    # A header of 2 and one token, and the answer header of 3: 6 tokens are the least that a context takes.
    batch = make_batch([group(3, [4], [1, 1, 1])])
    settings = make_settings(max_sequence_tokens=100, context_ratio=budget / 100, truncation=truncation)
    assert [rollout for rollout, _ in shown(batch, settings, 0)] == rollouts
    (context,) = pack_every_rank(batch, settings, 1).contexts(0)
    assert len(context.prefix_tokens) == 3 + 3 * len(rollouts) + 3 * bool(rollouts)


@pytest.mark.parametrize(
    "keep, ranges", [("head", [(0, 5)]), ("tail", [(4, 9)]), ("both_ends", [(0, 3), (7, 9)])]
)
def test_the_kept_part_of_a_truncated_attempt(keep, ranges):
    batch = make_batch([group(3, [4], [9])])
    settings = make_settings(max_sequence_tokens=100, context_ratio=0.1, keep=keep)
    assert shown(batch, settings, 0) == [(1, ranges)]
    (context,) = pack_every_rank(batch, settings, 1).contexts(0)
    attempt = batch.tokens[4:]
    kept = np.concatenate([attempt[start:stop] for start, stop in ranges])
    assert context.prefix_tokens.tolist() == [*batch.prompt_tokens, *WRONG, *kept, *ANSWER]


@pytest.mark.parametrize("limits", [{"max_sequence_tokens": 100}, {"max_tokens_per_microbatch": 99}])
def test_a_context_never_takes_room_from_the_longest_response(limits):
    batch = make_batch([group(10, [60, 5], [50])])
    settings = make_settings(**limits, context_ratio=1.0)
    # 100 - 10 - 60 leaves 30 tokens: 5 of headers and 25 of the attempt, for the short response as well.
    assert shown(batch, settings, 0) == shown(batch, settings, 1) == [(2, [(0, 25)])]


def test_an_end_token_is_no_part_of_an_attempt_and_an_empty_attempt_is_not_shown():
    rollouts = [Rollout(4, True), Rollout(3, False, ended=True), Rollout(1, False, ended=True)]
    batch = make_batch([Group(2, rollouts)])
    assert shown(batch, make_settings(), 0) == [(1, [(0, 2)])]
    assert shown(batch, make_settings(end_token_ids=()), 0) == [(1, [(0, 3)]), (2, [(0, 1)])]
    assert batch.tokens[-1] == ENDS[1]
    assert shown(batch, make_settings(end_token_ids=ENDS[:1]), 0) == [(1, [(0, 3)]), (2, [(0, 1)])]


def test_pair_source_trains_every_rollout_once_for_each_opposite_one():
    batch = make_batch([group(2, [3, 4], [5, 6, 7])])
    plan = pack_every_rank(batch, make_settings(context_source="pair"), dp_size=1)
    assert [[part.rollout for part in c.parts] for c in plan.contexts(0)] == [[2], [3], [4]]
    assert [[part.rollout for part in c.parts] for c in plan.contexts(4)] == [[0], [1]]
    (micro_batch,) = plan.ranks[0]
    scales = dict(zip(micro_batch.rollout_S.tolist(), micro_batch.scale_S.tolist(), strict=True))
    third = float(np.float32(1) / np.float32(3))
    assert scales == {0: third, 1: third, 2: 0.5, 3: 0.5, 4: 0.5}


def test_a_large_side_is_split_between_responses_and_its_prefix_repeated():
    batch = make_batch([group(11, [30, 20, 25, 15], [1])])
    plan = pack_every_rank(batch, make_settings(layout="plain", max_tokens_per_microbatch=60), dp_size=1)
    assert [micro_batch.rollout_S.tolist() for micro_batch in plan.ranks[0]] == [[0, 1], [2, 3, 4]]
    assert [micro_batch.num_prefix_rows for micro_batch in plan.ranks[0]] == [10, 10]


@pytest.mark.parametrize("limit, value", [("max_tokens_per_microbatch", 36), ("max_sequence_tokens", 37)])
def test_an_overlong_response_is_an_error_or_dropped_and_counted(limit, value):
    batch = make_batch([group(3, [5], [5]), group(3, [5, 35], [4])])
    message = f"group 1, rollout 3: a prompt of 3 and a response of 35 tokens exceed {limit} {value}"
    with pytest.raises(ValueError, match=message):
        pack_every_rank(batch, make_settings(**{limit: value}), dp_size=1)
    plan = pack_every_rank(batch, make_settings(**{limit: value}, overlong="drop"), dp_size=1)
    assert plan.stats["overlong_dropped"] == 1
    trained = [r for micro_batch in micro_batches(plan) for r in micro_batch.rollout_S.tolist()]
    assert sorted(trained) == [0, 1, 2, 4]


def test_a_rank_without_work_gets_padding_only():
    batch = make_batch([group(3, [5], [5])])
    plan = pack_every_rank(batch, make_settings(layout="plain", alignment=4), dp_size=2)
    (empty,) = plan.ranks[1]
    assert empty.tokens_N.tolist() == empty.labels_N.tolist() == empty.positions_N.tolist() == [0] * 4
    assert (empty.num_prefix_rows, empty.num_response_rows) == (0, 0)
    assert empty.cu_seqlens.tolist() == [0, 4]
    assert empty.cu_prefix.tolist() == empty.cu_response_side.tolist() == empty.cu_response.tolist() == [0]
    assert plan.stats["microbatches"] == 1
