"""Compares a whole optimizer step of BICC with one of plain GRPO on the same rollouts.

Packing, old log-probs, forward, backward and update of a small random policy. RCC is off in both: its forward
pass of the reference policy costs the same in every layout.
"""

import argparse
from collections.abc import Callable
from typing import Any

from benchmarks._measure import machine, median_ms, one_process, peak_mb
from benchmarks._steps import GROUP_SIZE, PROMPT, make_groups, make_learner

from megatron_bicc.metrics import Stopwatch
from megatron_bicc.training.learner import StepResult

ALGORITHMS = {"grpo": "grpo", "bicc": "grpo+bicc"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this benchmark's own options."""
    parser.add_argument("--groups", type=int, default=2, help="groups of 8 rollouts (%(default)s)")
    parser.add_argument("--layers", type=int, default=2, help="layers (%(default)s)")
    parser.add_argument("--hidden", type=int, default=512, help="hidden size (%(default)s)")
    parser.add_argument("--mean-length", type=int, default=100, help="mean response length (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps; takes the median (%(default)s)")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures both steps.

    Returns:
        cases: one per algorithm with name, ms, tokens (rows of the forward pass for old log-probs plus three
        times those of training, since a backward pass costs two forward ones) and peak_mb; time_ratio and
        token_ratio of BICC to GRPO, and excess, their quotient.
    """
    a = arguments
    with one_process():
        steps = {name: make_step(algorithm, a) for name, algorithm in ALGORITHMS.items()}
        tokens = {name: row_passes(step()) for name, step in steps.items()}
        ms = median_ms(a.repeats, steps)
    peak = {name: peak_mb(make_step, algorithm, a) for name, algorithm in ALGORITHMS.items()}
    cases = [
        {"name": n, "ms": ms[n], "tokens": tokens[n], "peak_mb": peak[n], "P": PROMPT, "n": GROUP_SIZE}
        for n in ALGORITHMS
    ]
    time_ratio, token_ratio = ms["bicc"] / ms["grpo"], tokens["bicc"] / tokens["grpo"]
    figures = {"time_ratio": time_ratio, "token_ratio": token_ratio, "excess": time_ratio / token_ratio}
    for case in cases:
        print(
            f"{case['name']:12}{case['ms']:>12,.1f} ms{case['tokens']:>12,} rows{case['peak_mb']:>12,.1f} MB"
        )
    for name, value in figures.items():
        print(f"{name:12}{value:>12.3f}")
    return {"cases": cases, **figures, "machine": machine()}


def make_step(algorithm: str, a: argparse.Namespace) -> Callable[[], StepResult]:
    """Returns a function that takes an optimizer step on the benchmark's rollouts."""
    longest = 5 * a.mean_length
    learner = make_learner(algorithm, a.hidden, a.layers, 2 * longest)
    groups = make_groups(a.groups, a.mean_length, longest, learner.policy.hf_config.vocab_size)
    return lambda: learner.step(groups, Stopwatch())[0]


def row_passes(result: StepResult) -> int:
    """Returns the cost of a step's passes, in rows of a forward pass."""
    responses, prompts = result.batch.rollouts.tokens, result.batch.rollouts.prompt_tokens
    groups = len(result.batch.rollouts.group_offsets_B) - 1
    rows = sum(trained.plan.stats["tokens_packed"] for trained in result.trained)
    return len(responses) + len(prompts) - groups + 3 * rows
