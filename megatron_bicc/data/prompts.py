"""Loads the prompts of a data file as token ids, and draws them in a resumable shuffled order.

Every fault of the file is found here, before training starts.
"""

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from transformers import PreTrainedTokenizerBase

from megatron_bicc import device, plugins
from megatron_bicc.config import ControlTokens, OverlongAction
from megatron_bicc.data.encoding import PromptEncoder
from megatron_bicc.data.rows import Message, read_questions
from megatron_bicc.errors import UserError, first_line

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prompt:
    """One question, ready for the rollout engine."""

    index: int
    """Row in the file, from 0; dropped and blank rows count."""
    messages: list[Message]
    """Chat messages: role and content."""
    token_ids: np.ndarray
    """int32 [P]: the chat template applied, up to where the response begins."""
    ground_truth: str
    """The right final answer."""
    data_source: str
    """The row's column data_source; empty if it has none."""
    extra: dict[str, Any]
    """The row's other columns by name."""

    @property
    def begun_answer(self) -> str:
        """The part of the response that the prompt holds: the text of a last message of the assistant."""
        return "".join(m["content"] for m in self.messages[-1:] if m["role"] == "assistant")


class PromptFilter(Protocol):
    """A function that chooses training prompts: data.filter.

    It is named as pkg.module:name or path/to/file.py:name. It is called once for each prompt of data.train,
    in the file's order, on every rank, and must decide the same on all of them and whenever the run is
    resumed: a checkpoint is refused if other prompts are kept.
    """

    def __call__(self, prompt: Prompt, /) -> bool:
        """Returns True to train on the prompt, False to drop it."""


def load_prompts(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    max_prompt_tokens: int,
    overlong: OverlongAction = "error",
    instruction: str = "",
    control_tokens: ControlTokens = "refuse",
    keep: str = "",
) -> list[Prompt]:
    """Loads a .parquet or .jsonl file in any of data.rows.SCHEMAS.

    A tokenizer without a chat template gets the contents joined by newlines. instruction: appended to each
    question. control_tokens: as in data.encoding.PromptEncoder. keep: import path of a PromptFilter; empty
    keeps all.

    Raises UserError, one line with file and row (from 1), for: an unreadable file, a malformed row, an
    unknown schema, a prompt that is empty, overlong (unless dropped) or incomplete in its tokens, a missing
    ground truth, a filter that fails, no prompts left.
    """
    path = Path(path)
    prompts: list[Prompt] = []
    rows = dropped = 0
    # DAPO-Math-17k repeats each of its prompts about a hundred times.
    encoded: dict[str, np.ndarray] = {}
    encoder = PromptEncoder(tokenizer, control_tokens)
    for number, question in read_questions(path, instruction):
        rows += 1
        key = json.dumps(question.messages)
        try:
            if key not in encoded:
                encoded[key] = encoder.encode(question.messages)
            if len(encoded[key]) > max_prompt_tokens:
                _refuse_overlong(len(encoded[key]), max_prompt_tokens, overlong)
                dropped += 1
                continue
        except UserError as error:
            raise UserError(f"{path}, row {number}: {error}") from error
        prompts.append(Prompt(number - 1, token_ids=encoded[key], **vars(question)))
    if dropped and device.is_first():
        logger.warning("%s: dropped %d of %d prompts over %d tokens", path, dropped, rows, max_prompt_tokens)
    if not prompts:
        reason = f"all {rows} prompts are over {max_prompt_tokens} tokens" if rows else "the file has no rows"
        raise UserError(f"{path}: no prompts: {reason}")
    return _filtered(prompts, keep, path) if keep else prompts


def _filtered(prompts: list[Prompt], name: str, path: Path) -> list[Prompt]:
    function: PromptFilter = plugins.load("data.filter", name)
    kept = [prompt for prompt in prompts if _keeps(function, prompt, f"{path}, row {prompt.index + 1}", name)]
    dropped = len(prompts) - len(kept)
    if device.is_first():
        logger.warning("%s: data.filter=%s dropped %d of %d prompts", path, name, dropped, len(prompts))
    if not kept:
        raise UserError(f"{path}: data.filter={name} drops all {len(prompts)} prompts; let it keep some")
    return kept


def _keeps(function: PromptFilter, prompt: Prompt, where: str, name: str) -> bool:
    try:
        keep = function(prompt)
    except Exception as error:  # a user's function may raise anything
        logger.exception("%s: data.filter=%s raised", where, name)
        raise UserError(
            f"{where}: data.filter={name} raised {type(error).__name__}: {first_line(error)}"
        ) from error
    if not isinstance(keep, bool | np.bool_):  # None is a forgotten return
        raise UserError(f"{where}: data.filter={name} returned {str(keep)[:60]!r}; return True or False")
    return bool(keep)


def digest(prompts: list[Prompt]) -> str:
    """Returns the SHA-256 of row numbers, token ids and ground truths, in the prompts' order."""
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
    """Draws prompts in shuffled epochs; a draw may span two epochs.

    The order depends on the seed and the number of prompts only, so `state_dict` is enough to resume it.
    """

    def __init__(self, num_prompts: int, prompts_per_step: int, seed: int):
        """Raises UserError if a step draws more prompts than there are."""
        if not 0 < prompts_per_step <= num_prompts:
            raise UserError(
                f"rollout.prompts_per_step={prompts_per_step} must be within 1 and the number of prompts "
                f"in data.train, {num_prompts}"
            )
        self._num_prompts = num_prompts
        self._seed = seed
        self.drawn = 0
        """Number of prompts drawn so far"""

    def draw(self, count: int) -> list[int]:
        """Returns the indices of the next `count` prompts and advances."""
        indices = self.peek(count)
        self.drawn += count
        return indices

    def peek(self, count: int) -> list[int]:
        """Returns the indices of the next `count` prompts without advancing."""
        draws = range(self.drawn, self.drawn + count)
        epochs = {n // self._num_prompts for n in draws}
        orders = {epoch: self._order(epoch) for epoch in epochs}
        return [int(orders[n // self._num_prompts][n % self._num_prompts]) for n in draws]

    def _order(self, epoch: int) -> np.ndarray:
        """Returns a permutation of the prompts, int64 [num_prompts]."""
        return np.random.default_rng([self._seed, epoch]).permutation(self._num_prompts)

    def state_dict(self) -> dict[str, int]:
        """Returns the state for load_state_dict, JSON values."""
        return {"drawn": self.drawn, "num_prompts": self._num_prompts, "seed": self._seed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Resumes after the last draw of a state; raises UserError if it is of other data or another seed."""
        for name, now in (("num_prompts", self._num_prompts), ("seed", self._seed)):
            if state[name] != now:
                raise UserError(
                    f"the checkpoint's prompt order has {name}={state[name]}, this run {now}; "
                    "resume with the same data.train and seed"
                )
        self.drawn = state["drawn"]
