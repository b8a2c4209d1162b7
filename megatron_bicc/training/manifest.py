"""manifest.json: size and SHA-256 of every file of a directory, so that a flipped bit is found."""

import hashlib
import json
from pathlib import Path

import torch.distributed as dist

MANIFEST = "manifest.json"


def write_manifest(directory: Path) -> None:
    """Writes the manifest of all files there. Collective: each process reads a share of them."""
    parts: list = [None] * dist.get_world_size()
    dist.all_gather_object(parts, {name: _describe(directory / name) for name in _share(_names(directory))})
    if dist.get_rank() == 0:
        files = {name: found for part in parts for name, found in part.items()}
        (directory / MANIFEST).write_text(json.dumps(files, indent=1, sort_keys=True))


def check_manifest(directory: Path) -> None:
    """Raises ValueError, on every process, that names a file that is missing or was changed. Collective."""
    parts: list = [None] * dist.get_world_size()
    dist.all_gather_object(parts, _first_damage(directory))
    for damage in filter(None, parts):
        raise ValueError(damage)


def _first_damage(directory: Path) -> str | None:
    try:
        files = json.loads((directory / MANIFEST).read_text())
        for name in _share(sorted(files)):
            if _describe(directory / name) != files[name]:
                return f"{directory / name} is damaged: it is not what {MANIFEST} says"
    except (OSError, ValueError) as error:
        return f"{getattr(error, 'filename', None) or directory / MANIFEST} cannot be read: {error}"
    return None


def _names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.is_file())


def _share(names: list[str]) -> list[str]:
    return names[dist.get_rank() :: dist.get_world_size()]


def _describe(path: Path) -> dict[str, int | str]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
