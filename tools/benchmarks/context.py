"""Measures context parallel: activations, time and traffic of a rank for a long response; balance of ranks.

A narrow policy of the Qwen3 architecture computes log-probs of a group with one long response, and their
gradient. Every number of context ranks is a job of that many processes, on a CPU or on as many GPUs of this
host. Recomputation is off.
"""

import argparse
import contextlib
import multiprocessing
import os
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from benchmarks._measure import machine, now, peak_beyond, return_freed_memory
from benchmarks.packing import make_batch, make_settings
from megatron.core import parallel_state
from torch import Tensor
from transformers import Qwen3Config

from megatron_bicc import device
from megatron_bicc.config import Config
from megatron_bicc.model.build import PolicyModel, transformer_config
from megatron_bicc.model.packed_batch import PackedBatch
from megatron_bicc.model.policy import start_model_parallel
from megatron_bicc.packing.pack import pack, plan_step
from megatron_bicc.packing.types import MicroBatchLayout, PackingSettings, RolloutBatch

RANKS = (1, 2, 4)
PROMPT, OTHER = 200, 64
"""Tokens of the prompt, and of the group's other response"""
VOCABULARY = 1024
BALANCED_RANKS, ROWS, GROUPS = 4, 16_384, 64
"""Of the balance: context ranks, rows that each holds at most, prompts with 8 responses each"""
MEAN_LENGTHS = (800, 4_000, 16_000)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this benchmark's own options."""
    parser.add_argument("--tokens", type=int, default=32_768, help="of the long response (%(default)s)")
    parser.add_argument("--layers", type=int, default=2, help="layers (%(default)s)")
    parser.add_argument("--hidden", type=int, default=128, help="hidden size (%(default)s)")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures every number of context ranks, and the balance.

    Returns:
        ranks: by their number, the largest value over its ranks: rows (padding included), saved_mb (what the
        forward pass keeps for the backward pass, weights left out), peak_mb (most memory of both passes
        beyond weights and their gradients, temporary tensors included), seconds (of both passes; processor
        time on a CPU), received_mb and formula_mb (what a layer receives from other context ranks, counted,
        and by the formula of megatron_bicc.model.attention); saved_ratio, peak_ratio and seconds_ratio to
        one rank.
        balance: by mean length of lognormal responses, largest over mean cost of 4 context ranks: imbalance
        (all micro-batches together, which wait for their slowest rank each) and worst (of a micro-batch).
    """
    found = {ranks: measure(ranks, arguments) for ranks in RANKS}
    one = dict(found[RANKS[0]])
    for figures in found.values():
        figures["saved_ratio"] = figures["saved_mb"] / one["saved_mb"]
        figures["peak_ratio"] = figures["peak_mb"] / one["peak_mb"]
        figures["seconds_ratio"] = figures["seconds"] / one["seconds"]
    balances = {mean: balance(mean) for mean in MEAN_LENGTHS}
    for title, rows in (("context ranks", found), ("mean length", balances)):
        print(f"{title:16}" + "".join(f"{row:>12,}" for row in rows))
        for name in next(iter(rows.values())):
            print(f"{name:16}" + "".join(f"{figures[name]:>12,.4g}" for figures in rows.values()))
    return {
        "ranks": {str(ranks): figures for ranks, figures in found.items()},
        "balance": {str(mean): figures for mean, figures in balances.items()},
        "machine": machine(),
    }


def measure(ranks: int, a: argparse.Namespace) -> dict[str, float]:
    """Returns the largest of every figure over the context ranks, each a process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # every process waits for the others in its task, so that each takes one
    with ProcessPoolExecutor(ranks, mp_context=multiprocessing.get_context("spawn")) as pool:
        found = list(pool.map(partial(_in_job, ranks=ranks, port=port, a=a), range(ranks)))
    return {name: max(figures[name] for figures in found) for name in found[0]}


def _in_job(rank: int, ranks: int, port: int, a: argparse.Namespace) -> dict[str, float]:
    return_freed_memory()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    device.start_distributed()
    config = Config()
    config.parallel.context = ranks
    start_model_parallel(config)
    figures = measure_rank(a)
    device.end_distributed()
    return figures


def measure_rank(a: argparse.Namespace) -> dict[str, float]:
    """Returns the figures of this process in the existing context group."""
    group = parallel_state.get_context_parallel_group()
    model = make_model(a)
    batch, settings = long_response(a.tokens, group.size())
    (micro_batch,) = pack(batch, settings, 1, 0, context_rank=group.rank()).micro_batches
    packed = PackedBatch.make(micro_batch, device.device())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)  # or the gradients would count among the activations
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    saved: dict[int, int] = {}
    received: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def passes() -> None:
        # counted inside: device.megatron replaces collectives, too
        with device.megatron(), counted(group, received):
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                log_probs = model.run(packed)[0]
            log_probs.sum().backward()

    start = now()
    peak = peak_beyond(passes)
    return {
        "rows": len(packed.tokens_N),
        "saved_mb": sum(size for place, size in saved.items() if place not in weights) / 2**20,
        "peak_mb": peak / 2**20,
        "seconds": now() - start,
        "received_mb": sum(received) / a.layers / 2**20,
        "formula_mb": formula(micro_batch, model) / 2**20,
    }


@contextlib.contextmanager
def counted(group: dist.ProcessGroup, received: list[int]) -> Iterator[None]:
    """Appends the bytes that collectives of a group bring from other ranks in the block."""
    originals = {name: getattr(dist, name) for name in ("all_gather_into_tensor", "all_to_all_single")}

    def counting(collective: Callable[..., Any], output: Tensor, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("group") is group:
            received.append(output.nbytes - output.nbytes // group.size())
        return collective(output, *args, **kwargs)

    for name, original in originals.items():
        setattr(dist, name, partial(counting, original))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def formula(layout: MicroBatchLayout, model: PolicyModel) -> float:
    """Returns the bytes that a rank receives in a layer, forward and backward, as model.attention says."""
    config, ranks = model.config, len(layout.chunks)
    pieces = Counter(segment for own in layout.chunks for segment in own.segment_W.tolist())
    shared = [
        sum(
            length
            for segment, length in zip(own.segment_W.tolist(), own.length_W.tolist(), strict=True)
            if segment < len(layout.cu_prefix) - 1 or pieces[segment] > 1
        )
        for own in layout.chunks
    ]
    element = config.params_dtype.itemsize
    return 3 * 2 * (ranks - 1) * max(shared) * config.num_query_groups * config.kv_channels * element


def make_model(a: argparse.Namespace) -> PolicyModel:
    """Returns a policy with random weights, the same on all ranks; fp32 on a CPU, bf16 on a GPU."""
    hf_config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=a.hidden,
        intermediate_size=8 * a.hidden // 3 // 16 * 16,
        num_hidden_layers=a.layers,
        num_attention_heads=a.hidden // 64,
        num_key_value_heads=max(1, a.hidden // 256),
        head_dim=64,
        max_position_embeddings=2 * a.tokens,
        architectures=["Qwen3ForCausalLM"],
    )
    config = Config()
    config.model.dtype = "bfloat16" if device.has_cuda() else "float32"
    config.parallel.context = parallel_state.get_context_parallel_world_size()
    with device.megatron():
        model = PolicyModel(transformer_config(hf_config, config), hf_config, temperature=1.0)
    model = model.to(device.device(), model.config.params_dtype)
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return model


def long_response(tokens: int, ranks: int) -> tuple[RolloutBatch, PackingSettings]:
    """Returns a group with a long and a short response, and settings that put it into one micro-batch."""
    random = np.random.default_rng(0)
    lengths = (tokens, OTHER)
    batch = RolloutBatch(
        prompt_tokens=random.integers(0, VOCABULARY, PROMPT, dtype=np.int32),
        prompt_offsets_B=np.array([0, PROMPT]),
        tokens=random.integers(0, VOCABULARY, sum(lengths), dtype=np.int32),
        offsets_R=np.array([0, tokens, sum(lengths)]),
        group_offsets_B=np.array([0, 2]),
        rewards_R=np.array([1, 0], np.float32),
    )
    rows = PROMPT + sum(lengths)
    settings = replace(
        make_settings(rows),
        layout="plain",
        max_tokens_per_microbatch=-(-rows // ranks),
        vocab_size=VOCABULARY,
        context_ranks=ranks,
    )
    return batch, settings


def balance(mean_length: int) -> dict[str, float]:
    """Returns how evenly the cost of lognormal responses is divided, in cost per context rank."""
    most = BALANCED_RANKS * ROWS - 1000
    batch = make_batch(GROUPS, mean_length, most // 2, (50, 250))
    settings = replace(make_settings(most), max_tokens_per_microbatch=ROWS, context_ranks=BALANCED_RANKS)
    (micro_batches,) = plan_step(batch, settings, dp_size=1).ranks
    costs_MC = np.array([rank_costs(layout, settings.token_cost) for layout in micro_batches])
    return {
        "micro_batches": len(costs_MC),
        "imbalance": float(costs_MC.max(1).sum() / costs_MC.mean(1).sum()),
        "worst": float((costs_MC.max(1) / costs_MC.mean(1)).max()),
    }


def rank_costs(layout: MicroBatchLayout, token_cost: int) -> list[float]:
    """Returns token_cost * rows + attention pairs of every context rank."""
    side_S = np.searchsorted(layout.cu_response_side, layout.cu_response[:-1], side="right") - 1
    prefix_rows = np.diff(layout.cu_prefix)
    # rows that all rows of a segment attend to, besides its own
    others = np.concatenate([np.zeros_like(prefix_rows), prefix_rows[side_S]]).astype(np.float64)
    costs = []
    for own in layout.chunks:
        keys_W = others[own.segment_W] + own.start_W + (own.length_W + 1) / 2  # of a row, on average
        costs.append(float((own.length_W * (token_cost + keys_W)).sum()))
    return costs
