"""Rows of a data file as dictionaries, with the number a person would count to."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_bicc.errors import first_line

Row = dict[str, Any]


def read_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """Yield (row number from 1, row) of a .parquet or .jsonl file; in .jsonl the line number.

    Raises ValueError, naming the file and where there is one the row, if the file is missing, unreadable,
    of another kind, or holds a line that is no JSON object.
    """
    readers: dict[str, Callable[[Path], Iterator[tuple[int, Row]]]] = {
        ".parquet": _read_parquet,
        ".jsonl": _read_jsonl,
    }
    if path.suffix not in readers:
        raise ValueError(f"{path}: unknown kind of file '{path.suffix}'; give a .parquet or .jsonl file")
    if not path.is_file():
        raise ValueError(f"{path}: no such file; check the path in the data or evaluation settings")
    try:
        yield from readers[path.suffix](path)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path}: cannot be read as {path.suffix}: {first_line(error)}") from error


def _read_parquet(path: Path) -> Iterator[tuple[int, Row]]:
    number = 0
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield number, row


def _read_jsonl(path: Path) -> Iterator[tuple[int, Row]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, _parse_line(path, number, line)


def _parse_line(path: Path, number: int, line: bytes) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path}, row {number}: not valid JSON ({error}); write one object a line"
        ) from error
    if not isinstance(row, dict):
        raise ValueError(f"{path}, row {number}: a {type(row).__name__}, not a JSON object")
    return row
