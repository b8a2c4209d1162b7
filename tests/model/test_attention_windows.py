"""Tests sliding windows in shared-prefix attention against a mask over the whole micro-batch."""

from functools import partial
from types import ModuleType

import numpy as np
import pytest
import torch
from support import attention_reference as reference
from support.attention_reference import differentiate, lay_out
from torch import Tensor

from megatron_bicc import device
from megatron_bicc.model import attention as shared_prefix_attention
from megatron_bicc.model import attention_cpu, attention_cuda, attention_math
from megatron_bicc.model import segments as segments_module
from megatron_bicc.model.attention import WindowAttention
from megatron_bicc.model.attention_calls import AttentionCalls
from megatron_bicc.model.attention_windows import WindowCall

SIDES = [(21, [4, 70, 3]), (15, [6]), (0, [5, 2]), (9, [1, 1, 12]), (2, [33])]
"""(prefix rows, rows of each response); a prompt of one token leaves no prefix rows"""
ROWS = sum(prefix + sum(side) for prefix, side in SIDES)
SCALE = 0.3
WINDOWS = [1, 2, 5, 16, 22, 1000]
"""One row; within a response and across its start; of one prefix and its response; longer than everything"""


def windowed(q_NHC: Tensor, k_NGC: Tensor, v_NGC: Tensor, window: int) -> Tensor:
    """Returns the product's attention."""
    call = WindowCall.of(AttentionCalls.of(lay_out(SIDES), 0), window)
    return WindowAttention.apply(q_NHC, k_NGC, v_NGC, device.upload_tensors(call, q_NHC.device), SCALE)


def made(rows: int, groups: int) -> list[Tensor]:
    """Returns q, k, v and the output's gradient."""
    random = torch.Generator().manual_seed(groups)
    return [
        torch.randn(rows, heads, 16, generator=random, dtype=torch.float64)
        for heads in (4, groups, groups, 4)
    ]


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(
    ("kernels", "longest", "dtype"),
    [
        (attention_cpu, 0, torch.float64),
        (attention_cpu, 8, torch.float32),
        (attention_cpu, 64, torch.float64),
        (attention_math, 0, torch.float64),
    ],
)
def test_equals_a_dense_mask(
    window: int, kernels: ModuleType, longest: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_prefix_attention, "_kernels", lambda q: kernels)
    monkeypatch.setattr(segments_module, "LONGEST", longest)
    *inputs, grad = made(ROWS, groups=2)
    dense = partial(reference.dense, sides=SIDES, scale=SCALE, window=window)
    ours = differentiate(partial(windowed, window=window), [x.to(dtype) for x in inputs], grad.to(dtype))
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for found, truth in zip(ours, differentiate(dense, inputs, grad), strict=True):
        # a row that sees only itself has no gradient but what rounding leaves of the output's
        size = max(float(grad.norm()), float(truth.norm()))
        assert (found.double() - truth).norm() <= tolerance * size


def test_a_window_longer_than_everything_is_none() -> None:
    *inputs, grad = made(ROWS, groups=4)
    whole = partial(reference.shared, sides=SIDES, scale=SCALE)
    for found, truth in zip(
        differentiate(partial(windowed, window=ROWS), inputs, grad),
        differentiate(whole, inputs, grad),
        strict=True,
    ):
        torch.testing.assert_close(found, truth, rtol=0, atol=1e-12)


def test_sums_of_copies_are_rounded_once() -> None:
    """In bf16: 300 responses each add 1/256 of the gradient; a sum in bf16 would stop growing."""
    call = WindowCall.of(AttentionCalls.of(lay_out([(1, [1] * 300)]), 0), window=2)
    grad = torch.full((601, 1, 1), 1 / 256, dtype=torch.bfloat16)
    found = call.gradient(grad).float()
    assert found[0] == torch.tensor(301 / 256).bfloat16()
    assert (found[1:] == 1 / 256).all()


def test_keys_and_work_grow_with_the_rows() -> None:
    """Of a response with 20 times the rows, in the call for CUDA and in the CPU kernel's tiles."""
    sizes = []
    for length in (2_000, 40_000):
        call = WindowCall.of(AttentionCalls.of(lay_out([(500, [length, 300])]), 0), window=100)
        assert len(call.key_rows) == 500 + length + 300 + 2 * 99
        scores = sum(tile.q.segments * tile.mask.numel() for tile in call.segments.tiles)
        sizes.append(scores / (800 + length))
    assert sizes[1] <= 1.1 * sizes[0]
    assert sizes[1] < 300


def test_no_tile_has_a_key_twice() -> None:
    """What `TileRows.add` relies on."""
    call = WindowCall.of(AttentionCalls.of(lay_out([(300, [700, 5, 64, 65])]), 0), window=50)
    tiles = call.segments.tiles
    for tile in tiles:
        keys = tile.k.index[tile.k.real].tolist()
        assert len(keys) == len(set(keys))
    rows = np.concatenate([tile.q.index[tile.q.real].numpy() for tile in tiles])
    assert sorted(rows.tolist()) == list(range(300 + 700 + 5 + 64 + 65))


def test_cuda_kernels_get_one_causal_call_with_the_keys_before_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """By shapes and types alone, on meta tensors: no GPU is needed, and no value is computed."""
    given: list[dict] = []
    names = ("_flash_attention_forward", "_flash_attention_backward")
    real = {name: getattr(torch.ops.aten, name) for name in names}

    def recording(name: str, *arguments: object, **options: object) -> object:
        given.append(options)
        return real[name](*arguments, **options)

    double = type("Aten", (), {name: staticmethod(partial(recording, name)) for name in names})
    monkeypatch.setattr(attention_cuda, "_aten", double)
    monkeypatch.setattr(shared_prefix_attention, "_kernels", lambda q: attention_cuda)
    meta = torch.device("meta")
    call = WindowCall.of(AttentionCalls.of(lay_out([(21, [4, 7]), (15, [6])]), 0), window=9)
    assert call.segments.causal
    assert call.segments.bounds_q == [0, 21, 36, 40, 47, 53]
    assert call.segments.bounds_k == [0, 21, 36, 36 + 12, 36 + 12 + 15, 36 + 12 + 15 + 14]
    leaves = [
        torch.empty(53, h, 64, dtype=torch.bfloat16, device=meta, requires_grad=True) for h in (4, 2, 2)
    ]
    out = WindowAttention.apply(*leaves, device.upload_tensors(call, meta), SCALE)
    out.backward(torch.empty_like(out))
    assert given == [{"scale": SCALE, "window_size_left": 8, "window_size_right": 0}] * 2
    assert [(x.grad.shape, x.grad.dtype) for x in leaves] == [(x.shape, x.dtype) for x in leaves]
