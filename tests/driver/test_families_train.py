"""Tests every family on the local engine: two training steps, and an evaluation of the result."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.models import MODELS
from support.two_steps import SETTINGS, assert_engine_followed, odd, save_prompts, train_two_steps

from megatron_bicc.cli import parse_config
from megatron_bicc.evaluate import evaluate_benchmarks, read_inputs


@pytest.mark.parametrize("family", MODELS)
def test_two_steps_and_an_evaluation(
    family: str, model_dirs: dict[str, Path], single_process: None, tmp_path: Path
) -> None:
    """An evaluation of the exported policy finds the figure that the run's own engine had at its end."""
    heldout = save_prompts(tmp_path / "heldout.jsonl")
    evaluation = (f"evaluation.data={heldout}", "evaluation.samples=2")
    records = train_two_steps(model_dirs[family], tmp_path, *evaluation)
    assert_engine_followed(records)

    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "run/hf"))
    assert before.keys() == after.keys()
    # a router that chooses one expert, whose gate is always 1, has no gradient
    moving = [name for name in before if family != "qwen3_moe_top1" or "mlp.gate." not in name]
    assert not any(torch.equal(before[name], after[name]) for name in moving)

    where = (f"model.path={tmp_path}/run/hf", f"output_dir={tmp_path}/evaluation", "evaluation.samples=2")
    inputs = read_inputs(parse_config([*SETTINGS, *where]), [str(heldout)])
    found = evaluate_benchmarks(replace(inputs, verifier=odd))["heldout"]
    assert found.avg.value == pytest.approx(records[-1]["eval/pass_at_1"])
