"""Tests the documented example of a reward model: a sequence classifier that an SGLang server scores with."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from support.sglang_server import SglangServer
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForSequenceClassification

from megatron_bicc.config import RewardConfig
from megatron_bicc.rewards.registry import get_scorer
from megatron_bicc.rewards.types import Completion

REPOSITORY = Path(__file__).parents[2]
POLICY = REPOSITORY / "examples/tiny_policy"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random one with the tokenizer of examples/tiny_policy."""
    path = tmp_path_factory.mktemp("reward_model")
    torch.manual_seed(1)
    config = Qwen2Config(
        vocab_size=len(AutoTokenizer.from_pretrained(POLICY)),
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        num_labels=1,
        pad_token_id=0,
    )
    Qwen2ForSequenceClassification(config).save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(POLICY / name, path / name)
    return path


def test_the_documented_reward_model(model: Path, tmp_path: Path) -> None:
    """Its rewards are Hugging Face's, but for a constant of the server (docs/rewards.md)."""
    server = SglangServer(model, tmp_path / "server.log", scores=True)
    page = (REPOSITORY / "docs/rewards.md").read_text()
    (code,) = re.findall(r"```python\n(# reward_model.py\n.*?)```", page, re.DOTALL)
    code = code.replace("http://127.0.0.1:30010", server.url).replace("models/reward", str(model))
    assert str(model) in code and server.url in code
    (tmp_path / "reward_model.py").write_text(code)
    completions = [
        Completion([{"role": "user", "content": "12+3="}], answer, "15") for answer in ("15", "12", "9+6=15")
    ]
    server.start()
    try:
        server.wait()
        scorer = get_scorer(RewardConfig(function=f"{tmp_path}/reward_model.py:reward_model"))
        found = scorer.score(completions).rewards
        scorer.close()
    finally:
        server.kill()
    tokenizer = AutoTokenizer.from_pretrained(model)
    reference = Qwen2ForSequenceClassification.from_pretrained(model, dtype=torch.float32).eval()
    expected = []
    for each in completions:
        chat = [*each.messages, {"role": "assistant", "content": each.response}]
        ids = tokenizer.apply_chat_template(chat, return_dict=False)
        expected.append(reference(torch.tensor([ids])).logits.item())
    assert np.ptp(expected) > 0.1
    np.testing.assert_allclose(found - found.mean(), np.array(expected) - np.mean(expected), atol=1e-4)
