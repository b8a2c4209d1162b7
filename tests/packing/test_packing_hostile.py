"""Tests malformed input: one exception that names the place, no crash, no silent fix."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from packing.cases import Group, Rollout, assert_same_plan, make_batch, make_settings, pack_every_rank

from megatron_bicc import _C
from megatron_bicc.config import ContextSource, Keep, OverlongAction, Truncation, settings
from megatron_bicc.packing.pack import pack
from megatron_bicc.packing.types import RolloutBatch

REPOSITORY = Path(__file__).parents[2]
INT64_MAX = 2**63 - 1


def valid_batch() -> RolloutBatch:
    """Returns three groups of two rollouts: prompts of 3, right responses of 4, wrong ones of 5 tokens."""
    return make_batch([Group(3, [Rollout(4, True), Rollout(5, False)])] * 3)


def changed(field: str, place: int, value: float) -> RolloutBatch:
    array = getattr(valid_batch(), field).copy()
    array[place] = value
    return replace(valid_batch(), **{field: array})


BAD_VALUES = [
    ("offsets_R", 3, 8, r"offsets_R\[3\] is 8 after 9 \(group 1, rollout 2\)"),
    ("offsets_R", 2, -1, r"offsets_R\[2\] is -1 after 4 \(group 0, rollout 1\)"),
    ("offsets_R", 0, -4, r"offsets_R\[0\] is -4 \(group 0, rollout 0\); offsets must start at 0"),
    ("offsets_R", 6, 28, r"offsets_R\[6\] is 28 .* \(group 2, rollout 5\).* 27 response tokens"),
    ("offsets_R", 6, 26, r"offsets_R ends at 26 \(group 2, rollout 5\) but there are 27"),
    ("offsets_R", 5, INT64_MAX, r"offsets_R\[5\] is 9223372036854775807 .* \(group 2, rollout 4\)"),
    ("offsets_R", 5, 18, r"group 2, rollout 4 is empty"),
    ("prompt_offsets_B", 1, 7, r"prompt_offsets_B\[2\] is 6 after 7 \(group 1\)"),
    ("prompt_offsets_B", 2, 3, r"group 1 is empty: RolloutBatch.prompt_offsets_B"),
    ("prompt_offsets_B", 3, 2**31, r"prompt_offsets_B\[3\] is 2147483648 .* \(group 2\)"),
    ("group_offsets_B", 1, 5, r"group_offsets_B\[2\] is 4 after 5 \(group 1\)"),
    ("group_offsets_B", 1, -2, r"group_offsets_B\[1\] is -2 after 0 \(group 0\)"),
    ("group_offsets_B", 3, 7, r"group_offsets_B\[3\] is 7 .* 6 rollouts"),
    ("group_offsets_B", 2, 2, r"group 1 is empty: RolloutBatch.group_offsets_B"),
    ("group_offsets_B", 1, 1, r"group 0 has one rollout \(rollout 0\)"),
    ("rewards_R", 3, np.nan, r"rewards_R\[3\] is nan \(group 1, rollout 3\)"),
    ("rewards_R", 4, np.inf, r"rewards_R\[4\] is inf \(group 2, rollout 4\)"),
    ("rewards_R", 5, -np.inf, r"rewards_R\[5\] is -inf \(group 2, rollout 5\)"),
    ("tokens", 10, 100_000, r"tokens\[10\] is token 100000 \(group 1, rollout 2, token 1\)"),
    ("tokens", 26, -1, r"tokens\[26\] is token -1 \(group 2, rollout 5, token 4\)"),
    ("prompt_tokens", 4, 2**31 - 1, r"prompt_tokens\[4\] is token 2147483647 \(group 1, token 1\)"),
]


@pytest.mark.parametrize("field, place, value, message", BAD_VALUES)
def test_a_bad_value_is_named(field, place, value, message):
    with pytest.raises(ValueError, match=message):
        pack_every_rank(changed(field, place, value), make_settings(), dp_size=1)


BAD_ARRAYS = [
    ("tokens", lambda a: a.astype(np.int64), "RolloutBatch.tokens must be of dtype int32, not int64"),
    ("tokens", lambda a: a.astype(">i4"), "RolloutBatch.tokens must be of dtype int32, not >i4"),
    ("offsets_R", lambda a: a.astype(np.int32), "RolloutBatch.offsets_R must be of dtype int64, not int32"),
    ("rewards_R", lambda a: a.astype(np.float64), "rewards_R must be of dtype float32, not float64"),
    ("prompt_tokens", lambda a: np.repeat(a, 2)[::2], "prompt_tokens must be C-contiguous"),
    ("tokens", lambda a: a[None], r"tokens must have 1 dimension\(s\), not 2"),
    ("tokens", lambda a: np.array(a[0]), r"tokens must have 1 dimension\(s\), not 0"),
    ("tokens", lambda a: misaligned(a), "tokens must be C-contiguous and aligned"),
    ("tokens", lambda a: a.tolist(), "RolloutBatch.tokens must be a NumPy array or a CPU tensor"),
    ("rewards_R", lambda a: None, "RolloutBatch.rewards_R must be a NumPy array or a CPU tensor"),
    ("rewards_R", lambda a: a[:5], r"group_offsets_B\[3\] is 6 .* up to the 5 rollouts"),
    ("offsets_R", lambda a: a[:0], "offsets_R holds 0 offsets; 6 rollouts need 7"),
    ("offsets_R", lambda a: a[:6], "offsets_R holds 6 offsets; 6 rollouts need 7"),
    ("prompt_offsets_B", lambda a: a[1:], "prompt_offsets_B holds 3 offsets; 3 groups need 4"),
    ("group_offsets_B", lambda a: a[:0], "the batch has no groups"),
    ("group_offsets_B", lambda a: a[:1], "the batch has no groups"),
]


def misaligned(array: np.ndarray) -> np.ndarray:
    return np.frombuffer(b"x" + array.tobytes(), np.uint8)[1:].view(array.dtype)


@pytest.mark.parametrize("field, spoil, message", BAD_ARRAYS)
def test_a_bad_array_is_named(field, spoil, message):
    batch = replace(valid_batch(), **{field: spoil(getattr(valid_batch(), field))})
    with pytest.raises(ValueError, match=message):
        pack_every_rank(batch, make_settings(), dp_size=1)


BAD_SETTINGS = [
    ({"max_tokens_per_microbatch": 0}, "max_tokens_per_microbatch is 0; it must be in"),
    ({"max_tokens_per_microbatch": 2**31}, "max_tokens_per_microbatch is 2147483648; it must be in"),
    (
        {"max_tokens_per_microbatch": 2**70},
        "max_tokens_per_microbatch is 1180591620717411303424, which is of",
    ),
    ({"max_sequence_tokens": 0}, "max_sequence_tokens is 0; it must be in"),
    ({"max_sequence_tokens": -5}, "max_sequence_tokens is -5; it must be in"),
    ({"vocab_size": 0}, "vocab_size is 0; it must be in"),
    ({"vocab_size": 2**31}, "vocab_size is 2147483648; it must be in"),
    ({"alignment": 0}, "alignment is 0; it must be in"),
    ({"alignment": 1001}, r"alignment is 1001; it must be in \[1, 1000\]"),
    ({"alignment": 1.5}, "alignment is 1.5, which is of the wrong type"),
    (
        {"max_sequence_tokens": np.float32(60.7)},
        "max_sequence_tokens is np.float32.60.7., which is of the wrong",
    ),
    ({"vocab_size": True}, "vocab_size is True, which is of the wrong type"),
    (
        {"wrong_header": (np.float32(7.9),)},
        r"wrong_header\[0\] is np.float32.7.9., which is of the wrong type",
    ),
    ({"wrong_header": iter([7])}, "wrong_header is <.*iterator.*, which is of the wrong type"),
    ({"wrong_header": {7, 8}}, "wrong_header is {8, 7}|{7, 8}, which is of the wrong type"),
    ({"token_cost": -1}, "token_cost is -1; it must be in"),
    ({"context_ranks": 0}, r"context_ranks is 0; it must be in \[1, 65536\]"),
    ({"context_ranks": 2**16 + 1}, r"context_ranks is 65537; it must be in \[1, 65536\]"),
    (
        {"context_ranks": 3, "max_tokens_per_microbatch": 2**30 - 1},
        r"context_ranks is 3; it must be in \[1, 2\]",
    ),
    ({"context_ranks": 2.0}, "context_ranks is 2.0, which is of the wrong type"),
    ({"context_ratio": float("nan")}, "context_ratio is nan; it must be in"),
    ({"context_ratio": 1.01}, "context_ratio is 1.01; it must be in"),
    ({"reward_threshold": float("inf")}, "reward_threshold must be finite"),
    ({"end_token_ids": (7, 100_000)}, r"end_token_ids\[1\] is token 100000, outside the vocabulary"),
    ({"end_token_ids": (-1,)}, r"end_token_ids\[0\] is token -1, outside the vocabulary"),
    ({"end_token_ids": 7}, "end_token_ids is 7, which is of the wrong type"),
    ({"wrong_header": (7, -1)}, r"wrong_header\[1\] is token -1, outside the vocabulary"),
    ({"answer_header": (2**40,)}, r"answer_header\[0\] is token 1099511627776, outside the vocabulary"),
    ({"right_header": "text"}, "right_header is 'text', which is of the wrong type"),
    ({"layout": "sideways"}, "layout is 'sideways'; it must be one of plain, bilateral"),
    ({"keep": None}, "keep is None, which is of the wrong type"),
]


@pytest.mark.parametrize("changes, message", BAD_SETTINGS)
def test_a_bad_setting_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        pack_every_rank(valid_batch(), make_settings(**changes), dp_size=1)


CHOICES = {
    "context_source": ContextSource,
    "truncation": Truncation,
    "keep": Keep,
    "overlong": OverlongAction,
}


@pytest.mark.parametrize("name", CHOICES)
def test_the_packers_choices_are_those_of_the_settings(name):
    choices = get_args(CHOICES[name])
    for choice in choices:
        pack(valid_batch(), make_settings(**{name: choice}), 1, 0)
    with pytest.raises(ValueError, match=f"{name} is 'x'; it must be one of {', '.join(choices)}$"):
        pack(valid_batch(), make_settings(**{name: "x"}), 1, 0)


@pytest.mark.parametrize(
    "name", ["bicc.context_ratio", "train.max_sequence_tokens", "train.max_tokens_per_microbatch"]
)
def test_the_packers_limits_are_those_of_the_settings(name):
    rule, field = settings()[name].rule, name.partition(".")[2]
    above = rule.below if rule.at_most is None else np.nextafter(rule.at_most, 2)
    below = rule.at_least - 1 if rule.at_most is None else np.nextafter(rule.at_least, -1)
    for value in (below, above):
        with pytest.raises(ValueError, match=f"{field} is .*; it must be in"):
            pack(valid_batch(), make_settings(**{field: value}), 1, 0)


@pytest.mark.parametrize("dp_size", [0, -1, 2**20])
def test_a_bad_number_of_ranks_is_named(dp_size):
    with pytest.raises(ValueError, match=f"dp_size is {dp_size}; it must be in"):
        pack_every_rank(valid_batch(), make_settings(), dp_size)


@pytest.mark.parametrize("rank", [-1, 2, 2**40, None, 0.0, "0"])
def test_a_bad_rank_is_named(rank):
    with pytest.raises(ValueError, match=f"rank is '?{rank}'?"):
        pack(valid_batch(), make_settings(), 2, rank)


@pytest.mark.parametrize("context_rank", [-1, 3, 2**40, None, 0.0, "0"])
def test_a_bad_context_rank_is_named(context_rank):
    with pytest.raises(ValueError, match=f"context_rank is '?{context_rank}'?"):
        pack(valid_batch(), make_settings(context_ranks=3), 2, 0, context_rank=context_rank)


def test_all_ranks_together_are_limited():
    with pytest.raises(ValueError, match=r"context_ranks is 3; it must be in \[1, 2\]"):
        pack(valid_batch(), make_settings(context_ranks=3), 2**15, 0)


@pytest.mark.parametrize("threads", [-1, 2000])
def test_a_bad_number_of_threads_is_named(threads):
    with pytest.raises(ValueError, match=f"threads is {threads}; it must be in"):
        pack_every_rank(valid_batch(), make_settings(), 1, threads)


def test_read_only_input_is_read_and_a_read_only_buffer_refused():
    batch = valid_batch()
    expected = pack_every_rank(batch, make_settings(), 1)
    for field in ("tokens", "prompt_tokens", "offsets_R", "rewards_R"):
        getattr(batch, field).flags.writeable = False
    assert_same_plan(pack_every_rank(batch, make_settings(), 1), expected)
    plan = _C.Plan(batch, make_settings(), 1)
    rows = np.zeros(plan.sizes[:, 0].sum(), np.int32)
    rows.flags.writeable = False
    with pytest.raises(ValueError, match="buffer tokens_N is read-only"):
        plan.fill_rows(0, 0, {"tokens_N": rows}, 1)


def test_a_buffer_of_another_size_is_refused():
    plan = _C.Plan(valid_batch(), make_settings(), 1)
    with pytest.raises(ValueError, match="buffer tokens_N holds 3 items; the plan needs"):
        plan.fill_rows(0, 0, {"tokens_N": np.zeros(3, np.int32)}, 1)
    with pytest.raises(ValueError, match="buffer cu_seqlens holds 3 items; the plan needs"):
        plan.fill_segments({"cu_seqlens": np.zeros(3, np.int32)})


def test_torch_tensors_are_read_in_place():
    batch = valid_batch()
    tensors = RolloutBatch(**{name: torch.from_numpy(array) for name, array in vars(batch).items()})
    plan = pack_every_rank(tensors, make_settings(), 1)
    assert_same_plan(plan, pack_every_rank(batch, make_settings(), 1))
    assert np.shares_memory(plan.batch.tokens, batch.tokens)


def test_thousands_of_malformed_inputs_do_not_crash():
    # In a process of its own: a crash shall fail this test, not end the whole run.
    command = [sys.executable, "tests/packing/fuzz_packer.py", "--inputs", "3000", "--seed", "1"]
    run = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=250, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "3000 inputs" in run.stdout


def test_a_mask_is_not_ignored():
    batch = valid_batch()
    masked = replace(batch, tokens=np.ma.array(batch.tokens, mask=True))
    with pytest.raises(ValueError, match="RolloutBatch.tokens is a masked array"):
        pack_every_rank(masked, make_settings(), 1)
