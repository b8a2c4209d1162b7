"""Tests rollouts as flat arrays: checked once, selected by group."""

from dataclasses import replace

import numpy as np
import pytest
from support.models import make_model
from support.routing import drawn, with_experts
from support.steps import make_examples, to_groups

from megatron_bicc.errors import UserError
from megatron_bicc.rollout.types import Group
from megatron_bicc.training.batch import collate


@pytest.fixture(scope="module")
def groups() -> list[Group]:
    groups = to_groups(make_examples(make_model("qwen3_tied"), 0.8))
    versions = 5 + np.arange(len(groups[1].samples[1].token_ids)) // 2
    return [groups[0], changed(groups[1], weight_version=5, versions=versions), *groups[2:]]


@pytest.mark.parametrize("chosen", [[], [0], [3, 1], [0, 1, 2, 3]])
def test_a_selection_is_what_its_groups_collate_to(chosen: list[int], groups: list[Group]) -> None:
    selected = collate(groups).select(np.array(chosen, int))
    expected = collate([groups[i] for i in chosen])
    for name, array in vars(expected.rollouts).items():
        found = getattr(selected.rollouts, name)
        assert (found.dtype, found.tolist()) == (array.dtype, array.tolist()), name
    np.testing.assert_array_equal(selected.rollout_logp_T, expected.rollout_logp_T)
    np.testing.assert_array_equal(selected.versions_T, expected.versions_T)
    assert selected.num_groups == len(chosen)


def test_every_token_has_the_version_of_the_weights_that_sampled_it(groups: list[Group]) -> None:
    third = replace(groups[2], samples=[replace(s, weight_version=7) for s in groups[2].samples])
    batch = collate([groups[1], third])
    expected = []
    for sample in groups[1].samples + third.samples:
        own = [sample.weight_version] * len(sample.token_ids)
        expected += own if sample.versions is None else sample.versions.tolist()
    assert len(set(expected)) > 3
    assert (batch.versions_T.dtype, batch.versions_T.tolist()) == (np.int32, expected)
    with pytest.raises(ValueError, match=r"rollout 1 has \d+ tokens, but 1 weight versions"):
        collate([changed(groups[1], versions=np.array([5]))])


def test_experts_are_selected_with_their_tokens() -> None:
    """Rows by token: of responses, of prompts without their last, and the free one."""
    examples = make_examples(make_model("qwen3_moe"), 0.8)
    plain = to_groups(examples)
    groups = with_experts(plain, examples, drawn(examples, make_model("qwen3_moe").config))
    whole, chosen = collate(groups), [3, 1]
    selected = whole.select(np.array(chosen)).experts
    np.testing.assert_array_equal(selected, collate([groups[i] for i in chosen]).experts)
    first = groups[3].samples
    own = len(first[0].token_ids)
    np.testing.assert_array_equal(selected[:own], first[0].experts)
    prompts = [groups[i].samples[0].prompt_experts for i in chosen]
    np.testing.assert_array_equal(selected[-1 - sum(map(len, prompts)) : -1], np.concatenate(prompts))
    assert (selected[-1] == 255).all()
    assert collate(plain).experts is None
    cut = changed(groups[1], experts=groups[1].samples[1].experts[1:])
    without_first = replace(groups[0], samples=groups[0].samples[1:], rewards=groups[0].rewards[1:])
    for broken, message in (
        ([plain[0], groups[1]], "rollout 0 has .* with experts, not 0"),
        ([groups[0], cut], "rollout 6 has"),
        ([without_first], "prompt of group 0"),
    ):
        with pytest.raises(ValueError, match=message):
            collate(broken)


def changed(group: Group, **fields: object) -> Group:
    """The group with its second sample changed."""
    return replace(group, samples=[group.samples[0], replace(group.samples[1], **fields), *group.samples[2:]])


def test_what_no_step_could_use_is_named(groups: list[Group]) -> None:
    first, second = groups[:2]
    sample = first.samples[1]
    nothing = np.zeros(0, np.int32)
    bad_logp = np.where(np.arange(len(sample.log_probs)) == 0, np.nan, sample.log_probs)
    unequal = len(first.samples) + len(second.samples)
    no_samples = replace(second, samples=[], rewards=second.rewards[:0])
    no_prompt = replace(first, prompt=replace(first.prompt, token_ids=nothing))
    for broken, kind, message in (
        ([changed(first, token_ids=nothing, log_probs=nothing)], ValueError, "rollout 1 has length 0"),
        ([first, no_samples], ValueError, "group_offsets_B: group 1 has length 0"),
        ([no_prompt], ValueError, "prompt_offsets_B: prompt of group 0 has length 0"),
        ([changed(first, log_probs=sample.log_probs[:-1])], ValueError, "offsets_R must run from 0 to"),
        ([first, replace(second, rewards=second.rewards[:-1])], ValueError, f"0 to {unequal - 1}, but"),
        ([replace(first, rewards=first.rewards * np.nan)], UserError, "reward of rollout 0 is nan"),
        ([changed(first, log_probs=bad_logp)], UserError, "rollout engine of rollout 1, token 0 is nan"),
    ):
        with pytest.raises(kind, match=message):
            collate(broken)
