"""Tests the order of prompts: whole epochs, determined by the seed, resumable anywhere."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_bicc.data.prompts import PromptSampler
from megatron_bicc.errors import UserError

sizes = st.integers(1, 12).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n)))


def draws(sampler: PromptSampler, per_step: int, steps: int) -> list[int]:
    return [index for _ in range(steps) for index in sampler.draw(per_step)]


@given(sizes, st.integers(0, 5))
def test_every_epoch_holds_every_prompt_once(size: tuple[int, int], seed: int):
    num_prompts, per_step = size
    order = draws(PromptSampler(num_prompts, per_step, seed), per_step, 3 * num_prompts)
    epochs = [order[i : i + num_prompts] for i in range(0, len(order), num_prompts)]
    assert len(order) == 3 * num_prompts * per_step
    assert all(sorted(epoch) == list(range(num_prompts)) for epoch in epochs)


@given(sizes, st.integers(0, 5), st.integers(0, 9))
def test_resumes_where_it_stopped(size: tuple[int, int], seed: int, steps: int):
    sampler, resumed = PromptSampler(*size, seed), PromptSampler(*size, seed)
    draws(sampler, size[1], steps)
    resumed.load_state_dict(sampler.state_dict())
    assert draws(resumed, size[1], 5) == draws(sampler, size[1], 5)


def test_order_depends_on_seed_and_epoch_and_not_on_the_step_size():
    order = draws(PromptSampler(100, 10, seed=1), 10, 20)
    assert order == draws(PromptSampler(100, 10, seed=1), 4, 50)
    assert order != draws(PromptSampler(100, 10, seed=2), 10, 20)
    assert order[:100] != order[100:]


def test_a_step_larger_than_the_data_names_both_numbers():
    with pytest.raises(UserError, match=r"rollout\.prompts_per_step=5 .* data\.train, 4"):
        PromptSampler(4, 5, seed=1)


@pytest.mark.parametrize("other", [{"num_prompts": 9, "seed": 1}, {"num_prompts": 8, "seed": 2}])
def test_state_of_another_run_is_refused(other: dict[str, int]):
    state = PromptSampler(prompts_per_step=2, **other).state_dict()
    with pytest.raises(UserError, match="same data.train and seed"):
        PromptSampler(8, 2, seed=1).load_state_dict(state)
