"""Tests a whole run on one process: its output, exact resume after a kill, its export."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from megatron.core.models.gpt.gpt_model import GPTModel
from safetensors.torch import load_file
from support import warm
from support.layout import causal_batch
from support.steps import make_config
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_bicc.checkpoint.checkpoint import load_checkpoint, read_progress
from megatron_bicc.weights.hf_weights import load_policy

REPOSITORY = Path(__file__).parents[2]
SETTINGS = [
    "parallel.tensor=1",
    "rollout.prompts_per_step=8",
    "evaluation.prompts=6",
    "evaluation.every=2",
    "evaluation.samples=2",
    "checkpoint.every=2",
    "monitoring.tensorboard=false",
]
PROGRAM = ["-m", "megatron_bicc.train", "--config", "examples/configs/tiny.yaml"]


def train(out: Path, *settings: str) -> subprocess.CompletedProcess:
    return warm.run([*PROGRAM, *SETTINGS, f"output_dir={out}", *settings], timeout_s=280)


def train_from_the_shell(out: Path, *settings: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-W", "ignore", *PROGRAM, *SETTINGS, f"output_dir={out}", *settings]
    # equal to the bit only on one thread: with more, sums are taken in the order in which threads finish
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=280)


def metrics(out: Path) -> list[dict]:
    """metrics.jsonl without the times, which differ from run to run."""
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if not k.startswith("time/")} for record in records]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps in one go."""
    out = tmp_path_factory.mktemp("run") / "whole"
    done = train_from_the_shell(out, "train.steps=4")
    assert done.returncode == 0, done.stderr[-3000:]
    for place in ("metrics.jsonl", "report.html", "hf", "checkpoints/step_00000004"):
        assert (out / place).exists()
        assert str(out / place) in done.stdout
    return out


def test_metrics_have_a_line_a_step(whole_run: Path) -> None:
    records = metrics(whole_run)
    assert [record["step"] for record in records] == [0, 1, 2, 3, 4]
    assert [record["step"] for record in records if "eval/pass_at_1" in record] == [0, 2, 4]
    for key in ("reward/mean", "rcc/cov", "tokens/packed", "tokens/rows", "train/grad_norm"):
        assert all(key in record for record in records[1:]), key
    assert all(record["tokens/packed"] < record["tokens/rows"] for record in records[1:])


def test_settings_and_layouts_are_written_down(whole_run: Path) -> None:
    assert yaml.safe_load((whole_run / "config.yaml").read_text())["bicc"]["enabled"] is True
    layouts = [json.loads(line) for line in (whole_run / "layout.jsonl").read_text().splitlines()]
    assert [layout["step"] for layout in layouts] == [2, 4]
    packed = {record["step"]: record["tokens/packed"] for record in metrics(whole_run)[1:]}
    for layout in layouts:
        sides = [s for plan in layout["plans"] for rank in plan["ranks"] for b in rank for s in b["sides"]]
        assert sum(s["prefix"] + sum(s["responses"]) for s in sides) == packed[layout["step"]]


def test_groups_show_their_contexts(whole_run: Path) -> None:
    groups = [json.loads(line) for line in (whole_run / "groups.jsonl").read_text().splitlines()]
    assert {group["step"] for group in groups} == {2, 4}
    for rollouts in (group["rollouts"] for group in groups):
        for rollout in rollouts:
            opposite = [other["text"] for other in rollouts if other["correct"] != rollout["correct"]]
            assert all(text in rollout["context"] for text in opposite)


def test_resumed_run_equals_one_that_was_not_stopped(whole_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "resumed"
    # the third step's metrics are written, its weights are lost: the run goes on from step 2
    assert train(out, "train.steps=3", "checkpoint.every=2").returncode == 0
    (out / "checkpoints/step_00000003").rename(tmp_path / "lost")
    done = train(out, "train.steps=4", "checkpoint.resume=true")
    assert done.returncode == 0, done.stderr[-3000:]
    expected = [record for record in metrics(whole_run) if record["step"] != 3]
    assert [r for r in metrics(out) if r["step"] != 3] == expected
    ours, theirs = (load_file(path / "hf/model.safetensors") for path in (out, whole_run))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_export_gives_the_trained_policys_greedy_answers(whole_run: Path, single_process: None) -> None:
    exported = AutoModelForCausalLM.from_pretrained(whole_run / "hf")
    tokenizer = AutoTokenizer.from_pretrained(whole_run / "hf")
    policy = load_policy(make_config(REPOSITORY / "examples/tiny_policy", "grpo"))
    checkpoint = whole_run / "checkpoints/step_00000004"
    load_checkpoint(checkpoint, policy, read_progress(checkpoint))
    module = policy.modules[0]
    module._postprocess = partial(GPTModel._postprocess, module)
    for question in ("47+8-6=", "31-5+9=", "60+7+7="):
        chat = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        answer = exported.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=32)[0]
        with torch.no_grad():
            packed = causal_batch(answer)
            logits = module(answer[None], packed.positions_N[None], None, packed_seq_params=packed)[0]
        assert torch.equal(logits[len(prompt) - 1 : -1].argmax(-1), answer[len(prompt) :]), question


def test_a_used_directory_is_refused(whole_run: Path) -> None:
    done = train(whole_run, "train.steps=4")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "it already contains a run" in done.stderr
