"""Tests reward functions in worker processes: limits of time and memory, crashes, prints, their end."""

import time
from pathlib import Path

import pytest

from megatron_bicc.config import RewardConfig
from megatron_bicc.errors import UserError
from megatron_bicc.rewards.registry import get_scorer
from megatron_bicc.rewards.types import Completion, Scores

FUNCTIONS = """
import os, signal, subprocess, sys, time, threading

def does(completion):
    text = completion.response
    if text == "loops":
        while True: pass
    if text == "sleeps":
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        subprocess.Popen(["sleep", "1000"])
        time.sleep(1000)
    if text == "fills": bytearray(1 << 33)
    if text == "crashes": os.kill(os.getpid(), signal.SIGSEGV)
    if text == "leaves": os._exit(3)
    if text == "raises": raise KeyError("column")
    if text == "nan": return float("nan")
    if text == "meets":
        folder = completion.extra["tag"]
        open(f"{folder}/{os.getpid()}.met", "w")
        while len([name for name in os.listdir(folder) if name.endswith(".met")]) < 2: time.sleep(0.01)
    print("a line that is no answer"); sys.stdout.flush()
    assert threading.current_thread() is threading.main_thread()
    return {"reward": len(text), "process": os.getpid(), "feedback": str(completion.extra["tag"])}

async def waits(completions):
    return [1.0 for _ in completions]
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "functions.py"
    path.write_text(FUNCTIONS)
    return path


def scores(path: str, texts: list[str], reward: RewardConfig, tag: object = (1, b"2")) -> Scores:
    reward.function = path
    scorer = get_scorer(reward)
    try:
        return scorer.score([Completion([], text, "", extra={"tag": tag}, row=3) for text in texts])
    finally:
        scorer.close()


def test_limits_and_crashes_cost_one_response(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Each is counted, none is a 0 that nobody knows of; the first is in the log with its traceback."""
    reward = RewardConfig(workers=1, cpu_s=0.3, memory_gb=1.0, on_error="zero")
    failing = ["raises", "loops", "fills", "crashes", "leaves", "nan"]
    found = scores(f"{file}:does", ["fine", *[text for name in failing for text in (name, "fine")]], reward)
    assert found.rewards.tolist() == [4.0] + [0.0, 4.0] * len(failing)
    assert found.failed.tolist() == [False] + [True, False] * len(failing)
    assert found.feedback[0] == "(1, b'2')"
    # a fork that was not killed serves on
    assert found.metrics[0]["process"] == found.metrics[2]["process"] != found.metrics[4]["process"]
    (record,) = caplog.records
    assert "response 1 to the prompt of row 3: the function raised KeyError: 'column'" in record.message
    assert f'{file}", line' in record.message


def test_what_each_failure_says(file: Path) -> None:
    said = {
        "loops": "took over 0.2 s of processor time",
        "sleeps": "took over 0.5 s of wall time",
        "fills": "the function raised MemoryError",
        "crashes": "crashed its process: SIGSEGV",
        "leaves": "ended its process with status 3",
    }
    for text, reason in said.items():
        wall = 0.5 if text == "sleeps" else 60.0  # a busy machine takes its time for the other limits
        reward = RewardConfig(workers=1, cpu_s=0.2, timeout_s=wall, memory_gb=1.0)
        with pytest.raises(UserError, match=f"response 0 to the prompt of row 3: .*{reason}"):
            scores(f"{file}:does", [text], reward)


def test_several_workers_at_a_time_and_coroutines(file: Path) -> None:
    """Two that wait for each other both end."""
    reward = RewardConfig(workers=2, timeout_s=20.0)
    assert not scores(f"{file}:does", ["meets", "meets"], reward, str(file.parent)).failed.any()
    assert scores(f"{file}:waits", ["a", "b"], RewardConfig(workers=1)).rewards.tolist() == [1.0, 1.0]


def test_a_scorer_that_is_closed_ends_what_runs(file: Path) -> None:
    scorer = get_scorer(RewardConfig(function=f"{file}:does", workers=1))
    found = scorer.score([Completion([], "", "", extra={"tag": 0})])
    scorer.submit([Completion([], "sleeps", "")])
    time.sleep(0.1)
    scorer.close()
    assert not Path(f"/proc/{int(found.metrics[0]['process'])}").exists()
