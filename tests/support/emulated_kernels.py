"""Builds csrc/cuda for the host, so that its kernels run on CPU tensors: a double of a GPU for tests.

The sources are the real ones. Only `kernel<<<...>>>(...)` is rewritten, and tests/kernels/emulate stands in
for CUDA's headers. Slow: for small sizes.
"""

import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from importlib.machinery import ExtensionFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import pybind11
import pytest

from megatron_bicc import device

REPOSITORY = Path(__file__).parents[2]
SOURCES = REPOSITORY / "csrc"
HEADERS = REPOSITORY / "tests/kernels/emulate"
LAUNCH = re.compile(r"(\w+(?:<[\w:, ]+>)?)\s*<<<(.+?)>>>\(", re.DOTALL)


def build() -> ModuleType:
    """Returns the module, compiled at most once for these sources, whatever the number of processes.

    Skips the test if there is no C++ compiler.
    """
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    files = sorted([*SOURCES.rglob("*.*"), *HEADERS.rglob("*.*")])
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]
    directory = Path(tempfile.gettempdir()) / f"emulated_kernels_{os.getuid()}_{digest}"
    directory.mkdir(mode=0o700, exist_ok=True)
    library = directory / f"_C_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            _compile(compiler, directory, library)
    loader = ExtensionFileLoader("_C_cuda", str(library))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("_C_cuda", loader))
    loader.exec_module(module)
    return module


def calls_of_kernels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Returns a list that gets the name of every function that is taken from device's kernels from now on."""
    csrc, called = device.kernels(), []

    class Recorder:
        def __getattr__(self, name: str) -> Any:
            called.append(name)
            return getattr(csrc, name)

    monkeypatch.setattr(device, "_kernels", Recorder())
    return called


def _compile(compiler: str, directory: Path, library: Path) -> None:
    sources = []
    for source in sorted((SOURCES / "cuda").glob("*.cu")):
        rewritten = directory / f"{source.stem}.cpp"
        rewritten.write_text(LAUNCH.sub(r"EMULATED_LAUNCH((\2), (\1), ", source.read_text()))
        sources.append(rewritten)
    includes = [HEADERS, SOURCES / "cuda", SOURCES, pybind11.get_include(), sysconfig.get_path("include")]
    objects, running = [], []
    for source in [*sources, *sorted((SOURCES / "cuda").glob("*.cpp"))]:
        objects.append(directory / f"{source.stem}.o")
        # fortified, longjmp refuses another stack
        options = ["-std=c++17", "-O1", "-fPIC", "-U_FORTIFY_SOURCE"]
        command = [compiler, "-c", *options, *(f"-I{path}" for path in includes)]
        running.append(subprocess.Popen([*command, source, "-o", objects[-1]]))
    statuses = [process.wait() for process in running]
    assert not any(statuses), "csrc/cuda does not compile for the host"
    unfinished = library.with_suffix(".unfinished")
    subprocess.run([compiler, "-shared", *objects, "-o", unfinished], check=True)
    unfinished.rename(library)
