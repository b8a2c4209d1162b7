"""A directory that is written aside, and has its name only when it is whole."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist


def check_disk(target: Path, needed: int) -> None:
    """Raises ValueError if there is less space than `needed` bytes where `target` is to be."""
    place = next(parent for parent in target.absolute().parents if os.path.exists(parent))
    free = shutil.disk_usage(place).free
    if free < needed:
        raise ValueError(f"{target}: needs {needed:,} bytes, but {place} has {free:,} bytes free")


def check_target(target: Path) -> None:
    """Raises ValueError if no directory can be made under this name, or something has it."""
    if not target.name or "\0" in str(target):
        raise ValueError(f"{str(target)!r}: cannot be the name of a new directory; choose another")
    if os.path.lexists(target):
        raise ValueError(f"{target}: already exists; choose another directory or delete it")


@contextmanager
def written_aside(target: Path) -> Iterator[Path]:
    """An empty directory beside `target` that takes its name once the block has ended well. Collective.

    It is removed if the block fails. Raises ValueError if `target` exists or cannot be made.
    """
    check_target(target)
    partial = target.with_name(target.name + ".partial")
    dist.barrier()
    try:
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        yield partial
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):
            where = f": {error.filename}" if error.filename else ""
            raise ValueError(f"{target}: cannot be written: {error.strerror or error}{where}") from error
        raise
    dist.barrier()
    if dist.get_rank() == 0:
        partial.rename(target)
    dist.barrier()
