"""Tests the documented commands where Transformer Engine, here tests/te_stand_in, is installed."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import te_stand_in, warm
from support.forked import torchrun_variables

# several processes; a busy machine needs minutes for that
pytestmark = pytest.mark.timeout(900)
TINY = ["--config", "examples/configs/tiny.yaml"]
CONVERT = "tools/convert_hf_checkpoint.py"


def run(command: list[str | Path], processes: int = 0, **variables: str) -> subprocess.CompletedProcess:
    """Runs a command that finds Transformer Engine, alone or as a job. Raises AssertionError if it fails."""
    each = torchrun_variables(processes) if processes else [variables]
    done = te_stand_in.warm_process().run([*map(str, command)], each, timeout_s=800)
    assert done.returncode == 0, done.stderr[-4000:]
    return done


def test_training_on_two_processes(tmp_path: Path) -> None:
    """What `make demo` runs after its dry run, with fewer rollouts."""
    few = ["train.steps=1", "rollout.prompts_per_step=4", "evaluation.prompts=2", "evaluation.samples=1"]
    done = run(["-m", "megatron_bicc.train", *TINY, *few, f"output_dir={tmp_path}/run"], processes=2)
    assert "on Transformer Engine's linears and norms" in done.stdout + done.stderr
    (record, *_) = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    assert (tmp_path / "run/hf/model.safetensors").is_file() and record


def test_dry_run() -> None:
    settings = [*TINY, "parallel.sequence=true", "dry_run=true"]
    done = run(["-m", "megatron_bicc.train", *settings], WORLD_SIZE="4")
    assert "4 processes: tensor 2 with sequence parallel" in done.stdout


def test_plan() -> None:
    assert "H100" in run(["tools/plan.py", *TINY, "--world-size", "2"]).stdout


@pytest.mark.parametrize("family", ["qwen3_tied", "qwen3_moe"])
def test_checkpoints_convert_with_and_without(
    family: str, model_dirs: dict[str, Path], tmp_path: Path
) -> None:
    """Imported by either, a checkpoint is read by the other: logits, and an export of the same tensors."""
    source = model_dirs[family]
    run([CONVERT, "import", source, tmp_path / "te"])
    for command in (["import", source, tmp_path / "local"], ["export", tmp_path / "te", tmp_path / "back"]):
        done = warm.run([CONVERT, *command])
        assert done.returncode == 0, done.stderr[-4000:]
    run([CONVERT, "verify", source, tmp_path / "local", "--length", "32"])
    before, after = (load_file(path / "model.safetensors") for path in (source, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_processes_with_and_without_are_refused(tmp_path: Path) -> None:
    """One of two processes finds Transformer Engine."""
    command = ["-m", "megatron_bicc.train", *TINY, f"output_dir={tmp_path}/run"]
    starts = zip((warm.warm_process(), te_stand_in.warm_process()), torchrun_variables(2), strict=True)
    for i, (process, variables) in enumerate(starts):
        process.start(command, [variables], tmp_path / f"out{i}", tmp_path / f"err{i}", 300)
    assert [p.wait(300) for p in (warm.warm_process(), te_stand_in.warm_process())] == [2, 2]
    said = (tmp_path / "err0").read_text() + (tmp_path / "err1").read_text()
    assert "library of the layers: local against Transformer Engine" in said
