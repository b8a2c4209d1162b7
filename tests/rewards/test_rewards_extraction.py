"""Tests the styles of marking answers: reading, detection in prompts, and warnings when nothing is read."""

import re

import numpy as np
import pytest

from megatron_bicc.config import RewardConfig
from megatron_bicc.data.prompts import Prompt
from megatron_bicc.rewards import math_reward
from megatron_bicc.rewards.math_reward import STYLES, Style, asked_styles, final_answer
from megatron_bicc.rewards.registry import describe_styles, style_mismatch, unscorable
from megatron_bicc.rollout.collect import ZeroRewardWatch, why_all_zero
from megatron_bicc.rollout.types import Group, Sample

DAPO = (
    "Solve the following math problem step by step. The last line of your response should be of the form "
    "Answer: $Answer (without quotes).\n\nWhat is 17*2?"
)


def make_prompts(text: str, truths: list[str]) -> list[Prompt]:
    messages = [{"role": "user", "content": text}]
    return [Prompt(i, messages, np.array([1], np.int32), truth, "", {}) for i, truth in enumerate(truths)]


@pytest.mark.parametrize(
    ("response", "right"),
    [
        ("17*2 = 34\n\nAnswer: 34", 1),
        ("17*2 = 34\n\nAnswer: $34$", 1),
        ("17*2 = 35\n\nAnswer: 35", 0),
        ("Answer: \\boxed{34}", 1),
        ("**Answer:** 34.", 1),
        ("**Answer**: **34**", 1),
        ("So \\boxed{34}.", 1),
        ("So \\fbox{34}.", 1),
        ("17*2 = <<17*2=34>>34\n#### 34", 1),
        ("It is 34.", 0),
    ],
)
def test_auto_reads_what_the_prompts_of_dapo_gsm8k_and_math_ask_for(response: str, right: float):
    assert math_reward.score([response], ["34"]).tolist() == [right]


@pytest.mark.parametrize(
    ("style", "text", "answer"),
    [
        # auto: the last line if it is Answer: X, else a box, else an Answer: line, else ####
        ("auto", "First \\boxed{3}.\nAnswer: 5", "5"),
        ("auto", "Answer: 3\nIt is \\boxed{5}.", "5"),
        ("auto", "\\boxed{5}\n#### Verification\nIt holds.", "5"),
        ("auto", "Answer: 5\nWhich is odd.", "5"),
        ("auto", "#### 3\nAnswer: 5", "5"),
        ("auto", "#### 3\n#### 5\n", "5"),
        ("auto", "5", None),
        ("auto", "\\boxed{5", None),
        ("auto", "", None),
        ("boxed", "\\boxed{3}\nAnswer: 5", "3"),
        ("boxed", "Answer: 5", None),
        ("answer_line", "Answer: 3\nAnswer: 5", "5"),
        ("answer_line", "\\boxed{3}\nfinal answer : 5", "5"),
        ("answer_line", "Answer:\n5", None),
        ("answer_line", "\\boxed{5}", None),
        ("hash", "Answer: 3\n#### 1,000", "1,000"),
        ("hash", "### 5", None),
        ("last_number", "It is 3, or 1,234.5 dollars.", "1,234.5"),
        ("last_number", "from 3 to -5", "-5"),
        ("last_number", "a 3/4 share", "3/4"),
        ("last_number", "no number", None),
        # thinking is no response
        ("auto", "<think>\\boxed{3}</think>It is \\boxed{5}.", "5"),
        ("auto", "\\boxed{3}</think>I do not know.", None),
        ("auto", "<think>It may be \\boxed{3}, but", None),
        ("last_number", "<think>3", None),
    ],
)
def test_styles(style: Style, text: str, answer: str | None):
    assert final_answer(text, style) == answer


@pytest.mark.parametrize("style", STYLES)
def test_a_truth_is_read_back_in_every_style(style: Style):
    truths = ["34", "-2.5", "1,000", "3/4"]
    reward = RewardConfig(answer=style)
    assert unscorable(reward, truths) == []
    assert unscorable(reward, ["7", "x+1", "east"]) == ([1, 2] if style == "last_number" else [])


def test_prompts_are_searched_for_markers():
    assert asked_styles(DAPO) == ["answer_line"]
    assert asked_styles("Put it within \\boxed{}.") == ["boxed"]
    assert asked_styles("End with #### and the number.") == ["hash"]
    assert asked_styles("What is 1+1?") == []


def test_what_is_said_at_start_up():
    prompts = make_prompts(DAPO, ["34"] * 60 + ["x+1"] * 10)
    assert describe_styles(RewardConfig(), prompts) == (
        "reward.answer=auto; in the first 64 prompts, ground truths readable per answer style: boxed 64, "
        "answer_line 64, hash 64, last_number 60; prompts ask for Answer: X (64)"
    )
    assert describe_styles(RewardConfig(), make_prompts("1+1?", ["2"])).endswith(
        "; no prompt specifies an answer format"
    )


def test_a_style_that_the_prompts_do_not_ask_for():
    prompts = make_prompts(DAPO, ["34"])
    assert style_mismatch("boxed", prompts) == (
        "reward.answer is boxed, but the prompts ask for Answer: X: a response that follows them scores 0; "
        "set reward.answer=answer_line"
    )
    for style in ("auto", "answer_line", "last_number"):
        assert style_mismatch(style, prompts) is None
    assert style_mismatch("boxed", make_prompts("1+1?", ["2"])) is None


def make_group(texts: list[str], reward: float = 0.0, finish_reason: str = "stop") -> Group:
    sample = Sample(np.array([1], np.int32), np.array([0.0], np.float32), finish_reason, 0)
    rewards = np.full(len(texts), reward, np.float32)
    return Group(make_prompts(DAPO, ["34"])[0], [sample] * len(texts), texts, rewards)


@pytest.mark.parametrize(
    ("text", "finish_reason", "style", "reason"),
    [
        ("It is 34.", "stop", "auto", "100% .* no answer .*'It is 34.'; set reward.answer=last_number"),
        ("Answer: 34", "stop", "boxed", "100% .* reward.answer=boxed reads.*; set reward.answer=auto, or"),
        ("It", "stop", "auto", r"ask for a marked answer, such as \\boxed\{X\}, by data.instruction"),
        ("It is", "length", "auto", "100% were cut off .*; raise rollout.max_new_tokens"),
        ("\\boxed{3}", "stop", "auto", "0% of the responses .* read and wrong: train on easier prompts"),
    ],
)
def test_why_all_rewards_are_zero(text: str, finish_reason: str, style: Style, reason: str):
    why = why_all_zero([make_group([text, text], finish_reason=finish_reason)], style)
    assert re.search(reason, str(why))


def test_no_reason_where_a_reward_is_not_zero():
    assert why_all_zero([make_group(["a"]), make_group(["b"], reward=1)], "auto") is None
    assert why_all_zero([], "auto") is None


def test_steps_without_a_reward_are_explained_once_a_row():
    zero, right = [make_group(["34"])], [make_group(["34"], reward=1)]

    def said(watch: ZeroRewardWatch, steps: list[list[Group]]) -> dict[int, str]:
        found = {i: watch.see(groups) for i, groups in enumerate(steps, 1)}
        return {i: why for i, why in found.items() if why}

    first = said(ZeroRewardWatch("auto", enabled=True), [zero] * 6)
    assert first.keys() == {3}
    assert first[3].startswith("in the last 3 steps all 3 rewards are 0: ")
    assert "collapsed" not in first[3]
    assert not said(ZeroRewardWatch("auto", enabled=True), [zero, zero, right, zero, zero, right])
    later = said(ZeroRewardWatch("auto", enabled=True), [right, *[zero] * 4, right, *[zero] * 3])
    assert later.keys() == {4, 9}
    assert all("there were rewards before: if the policy has collapsed" in why for why in later.values())
    assert not said(ZeroRewardWatch("auto", enabled=False), [zero] * 4)
