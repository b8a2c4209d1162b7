"""Tests that processes on hosts with different libraries are refused."""

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest

from megatron_bicc import consistency
from megatron_bicc.config import Config
from megatron_bicc.errors import UserError


def answers(others: dict[str, str]) -> Callable[[Any], list[Any]]:
    """Test double of `collective.gathered`: this process, and one on another host with other facts."""

    def gathered(own: Any) -> list[Any]:
        return [own, "another digest" if isinstance(own, str) else ("elsewhere", others)]

    return gathered


@pytest.mark.parametrize(
    ("fact", "other"),
    [
        ("library of the layers", "Transformer Engine"),
        ("library transformer-engine", "2.20.2"),
        ("library apex", "0.1"),
        ("library nvidia-nccl-cu13", "2.29.7"),
        ("library CUDA of torch", "12.9"),
        ("kernels", "csrc's"),
    ],
)
def test_another_library_is_named(fact: str, other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = consistency._facts(Config(), {}, "local")
    assert fact in facts
    monkeypatch.setattr(consistency, "gathered", answers(facts | {fact: other}))
    with pytest.raises(UserError, match=f"{fact}: {facts[fact]} against {other}; give all hosts the same"):
        consistency._check_same(facts)


def test_a_version_is_read_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "apex":
            raise PackageNotFoundError(name)
        return f"{name} 1.0"

    monkeypatch.setattr(consistency, "version", version)
    facts = consistency._facts(Config(), {}, "local")
    assert facts["library transformer-engine"] == "transformer-engine 1.0"
    assert facts["library apex"] == "none"


def test_both_extensions_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_C.cpython-311.so", "_C_cuda.cpython-311.so"):
        (tmp_path / name).write_text(name)
    monkeypatch.setattr(consistency, "PACKAGE", tmp_path)
    facts = consistency._facts(Config(), {}, "local")
    first = facts["code megatron_bicc/_C.cpython-311.so"]
    assert first != facts["code megatron_bicc/_C_cuda.cpython-311.so"]
