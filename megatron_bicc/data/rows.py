"""Reads the rows of a data file, and the question that each holds in any of the known schemas.

Schemas: DAPO-Math-17k, GSM8K, MATH, a plain one, and those of benchmarks as published on Hugging Face:

    {problem, solution}  MATH-500 (HuggingFaceH4), AIME 2024 (HuggingFaceH4/aime_2024, math-ai/aime24)
    {problem, answer}    AMC 2022 and 2023 (AI-MO/aimo-validation-amc), AIME 2025 (math-ai/aime25)
    {question, answer}   AMC 2023 (math-ai/amc23), AIME 2025 (opencompass/AIME2025)
    {Problem, Answer}    AIME 2024 (Maxwell-Jia/AIME_2024)
"""

import json
import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_bicc.errors import UserError, first_line

Row = dict[str, Any]
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
"""Half of a UTF-16 surrogate pair, escaped in JSON"""
MOST_DIGITS = 4300
"""Digits of the longest integer that Python parses by default"""


class JsonFloat(float):
    """A number of a JSON file that is not written as an integer, with its text: 0.10, 1e-5."""

    text: str
    """The number as the file has it"""

    def __new__(cls, text: str) -> "JsonFloat":
        number = super().__new__(cls, text)
        number.text = str(text)  # copy and pickle call this with the number, and set the text afterwards
        return number


def read_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """Yields (row number from 1, row) of a .parquet or .jsonl file; for .jsonl it is the line number.

    A float of .jsonl is a JsonFloat. A float32 of .parquet is the double of its shortest decimal text: 0.1,
    not 0.10000000149.

    Raises UserError, with the file and if possible the row, if the file is missing, unreadable, of another
    kind, or has a line that is not a JSON object or repeats a key.
    """
    readers: dict[str, Callable[[Path], Iterator[tuple[int, Row]]]] = {
        ".parquet": _read_parquet,
        ".jsonl": _read_jsonl,
    }
    if path.is_dir():
        raise UserError(f"{path}: a directory; give one .parquet or .jsonl file")
    if path.suffix not in readers:
        raise UserError(f"{path}: unknown kind of file '{path.suffix}'; give a .parquet or .jsonl file")
    if not path.is_file():
        raise UserError(f"{path}: no such file; check the path in the data or evaluation settings")
    try:
        yield from readers[path.suffix](path)
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as {path.suffix}: {first_line(error)}") from error


def _read_parquet(path: Path) -> Iterator[tuple[int, Row]]:
    number = 0
    with pq.ParquetFile(path) as file:
        names = file.schema_arrow.names
        if len(set(names)) < len(names):
            raise UserError(f"{path}: two columns have one name, among {', '.join(names)}; rename one")
        as_text, as_doubles = (_short_floats_as(t, file.schema_arrow) for t in (pa.string(), pa.float64()))
        for batch in file.iter_batches():
            for row in batch.cast(as_text).cast(as_doubles).to_pylist():
                number += 1
                yield number, row


def _short_floats_as(wanted: pa.DataType, schema: pa.Schema) -> pa.Schema:
    """Returns the schema with `wanted` in place of float32, also within structs and lists."""

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
        # a file may start with a byte order mark
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        row = json.loads(text, parse_float=JsonFloat, parse_int=_integer, object_pairs_hook=_object)
        if SURROGATE.search(line):
            json.dumps(row, ensure_ascii=False).encode()
    except UnicodeError as error:
        raise UserError(f"{path}, row {number}: not UTF-8 ({error}); write the file as UTF-8") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(
            f"{path}, row {number}: not valid JSON ({error}); write one object per line"
        ) from error
    except (UserError, ValueError) as error:  # valid JSON that is refused: a repeated key, a huge number
        raise UserError(f"{path}, row {number}: {error}") from error
    if not isinstance(row, dict):
        raise UserError(
            f"{path}, row {number}: a {type(row).__name__}, not a JSON object; write one object per line"
        )
    return row


def _integer(text: str) -> int:
    """Parses an integer of JSON. Raises UserError for one with more digits than Python parses."""
    if len(text) > MOST_DIGITS:
        raise UserError(f"a whole number of {len(text)} digits; store it as a string")
    return int(text)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Builds a JSON object from its pairs. Raises UserError for a repeated key."""
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"an object has the key {twice!r} twice")
    return made


Message = dict[str, str]

ASKS_NOTHING = ("system", "developer", "tool", "function")
"""Roles whose messages hold no question and may be empty"""
NOT_READ = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
"""Fields of a message that chat templates may render, but this package does not read"""
ROLE = re.compile(r"[A-Za-z][\w-]*")
GSM8K_MARK = "####"
"""Precedes the final answer in a solution of GSM8K"""
MOST_ZEROS = 1000
"""Largest exponent of a number in scientific notation"""


@dataclass(frozen=True)
class Question:
    """The content of a row, independent of its schema."""

    messages: list[Message]
    """Chat messages of the prompt: role and content."""
    ground_truth: str
    """The right final answer."""
    data_source: str
    """The row's column data_source; empty if it has none."""
    extra: dict[str, Any]
    """The row's other columns by name."""


@dataclass(frozen=True)
class Schema:
    """The columns that identify a schema, and where it keeps prompt and answer."""

    columns: frozenset[str]
    """A row with all of these columns has this schema."""
    prompt: str
    """Column of the prompt: a text or a list of messages."""
    ground_truth: Callable[[Row], Any]
    """Returns the answer of a row; None or blank if it has none."""
    ground_truth_column: str
    """Where the answer is read from, for error messages."""


def _dapo_truth(row: Row) -> Any:
    reward_model = row["reward_model"]
    return reward_model.get("ground_truth") if isinstance(reward_model, dict) else None


def _gsm8k_truth(row: Row) -> Any:
    answer = row["answer"]
    if not isinstance(answer, str):
        return answer
    if GSM8K_MARK in answer:
        return answer.rpartition(GSM8K_MARK)[2]
    # AMC 2023 and AIME 2025 have the same columns with a bare answer; several lines, or a calculation, are
    # a solution of GSM8K that lost its end
    return None if "\n" in answer.strip() or "<<" in answer else answer


def _math_truth(row: Row) -> Any:
    if row.get("answer") not in (None, ""):
        return row["answer"]
    solution = row.get("solution")
    return last_boxed(solution) if isinstance(solution, str) else None


SCHEMAS = (
    Schema(frozenset({"prompt", "reward_model"}), "prompt", _dapo_truth, "reward_model.ground_truth"),
    Schema(
        frozenset({"question", "answer"}), "question", _gsm8k_truth, 'answer, or what is after "####" in it'
    ),
    Schema(frozenset({"problem", "solution"}), "problem", _math_truth, "answer, or \\boxed{} in solution"),
    Schema(frozenset({"problem", "answer"}), "problem", _math_truth, "answer"),
    Schema(frozenset({"Problem", "Answer"}), "Problem", lambda row: row["Answer"], "Answer"),
    Schema(frozenset({"prompt", "answer"}), "prompt", lambda row: row["answer"], "answer"),
)
"""In the order in which they are tried"""


def read_question(row: Row, instruction: str = "") -> Question:
    """Returns prompt and answer of a row in any of SCHEMAS; `instruction` is appended to the last question.

    Raises UserError if no schema fits, the prompt is malformed or holds no question, or the ground truth is
    not one text or number.
    """
    schema = next((s for s in SCHEMAS if s.columns <= row.keys()), None)
    if schema is None:
        known = "; ".join(", ".join(sorted(s.columns)) for s in SCHEMAS)
        found = ", ".join(sorted(row)) or "none"
        raise UserError(f"unknown schema, columns found: {found}; give one of these sets: {known}")
    data_source = row.get("data_source")
    used = schema.columns | {"data_source"}
    messages = _messages(row[schema.prompt], schema.prompt)
    next(m for m in reversed(messages) if _asks(m))["content"] += instruction
    return Question(
        messages=messages,
        ground_truth=_truth_text(schema.ground_truth(row), schema.ground_truth_column),
        data_source=data_source if isinstance(data_source, str) else "",
        extra={name: value for name, value in row.items() if name not in used},
    )


def read_questions(path: Path, instruction: str = "") -> Iterator[tuple[int, Question]]:
    """Yields (row number from 1, question) of a .parquet or .jsonl file, as read_rows and read_question do.

    Raises UserError, with file and row, as these do; also for a file {question, answer} that is neither
    GSM8K, every solution with its "#### answer", nor a benchmark of bare answers. Otherwise the whole text of
    a solution that lost its end would be taken as the answer.
    """
    first_solution = first_bare = 0  # row numbers; 0: none so far
    for number, row in read_rows(path):
        try:
            question = read_question(row, instruction)
        except UserError as error:
            raise UserError(f"{path}, row {number}: {error}") from error
        answer = row.get("answer") if "question" in row else None
        if isinstance(answer, str) and GSM8K_MARK in answer:
            first_solution = first_solution or number
        elif isinstance(answer, str):
            first_bare = first_bare or number
        if first_solution and first_bare:
            raise UserError(
                f'{path}, row {first_bare}: no "{GSM8K_MARK}" in answer, but row {first_solution} has one; '
                f'end it with "{GSM8K_MARK} " and the final answer, or remove the row'
            )
        yield number, question


def _messages(prompt: Any, column: str) -> list[Message]:
    given = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not isinstance(given, list) or not all(_is_message(m) for m in given):
        raise UserError(
            f'"{column}" must be a text or a list of messages with the texts "role" and "content"'
        )
    # some templates render the role verbatim
    for role in (m["role"] for m in given):
        if not ROLE.fullmatch(role):
            raise UserError(f'"{column}": a message has the role {role[:60]!r}; write one word')
    messages = [{"role": m["role"], "content": _content(m, column)} for m in given]
    silent = [m["role"] for m in messages if m["role"] not in ASKS_NOTHING and _is_blank(m["content"])]
    if silent or not any(map(_asks, messages)):
        reason = f"the message of role {silent[0]!r} has no text" if silent else "no message of role 'user'"
        raise UserError(f'empty prompt in "{column}": {reason}; remove the row or write the question')
    return messages


def _asks(message: Message) -> bool:
    return message["role"] not in (*ASKS_NOTHING, "assistant")


def _is_blank(text: str) -> bool:
    """Returns whether a text has only white space, zero-width and control characters."""
    return all(c.isspace() or unicodedata.category(c) in ("Cf", "Cc") for c in text)


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, dict)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), str | list)
    )


def _content(message: Row, column: str) -> str:
    """Returns the text of a message, joined if it comes in parts."""
    role, content = message["role"], message["content"]
    for name in NOT_READ:
        if message.get(name):
            raise UserError(
                f'"{column}": the message of role {role!r} has "{name}", which is not read; '
                "write it into the content or remove it"
            )
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise UserError(
                f'"{column}": the message of role {role!r} has a part of type {kind!r}; only text is read'
            )
    return "".join(part["text"] for part in parts)


def _truth_text(truth: Any, column: str) -> str:
    if isinstance(truth, list) and len(truth) == 1:
        (truth,) = truth
    if truth is None or (isinstance(truth, str) and not truth.strip()):
        raise UserError(f"no ground truth ({column}); remove the row or write the answer")
    if isinstance(truth, str):
        return truth.strip()
    if isinstance(truth, bool) or not isinstance(truth, int | float):
        raise UserError(f"{column.partition(',')[0]} is a {type(truth).__name__}; write one text")
    return str(truth) if isinstance(truth, int) else _positional(truth, column.partition(",")[0])


def _positional(number: float, column: str) -> str:
    """Writes a float without an exponent, which a verifier would read as Euler's number: 1e-5 is 0.00001.

    The digits are those of the file; 27.0 becomes 27.
    """
    text = number.text if isinstance(number, JsonFloat) else repr(number)
    exact = Decimal(text)
    if not exact.is_finite() or abs(exact.as_tuple().exponent) > MOST_ZEROS:
        raise UserError(f"{column} is {text[:60]}; give a number or a string")
    return str(int(exact)) if exact == int(exact) else format(exact, "f")


_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])")
_ARGUMENT = re.compile(
    r"\s*([-+]?\s*\$?\d[\d,]*(?:\.\d+)?%?|-?\\[a-zA-Z]+(?:\s*\{[^{}]*\})*|[a-zA-Z](?![a-zA-Z]))"
)


def has_box(text: str) -> bool:
    r"""Returns whether \boxed or \fbox occurs in a text, closed or not."""
    return _BOX.search(text) is not None


def last_boxed(text: str) -> str | None:
    r"""Returns the contents of the last \boxed{...} or \fbox{...}, stripped; None if absent or not closed.

    Without braces (\boxed 2, as in the published MATH) they are the number, command or letter that follows.
    """
    boxes = list(_BOX.finditer(text))
    if not boxes:
        return None
    body = text[boxes[-1].end() :].lstrip()
    if not body.startswith("{"):
        argument = _ARGUMENT.match(body)
        return argument[1].rstrip(",").strip() if argument else None
    depth = position = 0
    while position < len(body):
        character = body[position]
        if character == "\\":
            position += 2  # \{ and \} are characters of the answer, not braces
            continue
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return body[1:position].strip()
        position += 1
    return None
