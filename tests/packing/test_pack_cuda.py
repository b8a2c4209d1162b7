"""Tests the rows that csrc's kernel fills against the packer's oracle, emulated and on a GPU."""

from dataclasses import is_dataclass
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from packing.cases import (
    Group,
    Rollout,
    assert_same_fields,
    group_lists,
    make_batch,
    make_settings,
    settings_dicts,
)
from packing.oracle import pack_reference, rows_of_rank

from megatron_bicc.model.packed_batch import PackedBatch
from megatron_bicc.packing.pack import make_plan
from megatron_bicc.packing.pack_cuda import DeviceRollouts, fill_rows, pack_on_device
from megatron_bicc.packing.types import PackingSettings, RolloutBatch


def assert_equals_the_oracle(
    batch: RolloutBatch, config: PackingSettings, dp_size: int, where: torch.device
) -> None:
    """Compares every rank's micro-batches on the device with the oracle's, copied to it."""
    expected = pack_reference(batch, config, dp_size)
    rollouts = DeviceRollouts.upload(batch, where)
    for rank, context_rank in product(range(dp_size), range(config.context_ranks)):
        plan, rows = pack_on_device(batch, rollouts, config, dp_size, rank, context_rank)
        found = PackedBatch.make_all(plan.ranks[rank], rows, context_rank, where)
        for own, other in zip(found, expected.ranks[rank], strict=True):
            assert_same(own, PackedBatch.make(rows_of_rank(other, context_rank), where), "PackedBatch")


def assert_same(own: object, other: object, name: str) -> None:
    """Asserts equality to the bit: values, shapes, types and devices."""
    assert type(own) is type(other), name
    if isinstance(own, torch.Tensor):
        assert own.device == other.device and own.dtype == other.dtype, name
        assert torch.equal(own, other), name
    elif is_dataclass(own):
        assert vars(own).keys() == vars(other).keys()
        for field, value in vars(own).items():
            assert_same(value, getattr(other, field), f"{name}.{field}")
    elif isinstance(own, tuple):
        for mine, theirs in zip(own, other, strict=True):
            assert_same(mine, theirs, name)
    else:
        assert own == other, name


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(group_lists, settings_dicts, st.integers(1, 4))
def test_every_ranks_rows_equal_the_oracle_to_the_bit(kernel_device, groups, changes, dp_size) -> None:
    config = make_settings(**{**changes, "overlong": "drop"})
    assert_equals_the_oracle(make_batch(groups), config, dp_size, kernel_device)


@pytest.mark.parametrize("layout", ["plain", "bilateral"])
@pytest.mark.parametrize("keep", ["head", "both_ends"])
def test_copies_longer_than_a_block(layout, keep, kernel_device) -> None:
    lengths = np.random.default_rng(0).integers(1, 700, (6, 4))
    groups = [
        Group(int(row[0]), [Rollout(int(n), bool(i % 2), n % 3 == 0) for i, n in enumerate(row)])
        for row in lengths
    ]
    config = make_settings(
        layout=layout, max_sequence_tokens=1500, max_tokens_per_microbatch=4096, alignment=16, keep=keep
    )
    assert_equals_the_oracle(make_batch(groups), config, 2, kernel_device)


@pytest.mark.parametrize("rank", [-1, 2, None, 0.0])
def test_a_bad_rank_is_named(rank) -> None:
    batch = make_batch([Group(2, [Rollout(3, True), Rollout(2, False)])])
    native, _ = make_plan(batch, make_settings(), 2)
    with pytest.raises(ValueError, match=f"rank is {rank}"):
        native.copies(rank, 0)


def test_the_operator_is_registered_for_tracing(kernel_device) -> None:
    batch = make_batch([Group(2, [Rollout(3, True), Rollout(2, False)])])
    native, plan = make_plan(batch, make_settings(), 1)
    (layout,) = plan.ranks[0]
    arrays = (native.copies(0, 0), native.headers, batch.prompt_tokens, batch.tokens)
    tensors = [torch.from_numpy(array).to(kernel_device) for array in arrays]
    sizes = layout.num_rows, layout.num_response_rows
    checked = torch.library.opcheck(fill_rows, (*tensors, *sizes))
    assert set(checked.values()) == {"SUCCESS"}


def test_a_plan_made_for_the_device_is_the_packers(kernel_device) -> None:
    batch = make_batch([Group(2, [Rollout(3, True), Rollout(2, False)])])
    plan, _ = pack_on_device(batch, DeviceRollouts.upload(batch, kernel_device), make_settings(), 1, 0)
    _, expected = make_plan(batch, make_settings(), 1)
    assert_same_fields(plan.sides, expected.sides)
