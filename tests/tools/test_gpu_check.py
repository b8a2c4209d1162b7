"""Tests the command behind `make gpu-check`: its table, its file, its exit status."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).parents[2]
sys.path.insert(0, str(REPOSITORY / "tools"))

import gpu_check  # noqa: E402
from gpu_checks import _check, _steps, environment  # noqa: E402

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: its parts are not skipped")


def run(out: Path, *parts: str) -> tuple[int, list[dict]]:
    """Exit status, and the checks in the JSON file."""
    status = gpu_check.main([*parts, "--out", str(out)])
    return status, json.loads((out / "checks.json").read_text())


def test_every_part_is_a_module_and_in_the_docs() -> None:
    files = {path.stem for path in (REPOSITORY / "tools/gpu_checks").glob("[!_]*.py")}
    assert set(gpu_check.PARTS) == files
    page = (REPOSITORY / "docs/gpu_check.md").read_text()
    assert all(f"| `{part}` |" in page for part in gpu_check.PARTS)


@no_gpu
def test_what_needs_a_gpu_is_skipped_with_the_reason(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    status, checks = run(tmp_path, "kernels", "environment")
    assert status == 0
    by_name = {(check["part"], check["name"]): check for check in checks}
    assert by_name["kernels", "all"]["reason"] == "needs 1 NVIDIA GPU; torch sees 0"
    assert by_name["environment", "torch"]["figure"] == torch.__version__
    assert by_name["environment", "GPUs"]["result"] == "skipped"
    assert "0 failed, " in capsys.readouterr().out


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch is a CUDA build")
def test_gpus_that_torch_cannot_use_are_a_failure(gpu_host: Callable[..., None], tmp_path: Path) -> None:
    """As a command in another directory, to which --out is relative."""
    gpu_host("570.86.10")
    command = [sys.executable, REPOSITORY / "tools/gpu_check.py", "environment", "--out", "here"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    failed = {
        check["name"]: check
        for check in json.loads((tmp_path / "here/checks.json").read_text())
        if check["result"] == "failed"
    }
    assert set(failed) == {"driver", "GPUs"}
    assert (failed["driver"]["figure"], failed["driver"]["bound"]) == (570.0, "at least 580")
    found = (
        f"nvidia-smi lists 1 GPU with driver 570.86.10, and torch {torch.__version__}, a build for the CPU"
    )
    assert failed["GPUs"]["reason"].startswith(found)


@pytest.mark.parametrize(
    "drivers, result, reason",
    [
        (["580.95.05"], "passed", ""),
        (["garbage"], "failed", "nvidia-smi answers 'garbage'"),
        ([], "failed", "nvidia-smi fails"),
    ],
    ids=["new", "garbage", "broken"],
)
def test_the_driver_is_checked_without_torch(
    gpu_host: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    drivers: list[str],
    result: str,
    reason: str,
) -> None:
    gpu_host(*drivers)
    monkeypatch.setattr(environment, "SERVER_PYTHON", tmp_path / "no server")
    (check,) = [check for check in environment.run(tmp_path) if check.name == "driver"]
    assert (check.result, check.reason[: len(reason)]) == (result, reason)


@pytest.mark.parametrize("out", ["file", "file/out"])
def test_a_place_that_cannot_be_written_to_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture, out: str
) -> None:
    (tmp_path / "file").write_text("")
    assert gpu_check.main(["environment", "--out", str(tmp_path / out)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"gpu_check: error: --out is {tmp_path / out}; it cannot be written to: ")


def test_a_part_that_does_not_end_well_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "TIMEOUT_S", 0.01)
    status, checks = run(tmp_path, "environment")
    assert status == 1
    assert [(check["name"], check["result"]) for check in checks] == [("process", "failed")]


@pytest.mark.parametrize("value, result", [(1.0, "passed"), (1.1, "failed"), (math.nan, "failed")])
def test_bounds(value: float, result: str) -> None:
    assert _check.at_most("x", value, 1.0).result == result
    assert _check.at_least("x", -value, -1.0).result == result


def test_differences_of_steps_are_seen() -> None:
    def made(scale: float) -> _steps.Step:
        return _steps.Step(scale, 1.0, {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([1.0, scale])}, {})

    one, other = made(1.0), made(-1.0)
    assert _steps.loss_error(other, one) == 2.0
    assert _steps.gradient_error(other, one) == pytest.approx(math.sqrt(2))
    assert _steps.smallest_cosine(other, one) == pytest.approx(0.0, abs=1e-7)
    assert _steps.gradient_error(one, one) == 0.0
