"""Files and killed processes: JSON lines and atomically replaced files outlive one, temporary ones do not."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_bicc.errors import UserError


def append_jsonl(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Appends one line per record and syncs the file; an unfinished last line is cut off first.

    Raises ValueError for a number that JSON does not have (NaN, infinity).
    """
    text = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)
    _repair(path)
    with path.open("a", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Returns every record; an unfinished last line is left out.

    Raises UserError that names the file and the line of anything else that is not a JSON object.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"{path}: cannot read it: {error.strerror}") from error
    records = [_parse(line, f"{path} line {i}") for i, line in enumerate(lines[:-1], 1) if line.strip()]
    return records + ([json.loads(lines[-1])] if _is_object(lines[-1]) else [])


def keep_jsonl(path: Path, wanted: Callable[[dict[str, Any]], bool]) -> None:
    """Drops all records but the wanted ones, atomically. Does nothing if there is no such file."""
    if path.exists():
        with atomic_file(path) as draft:
            append_jsonl(draft, filter(wanted, read_jsonl(path)))


def _repair(path: Path) -> None:
    """Terminates the last line if it is a whole record, else removes it: its writer was killed."""
    content = path.read_bytes() if path.exists() else b""
    complete, _, rest = content.rpartition(b"\n")
    if not rest:
        return
    with path.open("r+b") as stream:
        if _is_object(rest):
            stream.seek(0, os.SEEK_END)
            stream.write(b"\n")
        else:
            stream.truncate(len(content) - len(rest))


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _parse(line: bytes, where: str) -> dict[str, Any]:
    if not _is_object(line):
        raise UserError(f"{where}: not a JSON object; remove the line")
    return json.loads(line)


def check_disk(target: Path, needed: int) -> None:
    """Raises UserError if less than `needed` bytes are free where `target` will be written."""
    place = next(parent for parent in target.absolute().parents if os.path.exists(parent))
    free = shutil.disk_usage(place).free
    if free < needed:
        raise UserError(f"{target}: needs {needed:,} bytes, but {place} has {free:,} bytes free")


def check_target(target: Path) -> None:
    """Raises UserError if `target` exists, or cannot be the name of a directory."""
    if not target.name or "\0" in str(target):
        raise UserError(f"{str(target)!r}: cannot be the name of a new directory; choose another")
    if os.path.lexists(target):
        raise UserError(f"{target}: already exists; choose another directory or delete it")


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yields a draft path beside `path`; on normal exit the draft is synced and renamed to `path`.

    `path` is the old file or the complete new one, whenever the process is killed. After an error `path` is
    unchanged and the draft is removed.
    """
    draft = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        yield draft
        _sync(draft)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    _sync(path.parent)


@contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """Yields an empty directory beside `target`: renamed to it on success, removed after an error. One rank.

    Raises UserError if `target` exists or cannot be made; an OSError of the block becomes one.
    """
    check_target(target)
    partial = partial_name(target)
    try:
        with os_error_named(target):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            yield partial
            partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextmanager
def os_error_named(target: Path) -> Iterator[None]:
    """Converts an OSError of the block, such as a full disk, into a UserError that names `target`."""
    try:
        yield
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        raise UserError(f"{target}: cannot be written: {error.strerror or error}{where}") from error


def partial_name(target: Path) -> Path:
    """Returns the name under which `atomic_directory` writes."""
    return target.with_name(target.name + ".partial")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_REMOVER = """
import os, shutil, sys
sys.stdin.read()
if os.path.isfile(sys.argv[1]):
    os.remove(sys.argv[1])
shutil.rmtree(sys.argv[1], ignore_errors=True)
"""


def remove_at_end(path: Path) -> subprocess.Popen:
    """Starts a process that removes a file or directory once this process has ended, even by kill -9.

    The end of this process closes the standard input of the returned one; closing it removes the path, too.
    """
    command = [sys.executable, "-S", "-c", _REMOVER, str(path.absolute())]
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
