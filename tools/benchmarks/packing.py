"""Measures bilateral packing: time, token counts, fill of the bins, balance of the ranks.

The workload: 256 prompts of 50 to 250 tokens, 8 rollouts each, lognormal response lengths with a long tail, a
pass rate drawn per group, contexts of up to 40 % of the sequence. A micro-batch holds four sequences of
maximal length.
"""

import argparse
import math
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks._packing_baselines import memcpy, pair_rows, torch_cat_loop

from megatron_bicc.packing.pack import Packed, pack, plan_step
from megatron_bicc.packing.types import PackingSettings, RolloutBatch, StepPlan

PROMPTS, GROUP_SIZE, RANKS = 256, 8, 8
MAIN_LENGTH = 800
MAX_SEQUENCE_TOKENS = {200: 4096, 800: 4096, 1600: 8192, 4000: 16384}
LOG_STD = 0.8
VOCAB_SIZE = 150_000
SCALES = (100, 1_000, 10_000, 100_000)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this benchmark's own options."""
    parser.add_argument("--repeats", type=int, default=20, help="timed runs; takes the fastest (%(default)s)")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures every response length and prints the tables.

    Returns:
        the figures of the main workload (responses of 800 tokens), those of every length under "lengths", and
        the growth with the number of groups under "scaling". ms_*: milliseconds, fastest of the repeats;
        tokens_*: rows per step; fill: of the bins for one rank; imbalance: max/mean cost over 8 ranks.
    """
    lengths = {mean: measure(mean, arguments.repeats) for mean in MAX_SEQUENCE_TOKENS}
    print_table("response length", {str(mean): figures for mean, figures in lengths.items()})
    scaling = [measure_apart(groups) for groups in SCALES]
    print_table("groups", {f"{row.pop('groups'):,}": row for row in map(dict, scaling)})
    return {**lengths[MAIN_LENGTH], "lengths": {str(k): v for k, v in lengths.items()}, "scaling": scaling}


def make_batch(groups: int, mean_length: float, max_length: int, prompt: tuple[int, int]) -> RolloutBatch:
    """Returns random groups with long-tailed response lengths: their median is below their mean."""
    random = np.random.default_rng(0)
    rollouts = groups * GROUP_SIZE
    drawn = random.lognormal(math.log(mean_length) - LOG_STD**2 / 2, LOG_STD, rollouts)
    lengths = np.clip(drawn.astype(np.int64), 1, max_length)
    prompts = random.integers(*prompt, groups)
    chance = np.repeat(random.random(groups), GROUP_SIZE)
    return RolloutBatch(
        prompt_tokens=random.integers(0, VOCAB_SIZE, prompts.sum(), dtype=np.int32),
        prompt_offsets_B=np.concatenate([[0], prompts.cumsum()]),
        tokens=random.integers(0, VOCAB_SIZE, lengths.sum(), dtype=np.int32),
        offsets_R=np.concatenate([[0], lengths.cumsum()]),
        group_offsets_B=np.arange(groups + 1) * GROUP_SIZE,
        rewards_R=(random.random(rollouts) < chance).astype(np.float32),
    )


def make_settings(max_sequence_tokens: int) -> PackingSettings:
    """Returns bilateral settings with headers of a few tokens."""
    return PackingSettings(
        layout="bilateral",
        max_sequence_tokens=max_sequence_tokens,
        max_tokens_per_microbatch=4 * max_sequence_tokens,
        vocab_size=VOCAB_SIZE,
        reward_threshold=0.5,
        context_ratio=0.4,
        context_source="partition",
        truncation="equal",
        keep="head",
        token_cost=24576,
        wrong_header=(1, 2, 3, 4),
        right_header=(1, 2, 3, 4),
        answer_header=(5, 6),
    )


def measure(mean_length: int, repeats: int) -> dict[str, float]:
    """Returns the figures of one workload."""
    settings = make_settings(MAX_SEQUENCE_TOKENS[mean_length])
    batch = make_batch(PROMPTS, mean_length, settings.max_sequence_tokens - 250, (50, 250))
    packed = pack(batch, settings, dp_size=1, rank=0)
    plan = packed.plan
    balanced = plan_step(batch, settings, dp_size=RANKS)
    output = np.ones(output_bytes(packed), np.uint8)
    reference = torch_cat_loop(batch, settings)
    if sum(len(micro_batch["tokens"]) for micro_batch in reference) != plan.stats["tokens_packed"]:
        raise RuntimeError("the torch.cat loop and the packer do not pack the same rows")
    # In turns, so that a busy machine slows all of them alike.
    ms_cpp, ms_memcpy, ms_torch_cat = fastest_ms(
        repeats,
        lambda: pack(batch, settings, dp_size=1, rank=0),
        lambda: memcpy(output),
        lambda: torch_cat_loop(batch, settings),
    )
    (ms_pairs,) = fastest_ms(1, lambda: pair_rows(batch, settings))
    tokens_pairs = pair_rows(batch, settings)[1]
    return {
        "ms_cpp": ms_cpp,
        "ms_torch_cat": ms_torch_cat,
        "ms_authors_pairs": ms_pairs,
        "ms_memcpy": ms_memcpy,
        "tokens_shared": plan.stats["tokens_packed"],
        "tokens_rows": plan.stats["tokens_rows"],
        "tokens_pairs": tokens_pairs,
        "rows_cost_ratio": rows_cost(plan) / step_cost(plan),
        "fill": plan.stats["fill"],
        "fill_8_ranks": balanced.stats["fill"],
        "imbalance": balanced.stats["imbalance"],
    }


def fastest_ms(repeats: int, *calls: Callable[[], Any]) -> list[float]:
    """Returns the fastest time of each call in milliseconds."""
    times = []
    for _ in range(repeats):
        times.append([])
        for call in calls:
            start = time.perf_counter()
            call()
            times[-1].append((time.perf_counter() - start) * 1e3)
    return np.min(times, axis=0).tolist()


def arrays_of(packed: Packed) -> list[np.ndarray]:
    """Returns every array of every micro-batch."""
    fields = [vars(micro_batch).values() for micro_batch in packed.micro_batches]
    return [value for values in fields for value in values if isinstance(value, np.ndarray)]


def output_bytes(packed: Packed) -> int:
    """Returns the bytes that the packer wrote."""
    return sum(array.nbytes for array in arrays_of(packed))


def step_cost(plan: StepPlan) -> float:
    """Returns token_cost * rows + attention pairs of the packed step."""
    cost = 0.0
    for micro_batch in (m for rank in plan.ranks for m in rank):
        prefix, own = np.diff(micro_batch.cu_prefix), np.diff(micro_batch.cu_response)
        cross = (np.diff(micro_batch.cu_response_side).astype(np.float64) * prefix).sum()
        cost += (
            plan.settings.token_cost * (prefix.sum() + own.sum()) + triangle(prefix) + triangle(own) + cross
        )
    return cost


def rows_cost(plan: StepPlan) -> float:
    """Returns the same cost for one row per response, which repeats the prefix."""
    cost = 0.0
    for micro_batch in (m for rank in plan.ranks for m in rank):
        own = np.diff(micro_batch.cu_response)
        side = np.searchsorted(micro_batch.cu_response_side, micro_batch.cu_response[:-1], side="right") - 1
        rows = np.diff(micro_batch.cu_prefix)[side] + own
        cost += plan.settings.token_cost * rows.sum() + triangle(rows)
    return cost


def triangle(lengths: np.ndarray) -> float:
    """Returns the query-key pairs of causal attention within segments of those lengths."""
    lengths = lengths.astype(np.float64)
    return float((lengths * (lengths + 1) / 2).sum())


def measure_apart(groups: int) -> dict[str, float]:
    """Runs `measure_scale` in a child process, so that the peak memory is that of this size."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure_scale, groups).result()


def measure_scale(groups: int) -> dict[str, float]:
    """Returns time and memory of packing many short groups: responses of 30 tokens on average."""
    settings = make_settings(512)
    batch = make_batch(groups, 30, 256, (5, 25))
    before = resident_kb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    pack(batch, settings, dp_size=1, rank=0)
    peak = resident_kb("VmHWM") - before
    one, eight = fastest_ms(
        3, lambda: pack(batch, settings, 1, rank=0), lambda: pack(batch, settings, RANKS, rank=0)
    )
    return {
        "groups": groups,
        "ms": one,
        "us_per_group": one * 1e3 / groups,
        "us_per_group_8_ranks": eight * 1e3 / groups,
        "peak_mb": peak / 1024,
        "kb_per_group": peak / groups,
    }


def resident_kb(key: str) -> int:
    """Returns this process's resident memory, now ("VmRSS") or at its peak ("VmHWM")."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


def print_table(first: str, columns: dict[str, dict[str, float]]) -> None:
    """Prints one column per workload, one row per figure."""
    names = list(next(iter(columns.values())))
    width = max(len(name) for name in [first, *names])
    print(f"{first:{width}}" + "".join(f"{column:>14}" for column in columns))
    for name in names:
        values = (figures[name] for figures in columns.values())
        print(f"{name:{width}}" + "".join(f"{readable(value):>14}" for value in values))
    print()


def readable(value: float) -> str:
    """Returns counts in full and other figures to four digits."""
    return f"{value:,}" if isinstance(value, int) or value.is_integer() else f"{value:.4g}"
