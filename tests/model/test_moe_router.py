"""Tests what a router reads in a layer's recomputation."""

import torch

from megatron_bicc.model.moe_router import RecomputedValue


def passed_forward(value: RecomputedValue[int], given: int | None) -> None:
    """A checkpointed layer's forward pass of a micro-batch."""
    value.set(given)
    with torch.no_grad():
        assert value.read() == given


def test_a_recomputation_reads_its_own_micro_batchs_value() -> None:
    """As under pipeline parallel: two forward passes, then a backward and a forward pass in turns."""
    value = RecomputedValue[int]()
    passed_forward(value, 1)
    passed_forward(value, None)
    assert value.read() == 1
    passed_forward(value, 3)
    assert value.read() is None
    assert value.read() == 3


def test_without_recomputation_the_forward_pass_reads_with_gradients() -> None:
    value = RecomputedValue[int]()
    for given in (1, 2):
        value.set(given)
        assert value.read() == given


def test_nothing_is_left_after_an_error() -> None:
    value = RecomputedValue[int]()
    passed_forward(value, 1)
    value.clear()
    assert value.read() is None
    passed_forward(value, 2)
    assert value.read() == 2
