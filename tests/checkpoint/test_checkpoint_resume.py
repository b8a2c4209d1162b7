"""Tests resuming: damaged checkpoints, changed settings, full disks, killed processes.

Runs are forked from one process with all modules loaded, so that a run takes a second or two, not ten.
"""

import json
import os
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import warm
from support.finished_runs import assert_equal, metrics, one_line, progress, state
from torch import Tensor
from transformers import AutoModelForCausalLM

WORKER = Path(__file__).with_name("checkpoint_worker.py")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What checkpoint_worker.py reports: the directory as "out", and scenario: {"status": .., "err": ..}."""
    out = tmp_path_factory.mktemp("checkpoints")
    done = warm.run([WORKER, out, os.environ.get("KILLS", "20")], timeout_s=290)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((out / "report.json").read_text()) | {"out": out}


def test_killed_at_random_moments(found: dict, single_process: None) -> None:
    """Metrics, weights and optimizer, to the bit, of a run that nobody killed; no step lost, none twice."""
    whole, last = found["out"] / "whole", "checkpoints/step_00000006"
    expected = state(whole / last)
    assert any("exp_avg_sq" in name for name in expected)
    for killed in (path for path in found["out"].glob("killed*") if path.is_dir()):
        assert metrics(killed) == metrics(whole)
        assert_equal(state(killed / last), expected)
        assert progress(killed / last) == progress(whole / last)
        assert_equal(load_file(killed / "hf/model.safetensors"), load_file(whole / "hf/model.safetensors"))
    assert not found["killed"]["bad_latest"]


def test_kills_cover_a_step(found: dict) -> None:
    """Twenty kills, inside of every phase at least two."""
    phases = Counter(found["killed"]["phases"])
    assert phases.total() >= 20
    assert set(phases) == {"rollout", "pack", "logprob", "train", "sync", "eval", "export", "save", "write"}
    assert min(phases.values()) >= 2


def test_flipped_bit_is_found(found: dict) -> None:
    line = one_line(found["flipped"])
    assert f"{found['flipped']['file']} is damaged" in line
    assert "delete " in line
    assert line.endswith("to resume from " + str(found["out"] / "copy/checkpoints/step_00000005"))


def test_previous_checkpoint_goes_on(found: dict) -> None:
    assert found["previous"]["status"] == 0, found["previous"]["err"]
    assert metrics(found["out"] / "copy") == metrics(found["out"] / "whole")


def test_dangerous_settings_are_refused_by_name(found: dict) -> None:
    line = one_line(found["dangerous"])
    for name in ("bicc.context_ratio: was 0.4, is 0.3", "data.train: was ", "rollout.temperature: was 1.0"):
        assert name in line
    assert "train.steps" not in line
    assert "checkpoint.force=true" in line


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "poisoned_gradient",
            "step 3: the gradient is not finite: model.norm.weight; weights and optimizer were",
        ),
        ("poisoned_weight", "step 3: the policy's weights are not finite: model.norm.weight"),
    ],
)
def test_numbers_that_are_not_finite_end_the_run(found: dict, name: str, said: str) -> None:
    """Nothing is made of them; the last good checkpoint stays the newest, and a run resumes from it."""
    line = one_line(found[name])
    assert said in line
    assert line.endswith("checkpoint.resume=true resumes from the newest checkpoint")
    out = found["out"] / name
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == [
        "latest",
        "step_00000001",
        "step_00000002",
    ]
    assert (out / "checkpoints/latest").resolve().name == "step_00000002"
    assert [path.name for path in (out / "exports").iterdir()] == ["step_00000002"]
    assert not (out / "hf").exists()
    assert [record["step"] for record in metrics(out)] == [0, 1, 2]
    assert found["healed"]["status"] == 0, found["healed"]["err"]
    assert metrics(found["out"] / "healed") == metrics(found["out"] / "whole")


def test_forced_settings_and_harmless_ones_are_logged(found: dict) -> None:
    assert found["forced"]["status"] == 0, found["forced"]["err"]
    assert "changed since step 5: bicc.context_ratio: was 0.4, is 0.3" in found["forced"]["err"]
    assert found["harmless"]["status"] == 0, found["harmless"]["err"]
    assert "changed since step 6: train.steps: was 6, is 7" in found["harmless"]["err"]
    assert "data.train: was" in found["harmless"]["err"]
    assert [record["step"] for record in metrics(found["out"] / "harmless")] == list(range(8))


def test_another_layout(found: dict) -> None:
    """Two steps at TP=2, the third at TP=2, DP=2 or CP=2."""
    assert found["tp2"]["status"] == 0, found["tp2"]["err"]
    assert "changed since step 2: parallel.context: was 1, is 2" in found["cp2"]["err"]
    tp2, expected = (read(found["out"] / "tp2") for read in (metrics, exported))
    for layout in ("dp2", "cp2"):
        assert found[layout]["status"] == 0, found[layout]["err"]
        # megatron-core's words where the ranks' parts of a checkpoint do not fit together
        assert "common state dict differs" not in found[layout]["err"]
        assert "changed since step 2: parallel.tensor: was 2, is 1" in found[layout]["err"]
        own = metrics(found["out"] / layout)
        assert own[:3] == tp2[:3]
        assert own[3]["train/loss"] == pytest.approx(tp2[3]["train/loss"], abs=1e-5)
        assert own[3]["train/grad_norm"] == pytest.approx(tp2[3]["train/grad_norm"], rel=1e-4)
        weights = exported(found["out"] / layout)
        assert all((weights[name] - expected[name]).abs().max() < 1e-4 for name in expected)


def exported(run: Path) -> dict[str, Tensor]:
    """The weights that a run ended with."""
    return load_file(run / "hf/model.safetensors")


def test_full_disk(found: dict) -> None:
    line = one_line(found["full"])
    checkpoints = found["out"] / "full/checkpoints"
    assert f"{checkpoints / 'step_00000001'}: cannot be written: " in line
    assert not list(checkpoints.iterdir())


def test_unwritable_directory(found: dict) -> None:
    line = one_line(found["unwritable"])
    assert f"{found['out'] / 'unwritable/checkpoints'} cannot be written: " in line
    assert "training" not in found["unwritable"]["err"]


def test_converter_exports_a_training_checkpoint(found: dict) -> None:
    ours, theirs = (load_file(found["out"] / name / "model.safetensors") for name in ("exported", "whole/hf"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_exports_between(found: dict) -> None:
    """Of those after steps 2 and 4 the newest stays, whole, and not the policy of the end."""
    exports = found["out"] / "whole/exports"
    assert [path.name for path in exports.iterdir()] == ["step_00000004"]
    ours = AutoModelForCausalLM.from_pretrained(exports / "step_00000004").state_dict()
    end = load_file(found["out"] / "whole/hf/model.safetensors")
    assert any((ours[name] != end[name]).any() for name in end)
    for killed in (path for path in found["out"].glob("killed*") if path.is_dir()):
        theirs = load_file(killed / "exports/step_00000004/model.safetensors")
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_latest(found: dict) -> None:
    checkpoints = found["out"] / "whole/checkpoints"
    assert (checkpoints / "latest").resolve() == (checkpoints / "step_00000006").resolve()
    assert sorted(p.name for p in checkpoints.iterdir()) == ["latest", "step_00000005", "step_00000006"]
