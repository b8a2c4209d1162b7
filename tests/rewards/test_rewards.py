"""Tests final answers: found in a response, compared as mathematics, in bounded time."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_bicc.config import RewardConfig
from megatron_bicc.data.rows import last_boxed
from megatron_bicc.errors import UserError
from megatron_bicc.rewards import math_reward, registry
from megatron_bicc.rewards.registry import (
    BUILT_INS,
    check_reward,
    compared_as_text,
    get_verifier,
    unscorable,
)
from megatron_bicc.rewards.verdict import quick
from megatron_bicc.rewards.worker import WORKER, Worker

balanced = st.recursive(
    st.text(st.characters(exclude_characters="\\{}", exclude_categories=["Cs"]), max_size=8),
    lambda inner: st.lists(inner, max_size=3).map(lambda parts: "{" + "".join(parts) + "}"),
)


@given(st.text(max_size=20), balanced, st.text(max_size=20).filter(lambda t: "\\boxed" not in t))
def test_last_boxed_is_the_balanced_content(before: str, content: str, after: str):
    assert last_boxed(f"{before}\\boxed{{{content}}}{after}") == content.strip()


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("no answer", None),
        ("\\boxed 5", "5"),
        ("so it is $\\boxed 2$.", "2"),
        ("\\boxed 12, as asked", "12"),
        ("\\boxed -\\frac{1}{2}", "-\\frac{1}{2}"),
        ("\\boxed x", "x"),
        ("in a \\boxed format", None),
        ("\\boxedx{5}", None),
        ("\\fbox{5}", "5"),
        ("\\boxed{1} and \\fbox{2}", "2"),
        ("\\boxed{\\text{east}}", "\\text{east}"),
        ("\\boxed{1} then \\boxed{2", None),
        ("\\boxed{1} then \\boxed{2}", "2"),
        ("\\boxed {\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{\\{} and }", "\\{"),
        ("\\boxed{\\boxed{5}}", "5"),
        ("\\boxed{}", ""),
        ("\\boxed{\\", None),
        ("", None),
    ],
)
def test_last_boxed_cases(text: str, answer: str | None):
    assert last_boxed(text) == answer


@pytest.mark.parametrize(
    ("response", "truth", "reward"),
    [
        ("\\boxed{109}", "109", 1),
        ("\\boxed{119}", "109", 0),
        ("109", "109", 0),
        ("\\boxed{}", "", 0),
        ("\\boxed{\\frac12}", "0.5", 1),
        ("\\boxed{0.5}", "\\frac{1}{2}", 1),
        ("\\boxed{1{,}000}", "1,000", 1),
        ("\\boxed{2+x}", "x+2", 1),
        ("\\boxed{1} so \\boxed{2}", "1", 0),
        ("\\boxed{(1, 2]}", "(1,2]", 1),
        ("\\boxed{(1, 2)}", "(1,2]", 0),
        ("\\boxed{\\text{east}}", "\\text{east}", 1),
    ],
)
def test_math_compares_by_mathematics(response: str, truth: str, reward: float):
    rewards = math_reward.score([response], [truth])
    assert rewards.dtype == np.float32
    assert rewards.tolist() == [reward]


@pytest.mark.parametrize(
    "answer",
    [
        "9^9^9^9^9",
        "9^{9^{9^{9^9}}}",
        "(10^{10^8})!",
        "\\sum_{n=1}^{1000000000} n^{-2}",
        "\\binom{10000000}{5000000}",
        "9" * 100_000,
        "(" * 50_000 + ")" * 50_000,
        "{" * 5_000 + "}" * 5_000,
        "1/0",
        "\x00",
    ],
)
def test_hostile_answers_score_nothing_in_seconds(answer: str):
    start = time.process_time()
    assert math_reward.score([f"\\boxed{{{answer}}}"], ["42"]).tolist() == [0]
    assert time.process_time() - start < 5


def test_a_bad_answer_costs_its_own_time_only_from_any_thread(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """What is scored before and after it is right in every thread; it is counted, and the first is logged."""
    worker = Worker()
    monkeypatch.setattr(math_reward, "WORKER", worker)
    verdicts: dict[int, list[float]] = {}

    def work(i: int) -> None:
        texts = [f"\\boxed{{x+{i}+1}}", f"\\boxed{{{7 + i}^{{9^{{9^{{9^8}}}}}}}}", f"\\boxed{{x+{i}+2}}"]
        verdicts[i] = math_reward.score(texts, [f"{i + 1}+x", "42", f"{i + 2}+x"]).tolist()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verdicts == {0: [1, 0, 1], 1: [1, 0, 1]}
    assert worker.killed == 2
    assert len(caplog.records) == 1
    assert "scores 0" in caplog.text


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_a_worker_ends_with_its_process_and_prints_nothing(end: signal.Signals):
    code = (
        "import os, signal, time; from megatron_bicc.rewards.worker import WORKER\n"
        # a shell's background job, as a test runner may be, has its children ignore the interrupt
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "WORKER.ask('same', 'x+1', '1+x'); pid = WORKER._process.pid\n"
        "try: print(pid, flush=True); time.sleep(60)\n"
        "except KeyboardInterrupt: os._exit(3)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout and process.stderr
    worker = int(process.stdout.readline())
    if end == signal.SIGINT:
        os.killpg(process.pid, end)  # as a terminal does
    else:
        process.send_signal(end)
    assert process.wait(30) == (3 if end == signal.SIGINT else -signal.SIGKILL)
    assert process.stderr.read() == b""  # at its end: the worker holds it open no more
    deadline = time.monotonic() + 30
    while _lives(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _lives(worker)


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_plain_numbers_need_no_worker_and_take_little_time():
    """256 a second and more, as a step has thousands."""
    start = time.process_time()
    verdicts = [
        quick(f"{i}{form}", f"{i + wrong}") for i in range(500) for form in ("", ".0") for wrong in (0, 1)
    ]
    assert verdicts == [True, False] * 1000
    assert time.process_time() - start < len(verdicts) / 256


mathematics = st.text(st.sampled_from(r"0123456789xyab .,;:=<>()[]{}\\^_%$+-*/|&'" + '"'), max_size=16)
commands = st.sampled_from(
    [
        "\\frac",
        "\\sqrt",
        "\\text{",
        "\\pm",
        "\\cup",
        "\\le",
        "\\infty",
        "\\{",
        "\\}",
        "\\\\",
        " or ",
        " feet ",
        "°",
        "½",
    ]
)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(mathematics | commands, max_size=4).map("".join), st.sampled_from(["5", "(1,2)", "x>3", "a ft"])
)
def test_no_answer_makes_the_rules_raise(answer: str, truth: str):
    """A worker in which one does ends, and the run with it."""
    assert math_reward.score([f"\\boxed{{{answer}}}"], [truth])[0] in (0, 1)


VERDICTS = [json.loads(line) for line in (Path(__file__).parent / "verdicts.jsonl").read_text().splitlines()]
KINDS = sorted({pair["kind"] for pair in VERDICTS})


@pytest.mark.parametrize("kind", KINDS)
def test_verdicts(kind: str):
    """Equal and different answers of a kind; in either direction, and with no false positive."""
    pairs = [pair for pair in VERDICTS if pair["kind"] == kind]
    assert {pair["right"] for pair in pairs} == {0, 1}
    wrong = []
    for pair in pairs:
        answer, truth, right = pair["answer"], pair["truth"], bool(pair["right"])
        for a, t in ((answer, truth), (truth, answer)):
            if WORKER.ask("same", a, t) != right:
                wrong.append((a, t, right))
    assert [each for each in wrong if not each[2]] == []
    assert len(wrong) <= 0.02 * 2 * len(pairs), wrong


def test_a_truth_that_takes_too_long_to_evaluate_is_unscorable():
    """It is refused at start-up by file and row, although it is the same text as the answer."""
    assert unscorable(RewardConfig(), ["2x+1", "9^{9^{9^9}}", "2^{1000}"]) == [1]


def test_there_are_enough_pairs():
    assert len(VERDICTS) >= 300
    assert len({(pair["answer"], pair["truth"]) for pair in VERDICTS}) == len(VERDICTS)


def test_score_of_nothing_and_of_unequal_lengths():
    assert math_reward.score([], []).shape == (0,)
    with pytest.raises(ValueError, match="shorter"):
        math_reward.score(["\\boxed{1}"], [])


def test_unknown_verifier_names_the_nearest():
    with pytest.raises(UserError, match="reward.verifier: unknown 'maths'; did you mean 'math'"):
        get_verifier(RewardConfig(verifier="maths"))


@pytest.mark.parametrize("truth", ["109", "\\frac{1}{2}", "(1,2]", "\\text{east}", "\\{1, 2\\}", "1,000"])
def test_a_truth_that_can_be_scored(truth: str):
    assert unscorable(RewardConfig(), ["7", truth]) == []


@pytest.mark.parametrize(
    "truth", ["1234.", "180,", "34 apples.", "5 \\text{ cm}", "1 1/4", "0.\\overline{3}"]
)
def test_a_truth_that_is_a_number(truth: str):
    assert unscorable(RewardConfig(), [truth]) == compared_as_text(RewardConfig(), [truth]) == []
    number = {"1234.": "1234", "180,": "180", "34 apples.": "34", "1 1/4": "1.25"}.get(truth, truth)
    assert math_reward.score([f"\\boxed{{{number}}}"], [truth]).tolist() == [1]


def test_truths_that_are_compared_as_text():
    truths = ["7", "See solution", "x^2+1", "\\text{east}", "(1,2]", "5 \\text{ cm}", "Evelyn"]
    assert unscorable(RewardConfig(), truths) == []
    assert compared_as_text(RewardConfig(), truths) == [1, 3, 6]


@pytest.mark.parametrize("truth", ["\\frac{1}{2", "1+" * 400 + "1", "5\\", "nan", "NaN", "?", "..."])
def test_a_truth_that_no_response_can_meet(truth: str):
    assert unscorable(RewardConfig(), ["7", truth, "8"]) == [1]


def test_a_threshold_that_an_empty_response_passes(monkeypatch: pytest.MonkeyPatch):
    check_reward(RewardConfig(threshold=0.0))
    with pytest.raises(
        UserError, match=r"reward.threshold is -0.1; reward.verifier=math gives 0 to an empty"
    ):
        check_reward(RewardConfig(threshold=-0.1))
    signed = replace(
        BUILT_INS["math"], score=lambda texts, truths, style: np.full(len(texts), -1.0, np.float32)
    )
    monkeypatch.setattr(registry, "BUILT_INS", {"signed": signed})
    check_reward(RewardConfig(verifier="signed", threshold=-0.1))  # rewards of -1 and 1 are split by it
