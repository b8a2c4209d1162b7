"""Tests routing replay: the experts of a step against Hugging Face models whose routers are told theirs."""

import copy
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core import parallel_state
from support.hf_reference import Example, context_of, reference_loss
from support.routing import Experts, drawn, sequences, with_experts
from support.steps import (
    CASES,
    TOKENIZER,
    hf_gradients,
    make_config,
    make_examples,
    perturb,
    second_update,
    to_groups,
)
from training.test_step_matches_hf import named_gradients, set_weights
from transformers import AutoModelForCausalLM, PreTrainedModel

from megatron_bicc.config import Config
from megatron_bicc.errors import UserError
from megatron_bicc.metrics import Stopwatch
from megatron_bicc.model.build import transformer_config
from megatron_bicc.model.families import supported_config
from megatron_bicc.packing.pack import make_plan, pack
from megatron_bicc.packing.types import packed_sides
from megatron_bicc.training import routing
from megatron_bicc.training.batch import Packer, collate, packing_settings
from megatron_bicc.training.learner import Learner
from megatron_bicc.training.routing import FREE, TokenRows
from megatron_bicc.weights.hf_weights import load_policy


class Routed:
    """A model whose routers are told the experts of some positions of some sequences; one row at a time."""

    def __init__(self, model: PreTrainedModel, told: Experts) -> None:
        self.model, self.told = model, told
        self.chosen: Experts = {}
        """Those of every sequence that has been computed"""

    def __call__(self, ids: torch.Tensor) -> object:
        key = tuple(ids[0].tolist())
        layers, config = self.model.model.layers, self.model.config
        shape = (len(key), len(layers), config.num_experts_per_tok)
        told, chosen = self.told.get(key, np.full(shape, -1)), np.zeros(shape, np.int64)
        for layer, block in enumerate(layers):
            block.mlp.gate.forward = partial(route, block.mlp.gate, told[:, layer], chosen[:, layer])
        self.chosen[key] = chosen
        return self.model(ids)


def route(
    gate: torch.nn.Module, told: np.ndarray, chosen: np.ndarray, hidden: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Qwen3MoeTopKRouter.forward, with the experts that it is told."""
    logits = torch.nn.functional.linear(hidden, gate.weight)
    probs = logits.softmax(-1)
    for row, experts in enumerate(told):
        own = probs[row].topk(gate.top_k).indices.numpy()
        chosen[row] = own if experts[0] < 0 else experts
    weights = probs.gather(-1, torch.from_numpy(chosen.copy()))
    if gate.norm_topk_prob:
        weights = weights / weights.sum(-1, keepdim=True)
    return logits, weights, torch.from_numpy(chosen.copy())


def told_plain(example: Example, found: Experts) -> Experts:
    """What a step replays of a group's sequences; the prompt's experts are those of the first one."""
    last = len(example.prompt) - 1
    first, told = found[sequences(example)[0]], {}
    for sequence in sequences(example):
        told[sequence] = np.concatenate([first[:last], found[sequence][last:]])
        told[sequence][-1] = -1  # a response's last token is not read
    return told


def told_bilateral(example: Example, plain: Experts) -> Experts:
    """The same in the bilateral layout: a context and the first position that reads it are free."""
    told, last = {}, len(example.prompt) - 1
    for i, sequence in enumerate(sequences(example)):
        context = context_of(example, i)
        own = plain[sequence]
        prompt = np.append(own[:last], plain[sequences(example)[0]][last : last + 1], 0)
        free = np.full((len(context), *own.shape[1:]), -1)
        key = (*example.prompt, *context, *example.responses[i])
        told[key] = np.concatenate([prompt, free, own[last + 1 :]])
    return told


def told_everywhere(examples: list[Example], found: Experts) -> Experts:
    """Both layouts of all groups."""
    plain: Experts = {}
    for example in examples:
        plain |= told_plain(example, found)
    both = dict(plain)
    for example in examples:
        both |= told_bilateral(example, plain)
    return both


def configured(model: Path, case: str, replay: str, recompute: str = "none") -> Config:
    algorithm, settings = CASES[case]
    config = make_config(model, algorithm, **settings)
    config.model.routing_replay, config.model.recompute = replay, recompute
    return config


def assert_equal(
    loss: float, gradients: dict[str, torch.Tensor], expected: torch.Tensor, moved: PreTrainedModel
) -> None:
    """Loss and gradients are the reference's."""
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)
    truth = named_gradients(moved)
    assert gradients.keys() == truth.keys()
    for name, gradient in truth.items():
        difference = (gradients[name] - gradient).norm()
        assert difference <= 1e-5 * gradient.norm(), f"{name}: {difference / gradient.norm():.1e}"


@pytest.mark.parametrize(
    ("family", "case", "moves", "recompute"),
    [
        ("qwen3_moe", "bicc_rcc_mixed", False, "full"),
        ("qwen3_moe", "bicc_rcc_mixed_conditioned", True, "none"),
        ("qwen3_moe_raw_gates", "rcc_first_order", True, "selective"),
    ],
)
def test_experts_of_the_engine(
    family: str,
    case: str,
    moves: bool,
    recompute: str,
    model_dirs: dict[str, Path],
    single_process: None,
    tmp_path: Path,
) -> None:
    """Every pass has them; drawn at random, they are not what a router would choose."""
    config = configured(model_dirs[family], case, "engine", recompute)
    reference = AutoModelForCausalLM.from_pretrained(model_dirs[family], dtype=torch.float32).eval()
    old = perturb(reference)
    examples = make_examples(reference, config.rollout.temperature)
    found = drawn(examples, reference.config)
    groups = with_experts(to_groups(examples), examples, found)
    policy = load_policy(config)
    learner = Learner(config, policy, TOKENIZER)
    set_weights(policy, old, tmp_path / "old")
    if moves:
        result, moved = second_update(learner, groups, tmp_path)
    else:
        (result,), moved = learner.step(groups, Stopwatch()), old
    told = told_everywhere(examples, found)
    as_told = [Routed(model, told) for model in (moved, copy.deepcopy(old), reference)]
    expected = reference_loss(*as_told, examples, config)
    assert_equal(result.loss, hf_gradients(learner.policy), expected, moved)


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("case", ["bicc_rcc_mixed", "bicc_rcc_mixed_conditioned"])
def test_experts_of_the_old_policy(
    case: str, recompute: str, model_dirs: dict[str, Path], single_process: None, tmp_path: Path
) -> None:
    """Training has them; in the second update the policy's routers would choose others for some tokens."""
    path = model_dirs["qwen3_moe"]
    config = configured(path, case, "old", recompute)
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    old = perturb(reference)
    examples = make_examples(reference, config.rollout.temperature)
    policy = load_policy(config)
    learner = Learner(config, policy, TOKENIZER)
    set_weights(policy, old, tmp_path / "old")
    result, moved = second_update(learner, to_groups(examples), tmp_path)

    as_old, alone = Routed(copy.deepcopy(old), {}), Routed(copy.deepcopy(moved), {})
    with torch.no_grad():
        reference_loss(alone, as_old, reference, examples, config)
    if case == "bicc_rcc_mixed":
        told = told_everywhere([e for e in examples if len(set(e.rewards)) > 1], as_old.chosen)
    else:  # the conditioned pass has read the contexts
        told = as_old.chosen
    assert any((alone.chosen[key] != experts).any() for key, experts in as_old.chosen.items())
    expected = reference_loss(Routed(moved, told), copy.deepcopy(old), reference, examples, config)
    assert_equal(result.loss, hf_gradients(learner.policy), expected, moved)


def test_recorded_experts_are_those_of_hugging_face(
    model_dirs: dict[str, Path], single_process: None
) -> None:
    path = model_dirs["qwen3_moe"]
    learner, examples, found = chosen_by_hugging_face(path, "old")
    batch = collate(with_experts(to_groups(examples), examples, found))
    plan, batches = Packer(batch.rollouts).pack(learner.plain)
    with learner.policy.recorded_experts() as recorded:
        learner.policy.log_probs(batches)
    compared = 0
    for layout, experts in zip(plan.ranks[0], recorded, strict=True):
        known = TokenRows(batch.rollouts).of(layout, 0)
        is_token = known != FREE
        assert is_token.sum() == layout.num_prefix_rows + layout.num_response_rows
        expected = np.sort(batch.experts[known[is_token]])
        np.testing.assert_array_equal(np.sort(experts.numpy()[is_token]), expected)
        compared += len(expected)
    assert compared == plan.stats["tokens_packed"]


def chosen_by_hugging_face(path: Path, replay: str) -> tuple[Learner, list[Example], Experts]:
    """A learner, groups, and the experts that the policy as a Hugging Face model chooses for them."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    examples, routed = make_examples(model, 0.8), Routed(model, {})
    with torch.no_grad():
        for sequence in (s for example in examples for s in sequences(example)):
            routed(torch.tensor([sequence]))
    config = configured(path, "grpo", replay)
    return Learner(config, load_policy(config), TOKENIZER), examples, routed.chosen


def test_replaying_a_policys_own_experts_changes_no_bit(
    model_dirs: dict[str, Path], single_process: None
) -> None:
    steps = []
    for replay in ("none", "engine", "old"):
        learner, examples, found = chosen_by_hugging_face(model_dirs["qwen3_moe"], replay)
        groups = to_groups(examples)
        if replay == "engine":
            groups = with_experts(groups, examples, found)
        (result,) = learner.step(groups, Stopwatch())
        steps.append((result.loss, result.log_probs.old_T, hf_gradients(learner.policy)))
    for loss, old_T, gradients in steps[1:]:
        assert loss == steps[0][0]
        np.testing.assert_array_equal(old_T, steps[0][1])
        assert all(torch.equal(gradients[name], gradient) for name, gradient in steps[0][2].items())


def test_every_token_is_recorded_once_over_all_ranks(
    model_dirs: dict[str, Path], single_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also a prompt's whose responses are divided between ranks: the sum over ranks would be of two rows."""
    learner, examples, found = chosen_by_hugging_face(model_dirs["qwen3_moe"], "old")
    batch = collate(with_experts(to_groups(examples), examples, found))
    _, plan = make_plan(batch.rollouts, replace(learner.plain, max_tokens_per_microbatch=40), 2)
    sides = [side.group for rank in plan.ranks for layout in rank for side in packed_sides(layout)]
    assert len(sides) > len(set(sides)) == len(examples)
    recorded = []
    for rank in range(2):
        monkeypatch.setattr(parallel_state, "get_data_parallel_rank", lambda rank=rank: rank)
        recorded += routing._sources(plan)
    rows = np.concatenate(recorded)
    np.testing.assert_array_equal(np.sort(rows[rows != FREE]), np.arange(TokenRows(batch.rollouts).count - 1))


@pytest.mark.parametrize("layout", ["plain", "bilateral"])
@pytest.mark.parametrize("context_ranks", [1, 2, 4])
def test_rows_replay_the_experts_of_the_token_that_they_read(
    layout: str, context_ranks: int, model_dirs: dict[str, Path]
) -> None:
    path = model_dirs["qwen3_moe"]
    settings = packing_settings(configured(path, "grpo", "old"), supported_config(path), TOKENIZER)
    rows_of_a_rank = 160 // context_ranks
    chosen = replace(
        settings[layout == "bilateral"],
        context_ranks=context_ranks,
        max_tokens_per_microbatch=rows_of_a_rank,
    )
    examples = make_examples(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), 0.8)
    rollouts = collate(to_groups(examples)).rollouts
    read = [[e.prompt[-1], *response[:-1]] for e in examples for response in e.responses]
    token_of = np.concatenate([*read, *(e.prompt[:-1] for e in examples), [-1]])
    known = packed = 0
    for rank in range(context_ranks):
        for batch in pack(rollouts, chosen, 1, 0, context_rank=rank).micro_batches:
            rows = TokenRows(rollouts).of(batch, rank)
            assert len(rows) == len(batch.tokens_N)
            np.testing.assert_array_equal(token_of[rows[rows != FREE]], batch.tokens_N[rows != FREE])
            known += (rows != FREE).sum()
            packed += batch.chunks[rank].length_W.sum()
    if layout == "plain":
        assert known == packed
    else:  # of prompts and responses all but the first row after a context, and nothing of the contexts
        assert 0 < known < packed


@pytest.mark.parametrize(
    ("model", "fused", "message"),
    [
        ("qwen3_tied", False, "model.routing_replay is old; the model has no experts: set it to none"),
        ("qwen3_moe", True, "moe_router_fusion is true; .* remove moe_router_fusion"),
    ],
)
def test_a_policy_that_cannot_replay_is_refused(
    model: str, fused: bool, message: str, model_dirs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_bicc.model.megatron_settings.HAVE_TE", True)  # or it is refused for that
    config = configured(model_dirs[model], "grpo", "old")
    config.megatron.transformer = {"moe_router_fusion": True} if fused else {}
    with pytest.raises(UserError, match=message):
        transformer_config(supported_config(model_dirs[model]), config)
