"""Writes arithmetic prompts for training and held-out ones, in the schema of DAPO-Math-17k.

    python tools/make_arithmetic_prompts.py --out examples/data

A problem is two steps from a two-digit number, `47+8-6=`, such that every result has two digits and
forgetting every carry and borrow gives a different answer. A hash of its text decides whether it is held out,
so the two parts never overlap, whatever the seed.
"""

import argparse
import random
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

HELD_OUT_SHARE = 10
"""One problem in this many is held out"""


def add(a: int, b: int, carry: bool = True) -> int:
    """Returns a + b; without the carry, digit by digit, forgetting the carry into the tens (47+8 -> 45)."""
    return a + b if carry or a % 10 + b % 10 < 10 else a + b - 10


def subtract(a: int, b: int, borrow: bool = True) -> int:
    """Returns a - b; without the borrow, in every digit the smaller from the larger (52-8 -> 56)."""
    if borrow:
        return a - b
    width = max(len(str(a)), len(str(b)))
    pairs = zip(f"{a:0{width}}", f"{b:0{width}}", strict=True)
    return int("".join(str(abs(int(x) - int(y))) for x, y in pairs))


@dataclass(frozen=True)
class Problem:
    """A number and (operator, operand) pairs, evaluated from left to right."""

    first: int
    rest: tuple[tuple[str, int], ...]

    @property
    def text(self) -> str:
        """The question as given to the policy."""
        return f"{self.first}{''.join(f'{op}{x}' for op, x in self.rest)}="

    def values(self, right: bool = True) -> list[int]:
        """Returns the result of every step, by the right procedure or without carries and borrows."""
        values = [self.first]
        for op, x in self.rest:
            values.append((add if op == "+" else subtract)(values[-1], x, right))
        return values[1:]

    def solution(self, right: bool = True) -> str:
        """Returns the steps and the boxed answer."""
        lines, left = [], self.first
        for (op, x), value in zip(self.rest, self.values(right), strict=True):
            lines.append(f"{left}{op}{x}={value}\n")
            left = value
        return f"{''.join(lines)}\\boxed{{{left}}}"

    @property
    def held_out(self) -> bool:
        """True if the problem is held out."""
        return zlib.crc32(self.text.encode()) % HELD_OUT_SHARE == 0


def draw_problem(rng: random.Random, held_out: bool, steps: int = 2) -> Problem:
    """Draws a problem with two-digit results at every step and a wrong result that differs."""
    while True:
        rest = tuple((rng.choice("+-"), rng.randint(2, 9)) for _ in range(steps))
        problem = Problem(rng.randint(10, 99), rest)
        right, wrong = problem.values(), problem.values(right=False)
        two_digits = all(10 <= value <= 99 for value in right)
        if two_digits and right[-1] != wrong[-1] and problem.held_out == held_out:
            return problem


def draw_distinct(rng: random.Random, count: int, held_out: bool) -> list[Problem]:
    """Draws `count` distinct problems."""
    problems: dict[Problem, None] = {}
    while len(problems) < count:
        problems[draw_problem(rng, held_out)] = None
    return list(problems)


def table(problems: list[Problem]) -> pa.Table:
    """Returns the problems in the columns of DAPO-Math-17k."""
    return pa.table(
        {
            "data_source": ["arithmetic"] * len(problems),
            "prompt": [[{"role": "user", "content": p.text}] for p in problems],
            "ability": ["MATH"] * len(problems),
            "reward_model": [{"ground_truth": str(p.values()[-1]), "style": "rule"} for p in problems],
            "extra_info": [{"index": str(i)} for i in range(len(problems))],
        }
    )


def main(arguments: list[str]) -> None:
    """Writes train.parquet and heldout.parquet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("examples/data"), help="directory to write to")
    parser.add_argument("--train", type=int, default=10_000, help="training prompts")
    parser.add_argument("--heldout", type=int, default=500, help="held-out prompts")
    parser.add_argument("--seed", type=int, default=1, help="the same seed gives the same files")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(options.seed)
    for name, count in (("train", options.train), ("heldout", options.heldout)):
        problems = draw_distinct(rng, count, held_out=name == "heldout")
        pq.write_table(table(problems), options.out / f"{name}.parquet", compression="zstd")
        print(f"{options.out / name}.parquet: {count} prompts, such as {problems[0].text}")


if __name__ == "__main__":
    main(sys.argv[1:])
