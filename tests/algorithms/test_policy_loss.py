"""Tests every preset against its paper's formula in plain loops, and the normalisation contract."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from algorithms import reference
from algorithms.reference import Correction
from hypothesis import given, settings
from hypothesis import strategies as st
from support.token_loss import clip_masks

from megatron_bicc.algorithms.advantages import group_advantages, mean_baseline, rcc_baseline, token_weights
from megatron_bicc.algorithms.corrections import correction_weights
from megatron_bicc.algorithms.flat_arrays import spread
from megatron_bicc.algorithms.policy_loss import LossRows, kl_penalty, policy_loss
from megatron_bicc.algorithms.presets import PRESETS, resolve
from megatron_bicc.config import Config, LossConfig

MAX_LENGTH = 9
NOISE = {"gspo": 1.5e-3, "gmpo": 0.7, "cispo": 1.2, "aspo": 0.9}
DELTA_SCALE = 0.3
PRESET_NAMES = list(PRESETS)
CORRECTED = (
    Correction("token_tis", 0.7, 1.5, veto=0.3),
    Correction("sequence_tis", 0.4, 2.0),
    Correction("token_mask", 0.7, 1.5),
    Correction("sequence_mask", 0.4, 2.0, veto=0.3),
    Correction("geometric_mask", 0.7, 1.4),
)
"""Of ratios pi_old / mu with a standard deviation of 0.5 in the logarithm of a token's"""


def loss_config(algorithm: str, **changes) -> LossConfig:
    return replace(resolve(Config(algorithm=algorithm)).loss, **changes)


class Step:
    """A step's flat arrays, made the way training makes them."""

    def __init__(self, groups: list[reference.Group], loss: LossConfig, rcc: str | None, deltas=None) -> None:
        self.groups, self.loss = groups, loss
        rollouts = [rollout for group in groups for rollout in group]
        self.lengths_R = np.array([len(rollout.new) for rollout in rollouts])
        self.rewards_R = np.array([rollout.reward for rollout in rollouts])
        self.group_offsets_B = np.cumsum([0] + [len(group) for group in groups])
        self.deltas = deltas or [np.zeros(len(group)) for group in groups]
        baseline_R = mean_baseline(self.rewards_R, self.group_offsets_B)
        if rcc:
            delta_R = np.concatenate(self.deltas)
            corrected = rcc_baseline(self.rewards_R, delta_R, self.group_offsets_B, rcc)
            baseline_R = spread(corrected.baseline_B, self.group_offsets_B)
        self.advantage_R = group_advantages(
            self.rewards_R, self.group_offsets_B, baseline_R, loss.advantage, 0.5
        )
        self.new, self.old = [r.new for r in rollouts], [r.old for r in rollouts]
        offsets_R = np.cumsum([0, *self.lengths_R])
        engine_T = np.concatenate([r.engine for r in rollouts])
        self.corrections = correction_weights(np.concatenate(self.old), engine_T, offsets_R, loss)
        weight_R = token_weights(self.lengths_R, loss.aggregation, MAX_LENGTH)
        self.weight = np.split(spread(weight_R, offsets_R) * self.corrections.weight_T, offsets_R[1:-1])

    def part(self, rollouts: list[int]) -> tuple[float, list[np.ndarray]]:
        """Loss of the micro-batch of these rollouts, and the gradient of each one's log-probs."""
        lengths = self.lengths_R[rollouts]
        logp = torch.tensor(sum((self.new[r] for r in rollouts), []), dtype=torch.float64, requires_grad=True)
        rows = LossRows(
            old_logp=torch.tensor(sum((self.old[r] for r in rollouts), []), dtype=torch.float64),
            advantage=torch.from_numpy(np.repeat(self.advantage_R[rollouts], lengths)),
            weight=torch.from_numpy(np.concatenate([self.weight[r] for r in rollouts])),
            response=torch.from_numpy(np.repeat(np.arange(len(rollouts)), lengths)),
        )
        loss = policy_loss(logp, None, rows, self.loss).share
        loss.backward()
        return loss.item(), np.split(logp.grad.numpy(), np.cumsum(lengths)[:-1])

    def whole(self) -> tuple[float, np.ndarray]:
        loss, gradients = self.part(list(range(len(self.lengths_R))))
        return loss, np.concatenate(gradients)


def make_deltas(seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [DELTA_SCALE * rng.standard_normal(size) for size in reference.SIZES]


def reference_baselines(groups, deltas, rcc: str | None) -> list[float | None]:
    form = {"first_order": reference.first_order_baseline, "exact": reference.exact_baseline}.get(rcc)
    if form is None:
        return [None] * len(groups)
    return [form([r.reward for r in g], list(d)) for g, d in zip(groups, deltas, strict=True)]


@pytest.mark.parametrize("rcc", [None, "first_order", "exact"])
@pytest.mark.parametrize("addition", ["", "+bicc"])
@pytest.mark.parametrize("preset", PRESET_NAMES)
def test_value_and_gradient_follow_the_paper(preset: str, addition: str, rcc: str | None) -> None:
    groups, deltas = reference.make_groups(3, NOISE.get(preset, 0.5)), make_deltas(4)
    loss = loss_config(preset + addition)
    if preset in ("gspo", "gmpo") and addition:
        loss = replace(loss, dual_clip=1.0002 if preset == "gspo" else 1.2)  # so low that it binds here
    step = Step(groups, loss, rcc, deltas)
    baselines = reference_baselines(groups, deltas, rcc)
    value, gradient = step.whole()
    expected = reference.loss(preset, groups, step.new, baselines, MAX_LENGTH, loss.dual_clip)
    differences = reference.gradient(preset, groups, baselines, MAX_LENGTH, loss.dual_clip, step=1e-7)
    assert value == pytest.approx(expected, rel=1e-12)
    np.testing.assert_allclose(gradient, differences, atol=2e-8 * np.abs(differences).max() + 2e-9)


@pytest.mark.parametrize("preset", PRESET_NAMES)
def test_the_data_reaches_every_branch(preset: str) -> None:
    groups = reference.make_groups(3, NOISE.get(preset, 0.5))
    loss = loss_config(preset + "+bicc")
    if preset in ("gspo", "gmpo"):
        loss = replace(loss, dual_clip=1.0002 if preset == "gspo" else 1.2)
    step = Step(groups, loss, None)
    log_ratio_T = np.concatenate(step.new) - np.concatenate(step.old)
    masks = clip_masks(log_ratio_T, step.advantage_R, np.cumsum([0, *step.lengths_R]), loss)
    edges = {"high", "dual"} if preset == "cispo" else {"low", "high", "dual"}
    assert all(masks[edge].any() for edge in edges)
    assert not np.logical_or.reduce(list(masks.values())).all()
    assert 1 in step.lengths_R


@pytest.mark.parametrize("algorithm", [p + a for p in PRESET_NAMES for a in ("", "+bicc+rcc")])
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_the_cut_into_micro_batches_and_the_order_do_not_matter(algorithm: str, data: st.DataObject) -> None:
    preset = algorithm.split("+")[0]
    groups, deltas = reference.make_groups(5, NOISE.get(preset, 0.5)), make_deltas(6)
    loss = loss_config(algorithm)
    rcc = "first_order" if "rcc" in algorithm else None
    value, gradient = Step(groups, loss, rcc, deltas).whole()
    order = data.draw(st.permutations(range(len(groups))))
    shuffled = Step([groups[g] for g in order], loss, rcc, [deltas[g] for g in order])
    count = data.draw(st.sampled_from([1, 2, 5, 16]))
    owner = data.draw(st.lists(st.integers(0, count - 1), min_size=33, max_size=33))
    total, parts = 0.0, {}
    for micro_batch in range(count):
        rollouts = [r for r in range(33) if owner[r] == micro_batch]
        if rollouts:
            share, gradients = shuffled.part(rollouts)
            total += share
            parts |= dict(zip(rollouts, gradients, strict=True))
    starts = np.cumsum([0] + [len(group) for group in groups])
    original = [int(starts[g]) + i for g in order for i in range(len(groups[g]))]
    back = np.concatenate([parts[original.index(r)] for r in range(33)])
    assert total == pytest.approx(value, rel=1e-12)
    np.testing.assert_allclose(back, gradient, rtol=1e-11, atol=1e-15)


def one_token(loss: LossConfig, log_ratio: float, advantage: float) -> tuple[float, float]:
    logp = torch.tensor([log_ratio], dtype=torch.float64, requires_grad=True)
    ones = torch.ones(1, dtype=torch.float64)
    zero = torch.zeros(1, dtype=torch.float64)
    rows = LossRows(ones * advantage, ones, torch.zeros(1, dtype=torch.int64), old_logp=zero)
    value = policy_loss(logp, None, rows, loss).share
    value.backward()
    return value.item(), logp.grad.item()


@pytest.mark.parametrize("preset", ["grpo", "dr_grpo", "dapo", "gspo", "gmpo", "aspo"])
def test_a_ratio_exactly_at_an_edge_is_not_clipped_and_beyond_it_has_no_gradient(preset: str) -> None:
    loss = loss_config(preset, dual_clip=0.0)
    low, high = (-0.4, 0.4) if preset == "gmpo" else (math.log1p(-loss.clip_low), math.log1p(loss.clip_high))
    for edge, advantage, outward in ((high, 1.5, 1.0), (low, -1.5, -1.0)):
        ratio = math.exp(-edge if preset == "aspo" and advantage > 0 else edge)
        value, gradient = one_token(loss, edge, advantage)
        assert value == pytest.approx(-advantage * ratio, rel=1e-15)
        assert gradient == pytest.approx(-advantage * ratio, rel=1e-15)
        assert one_token(loss, edge + 1e-9 * outward, advantage)[1] == 0.0
        assert one_token(loss, -edge - 1e-3 * outward, advantage)[1] != 0.0  # the other side stays open


@pytest.mark.parametrize("advantage", [1.5, -1.5])
def test_cispo_bounds_the_weight_at_its_edge_and_keeps_the_gradient(advantage: float) -> None:
    loss = loss_config("cispo")
    for log_ratio, weight in (
        (math.log(5.0) - 0.01, 5.0 * math.exp(-0.01)),
        (math.log(5.0), 5.0),
        (2.0, 5.0),
    ):
        value, gradient = one_token(loss, log_ratio, advantage)
        assert gradient == pytest.approx(-advantage * weight, rel=1e-15)
        assert value == pytest.approx(-advantage * weight * log_ratio, rel=1e-15)


def test_dual_clip_bounds_the_loss_of_negative_advantages_only() -> None:
    loss = loss_config("bicc")
    assert one_token(loss, math.log(3.0), -2.0) == pytest.approx((6.0, 6.0))
    assert one_token(loss, math.log(3.0) + 1e-9, -2.0) == (pytest.approx(6.0), 0.0)
    assert one_token(loss, 2.0, -2.0) == (pytest.approx(6.0), 0.0)
    assert one_token(replace(loss, dual_clip=0.0), 2.0, -2.0)[0] == pytest.approx(2.0 * math.exp(2.0))


@pytest.mark.parametrize("preset", PRESET_NAMES)
def test_huge_ratios_in_float32_give_no_nan(preset: str) -> None:
    logp = torch.tensor([-200.0, -1.0, -200.0, -1.0, -200.0, -1.0], requires_grad=True)
    old = torch.tensor([-1.0, -200.0, -1.0, -200.0, -1.0, -200.0])
    advantage = torch.tensor([1.0, 1.0, -1.0, -1.0, 0.0, 0.0])
    rows = LossRows(advantage, torch.ones(6), torch.arange(6), old_logp=old)
    loss = policy_loss(logp, None, rows, loss_config(preset + "+bicc")).share
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(logp.grad).all()
    assert (logp.grad[4:] == 0).all()


def random_rows(seed: int = 0, **optional: torch.Tensor) -> tuple[torch.Tensor, LossRows]:
    generator = torch.Generator().manual_seed(seed)
    normal = [torch.randn(7, generator=generator, dtype=torch.float64) for _ in range(3)]
    logp = (-normal[0].abs() - 0.5).requires_grad_()
    old = (logp + 0.3 * normal[1]).detach()
    response = torch.tensor([0, 0, 0, 1, 2, 2, 2])
    advantage = torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64)[response]
    weight = torch.full((7,), 0.1, dtype=torch.float64)
    return logp, LossRows(advantage, weight, response, old, 2 * weight, **optional)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_in_the_loss(estimator: str) -> None:
    ref = -torch.linspace(0.2, 2.0, 7, dtype=torch.float64)
    logp, rows = random_rows(ref_logp=ref)
    base = policy_loss(logp, None, rows, loss_config("grpo")).share
    config = loss_config("grpo", kl_coefficient=0.3, kl_estimator=estimator)
    loss = policy_loss(logp, None, rows, config).share
    d = (ref - logp.detach()).numpy()
    expected = {"k1": -d, "k2": d**2 / 2, "k3": np.exp(d) - 1 - d}[estimator]
    slope = {"k1": np.ones(7), "k2": -d, "k3": 1 - np.exp(d)}[estimator]
    assert (loss - base).item() == pytest.approx(0.3 * 0.2 * expected.sum(), rel=1e-12)
    gradient = torch.autograd.grad(loss - base, logp)[0].numpy()
    np.testing.assert_allclose(gradient, 0.3 * 0.2 * slope, rtol=1e-10, atol=1e-15)
    assert (kl_penalty(logp, logp.detach(), estimator) == 0).all()


def test_kl_in_the_reward_stays_out_of_the_loss() -> None:
    logp, rows = random_rows()
    with_kl = policy_loss(logp, None, rows, loss_config("grpo", kl_coefficient=0.3, kl_in="reward"))
    assert with_kl.share == policy_loss(logp, None, rows, loss_config("grpo")).share


def test_the_entropy_bonus_lowers_the_loss() -> None:
    entropy = torch.linspace(0.1, 1.0, 7, dtype=torch.float64, requires_grad=True)
    logp, rows = random_rows()
    loss = policy_loss(logp, entropy, rows, loss_config("grpo", entropy_coefficient=0.2)).share
    base = policy_loss(logp, entropy, rows, loss_config("grpo")).share
    assert (loss - base).item() == pytest.approx(-0.2 * 0.2 * entropy.sum().item(), rel=1e-12)
    assert (torch.autograd.grad(loss, entropy)[0] == -0.2 * 0.2).all()


def test_rows_that_take_no_part_in_kl_and_entropy_need_neither() -> None:
    logp, rows = random_rows()
    rows = replace(rows, regularisation=None)
    changes = {"kl_coefficient": 0.3, "kl_estimator": "k2", "entropy_coefficient": 0.2}
    without = policy_loss(logp, None, rows, loss_config("grpo")).share
    assert policy_loss(logp, None, rows, loss_config("grpo", **changes)).share == without


@pytest.mark.parametrize("correction", CORRECTED, ids=lambda correction: correction.name)
@pytest.mark.parametrize("preset", PRESET_NAMES)
def test_a_correction_weighs_the_loss_and_its_gradient(preset: str, correction: Correction) -> None:
    groups = reference.make_groups(3, NOISE.get(preset, 0.5))
    settings = {f"correction_{name}": getattr(correction, name) for name in ("low", "high", "veto")}
    loss = loss_config(preset, correction=correction.name, **settings)
    step, baselines = Step(groups, loss, None), [None] * len(groups)
    value, gradient = step.whole()
    expected = reference.loss(preset, groups, step.new, baselines, MAX_LENGTH, loss.dual_clip, correction)
    differences = reference.gradient(
        preset, groups, baselines, MAX_LENGTH, loss.dual_clip, step=1e-7, correction=correction
    )
    # the weights are float32, and terms cancel in the loss
    assert value == pytest.approx(expected, rel=1e-6, abs=1e-7)
    np.testing.assert_allclose(gradient, differences, atol=1e-6 * np.abs(differences).max() + 2e-9)
    found = step.corrections
    touched = found.truncated_T if "tis" in correction.name else found.masked_T
    assert 0.1 < touched.mean() < 0.9 and (found.vetoed_T.any() or not correction.veto)


def test_a_micro_batch_without_rows_adds_nothing() -> None:
    for preset in PRESET_NAMES:
        logp = torch.zeros(0, dtype=torch.float64, requires_grad=True)
        empty = torch.zeros(0, dtype=torch.float64)
        rows = LossRows(empty, empty, empty.long(), old_logp=empty)
        loss = policy_loss(logp, None, rows, loss_config(preset)).share
        loss.backward()
        assert loss.item() == 0.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kl_coefficient": 0.1}, "loss.kl_coefficient is set, but LossRows.ref_logp was not given"),
        ({"entropy_coefficient": 0.1}, "loss.entropy_coefficient is set, but entropy was not given"),
        ({"kl_coefficient": 0.1, "kl_estimator": None}, "loss.kl_estimator is None"),
        ({"clip_low": None}, "loss.clip_low is not set"),
        ({"objective": None}, "loss.objective is not set"),
    ],
)
def test_what_a_setting_needs_is_named(changes: dict, message: str) -> None:
    logp, rows = random_rows()
    if changes.get("kl_estimator", "") is None:
        rows = replace(rows, ref_logp=rows.old_logp)
    with pytest.raises(ValueError, match=message):
        policy_loss(logp, None, rows, loss_config("grpo", **changes))


def test_shapes_and_types_are_checked() -> None:
    _, rows = random_rows()
    with pytest.raises(ValueError, match=r"LossRows.weight has shape \(3,\)"):
        replace(rows, weight=rows.weight[:3])
    with pytest.raises(ValueError, match="LossRows.response has dtype torch.int32"):
        replace(rows, response=rows.response.int())


@pytest.mark.parametrize("preset", PRESET_NAMES)
def test_without_old_log_probs_the_ratio_starts_at_one(preset: str) -> None:
    logp, rows = random_rows()
    own = policy_loss(logp, None, replace(rows, old_logp=None), loss_config(preset))
    given = policy_loss(logp, None, replace(rows, old_logp=logp.detach()), loss_config(preset))
    assert own.share == given.share and torch.equal(own.old_logp, logp.detach())
    gradients = [torch.autograd.grad(x.share, logp)[0] for x in (own, given)]
    assert torch.equal(*gradients) and (gradients[0] != 0).all()
