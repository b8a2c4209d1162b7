"""Measures the cost of the gradient-variance estimate in a GRPO step: sketch, sum over ranks, statistics."""

import argparse
from collections.abc import Callable
from functools import wraps
from typing import Any
from unittest.mock import patch

import numpy as np
from benchmarks._measure import machine, now, one_process
from benchmarks._steps import make_groups, make_learner

from megatron_bicc.metrics import Stopwatch
from megatron_bicc.model.gradient_sketch import GradientSketch
from megatron_bicc.training import learner as learner_module


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this benchmark's own options."""
    parser.add_argument("--groups", type=int, default=4, help="groups of 8 rollouts (%(default)s)")
    parser.add_argument("--layers", type=int, default=4, help="layers (%(default)s)")
    parser.add_argument("--hidden", type=int, default=512, help="hidden size (%(default)s)")
    parser.add_argument("--vocab", type=int, default=8192, help="vocabulary (%(default)s)")
    parser.add_argument("--mean-length", type=int, default=100, help="mean response length (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps; takes the median (%(default)s)")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Times the steps and, within them, the estimate.

    Returns:
        step_ms, sketch_ms (included in it) and share, their quotient.
    """
    a, times = arguments, []
    with one_process():
        learner = make_learner("grpo", a.hidden, a.layers, 10 * a.mean_length, a.vocab)
        groups = make_groups(a.groups, a.mean_length, 5 * a.mean_length, a.vocab)
        for _ in range(a.repeats + 1):
            times.append(timed_step(lambda: learner.step(groups, Stopwatch())))
    step_ms, sketch_ms = np.median(times[1:], axis=0) * 1e3
    print(f"step {step_ms:,.1f} ms, including the sketch {sketch_ms:,.1f} ms: {sketch_ms / step_ms:.2%}")
    return {
        "step_ms": step_ms,
        "sketch_ms": sketch_ms,
        "share": sketch_ms / step_ms,
        "machine": machine(),
    }


def timed_step(step: Callable[[], Any]) -> tuple[float, float]:
    """Returns the seconds of a step, and of the estimate within it."""
    spent = []

    def timed(function: Callable) -> Callable:
        @wraps(function)
        def call(*arguments: Any) -> Any:
            start = now()
            result = function(*arguments)
            spent.append(now() - start)
            return result

        return call

    start = now()
    with (
        patch.object(GradientSketch, "__init__", timed(GradientSketch.__init__)),
        patch.object(GradientSketch, "add", timed(GradientSketch.add)),
        patch.object(learner_module, "sum_over_all", timed(learner_module.sum_over_all)),
        patch.object(learner_module, "gradient_statistics", timed(learner_module.gradient_statistics)),
    ):
        step()
    return now() - start, sum(spent)
