"""Tests that csrc's kernels compile for every kind of GPU without spilling registers to memory."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
GPUS = ("sm_80", "sm_90", "sm_100")
"""A100, H100, B200"""
USED = re.compile(
    r"Function properties for (\w+)\n"
    r"\s*(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n"
    r".*?Used (\d+) registers"
)


def used_by_kernels(source: Path, directory: Path) -> dict[tuple[str, str], tuple[int, int]]:
    """Returns (registers, bytes of stack frame and spills) by (kind of GPU, kernel)."""
    ptx = directory / "kernels.ptx"
    compiler = ["nvcc", "-std=c++17", "-O3", "-ptx", "-arch=compute_80", f"-I{CSRC}"]
    subprocess.run([*compiler, source, "-o", ptx], check=True)
    used = {}
    for gpu in GPUS:
        command = ["ptxas", "-v", f"-arch={gpu}", ptx, "-o", directory / "kernels.cubin"]
        told = subprocess.run(command, check=True, capture_output=True, text=True).stderr
        for kernel, *counts in USED.findall(told):
            stack, stores, loads, registers = map(int, counts)
            used[gpu, kernel] = registers, stack + stores + loads
    return used


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
@pytest.mark.parametrize("source", sorted((CSRC / "cuda").glob("*.cu")), ids=lambda path: path.stem)
def test_no_kernel_spills(source: Path, tmp_path: Path) -> None:
    used = used_by_kernels(source, tmp_path)
    kernels = {kernel for _, kernel in used}
    assert kernels and len(used) == len(kernels) * len(GPUS)
    for (gpu, kernel), (registers, _) in used.items():
        print(f"{gpu} {registers:3} registers {kernel}")
    assert {name: spilled for name, (_, spilled) in used.items() if spilled} == {}
