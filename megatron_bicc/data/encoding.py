"""Encodes prompts with the policy's tokenizer, fixes the chat template's date, and finds the end tokens.

Prompts are encoded so that no text of a message is lost, and no text becomes a control token unless the
settings allow it. A chat template that reads the clock sees one date for the whole run, on any day it is
resumed.
"""

import json
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from datetime import date
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from megatron_bicc.config import ControlTokens
from megatron_bicc.data.rows import Message
from megatron_bicc.errors import UserError, first_line

JOINED = "{{ messages | map(attribute='content') | join('\n') }}"
"""Chat template for a tokenizer without one: contents joined by newlines"""


@dataclass(frozen=True)
class Turns:
    """The tokens that the chat template adds to the contents of messages with certain roles."""

    written: Counter[int]
    """Number of times that it writes each token id"""
    control: re.Pattern[str]
    """Matches control tokens: the tokenizer's special tokens, and added tokens that the template writes"""


class PromptEncoder:
    """Encodes messages with a tokenizer's chat template, up to where the response begins.

    control_tokens: treatment of a control token in a message's text. refuse: an error. text: it is encoded as
    ordinary tokens of its characters. keep: it stays a control token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, control_tokens: ControlTokens = "refuse"):
        self._tokenizer = tokenizer
        self._control_tokens = control_tokens
        self._template = None if tokenizer.chat_template else JOINED
        self._begin = _begin(tokenizer) if self._template else []
        self._turns = cache(self._probe)

    def encode(self, messages: list[Message]) -> np.ndarray:
        """Returns int32 [P], up to where the response begins; a last message of the assistant is continued.

        Raises UserError if the chat template refuses the messages, text of one is missing in the tokens, or a
        control token is refused.
        """
        turns = self._turns(tuple(message["role"] for message in messages))
        rendered = self._render(messages)
        found = None if self._control_tokens == "keep" else _control_token(messages, turns.control)
        if found and self._control_tokens == "refuse":
            raise UserError(
                f"{found}; remove it, or set data.control_tokens to text (ordinary text) or keep "
                "(a control token)"
            )
        if found:
            ids = self._encode_as_text(messages, turns, found)
        else:
            ids = self._tokenizer.encode(rendered, add_special_tokens=False)
        if not ids:
            raise UserError("the prompt has no tokens")
        self._check_text(messages, rendered, ids)
        # with control_tokens=keep the text may already start with the begin token
        begun = ids[: len(self._begin)] == self._begin
        return np.asarray(ids if begun else self._begin + ids, dtype=np.int32)

    def _probe(self, roles: tuple[str, ...]) -> Turns:
        """Renders marks as contents. Raises UserError if the template leaves out a role's message."""
        # letters and digits that no template contains
        marks = [f"kq7{i}zx" for i in range(len(roles))]
        rendered = self._render(
            [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
        )
        for role, mark in zip(roles, marks, strict=True):
            if mark not in rendered:
                raise UserError(f"the chat template leaves out the message of role {role!r}; rename the role")
        written = Counter(self._tokenizer.encode(rendered, add_special_tokens=False))
        added = self._tokenizer.added_tokens_decoder
        control = [token.content for i, token in added.items() if token.special or i in written]
        longest_first = sorted(map(re.escape, control), key=len, reverse=True)
        return Turns(written, re.compile("|".join(longest_first) or r"(?!)"))  # (?!) matches nothing

    def _render(self, messages: list[Message]) -> str:
        """Returns the messages as the chat template renders them."""
        begun = messages[-1]["role"] == "assistant"
        try:
            return self._tokenizer.apply_chat_template(
                messages,
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=not begun,
                continue_final_message=begun,
            )
        except Exception as error:  # templates may raise any exception, and jinja2 raises its own
            raise UserError(
                f"the tokenizer's chat template refuses the messages: {first_line(error)}"
            ) from error

    def _encode_as_text(self, messages: list[Message], turns: Turns, found: str) -> list[int]:
        """Encodes control tokens in the messages as ordinary text. Raises UserError if one cannot be."""
        begun = messages[-1]["role"] == "assistant"
        ids = self._tokenizer.apply_chat_template(
            messages,
            chat_template=self._template,
            add_generation_prompt=not begun,
            continue_final_message=begun,
            return_dict=False,
            sanitize_control_tokens=True,
        )
        counts = Counter(ids)
        for i, token in self._tokenizer.added_tokens_decoder.items():
            if turns.control.fullmatch(token.content) and counts[i] > turns.written[i]:
                raise UserError(f"{found}, which cannot be written as ordinary text; remove it")
        return ids

    def _check_text(self, messages: list[Message], rendered: str, ids: list[int]) -> None:
        """Raises UserError for a message whose text is incomplete in the rendered text or in the tokens."""
        written = _squeezed(rendered)
        decoded = _squeezed(self._tokenizer.decode(ids, clean_up_tokenization_spaces=False))
        for message in messages:
            role, text = message["role"], message["content"]
            if role == "assistant":
                text = text.rpartition("</think>")[2]  # templates drop the reasoning of earlier answers
            text = _squeezed(text)
            if text not in written:
                raise UserError(f"the chat template leaves out text of the message of role {role!r}")
            if text not in decoded:
                lost = next((c for c in text if c not in decoded), "")
                raise UserError(
                    f"the tokenizer loses text of the message of role {role!r}"
                    + (f": it has no token for {lost!r}" if lost else "")
                )


def _control_token(messages: list[Message], control: re.Pattern[str]) -> str:
    """Describes the first control token in the messages; empty if there is none."""
    for message in messages:
        for text in message.values():
            if match := control.search(text):
                return f"the message of role {message['role']!r} has the control token {match[0]!r}"
    return ""


def _begin(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the token ids that the tokenizer puts before a text, without those that it puts after it."""
    encoded = tokenizer("1", return_special_tokens_mask=True)
    pairs = zip(encoded["input_ids"], encoded["special_tokens_mask"], strict=True)
    return [token_id for token_id, _ in takewhile(lambda pair: pair[1], pairs)]


def _squeezed(text: str) -> str:
    """Removes white space, which templates trim, and applies NFKC, which tokenizers may apply."""
    return "".join(unicodedata.normalize("NFKC", text).split())


CLOCK = "strftime_now"
"""Name of the function that transformers gives to chat templates"""
DIRECTIVES = ["%" + flag + letter for flag in ("", "-") for letter in "aAbBcdHIjmMpSuUVwWxXyYZz"]


def asks_for_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Returns whether the chat template reads the clock, so that token ids depend on the day."""
    return CLOCK in str(tokenizer.chat_template)


def fix_date(tokenizer: PreTrainedTokenizerBase, today: date) -> None:
    """Replaces the clock that the chat template reads by this date, at midnight.

    It prepends a macro, which shadows the function of that name: transformers passes only plain data to
    templates, so the function itself cannot be replaced. The macro ends with a newline, so that the template
    still starts a line: jinja's white-space control depends on that.
    """
    filled = "".join(f"|replace({json.dumps(d)}, {json.dumps(today.strftime(d))})" for d in DIRECTIVES)
    macro = "{%- macro " + CLOCK + "(format) -%}{{ format" + filled + " }}{%- endmacro %}\n"
    found = tokenizer.chat_template
    named = found.items() if isinstance(found, dict) else [("default", found)]
    dated = {name: macro + template for name, template in named}
    tokenizer.chat_template = dated if isinstance(found, dict) else dated["default"]


ENDS_BY_TEXT = ("<|eom_id|>", "<|content_model_end_sampling|>", "<|ifm|im_end|>")
"""Added tokens at which SGLang 0.5.23 always stops (attach_additional_stop_token_ids)"""


def end_token_ids(
    hf_config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, path: str | Path
) -> tuple[int, ...]:
    """Returns the ids of the tokens that end a response, ascending; every engine uses the same.

    They are the eos_token_id of config.json, of the tokenizer, and each one in generation_config.json: chat
    models have one token for the end of a turn and another for the end of a text. SGLang stops at all of them
    and at ENDS_BY_TEXT, and has no option to exclude one, so the other engines do not exclude one either.

    hf_config, tokenizer: those of the Hugging Face directory `path`. Raises UserError for an eos_token_id
    that is not a token id, or a generation_config.json that cannot be read.
    """
    sources = {
        "config.json": getattr(hf_config, "eos_token_id", None),
        "generation_config.json": _generation_config(Path(path)).get("eos_token_id"),
        "the tokenizer": tokenizer.eos_token_id,
    }
    ends = {id_ for text, id_ in tokenizer.get_added_vocab().items() if text in ENDS_BY_TEXT}
    for source, given in sources.items():
        for end in given if isinstance(given, list | tuple) else [given]:
            if end is None:
                continue
            if type(end) is not int or not 0 <= end < hf_config.vocab_size:  # bool is a subclass of int
                raise UserError(
                    f"model.path is {path}; eos_token_id of {source} is {given!r}; {end!r} is none of the "
                    f"{hf_config.vocab_size} tokens of config.json: correct it"
                )
            ends.add(end)
    return tuple(sorted(ends))


def _generation_config(path: Path) -> dict[str, Any]:
    """Returns the contents of the directory's generation_config.json; empty if there is none."""
    file = path / "generation_config.json"
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"model.path is {path}; {file.name} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise UserError(
            f"model.path is {path}; {file.name} contains a {type(found).__name__}, not a JSON object"
        )
    return found
