"""Measures how long reward.function=math takes for the responses of a step.

The workload: 32 prompts with 8 responses of about 800 tokens each, half of them right. Answers are written as
in the data set: integers (DAPO-Math-17k, GSM8K), a mix as in MATH (half integers, the rest fractions, roots,
tuples, intervals, texts and polynomials), or a different expression in every response, which no cache helps.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

from megatron_bicc.config import RewardConfig
from megatron_bicc.rewards.registry import get_scorer
from megatron_bicc.rewards.types import Completion

PROMPTS, GROUP_SIZE = 32, 8
DERIVATION = "We simplify both sides: 2(x + 3) = 16 gives x + 3 = 8, so x = 5, as asked. " * 38
"""About 800 tokens"""
FORMS: list[Callable[[int], tuple[str, str]]] = [
    lambda n: (f"{n}", f"{n}"),
    lambda n: (f"\\frac{{{n}}}{{{n + 1}}}", f"\\dfrac{{{2 * n}}}{{{2 * n + 2}}}"),
    lambda n: (f"{n}", f"{n}.0"),
    lambda n: (f"{n}\\sqrt{{2}}", f"\\sqrt{{{2 * n * n}}}"),
    lambda n: (f"{n}", f"{n}"),
    lambda n: (f"({n}, {n + 1})", f"({n},{n + 1})"),
    lambda n: (f"{n}", f"${n}$"),
    lambda n: (f"x^2+{n}x", f"x(x+{n})"),
    lambda n: (f"{n}", f"{n}"),
    lambda n: (f"[{n}, \\infty)", f"[{n},\\infty)"),
    lambda n: (f"{n}", f"{n:,}"),
    lambda n: (f"\\frac{{{n}\\pi}}{{3}}", f"\\frac{{{n}}}{{3}}\\pi"),
]
"""Number -> (ground truth, another way to write it)"""
WORKLOADS: dict[str, Callable[[int, int], tuple[str, str, str]]] = {
    "integers": lambda prompt, response: (f"{prompt}", f"{prompt}", f"{prompt + response + 1}"),
    "MATH": lambda prompt, response: (
        *FORMS[prompt % 12](prompt),
        FORMS[prompt % 12](prompt + response + 1)[1],
    ),
    "all different": lambda prompt, response: (
        f"x^2+{prompt}x",
        f"x^2+{prompt + response}x-{response}x",
        f"x(x+{prompt + response + 1})",
    ),
}
"""(number of the prompt, of the response) -> (ground truth, a right answer, a wrong one)"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this benchmark's own options."""
    parser.add_argument("--repeats", type=int, default=3, help="timed runs; takes the fastest (%(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="reward.workers (%(default)s)")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures every workload and prints a table.

    Returns:
        seconds by workload, fastest of the repeats, for PROMPTS x GROUP_SIZE responses.
    """
    scorer = get_scorer(RewardConfig(workers=arguments.workers))
    for future in [scorer.submit([Completion([], f"\\boxed{{x+{i}}}", f"{i}+x")]) for i in range(8)]:
        future.result()  # starts the workers
    figures = {}
    print("| answers | responses | right | seconds |\n|---|---|---|---|")
    for name, workload in WORKLOADS.items():
        seconds = []
        for repeat in range(arguments.repeats):
            # other numbers each time: an answer that has been compared once is not compared again
            groups = [_group(workload, 1000 * (repeat + 1) + prompt) for prompt in range(PROMPTS)]
            start = time.perf_counter()
            found = [future.result() for future in [scorer.submit(group) for group in groups]]
            seconds.append(time.perf_counter() - start)
        right = sum(scores.rewards.sum() for scores in found)
        figures[name] = min(seconds)
        print(f"| {name} | {PROMPTS * GROUP_SIZE} | {right:.0f} | {figures[name]:.3f} |")
    scorer.close()
    return figures


def _group(workload: Callable[[int, int], tuple[str, str, str]], prompt: int) -> list[Completion]:
    completions = []
    for response in range(GROUP_SIZE):
        truth, right, wrong = workload(prompt, response)
        answer = right if response % 2 else wrong
        completions.append(Completion([], f"{DERIVATION}\\boxed{{{answer}}}", truth))
    return completions
