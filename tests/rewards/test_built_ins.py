"""Tests the built-in reward functions beside math: what they accept, and their checks of ground truths."""

import os
import re
from typing import Any

import numpy as np
import pytest

from megatron_bicc.config import RewardConfig
from megatron_bicc.data.prompts import Prompt
from megatron_bicc.errors import UserError
from megatron_bicc.rewards import sandbox
from megatron_bicc.rewards.built_ins import program, unit_tests
from megatron_bicc.rewards.registry import check_reward, check_truths, get_scorer
from megatron_bicc.rewards.types import Completion, Scores


def scores(name: str, responses: list[str], truth: str = "", columns: Any = None, **settings: Any) -> Scores:
    scorer = get_scorer(RewardConfig(function=name, **settings))
    found = scorer.score([Completion([], text, truth, "", columns or {}) for text in responses])
    scorer.close()
    return found


def check(name: str, truth: str, columns: Any = None) -> None:
    prompt = Prompt(4, [], np.zeros(1, np.int32), truth, "", columns or {})
    check_truths(RewardConfig(function=name), "rows.jsonl", [prompt])


def test_exact() -> None:
    responses = ["\\boxed{ab c}", "\\boxed{ ab c }", "\\boxed{ab  c}", "ab c", "<think>\\boxed{ab c}"]
    assert scores("exact", responses, "ab c").rewards.tolist() == [1, 1, 0, 0, 0]
    check("exact", "ab c")
    with pytest.raises(UserError, match="row 5: no response can be correct: .*cannot read the ground truth"):
        check("exact", "a}b{")


CHOICES = {"choices": ["A cat", "b", "Paris", "12"]}


@pytest.mark.parametrize(
    ("answer", "truth", "columns", "right"),
    [
        ("B", "B", {}, 1),
        ("(b)", "B", {}, 1),
        ("\\text{(B)}", "B", {}, 1),
        ("B) 12", "B", {}, 1),
        ("**B.**", "B", {}, 1),
        ("option B", "B", {}, 1),
        ("A man", "A", {}, 0),
        ("Berlin", "B", {}, 0),
        ("C", "B", {}, 0),
        ("paris", "C", CHOICES, 1),
        ("A cat", "A", CHOICES, 1),
        ("12", "D", CHOICES, 1),
        ("D", "3", CHOICES, 1),
        ("C", "3", CHOICES, 0),
        ("Q", "Y", {"choices": {"label": ["X", "Y"], "text": ["p", "q"]}}, 1),
    ],
)
def test_multiple_choice(answer: str, truth: str, columns: Any, right: float) -> None:
    found = scores("multiple_choice", [f"\\boxed{{{answer}}}", "", answer], truth, columns)
    assert found.rewards.tolist() == [right, 0, 0]
    check("multiple_choice", truth, columns)


@pytest.mark.parametrize(("truth", "columns"), [("12", {}), ("E", CHOICES), ("4", CHOICES)])
def test_a_truth_that_is_no_choice(truth: str, columns: Any) -> None:
    with pytest.raises(UserError, match=f"row 5: no response can be correct: .*{truth}.*is no choice"):
        check("multiple_choice", truth, columns)


def test_format_and_length() -> None:
    responses = ["<think>\na\n</think>b", "a", "<think></think>b"]
    assert scores("format", responses).rewards.tolist() == [1, 0, 0]
    assert scores("format", ["ab", "abc"], format="a.").rewards.tolist() == [1, 0]
    scorer = get_scorer(RewardConfig(function="length", target_tokens=4))
    tokens = [np.zeros(count, np.int32) for count in (0, 1, 4, 5)]
    found = scorer.score([Completion([], "", "", token_ids=each) for each in tokens])
    assert found.rewards.tolist() == [1, 0.75, 0, 0]


def fenced(code: str) -> str:
    return f"So:\n```python\n{code}\n```\nDone."


PROGRAMS = {
    "def f(x): return x + 1": (1, 1, 0, ""),
    "def f(x): return 2": (0, 0.5, 0, "test 2: AssertionError"),
    "def f(x": (0, 0, 0, r"test 1: SyntaxError: '\(' was never closed"),
    "import sys; sys.exit(0)": (0, 0, 0, "test 1: it left before its end"),
    "import os; os._exit(0)": (0, 0, 0, "test 1: it left before its end"),
    "f = lambda x: [0] * 10**10": (0, 0, 0, "test 1: MemoryError"),
    "f = lambda x: open('big', 'wb').write(bytes(1 << 25))": (0, 0, 0, "test 1: OSError: .*too large"),
    "import os; os.kill(os.getppid(), 9)": (0, 0, 0, "test 1: it .*"),
    "f = lambda x: x + 1\nopen('file', 'w').write('in its own directory')": (1, 1, 0, ""),
}


def test_code_by_unit_tests() -> None:
    """All programs in one worker, which survives each of them."""
    responses = [*map(fenced, PROGRAMS), "no program", "<think>" + fenced("def f(x): return x + 1")]
    found = scores(
        "code", responses, columns={"tests": ["assert f(1) == 2", "assert f(2) == 3"]}, memory_gb=1.0
    )
    for place, (reward, passed, timeout, said) in enumerate(PROGRAMS.values()):
        assert found.rewards[place] == reward, responses[place]
        assert found.metrics[place] == {"tests_passed": passed, "tests_timeout": timeout}
        assert re.fullmatch(said, found.feedback[place]), found.feedback[place]
    assert found.rewards[-2:].tolist() == [0, 0] and found.feedback[-2:] == ["no program"] * 2
    assert not found.failed.any()


def test_code_by_input_and_output() -> None:
    truth = '{"inputs": ["3\\n", "4\\n"], "outputs": ["9\\n", "16"]}'
    programs = [
        "print(int(input()) ** 2)",
        "print(9)",
        "import time\nif input() == '4': time.sleep(60)\nprint(9)",
    ]
    found = scores("code", [*map(fenced, programs)], truth, timeout_s=2.5)
    assert found.rewards.tolist() == [1, 0, 0]
    assert [each["tests_passed"] for each in found.metrics] == [1, 0.5, 0.5]
    assert [each["tests_timeout"] for each in found.metrics] == [0, 0, 0.5]
    assert found.feedback == ["", "test 2: it printed '9', not '16'", "test 2: out of time"]


@pytest.mark.skipif(bool(sandbox.limits()), reason=f"this kernel does not permit {sandbox.limits()}")
def test_a_program_has_no_network_no_secrets_and_writes_nowhere_else(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "abc")
    attempts = {
        "import socket; socket.create_connection(('127.0.0.1', 9))": "PermissionError|OSError",
        "import socket; socket.socket(type=socket.SOCK_DGRAM).sendto(b'', ('127.0.0.1', 9))": "OSError",
        f"open({str(tmp_path / 'x')!r}, 'w')": "PermissionError",
        f"import os; os.kill({os.getpid()}, 0)": "ProcessLookupError",
        "import os; print(os.environ['SECRET_TOKEN'])": "KeyError",
        "import subprocess; subprocess.Popen(['sleep', '60']); assert 0": "AssertionError",
    }
    found = scores("code", [*map(fenced, attempts)], "pass")
    for feedback, error in zip(found.feedback, attempts.values(), strict=True):
        assert re.match(f"test 1: ({error})", feedback)
    assert not list(tmp_path.iterdir())


def test_programs_and_tests_of_a_row() -> None:
    assert program("```\nold\n```\n```python\nnew\n```") == "new"
    assert program("<think>```\na\n```</think>") is None
    assert unit_tests("assert 1", {}) == [{"code": "assert 1"}]
    assert unit_tests("", {"tests": '["a", "b"]'}) == [{"code": "a"}, {"code": "b"}]
    for columns in ({"tests": []}, {"tests": {"inputs": ["a"]}}, {"tests": [1]}, {"tests": "def"}):
        with pytest.raises(UserError, match="row 5: no response can be correct: reward.function=code"):
            check("code", "", columns)


def test_remote_needs_its_address() -> None:
    with pytest.raises(UserError, match=r"reward.url is ''; set reward.url to the server's address"):
        check_reward(RewardConfig(function="math + remote"))
    with pytest.raises(UserError, match="reward.url is 'http://h'; it must name remote"):
        check_reward(RewardConfig(url="http://h"))
