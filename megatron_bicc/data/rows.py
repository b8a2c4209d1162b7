"""Rows of a data file as dictionaries, with the number a person would count to.

The schemas a row of prompts may come in: DAPO-Math-17k, GSM8K, MATH, the benchmarks' and a plain one.

Benchmarks as published on Hugging Face:

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
from megatron_bicc.rewards.math_reward import last_boxed

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

    Raises UserError, naming the file and where there is one the row, if the file is missing, unreadable,
    of another kind, or holds a line that is no JSON object or has a key twice.
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
        raise UserError(f"{path}, row {number}: not UTF-8 ({error}); write the file as UTF-8") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path}, row {number}: not valid JSON ({error}); write one object a line") from error
    except (UserError, ValueError) as error:  # of what is valid JSON, but cannot be taken
        raise UserError(f"{path}, row {number}: {error}") from error
    if not isinstance(row, dict):
        raise UserError(
            f"{path}, row {number}: a {type(row).__name__}, not a JSON object; write one object a line"
        )
    return row


def _integer(text: str) -> int:
    """A whole number of JSON; raises ValueError for one of more digits than Python reads."""
    if len(text) > MOST_DIGITS:
        raise UserError(f"a whole number of {len(text)} digits; write it as a text")
    return int(text)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object that JSON's pairs make; raises ValueError for a key that it has twice."""
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"an object has the key {twice!r} twice")
    return made


Message = dict[str, str]

ASKS_NOTHING = ("system", "developer", "tool", "function")
"""Roles that ask no question and may be empty"""
NOT_READ = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
"""What messages of other systems hold beside their content, and templates may write"""
ROLE = re.compile(r"[A-Za-z][\w-]*")
MOST_ZEROS = 1000
"""Of a number that is written with an exponent"""


@dataclass(frozen=True)
class Question:
    """What a row says, whatever its schema."""

    messages: list[Message]
    """Chat messages of the prompt: role and content."""
    ground_truth: str
    """The right final answer."""
    data_source: str
    """Where the question comes from; empty if the row does not say."""
    extra: dict[str, Any]
    """The row's other columns."""


@dataclass(frozen=True)
class Schema:
    """How to recognise a schema and where it keeps things."""

    columns: frozenset[str]
    """Columns that make a row one of this schema."""
    prompt: str
    """Column of the prompt: a text or a list of messages."""
    ground_truth: Callable[[Row], Any]
    """The answer of a row; raises ValueError, or gives None or blank, where there is none."""
    ground_truth_column: str
    """Where the answer is looked for, to say so in errors."""


def _dapo_truth(row: Row) -> Any:
    reward_model = row["reward_model"]
    return reward_model.get("ground_truth") if isinstance(reward_model, dict) else None


def _gsm8k_truth(row: Row) -> Any:
    answer = row["answer"]
    if not isinstance(answer, str):
        return answer
    if "####" in answer:
        return answer.rpartition("####")[2]
    # a benchmark gives the bare answer; several lines are a solution of GSM8K that lost its end
    return answer if "\n" not in answer.strip() else None


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
"""In the order tried."""


def read_question(row: Row, instruction: str = "") -> Question:
    """Prompt and answer of a row in any of SCHEMAS; `instruction` is put after the last question.

    Raises UserError if no schema fits, the prompt is malformed or asks nothing, or the ground truth is not
    one text or number.
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


def _messages(prompt: Any, column: str) -> list[Message]:
    given = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not isinstance(given, list) or not all(_is_message(m) for m in given):
        raise UserError(
            f'"{column}" must be a text or a list of messages with the texts "role" and "content"'
        )
    # some templates write the role into the prompt as it is
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
    """Whether nothing of a text can be seen: white space, zero-width and control characters."""
    return all(c.isspace() or unicodedata.category(c) in ("Cf", "Cc") for c in text)


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, dict)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), str | list)
    )


def _content(message: Row, column: str) -> str:
    """The text of a message, from its parts if it comes in parts."""
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
    """A float without an exponent, which verifiers would read as Euler's number: 1e-5 is 0.00001.

    The digits are those of the file; 27.0 is 27.
    """
    text = number.text if isinstance(number, JsonFloat) else repr(number)
    exact = Decimal(text)
    if not exact.is_finite() or abs(exact.as_tuple().exponent) > MOST_ZEROS:
        raise UserError(f"{column} is {text[:60]}; write the answer, as a text if it is no number")
    return str(int(exact)) if exact == int(exact) else format(exact, "f")
