"""Files of one JSON object a line that survive a process killed in the middle of a line."""

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any


def append(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Adds the records and returns once they are on disk; an unfinished last line is cut off first.

    Raises ValueError for a number that JSON does not have (NaN, infinity).
    """
    text = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)
    _repair(path)
    with path.open("a", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def read(path: Path) -> list[dict[str, Any]]:
    """Every record; an unfinished last line is left out.

    Raises ValueError that names the file and the line of anything else that is not a JSON object.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise ValueError(f"{path}: cannot read it: {error.strerror}") from None
    records = [_parse(line, f"{path} line {i}") for i, line in enumerate(lines[:-1], 1) if line.strip()]
    return records + ([json.loads(lines[-1])] if _is_object(lines[-1]) else [])


def keep(path: Path, wanted: Callable[[dict[str, Any]], bool]) -> None:
    """Drops the other records; the file is either the old one or the new one, whenever the process dies."""
    if not path.exists():
        return
    draft = path.with_name(path.name + ".new")
    draft.unlink(missing_ok=True)
    append(draft, filter(wanted, read(path)))
    os.replace(draft, path)


def _repair(path: Path) -> None:
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
        raise ValueError(f"{where}: not a JSON object; remove the line")
    return json.loads(line)
