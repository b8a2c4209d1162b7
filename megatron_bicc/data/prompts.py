"""Prompts of a data file as token ids, every fault found before training starts.

The order in which prompts are learned from.
"""

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from megatron_bicc.config import ControlTokens, OverlongAction
from megatron_bicc.data.encoding import PromptEncoder
from megatron_bicc.data.rows import Message, read_question, read_rows
from megatron_bicc.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prompt:
    """One question, ready for the rollout engine."""

    index: int
    """Row in the file, from 0; rows that were dropped or blank are counted."""
    messages: list[Message]
    """Chat messages: role and content."""
    token_ids: np.ndarray
    """int32 [length]: chat template applied, up to where the response begins"""
    ground_truth: str
    """The right final answer."""
    data_source: str
    """Where the question comes from; may be empty."""
    extra: dict[str, Any]
    """The row's other columns."""

    @property
    def begun_answer(self) -> str:
        """What of the answer the prompt holds: the text of a last message that is the assistant's."""
        return "".join(m["content"] for m in self.messages[-1:] if m["role"] == "assistant")


def load_prompts(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    max_prompt_tokens: int,
    overlong: OverlongAction = "error",
    instruction: str = "",
    control_tokens: ControlTokens = "refuse",
) -> list[Prompt]:
    """Read a .parquet or .jsonl file in any of data.schemas.SCHEMAS; `instruction` ends each question.

    A tokenizer without a chat template gets the contents joined by newlines. control_tokens: as in
    data.encoding.PromptEncoder.

    Raises UserError, in one line with file and row (from 1): unreadable file, malformed row, unknown
    schema, empty or (unless dropped) overlong prompt, one that is not whole in its tokens, no ground truth,
    no prompt left.
    """
    path = Path(path)
    prompts: list[Prompt] = []
    rows = dropped = 0
    # DAPO-Math-17k repeats each of its prompts about a hundred times.
    encoded: dict[str, np.ndarray] = {}
    encoder = PromptEncoder(tokenizer, control_tokens)
    for number, row in read_rows(path):
        rows += 1
        try:
            question = read_question(row, instruction)
            key = json.dumps(question.messages)
            if key not in encoded:
                encoded[key] = encoder.encode(question.messages)
            if len(encoded[key]) > max_prompt_tokens:
                _refuse_overlong(len(encoded[key]), max_prompt_tokens, overlong)
                dropped += 1
                continue
        except UserError as error:
            raise UserError(f"{path}, row {number}: {error}") from error
        prompts.append(Prompt(number - 1, token_ids=encoded[key], **vars(question)))
    if dropped:
        logger.warning("%s: dropped %d of %d prompts over %d tokens", path, dropped, rows, max_prompt_tokens)
    if not prompts:
        reason = f"all {rows} prompts are over {max_prompt_tokens} tokens" if rows else "the file has no rows"
        raise UserError(f"{path}: no prompts: {reason}")
    return prompts


def digest(prompts: list[Prompt]) -> str:
    """SHA-256 of token ids and ground truths, in the prompts' order."""
    found = hashlib.sha256()
    for prompt in prompts:
        found.update(repr((prompt.index, len(prompt.token_ids), prompt.ground_truth)).encode())
        found.update(prompt.token_ids.tobytes())
    return found.hexdigest()


def _refuse_overlong(length: int, limit: int, overlong: OverlongAction) -> None:
    if overlong == "error":
        raise UserError(
            f"the prompt has {length} tokens, over data.max_prompt_tokens={limit}; "
            "raise it, or set data.overlong_prompts=drop"
        )


class PromptSampler:
    """Shuffled epochs over prompts; a draw may cross from one epoch into the next.

    The order depends on `seed` alone, and `state_dict` is all that it takes to go on where a run ended.
    """

    def __init__(self, num_prompts: int, prompts_per_step: int, seed: int):
        """Raises UserError if a step would take more prompts than there are."""
        if not 0 < prompts_per_step <= num_prompts:
            raise UserError(
                f"rollout.prompts_per_step={prompts_per_step} must be within 1 and the number of prompts "
                f"in data.train, {num_prompts}"
            )
        self._num_prompts = num_prompts
        self._seed = seed
        self._drawn = 0

    def draw(self, count: int) -> list[int]:
        """Indices of the next `count` prompts."""
        indices = self.peek(count)
        self._drawn += count
        return indices

    def peek(self, count: int) -> list[int]:
        """Indices of the next `count` prompts, without drawing them."""
        draws = range(self._drawn, self._drawn + count)
        epochs = {n // self._num_prompts for n in draws}
        orders = {epoch: self._order(epoch) for epoch in epochs}
        return [int(orders[n // self._num_prompts][n % self._num_prompts]) for n in draws]

    def _order(self, epoch: int) -> np.ndarray:
        """int64 [num_prompts]: a permutation."""
        return np.random.default_rng([self._seed, epoch]).permutation(self._num_prompts)

    def state_dict(self) -> dict[str, int]:
        """What load_state_dict needs."""
        return {"drawn": self._drawn, "num_prompts": self._num_prompts, "seed": self._seed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after the last draw of a state; raises ValueError if it is of other data or another seed."""
        for name, now in (("num_prompts", self._num_prompts), ("seed", self._seed)):
            if state[name] != now:
                raise UserError(
                    f"the checkpoint's prompt order has {name}={state[name]}, this run {now}; "
                    "resume with the same data.train and seed"
                )
        self._drawn = state["drawn"]
