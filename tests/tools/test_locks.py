"""Tests that the locks are complete and agree with each other; by hand, that pip resolves to what they pin.

The resolutions ask the package index for a minute each:
.venv/bin/python -m pytest -m manual tests/tools/test_locks.py
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PIN = re.compile(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.!]+)(  #.*)?")
LOCKS = sorted(path.name for path in REPOSITORY.glob("requirements*.lock"))
SHARED_WITH_SERVERS = (
    "torch",
    "nvidia-nccl-cu13",
    "nvidia-cudnn-cu13",
    "nvidia-cublas",
    "cuda-toolkit",
    "triton",
)


def pins(*names: str) -> dict[str, str]:
    """Returns version by normalised package name; a later lock replaces an earlier one's."""
    found = {}
    for name in names:
        for line in (REPOSITORY / name).read_text().splitlines():
            if pin := PIN.fullmatch(line):
                found[normalised(pin[1])] = pin[2]
    return found


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize("name", LOCKS)
def test_every_line_is_a_pin(name: str) -> None:
    lines = (REPOSITORY / name).read_text().splitlines()
    requirements = [line for line in lines if line and not line.startswith("#")]
    assert [line for line in requirements if not PIN.fullmatch(line)] == []
    assert len(pins(name)) == len(requirements), "a package is pinned twice"


def test_trainer_and_servers_have_the_same_torch_and_nccl() -> None:
    trainer, servers = (
        pins("requirements.lock", "requirements-cuda.lock"),
        pins("requirements-sglang-cuda.lock"),
    )
    for name in SHARED_WITH_SERVERS:
        assert trainer[name] == servers[name], name


def test_the_servers_are_the_same_with_and_without_a_gpu() -> None:
    assert pins("requirements-sglang.lock")["sglang"] == pins("requirements-sglang-cuda.lock")["sglang"]


def test_transformer_engine_changes_no_other_pin() -> None:
    trainer, added = pins("requirements.lock", "requirements-cuda.lock"), pins("requirements-te.lock")
    assert trainer.keys() & added.keys() == set()
    versions = {added[name] for name in added if name.startswith("transformer-engine")}
    assert len(versions) == 1


def test_apex_of_pypi_is_in_no_lock() -> None:
    assert "apex" not in pins(*LOCKS)


@pytest.mark.manual
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "locks", [["requirements.lock", "requirements-cuda.lock"], ["requirements-sglang-cuda.lock"]]
)
def test_pip_resolves_to_the_lock(locks: list[str], tmp_path: Path) -> None:
    """The pins of a host with GPUs fit together, lack nothing, and exist as wheels; nothing is installed."""
    report, wanted = tmp_path / "report.json", tmp_path / "wanted.txt"
    expected = pins(*locks)
    wanted.write_text("".join(f"{name}=={version}\n" for name, version in expected.items()))
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
    command += ["--only-binary", ":all:", "--report", str(report), "-r", str(wanted)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    installed = [package["metadata"] for package in json.loads(report.read_text())["install"]]
    assert {normalised(p["name"]): p["version"] for p in installed} == expected
