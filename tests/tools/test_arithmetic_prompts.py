"""Tests the arithmetic problems of the demo and the files that hold them."""

import random
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

from make_arithmetic_prompts import Problem, draw_problem, main, subtract  # noqa: E402
from make_arithmetic_prompts import add as add_numbers  # noqa: E402


@pytest.mark.parametrize(
    ("a", "b", "total"), [(47, 85, 122), (13, 30, 43), (99, 99, 188), (187, 85, 262), (9, 1, 0)]
)
def test_adding_without_the_carry(a: int, b: int, total: int):
    assert add_numbers(a, b, carry=False) == total


@pytest.mark.parametrize(("a", "b", "rest"), [(132, 23, 111), (62, 21, 41), (12, 93, 81), (100, 99, 199)])
def test_subtracting_without_the_borrow(a: int, b: int, rest: int):
    assert subtract(a, b, borrow=False) == rest


def test_solution_is_written_out():
    problem = Problem(47, (("+", 8), ("-", 6)))
    assert problem.text == "47+8-6="
    assert problem.solution() == "47+8=55\n55-6=49\n\\boxed{49}"
    assert problem.solution(right=False) == "47+8=45\n45-6=41\n\\boxed{41}"


@pytest.mark.parametrize("held_out", [True, False])
def test_drawn_problems_have_two_digits_tell_the_procedures_apart_and_keep_to_their_part(held_out: bool):
    rng = random.Random(0)
    for _ in range(200):
        problem = draw_problem(rng, held_out)
        assert all(10 <= value <= 99 for value in problem.values())
        assert eval(problem.text.rstrip("=")) == problem.values()[-1] != problem.values(right=False)[-1]
        assert problem.held_out == held_out


def test_files_are_deterministic_distinct_and_disjoint(tmp_path: Path):
    for folder in ("a", "b"):
        main(["--out", str(tmp_path / folder), "--train", "300", "--heldout", "50"])
    read = {
        name: [row["prompt"][0]["content"] for row in pq.read_table(tmp_path / name).to_pylist()]
        for name in ("a/train.parquet", "a/heldout.parquet", "b/train.parquet")
    }
    assert read["a/train.parquet"] == read["b/train.parquet"]
    train, held_out = set(read["a/train.parquet"]), set(read["a/heldout.parquet"])
    assert (len(train), len(held_out), len(train & held_out)) == (300, 50, 0)
    main(["--out", str(tmp_path / "c"), "--train", "300", "--heldout", "50", "--seed", "2"])
    assert (tmp_path / "c/train.parquet").read_bytes() != (tmp_path / "a/train.parquet").read_bytes()


def test_the_committed_files_are_what_the_tool_writes(tmp_path: Path):
    main(["--out", str(tmp_path)])
    for name in ("train.parquet", "heldout.parquet"):
        assert pq.read_table(tmp_path / name).equals(pq.read_table(ROOT / "examples/data" / name))
