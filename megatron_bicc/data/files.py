"""Rows of a data file as dictionaries, with the number a person would count to."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_bicc.errors import first_line

Row = dict[str, Any]
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
"""A half of a UTF-16 pair, escaped in JSON"""
MOST_DIGITS = 4300


class JsonFloat(float):
    """A number of a JSON file that is not written as an integer: 0.10, 1e-5."""

    text: str
    """The number as the file has it"""

    def __new__(cls, text: str) -> "JsonFloat":
        number = super().__new__(cls, text)
        number.text = str(text)  # a copy is made from the number, and given the text afterwards
        return number


def read_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """Yield (row number from 1, row) of a .parquet or .jsonl file; in .jsonl the line number.

    A float of .jsonl is a JsonFloat; one of 32 bits in .parquet is the double of its shortest decimal text,
    0.1 and not 0.10000000149.

    Raises ValueError, naming the file and where there is one the row, if the file is missing, unreadable,
    of another kind, or holds a line that is no JSON object or has a key twice.
    """
    readers: dict[str, Callable[[Path], Iterator[tuple[int, Row]]]] = {
        ".parquet": _read_parquet,
        ".jsonl": _read_jsonl,
    }
    if path.is_dir():
        raise ValueError(f"{path}: a directory; give one .parquet or .jsonl file")
    if path.suffix not in readers:
        raise ValueError(f"{path}: unknown kind of file '{path.suffix}'; give a .parquet or .jsonl file")
    if not path.is_file():
        raise ValueError(f"{path}: no such file; check the path in the data or evaluation settings")
    try:
        yield from readers[path.suffix](path)
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as {path.suffix}: {first_line(error)}") from error


def _read_parquet(path: Path) -> Iterator[tuple[int, Row]]:
    number = 0
    with pq.ParquetFile(path) as file:
        names = file.schema_arrow.names
        if len(set(names)) < len(names):
            raise ValueError(f"{path}: two columns have one name, among {', '.join(names)}; rename one")
        as_text, as_doubles = (_short_floats_as(t, file.schema_arrow) for t in (pa.string(), pa.float64()))
        for batch in file.iter_batches():
            for row in batch.cast(as_text).cast(as_doubles).to_pylist():
                number += 1
                yield number, row


def _short_floats_as(wanted: pa.DataType, schema: pa.Schema) -> pa.Schema:
    """The schema with `wanted` in place of floats of 32 bits, within structs and lists as well."""

    def replaced(field: pa.Field) -> pa.Field:
        kind = field.type
        if pa.types.is_float32(kind):
            kind = wanted
        elif pa.types.is_struct(kind):
            kind = pa.struct([replaced(kind.field(i)) for i in range(kind.num_fields)])
        elif pa.types.is_list(kind):
            kind = pa.list_(replaced(kind.value_field))
        return field.with_type(kind)

    return pa.schema([replaced(field) for field in schema], schema.metadata)


def _read_jsonl(path: Path) -> Iterator[tuple[int, Row]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, _parse_line(path, number, line)


def _parse_line(path: Path, number: int, line: bytes) -> Row:
    try:
        # a byte order mark may stand at the start of a file
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        row = json.loads(text, parse_float=JsonFloat, parse_int=_integer, object_pairs_hook=_object)
        if SURROGATE.search(line):
            json.dumps(row, ensure_ascii=False).encode()
    except UnicodeError as error:
        raise ValueError(f"{path}, row {number}: not UTF-8 ({error}); write the file as UTF-8") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(
            f"{path}, row {number}: not valid JSON ({error}); write one object a line"
        ) from error
    except ValueError as error:  # of what is valid JSON, but cannot be taken
        raise ValueError(f"{path}, row {number}: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(
            f"{path}, row {number}: a {type(row).__name__}, not a JSON object; write one object a line"
        )
    return row


def _integer(text: str) -> int:
    """A whole number of JSON; raises ValueError for one of more digits than Python reads."""
    if len(text) > MOST_DIGITS:
        raise ValueError(f"a whole number of {len(text)} digits; write it as a text")
    return int(text)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object that JSON's pairs make; raises ValueError for a key that it has twice."""
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object has the key {twice!r} twice")
    return made
