"""Tests the kernel of the policy loss against plain torch and its autograd, emulated and on a GPU.

Shape suffixes: A response rows.
"""

import math
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from megatron_bicc import device
from megatron_bicc.algorithms.policy_loss import OBJECTIVES, LossRows, PolicyLoss, policy_loss
from megatron_bicc.algorithms.policy_loss_cuda import policy_loss_kernel
from megatron_bicc.config import LossConfig

LENGTHS = (1, 20, 7, 2)
CASES = [
    (False, ("loss", 0.0), 0.0, False),
    (False, ("loss", 0.1), 0.3, True),
    (False, ("loss", 0.1), 0.3, False),
    (True, ("loss", 0.1), 0.0, True),
    (True, ("reward", 0.1), 0.3, True),
    (False, ("reward", 0.1), 0.0, True),
]
"""ratio of 1; KL; entropy bonus; regularised rows"""


def loss_config(objective: str, **changes) -> LossConfig:
    """Returns settings whose every edge is met by `make_rows`."""
    narrow = {"sequence": 0.05, "geometric": 0.2}.get(objective, 0.2)
    settings = {"clip_low": narrow, "clip_high": 1.4 * narrow, "dual_clip": 1.1, "kl_estimator": "k3"}
    return LossConfig(objective=objective, **{**settings, **changes})


def make_rows(
    dtype: torch.dtype, where: torch.device, seed: int, lengths: tuple[int, ...] = LENGTHS
) -> tuple[Tensor, Tensor, LossRows]:
    """Returns log-probs and entropies, with gradients, and rows with ratios on both sides of every edge."""
    generator = torch.Generator().manual_seed(seed)
    rows, responses = sum(lengths), len(lengths)

    def normal(size: int = rows) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    old = -normal().abs()
    # the mean over a response must pass the edges, too
    shift = torch.repeat_interleave(0.3 * normal(responses), torch.tensor(lengths))
    found = {
        "advantage": torch.repeat_interleave(normal(responses), torch.tensor(lengths)),
        "weight": normal().abs(),
        "response": torch.repeat_interleave(torch.arange(responses), torch.tensor(lengths)),
        "old_logp": old,
        "regularisation": normal().abs(),
        "ref_logp": old + 0.3 * normal(),
    }
    to = {name: x.to(where, None if name == "response" else dtype) for name, x in found.items()}
    logp, entropy = ((x).to(where, dtype).requires_grad_() for x in (old + shift + 0.5 * normal(), normal()))
    return logp, entropy, LossRows(**to)


def computed(
    logp: Tensor, entropy: Tensor, rows: LossRows, loss: LossConfig
) -> tuple[PolicyLoss, Tensor, Tensor | None]:
    """Returns the loss, and 3 times its gradients with respect to log-probs and entropies."""
    logp, entropy = (x.detach().requires_grad_() for x in (logp, entropy))
    found = policy_loss(logp, entropy, rows, loss)
    (3 * found.share).backward()
    return found, logp.grad, entropy.grad


def by_torch(monkeypatch: pytest.MonkeyPatch, *args) -> tuple[PolicyLoss, Tensor, Tensor | None]:
    with monkeypatch.context() as patch:
        patch.setattr(device, "_kernels", None)
        return computed(*args)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_value_gradients_and_masks_equal_those_of_torch(
    objective, dtype, close, kernel_device, monkeypatch
) -> None:
    masked = torch.zeros(3, dtype=torch.bool)
    for seed, case in enumerate(CASES):
        ratio_is_1, (kl_in, kl_coefficient), entropy_coefficient, regularised = case
        loss = loss_config(
            objective,
            kl_in=kl_in,
            kl_coefficient=kl_coefficient,
            entropy_coefficient=entropy_coefficient,
            kl_estimator=("k1", "k2", "k3")[seed % 3],
        )
        logp, entropy, rows = make_rows(dtype, kernel_device, seed)
        rows = replace(rows, old_logp=None) if ratio_is_1 else rows
        rows = rows if regularised else replace(rows, regularisation=None)
        own, own_gradient, own_entropy = computed(logp, entropy, rows, loss)
        expected, gradient, of_entropy = by_torch(monkeypatch, logp, entropy, rows, loss)
        torch.testing.assert_close(own.share, expected.share, rtol=close, atol=close * 100)
        torch.testing.assert_close(own_gradient, gradient, rtol=close, atol=close)
        if of_entropy is None:
            assert own_entropy is None or not own_entropy.any()
        else:
            torch.testing.assert_close(own_entropy, of_entropy, rtol=close, atol=close)
        for i, edge in enumerate(("low", "high", "dual")):
            assert torch.equal(getattr(own, edge), getattr(expected, edge)), (case, edge)
            masked[i] |= getattr(own, edge).any().cpu()
        assert torch.equal(own.old_logp, expected.old_logp)
    assert masked.all(), "the rows must meet every edge"


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_every_estimator_of_the_kl(estimator, kernel_device, monkeypatch) -> None:
    loss = loss_config("token", kl_coefficient=2.0, kl_estimator=estimator)
    args = *make_rows(torch.float64, kernel_device, 0), loss
    (own, own_gradient, _), (expected, gradient, _) = computed(*args), by_torch(monkeypatch, *args)
    torch.testing.assert_close(own.share, expected.share, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(own_gradient, gradient, rtol=1e-12, atol=1e-12)


def test_responses_longer_than_a_block_and_the_same_sums_every_time(kernel_device, monkeypatch) -> None:
    args = *make_rows(torch.float64, kernel_device, 0, lengths=(3, 300)), loss_config("geometric")
    first, second = (computed(*args) for _ in range(2))
    assert torch.equal(first[0].share, second[0].share) and torch.equal(first[1], second[1])
    expected, gradient, _ = by_torch(monkeypatch, *args)
    torch.testing.assert_close(first[0].share, expected.share, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(first[1], gradient, rtol=1e-12, atol=1e-12)


def test_a_micro_batch_without_rows(kernel_device) -> None:
    logp, entropy, rows = make_rows(torch.float32, kernel_device, 0)
    nothing = LossRows(
        **{field.name: None if (x := getattr(rows, field.name)) is None else x[:0] for field in fields(rows)}
    )
    share, gradient, _ = computed(logp[:0], entropy[:0], nothing, loss_config("token"))
    assert share.share == 0 and len(gradient) == 0


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("broken", [math.nan, -math.inf])
def test_a_broken_log_prob_reaches_the_loss_where_it_does_in_torch(
    objective, broken, kernel_device, monkeypatch
) -> None:
    for sign in (1.0, -1.0):
        logp, entropy, rows = make_rows(torch.float32, kernel_device, 0)
        rows = replace(rows, advantage=sign * rows.advantage.abs())
        with torch.no_grad():
            logp[10] = broken
        args = logp, entropy, rows, loss_config(objective)
        own, expected = computed(*args)[0].share, by_torch(monkeypatch, *args)[0].share
        assert own.isfinite() == expected.isfinite(), (sign, own, expected)


def test_a_missing_input_and_a_foreign_dtype_are_named(kernel_device) -> None:
    logp, entropy, rows = make_rows(torch.float32, kernel_device, 0)
    with pytest.raises(ValueError, match="LossRows.ref_logp was not given"):
        policy_loss(logp, entropy, replace(rows, ref_logp=None), loss_config("token", kl_coefficient=0.1))
    with pytest.raises(ValueError, match="entropy was not given"):
        policy_loss(logp, None, rows, loss_config("token", entropy_coefficient=0.1))
    with pytest.raises(ValueError, match="LossRows.weight has dtype torch.float64"):
        policy_loss(logp, entropy, replace(rows, weight=rows.weight.double()), loss_config("token"))


def test_the_operator_is_registered_for_tracing_and_autograd(kernel_device) -> None:
    logp, entropy, rows = make_rows(torch.float64, kernel_device, 0)
    tensors = [logp, entropy, *(getattr(rows, name) for name in ORDER)]
    settings = ["geometric", -0.2, 0.2, 1.0, 0.1, "k2", 0.3]
    for mean in (None, torch.zeros_like(logp, requires_grad=True)):
        checked = torch.library.opcheck(policy_loss_kernel, (*tensors, mean, *settings))
        assert set(checked.values()) == {"SUCCESS"}


ORDER = (
    "old_logp",
    "advantage",
    "weight",
    "response",
    "regularisation",
    "ref_logp",
)
"""Of LossRows' fields in the operator's signature"""


def test_a_compiled_loss_is_one_graph(kernel_device, monkeypatch) -> None:
    args = *make_rows(torch.float64, kernel_device, 0), loss_config("token")
    expected, gradient, _ = computed(*args)
    compiled = torch.compile(policy_loss_kernel, fullgraph=True, backend="aot_eager")
    logp, entropy, rows = args[:3]
    logp = logp.detach().requires_grad_()
    fields_ = [getattr(rows, name) for name in ORDER]
    low, high, dual = math.log1p(-0.2), math.log1p(0.28), math.log(1.1)
    share, _, _, masks = compiled(logp, entropy, *fields_, None, "token", low, high, dual, 0.0, "k1", 0.0)
    (3 * share).backward()
    assert torch.equal(share, expected.share) and torch.equal(logp.grad, gradient)
    assert torch.equal(masks[1], expected.high)
