"""Chat templates that ask for today's date: one date for a whole run, resumed on whatever day."""

import json
from datetime import date

from transformers import PreTrainedTokenizerBase

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
