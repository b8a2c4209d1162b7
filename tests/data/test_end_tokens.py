"""Tests which tokens end a response, and that they are not part of the scored text."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from megatron_bicc.config import Config
from megatron_bicc.data.encoding import end_token_ids
from megatron_bicc.data.prompts import Prompt
from megatron_bicc.errors import UserError
from megatron_bicc.model.families import supported_config
from megatron_bicc.rewards.registry import Completion
from megatron_bicc.rollout.collect import GroupSampler
from megatron_bicc.rollout.types import Sample, Sampling
from megatron_bicc.startup import read_tokenizer
from megatron_bicc.training.batch import packing_settings

TINY = Path(__file__).parents[2] / "examples/tiny_policy"
END = 257
"""The tiny policy's only one, in all three files"""


def model(path: Path, **eos_token_id: Any) -> Path:
    """The tiny policy's directory with other end tokens: those of these files; None: no entry."""
    shutil.copytree(TINY, path, ignore=shutil.ignore_patterns("*.safetensors"))
    for name, value in eos_token_id.items():
        file = path / f"{name}.json"
        found = json.loads(file.read_text()) | {"eos_token_id": value}
        file.write_text(json.dumps({k: v for k, v in found.items() if (k, v) != ("eos_token_id", None)}))
    return path


def ends(path: Path) -> tuple[int, ...]:
    return end_token_ids(supported_config(path), read_tokenizer(str(path)), path)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (END,)),
        ({"generation_config": [END, 258]}, (END, 258)),
        ({"generation_config": 3}, (3, END)),
        ({"config": [4, 258], "generation_config": [258, 5]}, (4, 5, END, 258)),
        ({"config": None, "generation_config": None}, (END,)),
        ({"config": [], "generation_config": []}, (END,)),
    ],
)
def test_every_file_counts(given: dict[str, Any], expected: tuple[int, ...], tmp_path: Path) -> None:
    path = model(tmp_path / "model", **given)
    assert ends(path) == expected
    config = Config()
    config.model.path = str(path)
    for settings in packing_settings(config, supported_config(path), read_tokenizer(str(path))):
        assert settings.end_token_ids == expected


def test_without_a_generation_config(tmp_path: Path) -> None:
    path = model(tmp_path / "model")
    (path / "generation_config.json").unlink()
    assert ends(path) == (END,)


def test_a_token_at_which_servers_end_by_its_text(tmp_path: Path) -> None:
    path = model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_tokens(["<|eom_id|>"], special_tokens=True)
    hf_config = supported_config(path)
    hf_config.vocab_size += 1
    assert end_token_ids(hf_config, tokenizer, path) == (END, len(tokenizer) - 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"eos_token_id": [257, 264]}',
            r"generation_config.json is \[257, 264\]; 264 is none of the 264 tok",
        ),
        ('{"eos_token_id": -1}', "generation_config.json is -1; -1 is none of the 264 tokens"),
        ('{"eos_token_id": "<|end|>"}', "'<|end|>' is none of the 264 tokens"),
        ('{"eos_token_id": true}', "True is none of the 264 tokens"),
        ("{", "generation_config.json cannot be read"),
        ("[]", "generation_config.json contains a list"),
    ],
)
def test_what_is_no_token_is_named_before_anything_is_loaded(text: str, message: str, tmp_path: Path) -> None:
    path = model(tmp_path / "model")
    (path / "generation_config.json").write_text(text)
    with pytest.raises(UserError, match=message.replace("|", r"\|")) as raised:
        read_tokenizer(str(path))
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


def test_an_end_that_is_no_special_token_is_not_scored() -> None:
    """Only the end is left out; the same token in a response that was cut off is part of it."""
    tokenizer, seen = read_tokenizer(str(TINY)), []
    tokens = np.array(tokenizer.encode("1+1=2.", add_special_tokens=False), np.int32)

    def verifier(completions: list[Completion]) -> np.ndarray:
        seen.extend(completion.response for completion in completions)
        return np.zeros(len(completions), np.float32)

    log_probs = np.zeros(len(tokens), np.float32)
    samples = [Sample(tokens, log_probs, "stop", 0), Sample(tokens, log_probs, "length", 0)]
    sampler = GroupSampler(None, verifier, tokenizer, Sampling(1.0, 9), group_size=2)
    (group,) = sampler.scored([Prompt(0, [], np.array([1], np.int32), "2", "", {})], samples)
    assert seen == group.texts == ["1+1=2", "1+1=2."]
