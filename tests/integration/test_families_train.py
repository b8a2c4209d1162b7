"""Every supported family on the local engine: two steps of training, and an evaluation of what they made."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.models import MODELS
from support.two_steps import (
    SETTINGS,
    assert_engine_followed,
    odd_or_true,
    save_prompts,
    save_tokenizer,
    train_two_steps,
)

from megatron_bicc.cli import parse_config
from megatron_bicc.evaluate import evaluate_benchmarks, read_inputs
from megatron_bicc.rewards.registry import VERIFIERS


@pytest.mark.parametrize("family", MODELS)
def test_two_steps_and_an_evaluation(
    family: str,
    model_dirs: dict[str, Path],
    single_process: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """An evaluation of the exported policy finds the figures that the run's own engine had at its end."""
    monkeypatch.setitem(VERIFIERS, "math", odd_or_true)
    model = shutil.copytree(model_dirs[family], tmp_path / "model")
    save_tokenizer(model)
    heldout = save_prompts(tmp_path / "heldout.jsonl")
    records = train_two_steps(model, tmp_path / "run", f"evaluation.data={heldout}", "evaluation.samples=2")
    assert_engine_followed(records)

    before, after = (load_file(path / "model.safetensors") for path in (model, tmp_path / "run/hf"))
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before if "mlp.gate." not in name)

    where = [f"model.path={tmp_path / 'run/hf'}", f"output_dir={tmp_path / 'evaluation'}"]
    config = parse_config([*SETTINGS, *where, "evaluation.samples=2"])
    found = evaluate_benchmarks(read_inputs(config, [str(heldout)]))["heldout"]
    assert found.avg.value == pytest.approx(records[-1]["eval/pass_at_1"])
