"""driver, CUDA, torch and NCCL of both environments, Transformer Engine and apex, memory, links"""

import importlib.metadata
import importlib.util
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import torch
from check_environment import OLDEST_DRIVER, Failure, branch, driver_versions
from gpu_checks._check import REPOSITORY, Check, at_least, holds, noted, skipped

from megatron_bicc import device
from megatron_bicc.errors import UserError

SERVER_PYTHON = REPOSITORY / ".venv-sglang/bin/python"
SERVER_FACTS = """
import json, torch
from importlib.metadata import version
nccl = list(torch.cuda.nccl.version()) if torch.version.cuda else None
print(json.dumps([torch.__version__, nccl, version("sglang")]))
"""


def run(out: Path) -> Iterator[Check]:
    """Yields the versions, and whether those that must agree do."""
    yield noted("torch", torch.__version__)
    yield noted("megatron-core", importlib.metadata.version("megatron-core"))
    for name, module in (
        ("Transformer Engine", "transformer_engine"),
        ("apex of NVIDIA", "apex.normalization"),
    ):
        yield noted(name, "installed" if is_installed(module) else "not installed")
    nccl = torch.cuda.nccl.version() if torch.version.cuda else None
    yield from _server(nccl)
    if device.cpu_is_asked_for():
        yield skipped("GPUs", f"{device.VARIABLE} is cpu")
        return
    yield _driver()
    if not torch.cuda.is_available():
        yield _no_gpu()
        return
    yield noted("CUDA of torch", torch.version.cuda)
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        yield noted(
            f"{torch.cuda.get_device_name(index)} {index}: free of {total / 1e9:.0f} GB", free / 1e9, "GB"
        )
    if torch.cuda.device_count() > 1:
        links = "NVLink" if " NV" in nvidia_smi("topo", "-m") else "no NVLink"
        yield noted("links between GPUs", links)


def _driver() -> Check:
    """Checks the driver by nvidia-smi: torch cannot say why it sees no GPU."""
    if shutil.which("nvidia-smi") is None:
        return skipped("driver", "nvidia-smi is not installed")
    try:
        return at_least("driver", branch(driver_versions()[0]), OLDEST_DRIVER)
    except Failure as failure:
        return Check("driver", "failed", reason=str(failure))


def _no_gpu() -> Check:
    """Returns why torch sees no GPU: failed if this host has GPUs."""
    try:
        device.choose_device()
    except UserError as error:
        return Check("GPUs", "failed", reason=str(error))
    return skipped("GPUs", "neither torch nor nvidia-smi sees one")


def _server(nccl: tuple[int, ...] | None) -> Iterator[Check]:
    if not SERVER_PYTHON.exists():
        yield skipped("SGLang's environment", "not installed: make sglang")
        return
    done = subprocess.run([SERVER_PYTHON, "-c", SERVER_FACTS], capture_output=True, text=True, check=True)
    server_torch, server_nccl, sglang = json.loads(done.stdout)
    yield noted("SGLang", sglang)
    yield noted("torch of SGLang", server_torch)
    if nccl is None or server_nccl is None:
        yield skipped("NCCL of both environments", "a CPU build of torch has none")
    else:
        shown = f"{_dotted(nccl)} and {_dotted(server_nccl)}"
        yield holds("NCCL of both environments", list(nccl) == server_nccl, shown, "equal")


def is_installed(module: str) -> bool:
    """Returns whether a module can be found; imports its parent package, not the module."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the parent package is missing
        return False


def _dotted(version: tuple[int, ...] | list[int]) -> str:
    return ".".join(map(str, version))


def nvidia_smi(*arguments: str) -> str:
    """Returns what nvidia-smi prints. Raises CalledProcessError."""
    return subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, check=True).stdout
