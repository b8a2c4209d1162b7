"""Chat messages as the token ids of a prompt: all of their text, and control tokens by decision alone.

Chat templates that ask for today's date: one date for a whole run, resumed on whatever day.

The tokens that end a response.
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
"""Chat template of a tokenizer that has none: contents joined by newlines"""


@dataclass(frozen=True)
class Turns:
    """What the chat template writes around the contents of messages of certain roles."""

    written: Counter[int]
    """How often it writes each token id"""
    control: re.Pattern[str]
    """Any text that is a control token: one of the tokenizer's special tokens, or an added token it writes"""


class PromptEncoder:
    """Encodes messages by a tokenizer's chat template, up to where the response begins.

    control_tokens: what becomes of a control token in a message's text: refuse, an error; text, ordinary
    tokens of its characters; keep, the control token itself.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, control_tokens: ControlTokens = "refuse"):
        self._tokenizer = tokenizer
        self._control_tokens = control_tokens
        self._template = None if tokenizer.chat_template else JOINED
        self._begin = _begin(tokenizer) if self._template else []
        self._turns = cache(self._probe)

    def encode(self, messages: list[Message]) -> np.ndarray:
        """int32 [length]: a last message of the assistant is continued, after any other its turn is opened.

        Raises UserError if the chat template refuses the messages, if text of one is not in the tokens, or
        for a control token that is refused.
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
        # a text that is kept as it is may begin with the begin token
        begun = ids[: len(self._begin)] == self._begin
        return np.asarray(ids if begun else self._begin + ids, dtype=np.int32)

    def _probe(self, roles: tuple[str, ...]) -> Turns:
        """Raises UserError if the chat template leaves out a role's message."""
        # letters and digits that no template writes
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
        """The text that the chat template makes of the messages."""
        begun = messages[-1]["role"] == "assistant"
        try:
            return self._tokenizer.apply_chat_template(
                messages,
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=not begun,
                continue_final_message=begun,
            )
        except Exception as error:  # templates raise what their authors chose, jinja2 errors among them
            raise UserError(
                f"the tokenizer's chat template refuses the messages: {first_line(error)}"
            ) from error

    def _encode_as_text(self, messages: list[Message], turns: Turns, found: str) -> list[int]:
        """Token ids with no more control tokens than the template writes."""
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
        """Raises UserError for a message that is not whole in the template's text and in the tokens."""
        written = _squeezed(rendered)
        decoded = _squeezed(self._tokenizer.decode(ids, clean_up_tokenization_spaces=False))
        for message in messages:
            role, text = message["role"], message["content"]
            if role == "assistant":
                text = text.rpartition("</think>")[2]  # templates leave out the reasoning of earlier answers
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
    """Names the first control token in the messages; empty if there is none."""
    for message in messages:
        for text in message.values():
            if match := control.search(text):
                return f"the message of role {message['role']!r} has the control token {match[0]!r}"
    return ""


def _begin(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids that the tokenizer puts before a text, and not those that it puts after it."""
    encoded = tokenizer("1", return_special_tokens_mask=True)
    pairs = zip(encoded["input_ids"], encoded["special_tokens_mask"], strict=True)
    return [token_id for token_id, _ in takewhile(lambda pair: pair[1], pairs)]


def _squeezed(text: str) -> str:
    """Text without white space, which templates trim, in the form that tokenizers may normalise it to."""
    return "".join(unicodedata.normalize("NFKC", text).split())


CLOCK = "strftime_now"
"""What transformers calls its function for templates"""
DIRECTIVES = ["%" + flag + letter for flag in ("", "-") for letter in "aAbBcdHIjmMpSuUVwWxXyYZz"]


def asks_for_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template reads the clock: its prompts then have other token ids on another day."""
    return CLOCK in str(tokenizer.chat_template)


def fix_date(tokenizer: PreTrainedTokenizerBase, today: date) -> None:
    """Lets the chat template see this date in place of the clock's, at midnight.

    A template's own macro goes before the function of that name; a function cannot be handed in, as
    transformers gives templates plain data only. The template still begins at the start of a line, on which
    it depends what jinja strips there.
    """
    filled = "".join(f"|replace({json.dumps(d)}, {json.dumps(today.strftime(d))})" for d in DIRECTIVES)
    macro = "{%- macro " + CLOCK + "(format) -%}{{ format" + filled + " }}{%- endmacro %}\n"
    found = tokenizer.chat_template
    named = found.items() if isinstance(found, dict) else [("default", found)]
    dated = {name: macro + template for name, template in named}
    tokenizer.chat_template = dated if isinstance(found, dict) else dated["default"]


ENDS_BY_TEXT = ("<|eom_id|>", "<|content_model_end_sampling|>", "<|ifm|im_end|>")
"""Added tokens at which SGLang 0.5.23 ends whatever the files say (attach_additional_stop_token_ids)"""


def end_token_ids(
    hf_config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, path: str | Path
) -> tuple[int, ...]:
    """Ids of the tokens that end a response, ascending: the same for every engine.

    Every eos_token_id counts: config.json's, the tokenizer's, and each that generation_config.json lists, as
    chat models have one end of a turn and another of a text. SGLang ends at all of them and at ENDS_BY_TEXT
    and cannot be told to leave one out, so nobody here leaves one out.

    hf_config, tokenizer: those of the Hugging Face directory `path`. Raises UserError, one line, for an
    eos_token_id that is no token id, or a generation_config.json that cannot be read.
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
            if type(end) is not int or not 0 <= end < hf_config.vocab_size:  # JSON's true is an int, too
                raise UserError(
                    f"model.path is {path}; eos_token_id of {source} is {given!r}; {end!r} is none of the "
                    f"{hf_config.vocab_size} tokens of config.json: correct it"
                )
            ends.add(end)
    return tuple(sorted(ends))


def _generation_config(path: Path) -> dict[str, Any]:
    """The directory's generation_config.json; nothing where there is none."""
    file = path / "generation_config.json"
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"model.path is {path}; {file.name} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"model.path is {path}; {file.name} holds a {type(found).__name__}, no JSON object")
    return found
