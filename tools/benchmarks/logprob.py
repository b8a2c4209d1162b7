"""Compares log-probs over a large vocabulary with dense log_softmax: memory and time, forward and backward.

The dense version computes fp32 logits of all rows, log_softmax, the labels' log-probs, and the entropy
without a gradient. Both compute gradients of the rows and of the output layer. On a GPU the package's version
runs twice: with csrc's kernels, if they are built, and in plain torch (model.kernels).
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

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
        peak_ratio and time_ratio (ours to dense), kernels_time_ratio (ours with model.kernels=auto to torch),
        peak_mb_*, ms_* and the sizes.
    """
    a = arguments
    sizes = (a.rows, a.vocab, a.hidden)
    peak = {name: peak_mb(version, *sizes) for name, version in VERSIONS.items()}
    timed = (a.time_rows or a.rows, a.vocab, a.hidden)
    with one_process():
        ms = median_ms(a.repeats, {name: version(*timed) for name, version in VERSIONS.items()})
    figures = {
        "peak_ratio": peak["ours"] / peak["dense"],
        "time_ratio": ms["ours"] / ms["dense"],
        "kernels_time_ratio": ms["ours"] / ms["ours_in_torch"],
        **{f"peak_mb_{name}": value for name, value in peak.items()},
        **{f"ms_{name}": value for name, value in ms.items()},
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


def ours(rows: int, vocab: int, hidden: int, kernels: Literal["auto", "torch"] = "auto") -> Callable[[], Any]:
    """Returns a function: forward and backward pass of the package's log-probs under model.kernels."""
    states, weight, labels = make_inputs(rows, vocab, hidden)
    shard = VocabShard(0, vocab, dist.group.WORLD)

    def call() -> tuple[Tensor, ...]:
        device.choose_kernels(kernels)
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


VERSIONS = {"ours": ours, "ours_in_torch": partial(ours, kernels="torch"), "dense": dense}
