"""The schemas a row of prompts may come in: DAPO-Math-17k, GSM8K, MATH, the benchmarks' and a plain one.

Benchmarks as published on Hugging Face:

    {problem, solution}  MATH-500 (HuggingFaceH4), AIME 2024 (HuggingFaceH4/aime_2024, math-ai/aime24)
    {problem, answer}    AMC 2022 and 2023 (AI-MO/aimo-validation-amc), AIME 2025 (math-ai/aime25)
    {question, answer}   AMC 2023 (math-ai/amc23), AIME 2025 (opencompass/AIME2025)
    {Problem, Answer}    AIME 2024 (Maxwell-Jia/AIME_2024)
"""

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from megatron_bicc.data.files import JsonFloat, Row
from megatron_bicc.rewards.extraction import last_boxed

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

    Raises ValueError if no schema fits, the prompt is malformed or asks nothing, or the ground truth is not
    one text or number.
    """
    schema = next((s for s in SCHEMAS if s.columns <= row.keys()), None)
    if schema is None:
        known = "; ".join(", ".join(sorted(s.columns)) for s in SCHEMAS)
        found = ", ".join(sorted(row)) or "none"
        raise ValueError(f"unknown schema, columns found: {found}; give one of these sets: {known}")
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
        raise ValueError(
            f'"{column}" must be a text or a list of messages with the texts "role" and "content"'
        )
    # some templates write the role into the prompt as it is
    for role in (m["role"] for m in given):
        if not ROLE.fullmatch(role):
            raise ValueError(f'"{column}": a message has the role {role[:60]!r}; write one word')
    messages = [{"role": m["role"], "content": _content(m, column)} for m in given]
    silent = [m["role"] for m in messages if m["role"] not in ASKS_NOTHING and _is_blank(m["content"])]
    if silent or not any(map(_asks, messages)):
        reason = f"the message of role {silent[0]!r} has no text" if silent else "no message of role 'user'"
        raise ValueError(f'empty prompt in "{column}": {reason}; remove the row or write the question')
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
            raise ValueError(
                f'"{column}": the message of role {role!r} has "{name}", which is not read; '
                "write it into the content or remove it"
            )
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise ValueError(
                f'"{column}": the message of role {role!r} has a part of type {kind!r}; only text is read'
            )
    return "".join(part["text"] for part in parts)


def _truth_text(truth: Any, column: str) -> str:
    if isinstance(truth, list) and len(truth) == 1:
        (truth,) = truth
    if truth is None or (isinstance(truth, str) and not truth.strip()):
        raise ValueError(f"no ground truth ({column}); remove the row or write the answer")
    if isinstance(truth, str):
        return truth.strip()
    if isinstance(truth, bool) or not isinstance(truth, int | float):
        raise ValueError(f"{column.partition(',')[0]} is a {type(truth).__name__}; write one text")
    return str(truth) if isinstance(truth, int) else _positional(truth, column.partition(",")[0])


def _positional(number: float, column: str) -> str:
    """A float without an exponent, which verifiers would read as Euler's number: 1e-5 is 0.00001.

    The digits are those of the file; 27.0 is 27.
    """
    text = number.text if isinstance(number, JsonFloat) else repr(number)
    exact = Decimal(text)
    if not exact.is_finite() or abs(exact.as_tuple().exponent) > MOST_ZEROS:
        raise ValueError(f"{column} is {text[:60]}; write the answer, as a text if it is no number")
    return str(int(exact)) if exact == int(exact) else format(exact, "f")
