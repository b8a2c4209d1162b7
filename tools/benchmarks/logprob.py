"""Compares log-probs over a large vocabulary with dense log_softmax: memory and time, forward and backward.

The dense version computes fp32 logits of all rows, log_softmax, the labels' log-probs, and the entropy
without a gradient. Both compute gradients of the rows and of the output layer.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from benchmarks._measure import machine, median_ms, one_process, peak_mb
from torch import Tensor

from megatron_bicc import device
from megatron_bicc.model.log_probs import VocabParallelLogProbs, VocabShard


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this benchmark's own options."""
    parser.add_argument("--rows", type=int, default=8192, help="response rows (%(default)s)")
    parser.add_argument("--vocab", type=int, default=151_936, help="tokens (%(default)s)")
    parser.add_argument("--hidden", type=int, default=64, help="hidden size (%(default)s)")
    parser.add_argument("--time-rows", type=int, help="rows of the timed calls, if --rows takes too long")
    parser.add_argument("--repeats", type=int, default=3, help="timed calls; takes the median (%(default)s)")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures both versions.

    Returns:
        peak_ratio and time_ratio (ours to dense), peak_mb_*, ms_* and the sizes.
    """
    a = arguments
    sizes = (a.rows, a.vocab, a.hidden)
    peak = {"ours": peak_mb(ours, *sizes), "dense": peak_mb(dense, *sizes)}
    timed = (a.time_rows or a.rows, a.vocab, a.hidden)
    with one_process():
        ms = median_ms(a.repeats, {"ours": ours(*timed), "dense": dense(*timed)})
    figures = {
        "peak_ratio": peak["ours"] / peak["dense"],
        "time_ratio": ms["ours"] / ms["dense"],
        "peak_mb_ours": peak["ours"],
        "peak_mb_dense": peak["dense"],
        "ms_ours": ms["ours"],
        "ms_dense": ms["dense"],
        "rows": a.rows,
        "time_rows": timed[0],
        "vocab": a.vocab,
        "hidden": a.hidden,
        "machine": machine(),
    }
    for name, value in figures.items():
        print(f"{name:15}{value if isinstance(value, str) else f'{value:,.4g}':>20}")
    return figures


def make_inputs(rows: int, vocab: int, hidden: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns rows and output layer (bf16 on a GPU), and labels."""
    where = device.device()
    dtype = torch.bfloat16 if device.has_cuda() else torch.float32
    random = torch.Generator(where).manual_seed(0)
    make = {"generator": random, "device": where}
    states = torch.randn(rows, hidden, **make).to(dtype).requires_grad_()
    weight = (torch.randn(vocab, hidden, **make) / hidden**0.5).to(dtype).requires_grad_()
    return states, weight, torch.randint(0, vocab, (rows,), **make)


def ours(rows: int, vocab: int, hidden: int) -> Callable[[], Any]:
    """Returns a function: forward and backward pass of the package's log-probs."""
    states, weight, labels = make_inputs(rows, vocab, hidden)
    shard = VocabShard(0, vocab, dist.group.WORLD)

    def call() -> tuple[Tensor, ...]:
        log_probs, _ = VocabParallelLogProbs.apply(states, weight, labels, 1.0, shard, False)
        return torch.autograd.grad(log_probs.sum(), [states, weight])

    return call


def dense(rows: int, vocab: int, hidden: int) -> Callable[[], Any]:
    """Returns a function: forward and backward pass of the dense version."""
    states, weight, labels = make_inputs(rows, vocab, hidden)

    def call() -> tuple[Tensor, ...]:
        log_p = (states @ weight.t()).float().log_softmax(-1)
        log_probs = log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        with torch.no_grad():
            (log_p.exp() * log_p).sum(-1).neg()
        return torch.autograd.grad(log_probs.sum(), [states, weight])

    return call
