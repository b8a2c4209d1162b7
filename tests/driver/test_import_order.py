"""Tests that imports follow one order of packages, and that training imports neither planning nor report."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "megatron_bicc"
ORDER = (
    ("errors", "files", "plugins", "launcher"),
    ("collective",),
    ("config",),
    ("device_cpu",),
    ("device", "run_lock"),
    ("metrics", "consistency"),
    ("data",),
    ("rewards",),
    ("sglang",),
    ("packing",),
    ("model",),
    ("weights",),
    ("rollout",),
    ("algorithms",),
    ("training",),
    ("checkpoint",),
    ("evaluation",),
    ("startup",),
    ("cli",),
    ("train", "evaluate"),
)
"""Modules and folders of the package, lowest first; those of one row may import each other"""
BESIDE = ("planning", "report")
"""They import what they like, and nothing in ORDER imports them at module level"""
LATE = {"train.py": "planning", "metrics.py": "report"}
"""The only functions that import them, for --dry-run and at the end of a run"""
RANK = {name: rank for rank, row in enumerate(ORDER) for name in row}


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(nodes: Iterator[ast.AST]) -> set[str]:
    """The rooms of the package that these import statements name."""
    rooms = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "megatron_bicc":
            names = [f"megatron_bicc.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        else:
            continue
        rooms |= {name.split(".")[1] for name in names if name.startswith("megatron_bicc.")}
    return {name for name in rooms if not name.startswith("_")}  # the compiled packer


SOURCES = [path for path in sorted(PACKAGE.rglob("*.py")) if path.stem not in ("__init__", "__main__")]


def test_every_module_has_its_place() -> None:
    assert {room(path) for path in SOURCES} - set(BESIDE) == set(RANK)


@pytest.mark.parametrize(
    "path", [path for path in SOURCES if room(path) not in BESIDE], ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_imports_point_down(path: Path) -> None:
    tree, own = ast.parse(path.read_text()), room(path)
    upward = {name for name in imported(iter(tree.body)) if RANK.get(name, len(ORDER)) > RANK[own]}
    assert not upward, f"{path.relative_to(PACKAGE)} imports {upward}, which stand above {own}"


@pytest.mark.parametrize(
    "path", [path for path in SOURCES if room(path) not in BESIDE], ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_plans_and_pages_are_imported_late_and_in_one_place_each(path: Path) -> None:
    found = imported(ast.walk(ast.parse(path.read_text()))) & set(BESIDE)
    assert found <= {LATE.get(path.name)}
