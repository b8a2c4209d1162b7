"""manifest.json: size and SHA-256 of every file below a directory, so that a flipped bit is found."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_bicc.platform.gather import gathered

MANIFEST = "manifest.json"


def describe_share(directory: Path) -> dict[str, Any]:
    """This process's share of the manifest: size and SHA-256 of every so-many-th file there."""
    return {name: _describe(directory / name) for name in _share(_names(directory))}


def write_manifest(directory: Path, parts: list[dict[str, Any]]) -> None:
    """Writes the manifest from every process's share."""
    files = {name: found for part in parts for name, found in part.items()}
    (directory / MANIFEST).write_text(json.dumps(files, indent=1, sort_keys=True))


def check_file(directory: Path, name: str) -> None:
    """Raises ValueError if a file is missing or was changed."""
    if damage := _damage(directory, [name]):
        raise ValueError(damage)


def check_manifest(directory: Path) -> None:
    """Raises ValueError, on every process, that names a file that is missing or was changed. Collective."""
    for damage in filter(None, gathered(_damage(directory))):
        raise ValueError(damage)


def check_if_listed(directory: Path) -> None:
    """`check_manifest` where there is a manifest: what older versions imported has none. Collective."""
    if (directory / MANIFEST).exists():
        try:
            check_manifest(directory)
        except ValueError as error:
            raise ValueError(f"{error}; take an intact copy or another checkpoint") from error


def _damage(directory: Path, names: list[str] | None = None) -> str | None:
    """The first file that is damaged, in words; of all files this process looks at its share."""
    try:
        files = json.loads((directory / MANIFEST).read_text())
        for name in names or _share(sorted(files)):
            if _describe(directory / name) != files[name]:
                return f"{directory / name} is damaged: it is not what {MANIFEST} says"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{getattr(error, 'filename', None) or directory / MANIFEST} cannot be read: {error}"
    return None


def _names(directory: Path) -> list[str]:
    return sorted(p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file())


def _share(names: list[str]) -> list[str]:
    return names[dist.get_rank() :: dist.get_world_size()]


def _describe(path: Path) -> dict[str, int | str]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
