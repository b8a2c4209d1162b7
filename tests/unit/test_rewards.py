"""Final answers: found in a response, compared by mathematics, never hanging."""

import signal
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_bicc.rewards import check_threshold, get_verifier, registry, unscorable
from megatron_bicc.rewards.extraction import last_boxed
from megatron_bicc.rewards.limit import OutOfTime, cpu_limit

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
        ("\\boxed 5", None),
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
    rewards = get_verifier("math")([response], [truth])
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
    assert get_verifier("math")([f"\\boxed{{{answer}}}"], ["42"]).tolist() == [0]
    assert time.process_time() - start < 5


def test_only_processor_time_counts():
    with cpu_limit(0.05):
        time.sleep(0.2)
    with pytest.raises(OutOfTime), cpu_limit(0.05):
        while True:
            pass
    assert signal.getitimer(signal.ITIMER_PROF) == (0, 0)


def test_score_of_nothing_and_of_unequal_lengths():
    assert get_verifier("math")([], []).shape == (0,)
    with pytest.raises(ValueError, match="shorter"):
        get_verifier("math")(["\\boxed{1}"], [])


def test_unknown_verifier_names_the_nearest():
    with pytest.raises(ValueError, match="reward.verifier: unknown 'maths'; did you mean 'math'"):
        get_verifier("maths")


@pytest.mark.parametrize("truth", ["109", "\\frac{1}{2}", "(1,2]", "\\text{east}", "\\{1, 2\\}", "1,000"])
def test_a_truth_that_can_be_scored(truth: str):
    assert unscorable("math", ["7", truth], 0.5) == []


@pytest.mark.parametrize("truth", ["\\frac{1}{2", "1+" * 400 + "1", "5\\"])
def test_a_truth_that_no_response_can_meet(truth: str):
    assert unscorable("math", ["7", truth, "8"], 0.5) == [1]


def test_a_threshold_that_an_empty_response_passes(monkeypatch: pytest.MonkeyPatch):
    check_threshold("math", 0.0)
    with pytest.raises(
        ValueError, match=r"reward.threshold is -0.1; reward.verifier=math gives 0 to an empty"
    ):
        check_threshold("math", -0.1)
    penalty = {"signed": lambda texts, truths: np.full(len(texts), -1.0, np.float32)}
    monkeypatch.setattr(registry, "VERIFIERS", penalty)
    check_threshold("signed", -0.1)  # rewards of -1 and 1 are split by it
