"""Tests the kernels over a chunk of logits, against float64, and the log-probs that they make.

Shape suffixes: A response rows, L rows of a chunk, V tokens.
"""

import pytest
import torch
import torch.distributed as dist
from support.emulated_kernels import calls_of_kernels
from torch import Tensor

from megatron_bicc import device
from megatron_bicc.model import log_probs
from megatron_bicc.model.log_probs import VocabParallelLogProbs, VocabShard
from megatron_bicc.model.log_probs_kernels import logit_gradient, logit_statistics, overwrite_with_gradient

FIRST, TEMPERATURE = 100, 0.7
SIZES = [(1, 1), (2, 7), (3, 1000), (2, 1001), (3, 2500), (2, 2052)]
"""(rows, tokens): for one and several rounds of a block's threads, with and without aligned rows"""
ROUNDING = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 8e-3}


def make_logits(rows: int, vocabulary: int, kernel_device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns logits and labels, one of them in another rank's part; one logit is far above the others."""
    random = torch.Generator().manual_seed(0)
    logits = 5.0 * torch.randn(rows, vocabulary, generator=random)
    logits[0, vocabulary // 2] = 150.0
    labels = FIRST + torch.randint(0, vocabulary, (rows,), generator=random)
    labels[-1] = FIRST - 1 if rows % 2 else FIRST + vocabulary
    return logits.to(kernel_device), labels.to(kernel_device)


def label_mask(labels: Tensor, vocabulary: int) -> Tensor:
    return labels.unsqueeze(-1) == FIRST + torch.arange(vocabulary, device=labels.device)


@pytest.mark.parametrize("rows, vocabulary", SIZES)
def test_statistics_of_a_part_of_the_vocabulary(
    kernel_device: torch.device, rows: int, vocabulary: int
) -> None:
    logits, labels = make_logits(rows, vocabulary, kernel_device)
    z = logits.double() / TEMPERATURE
    less = z - z.amax(-1, keepdim=True)
    expected = [z.amax(-1), less.exp().sum(-1), (less.exp() * less).sum(-1)]
    expected.append((z * label_mask(labels, vocabulary)).sum(-1))
    found = logit_statistics(logits, labels, FIRST, TEMPERATURE)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), torch.stack(expected), rtol=1e-5, atol=1e-5)
    assert torch.equal(found, logit_statistics(logits, labels, FIRST, TEMPERATURE))


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("rows, vocabulary", SIZES)
def test_gradient_overwrites_the_logits(
    kernel_device: torch.device, dtype: torch.dtype, with_entropy: bool, rows: int, vocabulary: int
) -> None:
    logits, labels = make_logits(rows, vocabulary, kernel_device)
    z = logits.double() / TEMPERATURE
    lse, p = z.logsumexp(-1), z.softmax(-1)
    log_p = z - lse.unsqueeze(-1)
    entropy = -(p * log_p).sum(-1)
    seeds = torch.randn(2, rows, generator=torch.Generator().manual_seed(1)).to(kernel_device)
    expected = (label_mask(labels, vocabulary).double() - p) * seeds[0].double().unsqueeze(-1)
    if with_entropy:
        expected -= seeds[1].double().unsqueeze(-1) * p * (log_p + entropy.unsqueeze(-1))
    # a gradient that autograd has expanded has a stride of 0; others are slices
    padded = torch.full((rows, vocabulary + 4), -7.0, device=kernel_device)
    padded[:, :vocabulary] = logits
    found = logit_gradient(
        padded[:, :vocabulary],
        labels,
        FIRST,
        TEMPERATURE,
        lse.float(),
        entropy.float(),
        seeds.t().contiguous().t()[0],
        seeds[1] if with_entropy else None,
        dtype,
    )
    assert found.dtype == dtype
    assert found.data_ptr() == padded.data_ptr()
    error = ROUNDING[dtype]
    torch.testing.assert_close(found.double(), expected / TEMPERATURE, rtol=error, atol=error / 10)
    assert padded[:, vocabulary:].eq(-7.0).all()


def test_what_is_not_finite_is_seen(kernel_device: torch.device) -> None:
    for bad in (torch.nan, torch.inf):
        logits, labels = make_logits(2, 1000, kernel_device)
        logits[1, 900] = bad
        total = logit_statistics(logits, labels, FIRST, TEMPERATURE)[1]
        assert total.isfinite().tolist() == [True, False]


def test_what_does_not_fit_is_refused(kernel_device: torch.device) -> None:
    logits, labels = make_logits(2, 8, kernel_device)
    rows = torch.zeros(2, device=kernel_device)
    with pytest.raises(ValueError, match=r"logits are torch.bfloat16 \[2, 8\]"):
        logit_statistics(logits.bfloat16(), labels, FIRST, 1.0)
    with pytest.raises(ValueError, match="contiguous rows"):
        logit_statistics(logits.t(), labels, FIRST, 1.0)
    with pytest.raises(ValueError, match="labels are torch.int32"):
        logit_statistics(logits, labels.int(), FIRST, 1.0)
    with pytest.raises(ValueError, match=r"grad_entropy is torch.float32 \[1\]"):
        logit_gradient(logits, labels, FIRST, 1.0, rows, rows, rows, rows[:1], torch.float32)


def test_operators_are_what_torch_expects(kernel_device: torch.device) -> None:
    logits, labels = make_logits(2, 8, kernel_device)
    rows = torch.zeros(2, device=kernel_device)
    torch.library.opcheck(logit_statistics, (logits, labels, FIRST, 1.0))
    for grad_entropy in (None, rows):
        torch.library.opcheck(
            overwrite_with_gradient,
            (logits, labels, FIRST, 1.0, rows, rows, rows, grad_entropy, torch.bfloat16),
        )


@pytest.mark.parametrize("entropy_in_loss", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probs_with_kernels_equal_plain_torch(
    kernel_device: torch.device,
    dtype: torch.dtype,
    entropy_in_loss: bool,
    single_process: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(log_probs.CHUNK_ELEMENTS, kernel_device.type, 5 * 24)
    random = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(rows, 8, generator=random).to(kernel_device, dtype) for rows in (13, 24))
    labels = torch.randint(0, 19, (13,), generator=random).to(kernel_device)
    seeds = torch.randn(2, 13, generator=random).to(kernel_device)

    def run() -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        chunks: list[Tensor] = []
        shard = VocabShard(0, 19, dist.group.WORLD)
        found = VocabParallelLogProbs.apply(
            *leaves,
            labels,
            0.7,
            shard,
            entropy_in_loss,
            lambda first, grad_logits, rows: chunks.append(grad_logits.float()),
        )
        assert found[1].requires_grad == entropy_in_loss
        loss = (torch.stack(found) * seeds).sum()
        return [torch.stack(found), *torch.autograd.grad(loss, leaves), torch.cat(chunks)]

    called = calls_of_kernels(monkeypatch)
    ours = run()
    assert {"logit_statistics", "logit_gradient"} <= set(called)
    monkeypatch.setattr(device, "_kernels", None)
    for a, b in zip(ours, run(), strict=True):
        torch.testing.assert_close(a, b, rtol=ROUNDING[dtype], atol=ROUNDING[dtype] / 5)


def test_no_rows_give_no_log_probs(kernel_device: torch.device, single_process: None) -> None:
    weight = torch.randn(24, 8, device=kernel_device, requires_grad=True)
    empty, labels = (
        torch.zeros(0, 8, device=kernel_device, requires_grad=True),
        torch.zeros(0, dtype=torch.long, device=kernel_device),
    )
    shard = VocabShard(0, 19, dist.group.WORLD)
    found = VocabParallelLogProbs.apply(empty, weight, labels, 1.0, shard, False)
    assert [tuple(x.shape) for x in found] == [(0,), (0,)]
    found[0].sum().backward()
    assert weight.grad.abs().max() == 0
