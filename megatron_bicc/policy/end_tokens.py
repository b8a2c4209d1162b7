"""The tokens that end a response."""

import json
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase

ENDS_BY_TEXT = ("<|eom_id|>", "<|content_model_end_sampling|>", "<|ifm|im_end|>")
"""Added tokens at which SGLang 0.5.23 ends whatever the files say (attach_additional_stop_token_ids)"""


def end_token_ids(
    hf_config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, path: str | Path
) -> tuple[int, ...]:
    """Ids of the tokens that end a response, ascending: the same for every engine.

    Every eos_token_id counts: config.json's, the tokenizer's, and each that generation_config.json lists, as
    chat models have one end of a turn and another of a text. SGLang ends at all of them and at ENDS_BY_TEXT
    and cannot be told to leave one out, so nobody here leaves one out.

    hf_config, tokenizer: those of the Hugging Face directory `path`. Raises ValueError, one line, for an
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
                raise ValueError(
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
        raise ValueError(f"model.path is {path}; {file.name} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"model.path is {path}; {file.name} holds a {type(found).__name__}, no JSON object")
    return found
