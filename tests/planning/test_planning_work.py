"""Tests the plan's rows, pairs and FLOPs against the packer, a brute-force mask and torch's counter."""

from dataclasses import astuple

import numpy as np
import pytest
import torch
from packing.oracle import pack_reference
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from megatron_bicc.algorithms.presets import resolve
from megatron_bicc.config import Config
from megatron_bicc.planning.cost import (
    Load,
    Sizes,
    context_imbalance,
    forward_flops,
    in_flight,
    load_of,
    work_of,
)
from megatron_bicc.planning.synthetic import UnknownTokenizer, draw_rollouts, synthetic_step
from megatron_bicc.training.batch import packing_settings

LLAMA = LlamaConfig(
    vocab_size=200,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    architectures=["LlamaForCausalLM"],
)


def make_config(**settings: object) -> Config:
    """Steps of 12 prompts in short sequences."""
    config = Config(algorithm="bicc")
    config.rollout.prompts_per_step, config.rollout.max_new_tokens = 12, 60
    config.data.max_prompt_tokens = 40
    config.train.max_sequence_tokens = config.train.max_tokens_per_microbatch = 400
    for name, value in settings.items():
        section, field = name.split("__")
        setattr(getattr(config, section), field, value)
    return resolve(config)


def test_token_counts_are_the_packers() -> None:
    config = make_config()
    step = synthetic_step(config, LLAMA, UnknownTokenizer(), data_parallel=2)
    rollouts = draw_rollouts(config, np.random.default_rng(config.seed))
    _, bilateral = packing_settings(config, LLAMA, UnknownTokenizer())
    expected = pack_reference(rollouts, bilateral, 2)
    (update,) = step.updates
    assert update.trained["bilateral"].stats == expected.stats
    assert step.response_tokens == rollouts.offsets_R[-1]
    found = load_of(update.trained["bilateral"])
    assert found.micro_batches == len(expected.ranks[0])
    assert found.rows in [sum(len(b.tokens_N) for b in rank) for rank in expected.ranks]


def test_groups_without_contrast_are_not_trained() -> None:
    config = make_config(synthetic__pass_rate=0.85)
    step = synthetic_step(config, LLAMA, UnknownTokenizer(), data_parallel=1)
    rollouts = draw_rollouts(config, np.random.default_rng(config.seed))
    rewards_GR = rollouts.rewards_R.reshape(12, 8)
    mixed_G = rewards_GR.min(1) < rewards_GR.max(1)
    assert 0 < step.groups_with_contrast == mixed_G.sum() < 12
    (update,) = step.updates
    responses_G = np.diff(rollouts.offsets_R).reshape(12, 8).sum(1)
    assert sum(b.num_response_rows for b in update.log_probs.ranks[0]) == responses_G[mixed_G].sum()


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_kl_and_entropy_are_trained_on_every_group_given_its_prompt_alone(weight: float) -> None:
    config = make_config(synthetic__pass_rate=0.85, loss__kl_coefficient=0.1, bicc__weight=weight)
    step = synthetic_step(config, LLAMA, UnknownTokenizer(), data_parallel=1)
    (update,) = step.updates
    assert sum(b.num_response_rows for b in update.log_probs.ranks[0]) == step.response_tokens
    assert step.groups_with_contrast < 12
    work = work_of(step, config)
    bilateral = [load_of(update.trained["bilateral"])] if weight > 0 else []
    assert work.train == sum(bilateral, load_of(update.log_probs))
    assert work.forward == load_of(update.log_probs).times(2)
    without = make_config(synthetic__pass_rate=0.0, loss__entropy_coefficient=0.1, bicc__weight=weight)
    (update,) = synthetic_step(without, LLAMA, UnknownTokenizer(), data_parallel=1).updates
    assert update.trained.keys() == {"plain"}


def test_pairs_are_those_of_the_attention_mask() -> None:
    """Every row attends to its own segment up to itself; a response's row to all of its side's prefix too."""
    config = make_config()
    (update,) = synthetic_step(config, LLAMA, UnknownTokenizer(), data_parallel=1).updates
    pairs = 0
    for batch in update.trained["bilateral"].ranks[0]:
        segment = np.repeat(np.arange(len(batch.cu_seqlens) - 1), np.diff(batch.cu_seqlens))
        side = np.full(len(segment), -1)
        side[: batch.num_prefix_rows] = np.repeat(
            np.arange(len(batch.cu_prefix) - 1), np.diff(batch.cu_prefix)
        )
        responses = np.repeat(np.arange(len(batch.cu_prefix) - 1), np.diff(batch.cu_response_side))
        side[batch.num_prefix_rows :][: len(responses)] = responses
        row = np.arange(len(segment))
        own = (segment[:, None] == segment) & (row[:, None] >= row)
        response = (row >= batch.num_prefix_rows) & (side >= 0)
        cross = response[:, None] & (row < batch.num_prefix_rows) & (side[:, None] == side)
        pairs += int((own | cross).sum())
    assert load_of(update.trained["bilateral"]).pairs == pairs


def test_context_ranks_have_the_pairs_of_their_rows() -> None:
    """Row by row: a row of a prefix attends to its segment up to itself, one of a response also to its
    prefix. What is shared: rows of prefixes, and of segments that several context ranks hold."""
    config = make_config(parallel__context=4, train__max_tokens_per_microbatch=100, parallel__tensor=2)
    config.parallel.sequence = True
    step = synthetic_step(config, LLAMA, UnknownTokenizer(), data_parallel=1)
    (update,) = step.updates
    plan, busiest, costs = update.trained["bilateral"], [], []
    assert any(len(set(c.segment_W)) < len(c.segment_W) for batch in plan.ranks[0] for c in batch.chunks)
    for batch in plan.ranks[0]:
        prefixes = np.diff(batch.cu_prefix).tolist()
        sides = [side for side, rows in enumerate(np.diff(batch.cu_response_side)) for _ in range(rows)]
        before = [0] * len(prefixes) + [prefixes[sides[first]] for first in batch.cu_response[:-1].tolist()]
        held = [set(own.segment_W.tolist()) for own in batch.chunks]
        shared = {s for s in range(len(before)) if s < len(prefixes) or sum(s in own for own in held) > 1}
        loads = []
        for own in batch.chunks:
            pairs = shared_rows = response_rows = rows = 0
            for segment, start, length in zip(own.segment_W, own.start_W, own.length_W, strict=True):
                pairs += sum(before[segment] + row + 1 for row in range(start, start + length))
                shared_rows += length * (segment in shared)
                response_rows += length * (segment >= len(prefixes))
                rows += length
            pairs += sum(range(own.num_rows - rows + 1))  # padding attends to itself
            loads.append((own.num_rows, response_rows, pairs, shared_rows))
        assert sum(load[0] for load in loads) == batch.num_rows
        cost = [pairs + plan.settings.token_cost * rows for rows, _, pairs, _ in loads]
        costs.append((max(cost), sum(cost) / 4))
        most = max(load[3] for load in loads)
        busiest.append((1, *loads[cost.index(max(cost))][:3], most))
    assert astuple(load_of(plan)) == tuple(map(sum, zip(*busiest, strict=True)))
    assert context_imbalance(step) == pytest.approx(np.sum(costs, 0)[0] / np.sum(costs, 0)[1])


def test_lengths_have_the_given_mean_and_spread() -> None:
    config = make_config(synthetic__response_tokens=20, synthetic__response_sigma=0.3)
    config.rollout.prompts_per_step, config.rollout.max_new_tokens = 4000, 10**6
    lengths = np.diff(draw_rollouts(config, np.random.default_rng(0)).offsets_R)
    assert lengths.mean() == pytest.approx(20, rel=0.01)
    assert np.log(lengths).std() == pytest.approx(0.3, rel=0.03)


@pytest.mark.parametrize(
    ("settings", "forward", "train"),
    [
        ({}, 2, 1),  # rcc reads the reference policy
        ({"rcc__enabled": False}, 1, 1),
        ({"bicc__weight": 0.5, "rcc__enabled": False}, 1, 2),
        ({"bicc__denominator": "conditioned", "rcc__enabled": False, "train__updates_per_step": 3}, 1, 1),
    ],
)
def test_passes_are_the_learners(settings: dict, forward: int, train: int) -> None:
    config = make_config(**settings)
    step = synthetic_step(config, LLAMA, UnknownTokenizer(), data_parallel=1)
    work = work_of(step, config)
    plain = sum(len(update.log_probs.ranks[0]) for update in step.updates)
    conditioned = [len(update.trained["bilateral"].ranks[0]) for update in step.updates]
    extra = sum(conditioned[1:]) if config.bicc.denominator == "conditioned" else 0
    assert work.forward.micro_batches == forward * plain + extra
    assert work.train.micro_batches == sum(conditioned) + (plain if train == 2 else 0)


@pytest.mark.parametrize("experts", [False, True])
def test_flops_are_torchs_count_of_a_hugging_face_model(experts: bool) -> None:
    """With the whole square of query-key pairs, which plain attention computes."""
    hf_config, kind = LLAMA, LlamaForCausalLM
    if experts:
        shape = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
        base = {name: getattr(LLAMA, name) for name in ("vocab_size", "hidden_size", "num_hidden_layers")}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        hf_config = Qwen3MoeConfig(**base, **heads, **shape, architectures=["Qwen3MoeForCausalLM"])
        kind = Qwen3MoeForCausalLM
    hf_config._attn_implementation = hf_config._experts_implementation = "eager"
    model, rows = kind(hf_config), 24
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.arange(rows)[None])
    counted = forward_flops(Sizes.of(hf_config), Load(1, rows, rows, rows**2))
    # the rotary embedding's outer product of positions and frequencies is torch's matrix product too
    assert counter.get_total_flops() == pytest.approx(counted, rel=2e-3)


def test_parameters_are_the_models() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LLAMA)
    matrices = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    assert Sizes.of(LLAMA).parameters == matrices


def test_micro_batches_in_flight() -> None:
    """megatron-core's schedules: 1F1B, and interleaved with two chunks a stage."""
    config = Config()
    config.parallel.pipeline = 4
    assert [in_flight(config, 64, stage) for stage in range(4)] == [4, 3, 2, 1]
    assert in_flight(config, 2, 0) == 2
    config.parallel.virtual_pipeline = 2
    assert [in_flight(config, 64, stage) for stage in range(4)] == [11 / 2, 9 / 2, 7 / 2, 5 / 2]
