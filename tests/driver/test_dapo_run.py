"""Tests a run with dynamic sampling, leftover groups and several updates per step: metrics, exact resume."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_bicc.cli import parse_config
from megatron_bicc.startup import read_inputs
from megatron_bicc.train import build_trainer

REPOSITORY = Path(__file__).parents[2]
SETTINGS = [
    f"--config={REPOSITORY}/examples/configs/tiny.yaml",
    f"model.path={REPOSITORY}/examples/tiny_policy",
    f"data.train={REPOSITORY}/examples/data/train.parquet",
    f"evaluation.data={REPOSITORY}/examples/data/heldout.parquet",
    "algorithm=dapo+bicc+rcc",
    "rollout.leftover=keep",
    "rollout.prompts_per_step=4",
    "rollout.group_size=3",
    "train.updates_per_step=2",
    "train.steps=3",
    "parallel.tensor=1",
    "loss.correction=token_tis",
    "loss.correction_veto=1e-4",
    "evaluation.prompts=1",
    "evaluation.samples=2",
    "checkpoint.every=1",
    "checkpoint.keep=3",
    "monitoring.tensorboard=false",
]


def run(out: Path, *settings: str) -> list[dict]:
    """The run's metrics.jsonl without the times, which differ from run to run."""
    inputs = read_inputs(parse_config([*SETTINGS, f"output_dir={out}", *settings]))
    trainer = build_trainer(inputs)
    trainer.restore()
    trainer.run()
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(single_process: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:
    """Three steps in one go."""
    out = tmp_path_factory.mktemp("dapo") / "whole"
    return out, run(out)


def test_steps_are_full_and_groups_are_carried_over(whole: tuple[Path, list[dict]]) -> None:
    steps = whole[1][1:]
    assert all(
        step["rollout/prompts"] * step["contrast/share"] + step["rollout/carried"] >= 4 for step in steps
    )
    assert [step["rollout/carried"] for step in steps[1:]] == [
        step["rollout/leftover"] for step in steps[:-1]
    ]
    assert any(step["rollout/carried"] for step in steps)


def test_the_second_update_has_moved_from_the_old_policy(single_process: None, tmp_path: Path) -> None:
    """Without contexts every ratio of a step's first update is 1: what is left is the second one's."""
    found = run(tmp_path / "run", "algorithm=dapo", "train.steps=1", "rollout.prompts_per_step=2")
    assert found[1]["kl/old_new"] > 1e-9


def test_resumed_run_equals_one_that_was_not_stopped(whole: tuple[Path, list[dict]], tmp_path: Path) -> None:
    out, expected = whole
    shutil.copytree(out, tmp_path / "resumed", symlinks=True)
    for checkpoint in ("step_00000001", "step_00000002"):
        state = json.loads((out / "checkpoints" / checkpoint / "progress.json").read_text())
        if state["sampler"]["leftover"]:
            break
    else:
        pytest.fail("no checkpoint holds a leftover: the test shows nothing")
    for later in (tmp_path / "resumed/checkpoints").glob("step_*"):
        if later.name > checkpoint:
            shutil.rmtree(later)
    found = run(tmp_path / "resumed", "checkpoint.resume=true")
    assert without_times(found) == without_times(expected)
    ours, theirs = (load_file(path / "hf/model.safetensors") for path in (tmp_path / "resumed", out))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def without_times(records: list[dict]) -> list[dict]:
    return [{k: v for k, v in record.items() if not k.startswith("time/")} for record in records]


def documented() -> list[str]:
    """A pattern for every key in the tables of docs/metrics.md; `/q01` goes on from the key before it."""
    text = (REPOSITORY / "docs/metrics.md").read_text().split("## metrics.jsonl")[1].split("\n## ")[0]
    patterns = []
    for cell in re.findall(r"^\| (`.*?`) \|", text, flags=re.MULTILINE):
        first, *others = re.findall("`(.*?)`", cell)
        keys = [first, *(first.rpartition("/")[0] + key if key[0] == "/" else key for key in others)]
        patterns += [re.sub("_[NM](?=_|$)", r"_\\d+", key) for key in keys]
    return [p.replace("SIDE", side) for p in patterns for side in ("right", "wrong")]


def test_what_is_written_is_what_is_documented(whole: tuple[Path, list[dict]]) -> None:
    written = {key for record in whole[1] for key in record} - {"step"}
    patterns = documented()
    assert len(patterns) > 100
    assert not [key for key in written if not any(re.fullmatch(p, key) for p in patterns)]
    missing = {p for p in patterns if not any(re.fullmatch(p, key) for key in written)}
    # the tiny policy is dense; test_normalisation_contract compares these, by name
    missing = {pattern for pattern in missing if not pattern.startswith("moe/")}
    others = {"rollout/resent", "rollout/stale", "time/export_s"}  # of SGLang, of export.every
    # test_asynchronous_run compares these
    others |= {p for p in missing if re.match("rollout/(staleness|mixed|in_flight|dropped)", p)}
    assert missing <= others | {"memory/peak_gb", "perf/mfu", "perf/rows_per_gpu_second"}


def test_every_step_has_every_metric(whole: tuple[Path, list[dict]]) -> None:
    first, *others = [
        {key for key in record if "eval" not in key and "/staleness_" not in key} for record in whole[1][1:]
    ]
    assert all(keys == first for keys in others)


def test_staleness_is_that_of_the_carried_groups(whole: tuple[Path, list[dict]]) -> None:
    for step in whole[1][1:]:
        found = {key.rpartition("/")[2] for key in step if key.startswith("tokens/staleness_")}
        stale = found - {"staleness_0"}
        assert bool(stale) == (step["rollout/carried"] > 0)
        # engine and policy compute the same, but the steps have moved the policy
        assert all(step[f"kl/rollout_old/{n}"] > 1e-9 for n in stale)
        assert step.get("kl/rollout_old/staleness_0", 0.0) < 1e-9
