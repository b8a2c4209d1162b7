"""Tests that a dry run finds the errors that the run would raise, at any number of processes."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from support import warm

REPOSITORY = Path(__file__).parents[2]
# several processes or many shards; a busy machine needs minutes for that
pytestmark = pytest.mark.timeout(900)
CONFIGS = REPOSITORY / "examples/configs"
TINY = REPOSITORY / "examples/tiny_policy"
TINY_RUN = [
    "--config",
    f"{CONFIGS}/tiny.yaml",
    f"model.path={TINY}",
    f"data.train={REPOSITORY}/examples/data/train.parquet",
    f"evaluation.data={REPOSITORY}/examples/data/heldout.parquet",
]
EXPERTS = ["parallel.expert=2", "parallel.sequence=true", "model.dtype=bfloat16", "data.train="]
OFFLOAD = "megatron.optimizer.optimizer_cpu_offload", "megatron.optimizer.optimizer_offload_fraction"
EXPERTS += [f"{OFFLOAD[0]}=true", f"{OFFLOAD[1]}=1.0"]


def damaged_models(root: Path) -> dict[str, Path]:
    """The tiny policy without a tensor, with one of another shape, and without weights and tokenizer."""
    paths = {name: root / name for name in ("missing", "misshapen", "bare")}
    for path in paths.values():
        shutil.copytree(TINY, path)
    tensors = load_file(TINY / "model.safetensors")
    name = "model.layers.2.mlp.up_proj.weight"
    save_file({k: v for k, v in tensors.items() if k != name}, paths["missing"] / "model.safetensors")
    save_file(tensors | {name: tensors[name][:-2]}, paths["misshapen"] / "model.safetensors")
    for file in paths["bare"].iterdir():
        if file.name != "config.json":
            file.unlink()
    return paths


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, model_dirs: dict[str, Path]) -> dict[str, dict]:
    """Every case's dry run, by name."""
    root = tmp_path_factory.mktemp("dry_runs")
    damaged = damaged_models(root)
    unread = [*TINY_RUN, "data.train=", "evaluation.data="]
    experts = [*TINY_RUN, f"model.path={model_dirs['qwen3_moe']}", *EXPERTS]
    cases = {
        "tiny": [4, [*TINY_RUN, "parallel.pipeline=2", "parallel.virtual_pipeline=2"]],
        "experts": [8, experts],
        "no data": [2, [*unread, "loss.kl_coefficient=0.1", "loss.kl_estimator=k3"]],
        "bare": [2, [*TINY_RUN, f"model.path={damaged['bare']}"]],
        "heads": [8, [*unread, "parallel.tensor=4"]],
        "world": [3, [*unread]],
        "missing": [2, [*unread, f"model.path={damaged['missing']}"]],
        "misshapen": [2, [*unread, f"model.path={damaged['misshapen']}"]],
        "no contrast": [2, [*unread, "synthetic.pass_rate=0"]],
        "second process": [2, [*unread], 1],
    }
    for _, arguments, *_ in cases.values():
        arguments.append(f"output_dir={root}/run")
    worker = Path(__file__).with_name("dry_run_worker.py")
    done = warm.run([worker, json.dumps(list(cases.values())), root / "out.json"])
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(zip(cases, json.loads((root / "out.json").read_text()), strict=True))


def test_a_whole_run_is_checked_whole(results: dict[str, dict]) -> None:
    found = results["tiny"]
    assert found["status"] == 0, found["err"]
    assert "4 processes: tensor 2, pipeline 2 x 2 chunks, data 1, expert 1" in found["out"]
    assert "stage 0: layers 1, 3, " in found["out"] and "stage 1: layers 2, 4, " in found["out"]
    assert "bilateral: " in found["out"]
    assert "not checked" not in found["out"]


def test_experts(results: dict[str, dict]) -> None:
    assert results["experts"]["status"] == 0, results["experts"]["err"]
    assert "shards of " in results["experts"]["out"]


def test_an_estimator_of_another_gradient_is_warned_of(results: dict[str, dict]) -> None:
    lines = [line for line in results["no data"]["err"].splitlines() if "loss.kl_estimator is" in line]
    assert len(lines) == 1 and "loss.kl_estimator is k3" in lines[0]
    assert "loss.kl_estimator" not in results["tiny"]["err"]


def test_of_a_torchrun_only_the_first_process_speaks(results: dict[str, dict]) -> None:
    assert results["second process"]["status"] == 0
    assert results["second process"]["out"] == ""


@pytest.mark.parametrize(
    ("case", "unchecked"),
    [
        ("no data", ["prompts: data.train"]),
        ("experts", ["the tokenizer", "prompts", "prompts", *OFFLOAD]),
        ("bare", ["the tokenizer", "prompts", "weights"]),
    ],
)
def test_what_is_absent_is_named(results: dict[str, dict], case: str, unchecked: list[str]) -> None:
    assert results[case]["status"] == 0, results[case]["err"]
    lines = [line for line in results[case]["out"].splitlines() if line.startswith("not checked: ")]
    assert len(lines) == len(unchecked)
    for line, what in zip(lines, unchecked, strict=True):
        assert line.startswith(f"not checked: {what}")


@pytest.mark.parametrize(
    ("case", "parts"),
    [
        ("heads", ["parallel.tensor=4", "num_key_value_heads=2"]),
        ("world", ["parallel.tensor is 2", "number of processes, 3"]),
        ("missing", ["missing", "tensor model.layers.2.mlp.up_proj.weight is missing"]),
        ("misshapen", ["misshapen", "model.layers.2.mlp.up_proj.weight", "config.json requires (256, 128)"]),
        ("no contrast", ["synthetic.pass_rate is 0", "no group"]),
    ],
)
def test_what_is_wrong_is_named_in_one_line(results: dict[str, dict], case: str, parts: list[str]) -> None:
    assert results[case]["status"] == 2
    assert len(results[case]["err"].splitlines()) == 1
    assert all(part in results[case]["err"] for part in parts), results[case]["err"]
