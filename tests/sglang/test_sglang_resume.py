"""Tests whole runs on real SGLang servers: killed and resumed, ahead of training, a server lost, exported.

A server on a CPU ignores the seed of a request, so a proxy (support/recording_proxy.py) answers repeated
requests as the server did the first time. With that a resumed run must equal one that was never stopped.
Needs `make sglang`.
"""

import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import anyio
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from support.finished_runs import assert_equal, metrics, progress, state
from support.forked_runs import ForkedRuns
from support.recording_proxy import Asked, RecordingProxy
from support.sglang_server import PYTHON, SglangServer
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_bicc.checkpoint.checkpoint import checkpoints
from megatron_bicc.checkpoint.megatron_files import check_manifest
from megatron_bicc.sglang.client import ServerClient

STEPS, PROMPTS, HELDOUT = 4, 3, 2
SETTINGS = [
    *("--config", "examples/configs/tiny.yaml", "parallel.tensor=1", f"train.steps={STEPS}"),
    *(f"rollout.prompts_per_step={PROMPTS}", "rollout.group_size=8"),
    # whatever is sampled, every step has weights of its own
    "optimizer.weight_decay=0.1",
    *(f"evaluation.prompts={HELDOUT}", "evaluation.every=2", "evaluation.samples=1"),
    *("checkpoint.every=2", "monitoring.tensorboard=false"),
    *("rollout.engine=sglang", "rollout.launch=attach", "rollout.sglang.server_args="),
    # several buckets a sync, for a kill between two of them
    "weight_sync.bucket_mb=1",
]
RESUME = "checkpoint.resume=true"
UPDATE = "/update_weights_from_tensor"
CHATS = [[{"role": "user", "content": sum_}] for sum_ in ("47+8-6=", "31-5+9=", "60+7+7=", "12+9-4=")]
NEW = 24
"""Most tokens of their answers"""
MODEL = Path(__file__).parents[2] / "examples/tiny_policy"
DATA = Path(__file__).parents[2] / "examples/data/train.parquet"
pytestmark = [
    pytest.mark.timeout(900),  # a busy machine needs minutes to start a server
    pytest.mark.skipif(not PYTHON.exists(), reason="there is no .venv-sglang: make sglang"),
]


@dataclass
class Runs:
    """What runs are made with, and where."""

    directory: Path
    server: SglangServer
    forked: ForkedRuns

    def start(self, name: str, url: str, *settings: str) -> int:
        """Starts a run on the server at this URL; its process id."""
        out = self.directory / name
        prompts = self.directory / "prompts.parquet"
        where = [f"output_dir={out}", f"data.train={prompts}", f"rollout.sglang.servers={url}"]
        return self.forked.start([*SETTINGS, *where, *settings], self.directory / f"{name}.err")

    def end(self, name: str, url: str, *settings: str) -> dict:
        """A run to its end."""
        self.start(name, url, *settings)
        return self.forked.wait()

    def kill(self, name: str, proxy: RecordingProxy, when: tuple[str, str, int], *more: str) -> None:
        """A run that is killed when the proxy's trap (its path, version, nth) is sprung, once step 2's
        checkpoint has its name."""
        pid = self.start(name, proxy.url, *more)
        checkpoint = self.directory / name / "checkpoints/step_00000002"

        def strike() -> None:
            until(checkpoint.exists)
            os.kill(pid, signal.SIGKILL)

        proxy.trap(*when, strike)
        assert self.forked.wait()["status"] == -signal.SIGKILL


def until(true: Callable[[], bool]) -> None:
    """Returns when it is true, or after a minute."""
    end = time.monotonic() + 60
    while not true() and time.monotonic() < end:
        time.sleep(0.02)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    directory = tmp_path_factory.mktemp("runs")
    server = SglangServer(MODEL, directory / "server.log")
    server.start()
    forked = ForkedRuns()
    pq.write_table(pq.read_table(DATA)[:64], directory / "prompts.parquet")
    try:
        server.wait()
        yield Runs(directory, server, forked)
    finally:
        forked.close()
        server.kill()


@dataclass
class Whole:
    """A run that nobody stopped."""

    out: Path
    proxy: RecordingProxy
    asked: list[Asked]
    buckets: int
    """Of one sync"""


@pytest.fixture(scope="module")
def whole(runs: Runs) -> Whole:
    proxy = RecordingProxy(runs.server.url, replay=True)
    ended = runs.end("whole", proxy.url)
    assert ended["status"] == 0, ended["err"]
    return Whole(runs.directory / "whole", proxy, proxy.drain(), proxy.requests[UPDATE] // (STEPS + 1))


@pytest.fixture(scope="module")
def exported(runs: Runs, whole: Whole) -> Iterator[SglangServer]:
    """A server that starts from the whole run's export, while runs go on."""
    server = SglangServer(whole.out / "hf", runs.directory / "exported.log", tokenizer=True)
    server.start()
    try:
        yield server
    finally:
        server.kill()


@pytest.fixture(scope="module")
def replayed(runs: Runs, whole: Whole, exported: SglangServer) -> list[list[Asked]]:
    """What the three processes of a run asked for that was answered as the whole one was: killed among the
    rollouts of step 4, resumed after step 2, killed between two buckets of the weights of step 3, resumed."""
    proxy, asked = whole.proxy, []
    runs.kill("replayed", proxy, ("/generate", "3", 2))
    asked.append(proxy.drain())
    runs.kill("replayed", proxy, (UPDATE, "incomplete", whole.buckets + 2), RESUME)
    asked.append(proxy.drain())
    ended = runs.end("replayed", proxy.url, RESUME)
    assert ended["status"] == 0, ended["err"]
    return [*asked, proxy.drain()]


@pytest.fixture(scope="module")
def answers(exported: SglangServer) -> list[dict]:
    """The server's greedy answers: to token ids, then to the first question as a chat."""
    exported.wait()
    greedy = {"temperature": 0, "max_new_tokens": NEW}
    bodies = [{"input_ids": ids, "sampling_params": greedy, "return_logprob": True} for ids in chats()]
    said = [anyio.run(ServerClient(exported.url).generate, body) for body in bodies]
    chat = {"model": "policy", "messages": CHATS[0], "temperature": 0, "max_tokens": NEW}
    return [*said, anyio.run(ServerClient(exported.url).post, "/v1/chat/completions", chat)]


def chats() -> list[list[int]]:
    """The questions' token ids."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    return [tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=False) for c in CHATS]


@dataclass
class Ahead:
    """A run whose server generates while it trains, killed and resumed after step 2."""

    out: Path
    state: dict
    """Of the collector in the checkpoint that it was resumed from"""
    killed: list[Asked]
    resumed: list[Asked]


@pytest.fixture(scope="module")
def ahead(runs: Runs) -> Ahead:
    """Nothing is replayed. A request of step 2 is held back, so that it is in flight in the checkpoint."""
    proxy = RecordingProxy(runs.server.url, replay=False)
    runs.kill("ahead", proxy, ("/generate", "1", PROMPTS), "rollout.max_staleness=1")
    killed, out = proxy.drain(), runs.directory / "ahead"
    saved = progress(out / "checkpoints/step_00000002")["sampler"]
    ended = runs.end("ahead", proxy.url, "rollout.max_staleness=1", RESUME)
    assert ended["status"] == 0, ended["err"]
    return Ahead(out, saved, killed, proxy.drain())


@dataclass
class Robbed:
    """A run whose server went for good."""

    asked: list[Asked]
    """Of the process that was killed before, of the one that lost its server, of the one that had another"""
    ended: dict
    """As it lost its server"""
    last: Path
    """Its newest checkpoint then"""


@pytest.fixture(scope="module")
def robbed(runs: Runs, ahead: Ahead, exported: SglangServer, answers: list) -> Robbed:
    """Nothing is replayed. Killed among the rollouts of step 3 and resumed; its server is killed among those
    of step 4; resumed with the other server."""
    proxy = RecordingProxy(runs.server.url, replay=False)
    runs.kill("robbed", proxy, ("/generate", "2", HELDOUT + 2))
    asked = [proxy.drain()]
    proxy.trap("/generate", "3", 2, lambda: (runs.server.kill(), proxy.close()))
    runs.start("robbed", proxy.url, RESUME, "rollout.sglang.retry_timeout_s=3")
    ended = runs.forked.wait()
    asked.append(proxy.drain())
    last = checkpoints(str(runs.directory / "robbed"))[-1]
    proxy = RecordingProxy(exported.url, replay=False)
    assert runs.end("robbed", proxy.url, RESUME)["status"] == 0
    return Robbed([*asked, proxy.drain()], ended, last)


def test_a_resumed_run_equals_one_that_was_never_stopped(
    runs: Runs, whole: Whole, replayed: list, single_process: None
) -> None:
    """To the bit: metrics, weights, the optimizer's state, schedule, place in the data."""
    ours, theirs = runs.directory / "replayed", whole.out
    assert metrics(ours) == metrics(theirs)
    assert [record["step"] for record in metrics(ours)] == list(range(STEPS + 1))
    last = f"checkpoints/step_{STEPS:08d}"
    assert progress(ours / last) == progress(theirs / last)
    expected = state(theirs / last)
    assert any("exp_avg_sq" in name for name in expected)
    assert_equal(state(ours / last), expected)
    ours, theirs = (load_file(out / "hf/model.safetensors") for out in (ours, theirs))
    assert_equal(ours, theirs)
    assert any(record.get("train/grad_norm") for record in metrics(whole.out)), "nothing was learned from"


def test_a_resumed_run_asks_what_the_whole_one_asked(whole: Whole, replayed: list[list[Asked]]) -> None:
    """The same prompts with the same seeds, of the same weights by the server's own checksums, and nothing
    else; what comes twice is of steps after the checkpoint."""
    saved, first, second, third = 2 * (PROMPTS + HELDOUT), *replayed
    killed = saved + PROMPTS
    assert len(set(whole.asked)) == len(whole.asked) == STEPS * PROMPTS + (STEPS // 2 + 1) * HELDOUT
    assert set(whole.proxy.said) == set(whole.asked), "a request that was not one of the first"
    assert Counter(first[:killed]) == Counter(whole.asked[:killed])
    assert len(first) >= killed + 2
    assert Counter(second) == Counter(whole.asked[saved:killed])
    assert Counter(third) == Counter(whole.asked[saved:])


def test_samples_carry_the_version_of_the_weights(whole: Whole) -> None:
    for asked, said in whole.proxy.said.items():
        samples = json.loads(said.partition(b"\r\n\r\n")[2])
        assert {sample["meta_info"]["weight_version"] for sample in samples} == {asked.version}
    weights = {asked.version: asked.weights for asked in whole.asked}
    assert len(set(weights.values())) == len(weights) == STEPS + 1


def test_no_prompt_of_a_server_ahead_of_training_is_lost(ahead: Ahead) -> None:
    *_, last = steps = metrics(ahead.out)[1:]
    assert [step["step"] for step in steps] == list(range(1, STEPS + 1))
    state = progress(ahead.out / f"checkpoints/step_{STEPS:08d}")["sampler"]
    dropped = sum(step["rollout/dropped_stale"] + step["rollout/aborted"] for step in steps)
    assert STEPS * PROMPTS + dropped + last["rollout/leftover"] == state["drawn"]
    assert max(step["rollout/staleness_max"] for step in steps) == 1
    assert steps[0]["kl/rollout_old"] < 1e-9 and steps[0]["rollout/staleness_max"] == 0


def test_what_was_in_flight_is_asked_for_again(ahead: Ahead) -> None:
    """With the same seeds, of the checkpoint's weights."""
    in_flight, finished = ahead.state["in_flight"], ahead.state["finished"]
    assert in_flight and len(in_flight) + len(finished) == PROMPTS
    before, again = ([(a.prompts, a.sampling) for a in asked] for asked in (ahead.killed, ahead.resumed))
    assert set(again[: len(in_flight)]) <= set(before)
    weights = {asked.weights for asked in ahead.killed if asked.version == "2"}
    assert ahead.resumed[0].version == "2" and {ahead.resumed[0].weights} == weights


def test_all_servers_gone(runs: Runs, robbed: Robbed, single_process: None) -> None:
    """When the time is over, one line says how to resume, then the traceback; the checkpoint is whole."""
    stderr = robbed.ended["err"]
    assert robbed.ended["status"] == 1, stderr
    (line,) = [line for line in stderr.splitlines() if "megatron_bicc.train: error: " in line]
    assert "no answer after 3 s of attempts" in line and "checkpoint.resume=true" in line
    assert "Traceback" in stderr.partition(line)[2]
    assert robbed.last.name == "step_00000002"
    check_manifest(robbed.last)


def test_a_run_goes_on_with_its_server_or_another(runs: Runs, robbed: Robbed) -> None:
    """From its checkpoint's weights, which the server has before it is asked; every step once."""
    killed, lost, found = robbed.asked
    assert [killed[-1].version, lost[0].version, lost[-1].version, found[0].version] == ["2", "2", "3", "2"]
    assert killed[-1].weights == lost[0].weights == found[0].weights != lost[-1].weights
    records = metrics(runs.directory / "robbed")
    assert [record["step"] for record in records] == list(range(STEPS + 1))
    assert [record["rollout/stale"] for record in records[1:]] == [0] * STEPS


def test_an_export_starts_a_server(whole: Whole, answers: list[dict]) -> None:
    """Which answers as transformers does, greedily, to tokens and, by the export's tokenizer, to a chat."""
    *generated, chat = answers
    export = whole.out / "hf"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(export), AutoTokenizer.from_pretrained(export)
    texts = []
    for ids, answer in zip(chats(), generated, strict=True):
        row = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=NEW)[0]
        assert answer["output_ids"] == row[len(ids) :].tolist()
        with torch.no_grad():
            log_p = model(row[None]).logits[0, len(ids) - 1 : -1].log_softmax(-1).amax(-1)
        theirs = [log_prob for log_prob, *_ in answer["meta_info"]["output_token_logprobs"]]
        np.testing.assert_allclose(theirs, log_p.numpy(), atol=1e-4)
        texts.append(tokenizer.decode(answer["output_ids"], skip_special_tokens=True))
    assert chat["choices"][0]["message"]["content"] == texts[0]
