"""Compiles guard.cpp against torch's headers and loads it; imports no torch, which must come later."""

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

SOURCE = Path(__file__).with_name("guard.cpp")


def load() -> None:
    """Registers a CUDA device with torch's dispatcher and autograd. Before torch is imported."""
    if "torch" in sys.modules:
        raise RuntimeError("torch is imported already: it has found no CUDA device")
    ctypes.CDLL(str(_library()), mode=ctypes.RTLD_GLOBAL)


def _library() -> Path:
    """Returns the compiled library, compiled once per version of torch and of the source."""
    torch = Path(find_spec("torch").submodule_search_locations[0])
    command = [
        *(shutil.which("c++") or "g++", "-std=c++20", "-O0", "-shared", "-fPIC", str(SOURCE)),
        *(f"-I{torch / 'include'}", f"-L{torch / 'lib'}", f"-Wl,-rpath,{torch / 'lib'}"),
        *("-Wl,--no-as-needed", "-ltorch_cpu", "-lc10"),
    ]
    key = "\n".join([*command, version("torch"), SOURCE.read_text()])
    cache = Path(tempfile.gettempdir(), f"megatron_bicc_fake_cuda_{os.getuid()}")
    library = cache / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if not library.exists():
        cache.mkdir(mode=0o700, exist_ok=True)
        partial = library.with_suffix(f".{os.getpid()}")
        subprocess.run([*command, "-o", str(partial)], check=True)
        partial.rename(library)
    return library
