"""Tests settings that are well typed but contradict each other."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_bicc.cli import parse_config
from megatron_bicc.errors import UserError
from megatron_bicc.startup import validate


@pytest.fixture
def good(tmp_path: Path) -> list[str]:
    """Overrides that make a valid run of existing files."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "train.jsonl").write_text("{}\n")
    return [f"model.path={tmp_path}/model", f"data.train={tmp_path}/train.jsonl"]


@pytest.fixture
def message(capsys: pytest.CaptureFixture) -> Callable[[list[str]], str]:
    """Returns the line that refuses overrides, be it when they are parsed or when they are checked."""

    def refusal(overrides: list[str]) -> str:
        try:
            config = parse_config(overrides)
        except SystemExit:
            line = capsys.readouterr().err.removesuffix("\n")
        else:
            with pytest.raises(UserError) as error:
                validate(config, world_size=8)
            line = str(error.value)
        assert "\n" not in line
        return line

    return refusal


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["parallel.tensor=2", "parallel.sequence=true", "parallel.pipeline=2", "parallel.virtual_pipeline=2"],
        ["parallel.tensor=2", "parallel.expert=4", "parallel.pipeline=2"],
        ["train.max_sequence_tokens=3072", "train.max_tokens_per_microbatch=3072"],
        ["parallel.context=4", "parallel.tensor=2", "train.max_tokens_per_microbatch=1024"],
        ["parallel.context=2", "parallel.expert=8", "train.max_tokens_per_microbatch=2049"],
        ["rollout.prompts_per_step=30", "train.updates_per_step=15"],
        ["loss.objective=geometric", "loss.clip_low=1.5", "parallel.heartbeat_timeout_s=0"],
        ["algorithm=grpo", "loss.baseline=mine:baseline", "loss.kl_estimator=k1"],
        ["loss.kl_coefficient=0.1", "loss.kl_estimator=k1", "loss.kl_in=reward"],
        ["algorithm=cispo", "parallel.heartbeat_timeout_s=5", "weight_sync.bucket_mb=1"],
        ["bicc.weight=0", "bicc.context_ratio=1", "rollout.group_size=2", "checkpoint.every=0"],
    ],
)
def test_sound_settings_pass(good: list[str], overrides: list[str]):
    validate(parse_config(good + overrides), world_size=8)


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["output_dir=a\0b"], ["output_dir is 'a\\x00b'", "NUL"]),
        (["weight_sync.path=a\0b"], ["weight_sync.path is 'a\\x00b'", "NUL"]),
        (["rollout.group_size=1"], ["rollout.group_size is 1", "within 2 and"]),
        (["bicc.weight=1.1"], ["bicc.weight is 1.1", "within 0 and 1"]),
        (["bicc.context_ratio=-0.1"], ["bicc.context_ratio is -0.1", "within 0 and 1"]),
        (["rollout.temperature=0"], ["rollout.temperature is 0", "greater than 0"]),
        (["evaluation.temperature=-1"], ["evaluation.temperature is -1", "greater than 0"]),
        (["optimizer.lr=.nan"], ["optimizer.lr is nan", "finite"]),
        (["optimizer.beta2=1"], ["optimizer.beta2 is 1", "less than 1"]),
        (["optimizer.min_lr=1e-3"], ["optimizer.min_lr is 0.001", "optimizer.lr = 1e-06"]),
        (["train.steps=0"], ["train.steps is 0", "at least 1"]),
        (["train.updates_per_step=0"], ["train.updates_per_step is 0", "at least 1"]),
        (["rollout.prompts_per_step=0"], ["rollout.prompts_per_step is 0", "within 1 and"]),
        (["rollout.batch_size=0"], ["rollout.batch_size is 0", "at least 1"]),
        (["checkpoint.every=-1"], ["checkpoint.every is -1", "at least 0"]),
        (["export.every=-1"], ["export.every is -1", "at least 0"]),
        (["export.keep=0"], ["export.keep is 0", "at least 1"]),
        (["synthetic.response_tokens=0"], ["synthetic.response_tokens is 0", "at least 1"]),
        (["synthetic.pass_rate=2"], ["synthetic.pass_rate is 2", "within 0 and 1"]),
        (["train.updates_per_step=3"], ["train.updates_per_step is 3", "rollout.prompts_per_step = 32"]),
        (["parallel.tensor=3"], ["parallel.tensor is 3", "number of processes, 8"]),
        (["parallel.tensor=4", "parallel.pipeline=4"], ["parallel.pipeline is 4", "16", "processes, 8"]),
        (["parallel.expert=3"], ["parallel.expert is 3", "number of processes, 8"]),
        (
            ["parallel.tensor=2", "parallel.context=3"],
            ["parallel.tensor is 2, parallel.context is 3 and parallel.pipeline is 1", "6", "processes, 8"],
        ),
        (["parallel.sequence=true"], ["parallel.sequence is true", "parallel.tensor"]),
        (["parallel.virtual_pipeline=2"], ["parallel.virtual_pipeline is 2", "parallel.pipeline"]),
        (
            ["train.max_sequence_tokens=3071"],
            ["train.max_sequence_tokens is 3071", "data.max_prompt_tokens", "rollout.max_new_tokens", "3072"],
        ),
        (
            ["train.max_tokens_per_microbatch=4095"],
            ["train.max_tokens_per_microbatch is 4095; it must hold", "train.max_sequence_tokens = 4096"],
        ),
        (
            ["train.max_tokens_per_microbatch=2049", "parallel.context=2", "train.max_sequence_tokens=4099"],
            [
                "is 2049; parallel.context = 2 times that is 4098; it must hold",
                "4099",
            ],
        ),
        (
            ["train.max_tokens_per_microbatch=4099", "parallel.tensor=4", "train.max_sequence_tokens=4099"],
            ["is 4099; parallel.context = 1 times that, in multiples of 4 rows is 4096; it must hold"],
        ),
        (["algorithm=bic"], ["algorithm is 'bic'", "did you mean bicc?"]),
        (
            ["algorithm=bicc", "loss.baseline=mine:baseline"],
            ["loss.baseline is 'mine:baseline' and rcc.enabled is true", "set rcc.enabled=false"],
        ),
        (["loss.kl_coefficient=0.1", "loss.kl_estimator=k1"], ["loss.kl_estimator is k1", "use k2"]),
        (
            ["loss.correction=tis"],
            ["loss.correction is 'tis'", "none, token_tis, sequence_tis, token_mask, sequence_mask or geom"],
        ),
        (["loss.correction_high=3"], ["loss.correction_high is 3.0 and loss.correction is none"]),
        (["loss.correction_low=0.5"], ["loss.correction_low is 0.5 and loss.correction is none"]),
        (
            ["loss.correction=token_tis", "loss.correction_low=2.5"],
            ["loss.correction_low is 2.5; it must not exceed loss.correction_high = 2.0"],
        ),
        (["loss.clip_low=1.5"], ["loss.clip_low is 1.5", "within 0 and 1"]),
        (
            ["parallel.heartbeat_timeout_s=0.001"],
            ["parallel.heartbeat_timeout_s is 0.001", "at least 5", "0 for off"],
        ),
        (["weight_sync.bucket_mb=1e-9"], ["weight_sync.bucket_mb is 1e-09", "at least 1"]),
        (["loss.dual_clip=0.5"], ["loss.dual_clip is 0.5"]),
        (
            ["rollout.max_staleness=1"],
            ["rollout.max_staleness is 1 and rollout.engine is local", "set rollout.engine=sglang"],
        ),
        (
            ["rollout.max_staleness=2", "rollout.engine=sglang", "rollout.colocate=true"],
            ["rollout.max_staleness is 2 and rollout.colocate is true", "set rollout.max_staleness=0"],
        ),
        (
            ["rollout.max_staleness=1", "rollout.engine=sglang", "model.routing_replay=engine"],
            ["rollout.max_staleness is 1 and model.routing_replay is engine", "set model.routing_replay=old"],
        ),
        (
            ["rollout.engine=sglang", "rollout.colocate=true", "weight_sync.method=distributed"],
            ["weight_sync.method is 'distributed' and rollout.colocate is true", "weight_sync.method=tensor"],
        ),
        (
            ["weight_sync.delta=true", "model.dtype=float32"],
            ["weight_sync.delta is true and model.dtype is 'float32'", "set weight_sync.delta=false"],
        ),
        (
            ["model.routing_replay=engine"],
            ["model.routing_replay is engine and rollout.engine is local", "set rollout.engine=sglang"],
        ),
        (["model.path="], ["model.path is not set"]),
        (["data.train="], ["data.train is not set"]),
        (["model.path=/nowhere"], ["model.path is /nowhere", "config.json"]),
        (["data.train=/nowhere.parquet"], ["data.train is /nowhere.parquet", "no such file"]),
        (["evaluation.data=/nowhere.parquet"], ["evaluation.data is /nowhere.parquet", "no such file"]),
        (["monitoring.compare_run=/nowhere"], ["monitoring.compare_run is /nowhere", "metrics.jsonl"]),
    ],
)
def test_unsound_settings_are_named(message, good: list[str], overrides: list[str], parts: list[str]):
    line = message(good + overrides)
    assert all(part in line for part in parts), line


def test_a_megatron_checkpoint_is_no_model(message, good: list[str], tmp_path: Path):
    (tmp_path / "imported").mkdir()
    (tmp_path / "imported" / "metadata.json").write_text("{}")
    line = message([*good, f"model.path={tmp_path}/imported"])
    assert f"model.path is {tmp_path}/imported; it is a Megatron checkpoint" in line
    assert "tools/convert_hf_checkpoint.py export" in line


@pytest.mark.parametrize(
    ("overrides", "accepted"),
    [([], False), (["rollout.sglang.gpus=1"], True), (["rollout.colocate=true"], True)],
)
def test_a_server_needs_a_gpu_of_its_own(
    message, good: list[str], overrides: list[str], accepted: bool, monkeypatch: pytest.MonkeyPatch
):
    run = [*good, "rollout.engine=sglang", f"rollout.sglang.python={sys.executable}", *overrides]
    validate(parse_config(run), world_size=8)
    monkeypatch.setattr("megatron_bicc.device.has_cuda", lambda: True)
    if accepted:
        validate(parse_config(run), world_size=8)
    else:
        assert "rollout.sglang.gpus is empty; a server would take most of GPU 0" in message(run)


def test_missing_wandb_is_named(message, good: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert "pip install wandb" in message([*good, "monitoring.wandb_project=mine"])


def test_unreadable_file_is_named(message, good: list[str], monkeypatch: pytest.MonkeyPatch):
    # Permission bits do not stop a superuser, so the answer of the system is set instead.
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert "cannot be read" in message(good)
