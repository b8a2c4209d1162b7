"""Tests that imports follow one order of packages, and which of them are late: inside a function."""

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
"""They import what they like, and what is in ORDER imports them late or not at all"""
LATE = {
    ("train.py", "run", "planning"): "a run without --dry-run does not need it",
    ("metrics.py", "finish", "report"): "it loads a drawing library, and steps must not wait for that",
    ("device.py", "megatron", "device_cpu"): "it loads megatron-core, which an evaluation does not need",
    ("cli.py", "_field_value", "model"): "it loads torch and megatron-core, which --help does not need",
    ("rewards/worker.py", "_serve", "rewards"): "until it serves, it imports the standard library only",
}
"""The only imports of the package inside functions of ORDER, by file, function and what is imported: why"""
RANK = {name: rank for rank, row in enumerate(ORDER) for name in row}


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def rooms(node: ast.Import | ast.ImportFrom) -> set[str]:
    """The rooms of the package that this import statement names."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    else:
        assert node.level == 0, f"line {node.lineno}: write the import with megatron_bicc"
        names = [node.module or ""]
        if names == ["megatron_bicc"]:
            names = [f"megatron_bicc.{alias.name}" for alias in node.names]
    found = {name.split(".")[1] for name in names if name.startswith("megatron_bicc.")}
    return {name for name in found if not name.startswith("_")}  # the compiled packer


def imported(node: ast.AST, function: str = "") -> Iterator[tuple[str, str]]:
    """All imports of the package below a node, under `if` and `try` too: (function, or empty; room)."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield from ((function, name) for name in rooms(child))
        inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
        yield from imported(child, child.name if inside else function)


SOURCES = [path for path in sorted(PACKAGE.rglob("*.py")) if path.stem not in ("__init__", "__main__")]
ORDERED = [path for path in SOURCES if room(path) not in BESIDE]


def test_every_module_has_its_place() -> None:
    assert {room(path) for path in SOURCES} - set(BESIDE) == set(RANK)


@pytest.mark.parametrize("path", ORDERED, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    own = room(path)
    names = {name for function, name in imported(ast.parse(path.read_text())) if not function}
    upward = {name for name in names if RANK.get(name, len(ORDER)) > RANK[own]}
    assert not upward, f"{path.relative_to(PACKAGE)} imports {upward}, which stand above {own}"


def test_late_imports_are_those_with_a_reason() -> None:
    found = {
        (str(path.relative_to(PACKAGE)), function, name)
        for path in ORDERED
        for function, name in imported(ast.parse(path.read_text()))
        if function
    }
    assert found == LATE.keys()
