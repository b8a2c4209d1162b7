"""Checks that all processes run the same code, on the same settings, libraries and files.

Hosts may differ: one was not updated, one reads an older copy of the data. Their collectives would still
match, and training would silently use mixed inputs.
"""

import hashlib
import platform
import secrets
import socket
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_bicc import device
from megatron_bicc.collective import gathered, raised_on_all_ranks
from megatron_bicc.config import Config, flatten
from megatron_bicc.errors import UserError

PACKAGE = Path(__file__).parent
LIBRARIES = ("torch", "megatron-core", "transformers", "numpy")
OPTIONAL_LIBRARIES = ("transformer-engine", "apex", "nvidia-nccl-cu12", "nvidia-nccl-cu13")


def check_agreement(config: Config, contents: dict[str, str], layers: str) -> None:
    """Raises UserError that names the first setting, source file, library or input that differs. Collective.

    contents: startup.Inputs.contents. layers: model.build.backend(), which decides the order of parameters in
    the gradient buffers: their lengths would match, and gradients of different weights would be added.
    """
    _check_same(_facts(config, contents, layers))
    _check_shared(Path(config.output_dir))


def _facts(config: Config, contents: dict[str, str], layers: str) -> dict[str, str]:
    """Returns everything that must be equal on all ranks, by name."""
    facts = {f"setting {name}": repr(value) for name, value in flatten(asdict(config)).items()}
    for file in sorted([*PACKAGE.rglob("*.py"), *PACKAGE.glob("_C*.so")]):
        facts[f"code megatron_bicc/{file.relative_to(PACKAGE)}"] = _sha256(file)
    facts |= {f"library {name}": version(name) for name in LIBRARIES}
    facts |= {f"library {name}": _version_if_installed(name) for name in OPTIONAL_LIBRARIES}
    facts |= {"library python": platform.python_version(), "library CUDA of torch": str(torch.version.cuda)}
    facts["library of the layers"] = layers
    # with csrc's kernels tensor-parallel ranks reduce once for a micro-batch, without them once for a chunk
    facts["kernels"] = "plain torch" if device.kernels() is None else "csrc's"
    return facts | {f"content of {name}": digest[:12] for name, digest in contents.items()}


def _version_if_installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


def _check_same(facts: dict[str, str]) -> None:
    # one digest per rank first: the facts of thousands of ranks would be megabytes
    digest = hashlib.sha256(repr(sorted(facts.items())).encode()).hexdigest()
    digests = gathered(digest)
    odd = [rank for rank, other in enumerate(digests) if other != digests[0]]
    if not odd:
        return
    everyone = gathered((socket.gethostname(), facts))
    (here, first), (there, other) = everyone[0], everyone[odd[0]]
    names = [name for name in sorted(first | other) if first.get(name) != other.get(name)]
    listed = "; ".join(f"{n}: {first.get(n, 'none')} against {other.get(n, 'none')}" for n in names[:5])
    more = f"; and {len(names) - 5} more" if len(names) > 5 else ""
    raise UserError(
        f"process 0 on host {here} ({digests[0][:12]}) and process {odd[0]} on host {there} "
        f"({digests[odd[0]][:12]}) run different code or settings: {listed}{more}; "
        "give all hosts the same code, settings and files"
    )


def _check_shared(output_dir: Path) -> None:
    """Checks that every rank sees a file that rank 0 writes: checkpoints need one shared file system."""
    name = gathered(f".shared_{secrets.token_hex(4)}")[0]
    probe = output_dir / name
    with raised_on_all_ranks(UserError):
        if dist.get_rank() == 0:
            try:
                output_dir.mkdir(parents=True, exist_ok=True)
                probe.touch()
            except OSError as error:
                raise UserError(f"output_dir: {output_dir} cannot be written: {error.strerror}") from error
    seen = gathered((probe.exists(), socket.gethostname()))
    if dist.get_rank() == 0:
        probe.unlink()
    for rank, (found, host) in enumerate(seen):
        if not found:
            raise UserError(
                f"output_dir is {output_dir}; process {rank} on host {host} does not see what process 0 on "
                f"host {seen[0][1]} writes there: it must be on a file system that all hosts share"
            )


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:12]
