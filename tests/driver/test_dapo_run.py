"""Tests runs with dynamic sampling and several updates: metrics, exact resume, asynchronous rollouts."""

import json
import re
import shutil
from contextlib import closing
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

AHEAD = """
from contextlib import contextmanager
from dataclasses import replace

import numpy as np

from megatron_bicc.rollout.local import make_local_engine
from megatron_bicc.rollout.types import Engine


class Ahead(Engine):
    '''A stream that samples a group when it is waited for, as if the first token were from before.'''

    def __init__(self, config, tokenizer):
        self.local = make_local_engine(config, tokenizer)
        self.load_weights, self.generate = self.local.load_weights, self.local.generate
        self.submitted = {}

    @contextmanager
    def stream(self, sampling):
        self.sampling = sampling
        yield self
        self.submitted.clear()

    def submit(self, key, requests):
        self.submitted[key] = self.local.version, requests

    def next(self, seconds):
        if not seconds:
            return None
        key = min(self.submitted)
        version, requests = self.submitted.pop(key)
        samples = self.generate(requests, self.sampling)
        return key, [replace(sample, versions=self.versions(sample, version)) for sample in samples]

    def versions(self, sample, first):
        found = np.full(len(sample.token_ids), sample.weight_version, np.int32)
        found[0] = first
        return found

    def abort(self, key):
        del self.submitted[key]

    def outstanding(self):
        return len(self.submitted)
"""


def run(out: Path, *settings: str) -> list[dict]:
    """The run's metrics.jsonl without the times, which differ from run to run."""
    inputs = read_inputs(parse_config([*SETTINGS, f"output_dir={out}", *settings]))
    with closing(build_trainer(inputs)) as trainer:
        trainer.restore()
        trainer.run()
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(single_process: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:
    """Three steps in one go."""
    out = tmp_path_factory.mktemp("dapo") / "whole"
    return out, run(out)


@pytest.fixture(scope="module")
def ahead(single_process: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:
    """Three steps, the rollouts of each asked for up to two steps before."""
    directory = tmp_path_factory.mktemp("ahead")
    (directory / "ahead.py").write_text(AHEAD)
    out = directory / "whole"
    return out, run(out, *asynchronous(out))


def asynchronous(out: Path) -> list[str]:
    return [f"rollout.engine={out.parent}/ahead.py:Ahead", "rollout.max_staleness=2"]


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


def test_no_prompt_of_an_asynchronous_run_is_lost(ahead: tuple[Path, list[dict]]) -> None:
    """Nor of one that is resumed after its second step, with prompts in flight."""
    out, records = ahead
    assert_none_lost(out, records)
    assert all(step["rollout/staleness_max"] > 0 for step in records[2:])
    assert [step["rollout/staleness_0"] for step in records[1:2]] == [1.0]
    shutil.rmtree(out / "checkpoints/step_00000003")
    state = json.loads((out / "checkpoints/step_00000002/progress.json").read_text())["sampler"]
    assert state["in_flight"]
    again = run(out, *asynchronous(out), "checkpoint.resume=true")
    assert without_times(again[:3]) == without_times(records[:3])
    assert len(again) == len(records)
    assert_none_lost(out, again)


def assert_none_lost(out: Path, records: list[dict]) -> None:
    (*_, last) = steps = records[1:]
    state = json.loads((out / "checkpoints/step_00000003/progress.json").read_text())["sampler"]
    trained = 4 * len(steps)
    counts = ("rollout/dropped_stale", "rollout/dropped_no_contrast", "rollout/aborted")
    dropped = sum(step[count] for step in steps for count in counts)
    assert trained + dropped + last["rollout/leftover"] == state["drawn"]
    assert last["rollout/in_flight"] == 0 and not state["in_flight"]


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


def test_what_is_written_is_what_is_documented(
    whole: tuple[Path, list[dict]], ahead: tuple[Path, list[dict]]
) -> None:
    written = {key for record in whole[1] + ahead[1] for key in record} - {"step"}
    patterns = documented()
    assert len(patterns) > 100
    assert not [key for key in written if not any(re.fullmatch(p, key) for p in patterns)]
    missing = {p for p in patterns if not any(re.fullmatch(p, key) for key in written)}
    # the tiny policy is dense; test_normalisation_contract compares these, by name
    missing = {pattern for pattern in missing if not pattern.startswith("moe/")}
    others = {"rollout/resent", "rollout/stale", "time/export_s"}  # of SGLang, of export.every
    assert missing <= others | {"memory/peak_gb", "perf/mfu", "perf/rows_per_gpu_second"}


@pytest.mark.parametrize("name", ["whole", "ahead"])
def test_every_step_has_every_metric(name: str, request: pytest.FixtureRequest) -> None:
    records = request.getfixturevalue(name)[1]
    first, *others = [
        {key for key in record if "eval" not in key and "/staleness_" not in key} for record in records[1:]
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
