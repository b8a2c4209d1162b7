"""Tests background writing: the state at the snapshot, one checkpoint at a time, failures reported."""

import os
import resource
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.finished_runs import state
from support.models import make_model
from support.scripted import Scripted
from support.steps import HEADERS, TOKENIZER
from support.two_steps import odd
from torch import Tensor

from megatron_bicc.algorithms.presets import resolve
from megatron_bicc.checkpoint.checkpoint import (
    CheckpointError,
    CheckpointWriter,
    Progress,
    checkpoints,
    load_checkpoint,
    read_progress,
)
from megatron_bicc.checkpoint.resume import (
    HELD_OUT_IDS,
    TRAIN_IDS,
    WEIGHTS,
    check_resume,
    digests_of_files,
    resume_point,
)
from megatron_bicc.config import Config, OptimizerConfig
from megatron_bicc.data.prompts import Prompt, PromptSampler
from megatron_bicc.errors import UserError
from megatron_bicc.model.policy import Policy
from megatron_bicc.rollout.sampling import Collector
from megatron_bicc.startup import Inputs
from megatron_bicc.train import Trainer
from megatron_bicc.training.learner import Learner
from megatron_bicc.weights.hf_weights import load_policy
from megatron_bicc.weights.sync import EngineWeightSync


@pytest.fixture
def policy(tmp_path: Path, single_process: None) -> Policy:
    """A random tied Qwen3, after an update by random gradients."""
    make_model("qwen3_tied").save_pretrained(tmp_path / "hf")
    config = Config()
    config.model.path, config.model.dtype, config.optimizer.lr = str(tmp_path / "hf"), "float32", 1e-3
    policy = load_policy(config)
    update(policy)
    return policy


def update(policy: Policy) -> None:
    """One step of the optimizer; the next one's gradients differ."""
    for chunk in policy.chunks:
        for parameter in chunk.parameters():
            parameter.main_grad.normal_()
    policy.update()


def held(policy: Policy) -> list[Tensor]:
    """A copy of all weights and of all that Adam keeps."""
    optimizers = [part.optimizer for part in policy.optimizer.chained_optimizers]
    adam = [x for o in optimizers for state in o.state.values() for _, x in sorted(state.items())]
    return [x.detach().clone() for x in (*policy.modules[0].parameters(), *adam)]


def settings_in(directory: Path) -> Config:
    """Of a run there that resumes."""
    config = Config()
    config.model.path, config.data.train = str(directory / "hf"), str(directory / "train.jsonl")
    config.output_dir, config.checkpoint.resume = str(directory), True
    config.bicc.wrong_header, config.bicc.right_header, config.bicc.answer_header = HEADERS
    (directory / "train.jsonl").write_text("{}")
    return config


def trainer_of(config: Config, policy: Policy, **token_ids: str) -> Trainer:
    """A run's trainer, not restored; `train` and `heldout` stand for digests of its prompts' token ids."""
    names = {"train": TRAIN_IDS, "heldout": HELD_OUT_IDS}
    contents = digests_of_files(config) | {names[k]: v for k, v in ({"train": "these"} | token_ids).items()}
    prompts = [Prompt(i, [], np.array([2, 3], np.int32), "", "", {}) for i in range(2)]
    collector = Collector(config, prompts, PromptSampler(2, 1, config.seed))
    found = resume_point(config, first_process=True)
    if found:
        check_resume(found.progress, config, contents, first_process=True)
    inputs = Inputs(config, TOKENIZER, odd, prompts, [], contents, collector, found)
    engine = Scripted(rights=lambda prompt: 0)  # generates nothing here
    learner = Learner(resolve(config), policy, TOKENIZER)
    return Trainer(inputs, policy, learner, engine, EngineWeightSync(policy, engine))


def restore(config: Config, policy: Policy, **token_ids: str) -> int:
    """The step that a run resumes from."""
    trainer = trainer_of(config, policy, **token_ids)
    trainer.restore()
    return trainer.step


def save(trainer: Trainer, *steps: int) -> list[Path]:
    """Checkpoints after these steps."""
    for trainer.step in steps:
        trainer.save()
        trainer.writer.start()
    trainer.writer.wait()
    return checkpoints(trainer.config.output_dir)


def progress(policy: Policy, step: int) -> Progress:
    return Progress(step, {}, policy.scheduler.state_dict(), {}, {})


def checkpoint_of(policy: Policy, directory: Path) -> Path:
    """The only checkpoint in a run's directory, of the policy after a step."""
    writer = CheckpointWriter(str(directory), keep=1)
    writer.snapshot(policy, progress(policy, 1))
    writer.start()
    writer.wait()
    (path,) = checkpoints(str(directory))
    return path


def test_a_checkpoint_holds_the_moment_of_its_snapshot(policy: Policy, tmp_path: Path) -> None:
    writer = CheckpointWriter(str(tmp_path), keep=2)
    writer.snapshot(policy, progress(policy, 1))
    then, weights = held(policy), {n: p.detach().clone() for n, p in policy.modules[0].named_parameters()}
    update(policy)
    writer.start()
    writer.wait()
    assert not all(torch.equal(a, b) for a, b in zip(held(policy), then, strict=True))
    (path,) = checkpoints(str(tmp_path))
    # loading takes the weights from the optimizer's copy: here those that an export reads, too
    saved = state(path)
    whole = saved.keys() & weights.keys()
    assert {"embedding.word_embeddings.weight", "decoder.final_layernorm.weight"} <= whole
    assert all(torch.equal(saved[name], weights[name]) for name in whole)
    load_checkpoint(path, policy, read_progress(path))
    assert all(torch.equal(a, b) for a, b in zip(held(policy), then, strict=True))


def test_optimizer_settings_of_a_resumed_run_are_its_own(policy: Policy, tmp_path: Path) -> None:
    path = checkpoint_of(policy, tmp_path)
    config = Config()
    config.model.path, config.model.dtype = str(tmp_path / "hf"), "float32"
    config.optimizer = OptimizerConfig(
        lr=5e-3, min_lr=1e-3, schedule="linear", beta1=0.8, beta2=0.9, eps=1e-4, weight_decay=0.1
    )
    resumed = load_policy(config)
    given = [settings(group) for group in resumed.optimizer.param_groups]
    load_checkpoint(path, resumed, read_progress(path))
    assert [settings(group) for group in resumed.optimizer.param_groups] == given
    # one of train.steps updates is done
    assert resumed.learning_rate() == pytest.approx(1e-3 + 4e-3 * (1 - 1 / config.train.steps))
    states = [
        state for part in resumed.optimizer.chained_optimizers for state in part.optimizer.state.values()
    ]
    assert {float(state["step"]) for state in states} == {1.0}
    assert all(torch.equal(a, b) for a, b in zip(held(resumed), held(policy), strict=True))


def settings(group: dict) -> dict:
    """What an optimizer is told of a group of parameters, but for the learning rate, which moves."""
    return {name: value for name, value in group.items() if name not in ("params", "lr", "step")}


def test_weights_that_are_not_finite_are_not_resumed_from(policy: Policy, tmp_path: Path) -> None:
    """Such as an older version wrote them."""
    writer = CheckpointWriter(str(tmp_path), keep=2)
    for step in (1, 2):
        writer.snapshot(policy, progress(policy, step))
        writer.start()
        writer.wait()
        policy.modules[0].decoder.layers[0].mlp.linear_fc2.weight.data[0] = torch.nan
        policy.optimizer.reload_model_params()
    first, second = checkpoints(str(tmp_path))
    load_checkpoint(first, policy, read_progress(first))
    with pytest.raises(CheckpointError, match="not finite: model.layers.0.mlp.down_proj.weight") as raised:
        load_checkpoint(second, policy, read_progress(second))
    assert str(raised.value).startswith(f"{second}: ")
    assert str(raised.value).endswith(f"delete {second} to resume from {first}")


def test_one_at_a_time(policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = CheckpointWriter._write

    def late(*arguments: object) -> None:
        time.sleep(0.3)
        write(*arguments)

    monkeypatch.setattr(CheckpointWriter, "_write", late)
    writer = CheckpointWriter(str(tmp_path), keep=2)
    for step in (1, 2, 3):
        writer.snapshot(policy, progress(policy, step))
        assert len(checkpoints(str(tmp_path))) == min(step - 1, 2)
        writer.start()
    writer.wait()
    assert [path.name for path in checkpoints(str(tmp_path))] == ["step_00000002", "step_00000003"]
    assert os.readlink(tmp_path / "checkpoints/latest") == "step_00000003"


def test_what_fails_behind_the_run_is_raised_at_a_later_step(policy: Policy, tmp_path: Path) -> None:
    writer = CheckpointWriter(str(tmp_path), keep=2)
    writer.snapshot(policy, progress(policy, 1))
    writer.start()
    writer.wait()
    writer.snapshot(policy, progress(policy, 2))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        writer.start()
        with pytest.raises(
            CheckpointError, match="step_00000002: cannot be written: .*; free space"
        ) as raised:
            while True:
                writer.check()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(raised.value)
    writer.wait()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["latest", "step_00000001"]


def test_a_kill_between_two_names_of_latest_is_mended(policy: Policy, tmp_path: Path) -> None:
    """What a killed run leaves aside does not stop the next save."""
    root = tmp_path / "checkpoints"
    (root / "step_00000007.partial").mkdir(parents=True)
    (root / "latest.new").symlink_to("step_00000006")
    writer = CheckpointWriter(str(tmp_path), keep=2)
    writer.snapshot(policy, progress(policy, 1))
    writer.start()
    writer.wait()
    assert sorted(path.name for path in root.iterdir()) == ["latest", "step_00000001"]


@pytest.mark.parametrize(("saved", "kept"), [((2,), [1, 2]), ((), [])])
def test_exports_of_a_branch_given_up_are_removed(
    saved: tuple[int, ...], kept: list[int], policy: Policy, tmp_path: Path
) -> None:
    config = settings_in(tmp_path)
    save(trainer_of(config, policy), *saved)
    for name in ("step_00000001", "step_00000002", "step_00000003", "step_00000004.partial", "step_mine"):
        (tmp_path / "exports" / name).mkdir(parents=True)
        (tmp_path / "exports" / name / "config.json").write_text("{}")
    assert restore(config, policy) == sum(saved)
    left = sorted(path.name for path in (tmp_path / "exports").iterdir())
    assert left == [*(f"step_{step:08d}" for step in kept), "step_mine"]
    config.checkpoint.resume = False
    (tmp_path / "exports/step_00000007").mkdir()
    restore(config, policy)
    assert (tmp_path / "exports/step_00000007").is_dir()


@pytest.mark.parametrize("lost", ["progress.json", "manifest.json", "*"])
def test_newest_checkpoint_without_its_files_is_named(lost: str, policy: Policy, tmp_path: Path) -> None:
    config = settings_in(tmp_path)
    earlier, newest = save(trainer_of(config, policy), 1, 2)
    for file in newest.glob(lost):
        file.unlink()
    words = rf"{newest}/\w+.json cannot be read: .*; delete {newest} to resume from {earlier}$"
    with pytest.raises(CheckpointError, match=words):
        restore(config, policy)
    newest.rename(tmp_path / "deleted")
    assert restore(config, policy) == 1


def test_a_start_instead_of_a_resume_is_logged(
    policy: Policy, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = settings_in(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("{}")
    assert restore(config, policy) == 0
    [line] = caplog.messages
    assert f"no checkpoint in {tmp_path}/checkpoints; starting at step 0 with a new metrics.jsonl" in line
    (tmp_path / "metrics.jsonl").unlink()
    restore(config, policy)
    assert caplog.messages[1].endswith("starting at step 0")
    config.checkpoint.resume = False
    restore(config, policy)
    assert len(caplog.messages) == 2


def test_other_weights_of_the_same_size_are_refused(policy: Policy, tmp_path: Path) -> None:
    config = settings_in(tmp_path)
    save(trainer_of(config, policy), 1)
    shutil.copytree(tmp_path / "hf", tmp_path / "moved")
    config.model.path = str(tmp_path / "moved")
    assert restore(config, policy) == 1
    file = tmp_path / "moved/model.safetensors"
    size, tensors = file.stat().st_size, load_file(file)
    save_file({name: 1.01 * x for name, x in tensors.items()}, file, metadata={"format": "pt"})
    assert file.stat().st_size == size
    refused = r"settings differ from those of step 1: model.path \(weights\): its content"
    with pytest.raises(UserError, match=refused):
        restore(config, policy)
    data = bytearray((tmp_path / "hf/model.safetensors").read_bytes())
    data[-1] ^= 4
    file.write_bytes(data)
    with pytest.raises(UserError, match=refused):
        restore(config, policy)
    config.checkpoint.force = True
    assert restore(config, policy) == 1


def test_checkpoints_of_older_versions_hold_nothing_of_the_weights_and_the_token_ids(
    policy: Policy, tmp_path: Path
) -> None:
    trainer = trainer_of(settings_in(tmp_path), policy)
    contents = dict(trainer.inputs.contents)
    saved = trainer.progress()
    del saved.contents[WEIGHTS], saved.contents[TRAIN_IDS]
    check_resume(saved, trainer.config, contents, first_process=True)
    saved.contents["data.train"] = "another"
    refused = "settings differ from those of step 0: data.train: its content has changed; "
    with pytest.raises(UserError, match=refused):
        check_resume(saved, trainer.config, contents, first_process=True)


def test_other_token_ids_of_the_same_files_are_refused(
    policy: Policy, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Those of held-out prompts change no weights: they are logged, as the settings of an evaluation are."""
    config = settings_in(tmp_path)
    save(trainer_of(config, policy, heldout="those"), 1)
    caplog.clear()
    assert restore(config, policy, heldout="others") == 1
    assert [m for m in caplog.messages if "evaluation.data (token ids): its prompts" in m]
    refused = r"differ from those of step 1: data.train \(token ids\): its prompts have other token ids"
    with pytest.raises(UserError, match=refused) as raised:
        restore(config, policy, heldout="those", train="others")
    assert "\n" not in str(raised.value)


def test_a_setting_that_is_newer_than_the_checkpoint_was_at_its_default(
    policy: Policy, tmp_path: Path
) -> None:
    trainer = trainer_of(settings_in(tmp_path), policy)
    saved, contents = trainer.progress(), trainer.inputs.contents
    assert saved.config["data"].pop("date") == ""
    check_resume(saved, trainer.config, contents, first_process=True)
    trainer.config.data.date = "2026-01-14"
    with pytest.raises(UserError, match="data.date: was , is 2026-01-14"):
        check_resume(saved, trainer.config, contents, first_process=True)


def test_the_date_of_the_first_start_is_in_the_checkpoint(policy: Policy, tmp_path: Path) -> None:
    config = settings_in(tmp_path)
    assert resume_point(config, first_process=True) is None
    config.data.date = "2026-01-14"
    save(trainer_of(config, policy), 1, 2)
    config.data.date = ""
    found = resume_point(config, first_process=True)
    assert (found.progress.step, found.date) == (2, "2026-01-14")
    config.checkpoint.resume = False
    assert resume_point(config, first_process=True) is None


def test_contexts_of_another_length_are_refused(policy: Policy, tmp_path: Path) -> None:
    trainer = trainer_of(settings_in(tmp_path), policy)
    saved = trainer.progress()
    trainer.config.train.max_sequence_tokens = 256
    with pytest.raises(UserError, match="train.max_sequence_tokens: was 4096, is 256; set them back"):
        check_resume(saved, trainer.config, trainer.inputs.contents, first_process=True)


def test_a_checkpoint_of_other_tensors_is_one_line(
    policy: Policy, model_dirs: dict[str, Path], tmp_path: Path
) -> None:
    """As is one of an earlier version of a policy with experts."""
    path = checkpoint_of(policy, tmp_path)
    config = Config()
    config.model.path, config.model.dtype = str(model_dirs["qwen3_moe"]), "float32"
    with pytest.raises(CheckpointError, match=f"{path}: tensor .* is missing: .*; delete {path} to"):
        load_checkpoint(path, load_policy(config), read_progress(path))
