"""Runs two training steps in this process, on any of the small policies and with either engine."""

import json
import shutil
import string
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from megatron_bicc.cli import parse_config
from megatron_bicc.rewards.registry import Completion
from megatron_bicc.startup import read_inputs
from megatron_bicc.train import build_trainer
from support.finished_runs import metrics
from support.models import VOCAB

SETTINGS = (
    "algorithm=grpo+bicc+rcc",
    "model.dtype=float32",
    "data.max_prompt_tokens=32",
    *("rollout.prompts_per_step=4", "rollout.group_size=6", "rollout.max_new_tokens=16"),
    *("train.steps=2", "train.max_sequence_tokens=256", "train.max_tokens_per_microbatch=512"),
    # large, so that an engine with a weight of the previous step is detected
    *("optimizer.lr=1e-2", "optimizer.eps=1e-2"),
    "monitoring.tensorboard=false",
)
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def save_tokenizer(directory: Path) -> None:
    """Saves a tokenizer with one token per printable character, and Qwen2's end token at the models' id."""
    tokens = [string.printable[0], "<|endoftext|>", *string.printable[1:]]
    assert len(tokens) == VOCAB
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(directory)


def odd(completions: list[Completion]) -> np.ndarray:
    """Scores about half of a random policy's responses as right."""
    return np.array([sum(map(ord, each.response)) % 2 for each in completions], np.float32)


def save_prompts(path: Path) -> Path:
    """Writes a file of prompts; returns its path."""
    rows = [{"problem": f"{i}+{7 * i}=", "answer": str(8 * i)} for i in range(1, 13)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def train_two_steps(model: Path, root: Path, *settings: str) -> list[dict]:
    """Trains; returns the metrics, step 0 first. Reads root/model, a copy with a tokenizer; writes root/run.

    megatron-core's process groups for one process must exist.
    """
    shutil.copytree(model, root / "model")
    save_tokenizer(root / "model")
    prompts = save_prompts(root / "train.jsonl")
    where = [f"model.path={root}/model", f"output_dir={root}/run", f"data.train={prompts}"]
    inputs = replace(read_inputs(parse_config([*SETTINGS, *where, *settings])), verifier=odd)
    with closing(build_trainer(inputs)) as trainer:
        trainer.run()
    return metrics(root / "run")


def train_on(server: str, model: Path, root: Path, *settings: str) -> list[dict]:
    """Calls `train_two_steps` with rollouts of the SGLang server at this URL."""
    engine = ("rollout.engine=sglang", "rollout.launch=attach", f"rollout.sglang.servers={server}")
    return train_two_steps(model, root, *engine, *settings)


def assert_engine_followed(records: list[dict]) -> None:
    """Asserts that the engine sampled each step with the policy's weights at that step."""
    assert [record["step"] for record in records] == [0, 1, 2]
    for record in records[1:]:
        assert record["train/grad_norm"] > 0
        assert abs(record["kl/rollout_old"]) < 1e-6
