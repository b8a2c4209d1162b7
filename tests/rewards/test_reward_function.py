"""Tests reward.verifier by import path: the function's arguments, and errors for its mistakes."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from support.scripted import Words

from megatron_bicc import plugins
from megatron_bicc.checkpoint.resume import TRAIN_IDS
from megatron_bicc.cli import parse_config
from megatron_bicc.config import RewardConfig
from megatron_bicc.data.prompts import Prompt
from megatron_bicc.errors import UserError
from megatron_bicc.rewards.registry import (
    Completion,
    answer_style,
    check_reward,
    check_truths,
    get_verifier,
)
from megatron_bicc.rollout.collect import GroupSampler, why_all_zero
from megatron_bicc.rollout.types import Sample, Sampling
from megatron_bicc.startup import read_inputs

REWARDS = """
import asyncio
from megatron_bicc.rewards.registry import Completion

def length_penalty(completions: list[Completion]) -> list[float]:
    calls.append(completions)
    return [
        float(each.response == each.ground_truth) - len(each.response) / each.extra["max_characters"]
        for each in completions
    ]

async def awaited(completions):
    async def one(each):
        await asyncio.sleep(0)
        return float(each.response == each.ground_truth)
    return await asyncio.gather(*map(one, completions))

class Judge:
    def __call__(self, completions):
        return [1.0] * len(completions)

judge = Judge()
calls = []

def raises(completions): return [each.extra["maxcharacters"] for each in completions]
def exits(completions): raise SystemExit(0)
def too_few(completions): return [1.0]
def none(completions): return None
def words(completions): return ["good", "bad"]
def not_a_number(completions): return [0.0, float("nan")]
def too_large(completions): return [0.0, 1e300]
def one_number(completions): return 1.0
"""
PAGE = (Path(__file__).parents[2] / "docs/extending.md").read_text()
MESSAGES = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1+1?"}]
PROMPT = Prompt(6, MESSAGES, np.array([1], np.int32), "1", "sums", {"max_characters": 4})


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "rewards.py"
    path.write_text(REWARDS)
    return path


def documented(name: str, folder: Path) -> Path:
    """The example of docs/extending.md whose first line is a comment with this name, as a file."""
    (code,) = re.findall(rf"```python\n(# {re.escape(name)}\n.*?)```", PAGE, re.DOTALL)
    (folder / name).write_text(code)
    return folder / name


def rewards_of(name: str, prompt: Prompt = PROMPT) -> list[float]:
    """Through the rollouts' own way: the responses "1" and "11" to a prompt."""
    tokens = [np.array([1], np.int32), np.array([11], np.int32)]
    samples = [Sample(one, np.zeros(1, np.float32), "length", 0) for one in tokens]
    sampler = GroupSampler(
        None, get_verifier(RewardConfig(verifier=name)), Words(), Sampling(1.0, 1), group_size=2
    )
    (group,) = sampler.scored([prompt], samples)
    assert group.rewards.dtype == np.float32
    return group.rewards.tolist()


def test_a_function_sees_prompt_truth_and_columns(file: Path) -> None:
    assert rewards_of(f"{file}:length_penalty") == [0.75, -0.5]
    (seen,) = get_verifier(RewardConfig(verifier=f"{file}:length_penalty"))._function.__globals__["calls"]
    expected = {"messages": MESSAGES, "ground_truth": "1", "data_source": "sums", "row": 7}
    assert all(vars(each).items() >= expected.items() for each in seen)
    assert seen[0].extra == {"max_characters": 4} and seen[0].prompt == "Add.\n1+1?"
    assert [each.response for each in seen] == ["1", "11"]


def test_the_example_of_the_documentation(tmp_path: Path) -> None:
    verifier = get_verifier(RewardConfig(verifier=f"{documented('my_rewards.py', tmp_path)}:concise"))
    texts = ["\\boxed{2}", "\\boxed{2}" + " " * 3, "\\boxed{2}" * 3, "\\boxed{3}"]
    found = verifier([Completion(MESSAGES, text, "2", extra={"max_characters": 10}) for text in texts])
    assert found.tolist() == pytest.approx([1.0, 0.8, 0.6, 0.0])


def test_the_documented_filter(tmp_path: Path) -> None:
    keep = plugins.load("data.filter", f"{documented('my_filters.py', tmp_path)}:learnable")
    rates = (0.0, 0.1, 0.5, 1.0)
    prompts = [Prompt(0, MESSAGES, np.array([1], np.int32), "2", "", {"pass_rate": rate}) for rate in rates]
    assert [keep(prompt) for prompt in prompts] == [False, True, True, False]


def test_a_begun_answer_stands_before_the_response(file: Path) -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": "1"}]
    begun = Prompt(0, messages, np.array([1], np.int32), "11", "", {})
    assert rewards_of(f"{file}:awaited", begun) == [1.0, 0.0]


@pytest.mark.parametrize(("name", "rewards"), [("awaited", [1.0, 0.0]), ("judge", [1.0, 1.0])])
def test_coroutines_and_objects(file: Path, name: str, rewards: list[float]) -> None:
    assert rewards_of(f"{file}:{name}") == rewards


@pytest.mark.parametrize(
    ("name", "complaint", "cause"),
    [
        ("raises", "the function raised KeyError: 'maxcharacters'", KeyError),
        ("exits", "the function raised SystemExit: 0", SystemExit),
        ("too_few", "returned 1 rewards for 2 responses; return one per response", None),
        ("none", "returned 'None', a NoneType; return a list", TypeError),
        ("words", r"returned \"\['good', 'bad'\]\", a list; return a list with one number", ValueError),
        ("not_a_number", "the reward of response 1 is nan; it must be finite", None),
        ("too_large", "the reward of response 1 is inf; it must be finite", None),
        ("one_number", "returned '1.0', a float", TypeError),
    ],
)
def test_a_mistake_names_verifier_and_prompt(
    file: Path, name: str, complaint: str, cause: type | None, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(UserError, match=complaint) as caught:
        rewards_of(f"{file}:{name}")
    message = str(caught.value)
    assert message.startswith(f"reward.verifier={file}:{name}, responses to the prompt of row 7: ")
    assert "\n" not in message
    found = caught.value.__cause__
    assert found is None if cause is None else isinstance(found, cause)
    if name == "raises":  # the one line does not say where: the log does
        assert "Traceback" in caplog.text and f'{file}", line' in caplog.text


def test_a_function_is_not_checked_as_if_it_read_answers(file: Path) -> None:
    """It may need columns or give rewards below any threshold; no style says how it reads answers."""
    reward = RewardConfig(verifier=f"{file}:raises", threshold=-1.0)
    check_reward(reward)
    with pytest.raises(UserError, match="has no function or class 'judges'; it has: "):
        check_reward(RewardConfig(verifier=f"{file}:judges"))
    check_truths(reward, "a.jsonl", [Prompt(0, MESSAGES, np.array([1], np.int32), "nan", "", {})])
    assert answer_style(reward) is None and answer_style(RewardConfig()) == "auto"


def test_rewards_that_are_all_zero_are_not_explained_by_a_style(file: Path) -> None:
    sample = Sample(np.array([1], np.int32), np.zeros(1, np.float32), "length", 0)
    sampler = GroupSampler(None, lambda found: np.zeros(len(found), np.float32), Words(), Sampling(1.0, 1), 1)
    why = why_all_zero(sampler.scored([PROMPT], [sample]), style=None)
    assert "reward.answer" not in str(why) and "100% of the responses were cut off" in str(why)
    assert "check the function that reward.verifier names" in str(why)


def test_the_built_in_scores_completions() -> None:
    found = [Completion(MESSAGES, "\\boxed{2}", "2"), Completion(MESSAGES, "\\boxed{3}", "2")]
    assert get_verifier(RewardConfig())(found).tolist() == [1.0, 0.0]
    assert get_verifier(RewardConfig(answer="hash"))(found).tolist() == [0.0, 0.0]


def test_start_up_takes_both_seams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The filter chooses training prompts only; a truth that the built-in would refuse does not matter."""
    rows = [{"prompt": f"{i}+1=", "answer": "nan", "pass_rate": i / 4} for i in range(5)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    monkeypatch.chdir(Path(__file__).parents[2])
    settings = [
        *("--config", "examples/configs/tiny.yaml", "parallel.tensor=1", "rollout.prompts_per_step=2"),
        *(f"data.train={data}", f"evaluation.data={data}", f"output_dir={tmp_path}/run"),
        f"reward.verifier={documented('my_rewards.py', tmp_path)}:concise",
    ]
    everything = read_inputs(parse_config(settings))
    keep = f"data.filter={documented('my_filters.py', tmp_path)}:learnable"
    inputs = read_inputs(parse_config([*settings, keep]))
    assert [prompt.index for prompt in inputs.prompts] == [1, 2, 3]
    assert [prompt.index for prompt in inputs.heldout] == [0, 1, 2, 3, 4]
    assert inputs.contents[TRAIN_IDS] != everything.contents[TRAIN_IDS]
    found = [Completion(MESSAGES, "\\boxed{2}", "2", extra={"max_characters": 9})]
    assert inputs.verifier(found).tolist() == [1.0]
