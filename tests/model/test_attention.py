"""Tests shared-prefix attention against one causal row per response, values and gradients."""

from collections import Counter
from functools import partial
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from model.context_attention_worker import CASES, CHANNELS, HEADS, RANKS, SCALE, Case, Found
from support import attention_reference as reference
from support.attention_reference import differentiate, divide, lay_out
from support.torchrun import torchrun
from torch import Tensor

from megatron_bicc import device
from megatron_bicc.config import Config
from megatron_bicc.model import attention as shared_prefix_attention
from megatron_bicc.model import attention_cpu, attention_cuda, attention_math
from megatron_bicc.model import segments as segments_module
from megatron_bicc.model.attention import SharedPrefixAttention
from megatron_bicc.model.attention_calls import AttentionCalls
from megatron_bicc.model.flops import NOTHING, Sizes, loads_of_batch
from megatron_bicc.planning.cost import Work, traffic_of
from megatron_bicc.planning.shards import Shard

SIDES = [(21, [4, 7, 3]), (15, [6]), (0, [5, 2]), (9, [1, 1, 12])]
"""(prefix rows, rows of each response); a prompt of one token leaves no prefix rows"""
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 3e-3}
shared, row_by_row = (
    partial(attention, sides=SIDES, scale=SCALE) for attention in (reference.shared, reference.row_by_row)
)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(
    ("kernels", "longest"),
    [(attention_cpu, 0), (attention_cpu, 8), (attention_cpu, 256), (attention_math, 0)],
)
def test_equals_one_row_a_response(
    dtype: torch.dtype,
    tolerance: float,
    groups: int,
    kernels: ModuleType,
    longest: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # what a GPU uses for these types; plain products run anywhere
    monkeypatch.setattr(shared_prefix_attention, "_kernels", lambda q: kernels)
    monkeypatch.setattr(segments_module, "LONGEST", longest)
    rows = sum(p + sum(side) for p, side in SIDES)
    random = torch.Generator().manual_seed(groups)
    inputs = [torch.randn(rows, h, 16, generator=random, dtype=torch.float64) for h in (4, groups, groups)]
    grad = torch.randn(rows, 4, 16, generator=random, dtype=torch.float64)
    found = differentiate(shared, [x.to(dtype) for x in inputs], grad.to(dtype))
    for ours, truth in zip(found, differentiate(row_by_row, inputs, grad), strict=True):
        assert (ours.double() - truth).norm() / truth.norm() < tolerance


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_worse_than_one_row_a_response(dtype: torch.dtype) -> None:
    rows = sum(p + sum(side) for p, side in SIDES)
    random = torch.Generator().manual_seed(0)
    inputs = [torch.randn(rows, h, 16, generator=random).to(dtype) for h in (4, 2, 2)]
    grad = torch.randn(rows, 4, 16, generator=random).to(dtype)
    truth = differentiate(row_by_row, [x.double() for x in inputs], grad.double())
    ours, theirs = (differentiate(f, inputs, grad) for f in (shared, row_by_row))
    for a, b, exact in zip(ours, theirs, truth, strict=True):
        assert (a.double() - exact).norm() <= (b.double() - exact).norm()


def test_cuda_kernels_take_what_they_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """By shapes and types alone, on meta tensors: no GPU is needed, and no value is computed."""
    monkeypatch.setattr(shared_prefix_attention, "_kernels", lambda q: attention_cuda)
    meta = torch.device("meta")
    calls = device.upload_tensors(AttentionCalls.of(lay_out([(21, [4, 7]), (15, [6])]), 0), meta)
    leaves = [
        torch.empty(53, h, 64, dtype=torch.bfloat16, device=meta, requires_grad=True) for h in (4, 2, 2)
    ]
    out = SharedPrefixAttention.apply(*leaves, calls, None, 0.3)
    out.backward(torch.empty_like(out))
    assert [(x.shape, x.dtype) for x in (out, *(x.grad for x in leaves))] == [
        (x.shape, torch.bfloat16) for x in (leaves[0], *leaves)
    ]


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[str, int], Any]]:
    """Returns the report of every process of the worker, by case and number of context ranks."""
    directory = tmp_path_factory.mktemp("context_attention")
    torchrun(RANKS[-1], Path(__file__).with_name("context_attention_worker.py"), directory)
    return [torch.load(directory / str(process)) for process in range(RANKS[-1])]


def joined(founds: list[Found]) -> list[Tensor]:
    """Returns output, dq, dk and dv of all rows from those of every context rank."""
    order = torch.cat([found["rows"] for found in founds]).argsort()
    return [torch.cat(parts)[order] for parts in zip(*(found["values"] for found in founds), strict=True)]


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("name", CASES)
def test_context_ranks_together_equal_a_dense_mask(
    name: str, ranks: int, reports: list[dict[tuple[str, int], Any]]
) -> None:
    case = CASES[name]
    *qkv, grad = (x.double() for x in case.inputs())
    dense = partial(reference.dense, sides=case.sides, scale=SCALE)
    expected = differentiate(dense, qkv, grad)
    for first in range(0, len(reports), ranks):
        founds = [report[name, ranks] for report in reports[first : first + ranks]]
        assert all(found["repeats"] for found in founds)
        for ours, truth in zip(joined(founds), expected, strict=True):
            assert ours.shape == truth.shape
            assert (ours.double() - truth).norm() <= TOLERANCE[case.dtype] * truth.norm()


def planned_bytes(case: Case, ranks: int) -> int:
    """What a plan counts for a forward and a backward pass of one layer."""
    config = Config()
    config.model.dtype, config.model.recompute = str(case.dtype).removeprefix("torch."), "none"
    config.parallel.context = ranks
    sizes = Sizes(1, 64, HEADS, case.groups, CHANNELS, 64, 0, 0, 0, 100, False, False)
    work = Work(NOTHING, loads_of_batch(case.layout(ranks))[0])
    return traffic_of(sizes, config, work, Shard(0, 0, (1,), 0, 0, 0, 0, 0, 0), ranks, updates=1).context


def test_bytes_received_in_a_layer(reports: list[dict[tuple[str, int], Any]]) -> None:
    """By the formula of megatron_bicc.model.attention, and of a plan without recompute."""
    for (name, case), ranks in product(CASES.items(), RANKS):
        layout, sides = case.layout(ranks), len(case.sides)
        pieces = Counter(s for own in layout.chunks for s in own.segment_W.tolist())
        chunks = [zip(own.segment_W.tolist(), own.length_W.tolist(), strict=True) for own in layout.chunks]
        most = max(sum(n for s, n in own if s < sides or pieces[s] > 1) for own in chunks)
        once = 2 * (ranks - 1) * most * case.groups * CHANNELS * case.dtype.itemsize
        expected = {"all_gather_into_tensor": 2 * once, "all_to_all_single": once} if once else {}
        for report in reports:
            assert report[name, ranks]["received"] == expected, (name, ranks)
        if case.dtype != torch.float64:  # no policy is trained in it
            assert planned_bytes(case, ranks) == sum(expected.values())
    assert reports[0]["mixed", 4]["received"]
    assert not reports[0]["nothing shared", 4]["received"]


def test_the_benchmark_counts_what_the_formula_says(reports: list[dict[tuple[str, int], Any]]) -> None:
    """And activations of four context ranks are about a quarter of those of one."""
    for ranks in RANKS:
        for report in reports:
            figures = report["benchmark", ranks]
            assert figures["received_mb"] == figures["formula_mb"]
            assert (figures["formula_mb"] > 0) == (ranks > 1)
    one, four = (max(report["benchmark", ranks]["saved_mb"] for report in reports) for ranks in (1, 4))
    assert 0 < four <= 0.30 * one


def test_gradients_of_shared_keys_are_summed_before_they_are_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """1 and 1/256 from two ranks, and 1/256 of this rank's own: in bf16 their sum would be 1."""

    def receive(received: Tensor, sent: Tensor, group: object) -> None:
        received.copy_(torch.tensor([1.0, 1 / 256])[:, None, None, None].expand_as(sent))

    monkeypatch.setattr(shared_prefix_attention.dist, "all_to_all_single", receive)
    layout = lay_out([(1, [1, 1])], divide([1, 1, 1], [0, 0, 1], ranks=2))
    calls = AttentionCalls.of(layout, 0)
    dk, dv = torch.full((2, 1, 1), 1 / 256), torch.zeros(2, 1, 1)
    nothing = torch.zeros(len(calls.exchange.keys), 2, 1, 1)
    group = type("Group", (), {"size": lambda self: 2})()
    shared_prefix_attention._give_back(nothing, torch.bfloat16, (dk, dv), calls, group)
    assert dk.flatten().tolist() == [1 + 1 / 128, 1 / 256]
    assert dv.flatten().tolist() == [1 + 1 / 256, 0]
