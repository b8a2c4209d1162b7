"""Tests vocabulary-parallel log-probs on one rank against log_softmax and its gradients."""

import pytest
import torch
import torch.distributed as dist

from megatron_bicc.model import log_probs
from megatron_bicc.model.log_probs import VocabParallelLogProbs, VocabShard

ROWS, HIDDEN, VOCAB, PADDED, TEMPERATURE = 13, 8, 19, 24, 0.7


@pytest.mark.parametrize("chunk_elements", [1, 5 * PADDED, 10**6])
def test_equals_log_softmax(
    chunk_elements: int, single_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(log_probs.CHUNK_ELEMENTS, "cpu", chunk_elements)
    random = torch.Generator().manual_seed(1)
    hidden = torch.randn(ROWS, HIDDEN, generator=random, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(PADDED, HIDDEN, generator=random, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, VOCAB, (ROWS,), generator=random)
    seeds = torch.randn(2, ROWS, generator=random, dtype=torch.float64)

    shard = VocabShard(0, VOCAB, dist.group.WORLD)
    found = torch.stack(VocabParallelLogProbs.apply(hidden, weight, labels, TEMPERATURE, shard, True))
    gradients = torch.autograd.grad((found * seeds).sum(), [hidden, weight])

    log_p = (hidden @ weight[:VOCAB].t() / TEMPERATURE).log_softmax(-1)
    expected = torch.stack([log_p.gather(-1, labels[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)])
    truth = torch.autograd.grad((expected * seeds).sum(), [hidden, weight])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(gradients, truth, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_no_rows_give_no_log_probs(single_process: None) -> None:
    weight = torch.randn(PADDED, HIDDEN, requires_grad=True)
    shard = VocabShard(0, VOCAB, dist.group.WORLD)
    empty = torch.zeros(0, HIDDEN, requires_grad=True)
    found = VocabParallelLogProbs.apply(empty, weight, torch.zeros(0, dtype=torch.long), 1.0, shard, False)
    assert [tuple(x.shape) for x in found] == [(0,), (0,)]
    found[0].sum().backward()
    assert weight.grad.abs().max() == 0
