"""The schemas a row of prompts may come in: DAPO-Math-17k, GSM8K, MATH, the benchmarks' and a plain one.

Benchmarks as published on Hugging Face:

    {problem, solution}  MATH-500 (HuggingFaceH4), AIME 2024 (HuggingFaceH4/aime_2024, math-ai/aime24)
    {problem, answer}    AMC 2022 and 2023 (AI-MO/aimo-validation-amc), AIME 2025 (math-ai/aime25)
    {question, answer}   AMC 2023 (math-ai/amc23), AIME 2025 (opencompass/AIME2025)
    {Problem, Answer}    AIME 2024 (Maxwell-Jia/AIME_2024)
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_bicc.data.files import Row
from megatron_bicc.rewards.extraction import last_boxed

Message = dict[str, str]


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
    """Prompt and answer of a row in any of SCHEMAS; `instruction` is put after the last message.

    Raises ValueError if no schema fits, the prompt is malformed or empty, or there is no ground truth.
    """
    schema = next((s for s in SCHEMAS if s.columns <= row.keys()), None)
    if schema is None:
        known = "; ".join(", ".join(sorted(s.columns)) for s in SCHEMAS)
        found = ", ".join(sorted(row)) or "none"
        raise ValueError(f"unknown schema, columns found: {found}; give one of these sets: {known}")
    data_source = row.get("data_source")
    used = schema.columns | {"data_source"}
    *before, last = _messages(row[schema.prompt], schema.prompt)
    return Question(
        messages=[*before, last | {"content": last["content"] + instruction}],
        ground_truth=_truth_text(schema.ground_truth(row), schema.ground_truth_column),
        data_source=data_source if isinstance(data_source, str) else "",
        extra={name: value for name, value in row.items() if name not in used},
    )


def _messages(prompt: Any, column: str) -> list[Message]:
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not isinstance(messages, list) or not all(_is_message(m) for m in messages):
        raise ValueError(
            f'"{column}" must be a text or a list of messages with the texts "role" and "content"'
        )
    if not any(m["content"].strip() for m in messages):
        raise ValueError(f'empty prompt in "{column}"; remove the row or write the question')
    return [{"role": m["role"], "content": m["content"]} for m in messages]


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(k), str) for k in ("role", "content"))


def _truth_text(truth: Any, column: str) -> str:
    if isinstance(truth, float) and truth.is_integer():
        truth = int(truth)
    text = str(truth).strip() if isinstance(truth, str | int | float) else ""
    if not text:
        raise ValueError(f"no ground truth ({column}); remove the row or write the answer")
    return text
