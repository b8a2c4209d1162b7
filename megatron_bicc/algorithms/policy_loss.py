"""The policy loss of a micro-batch: objective, KL, entropy bonus.

With x = log pi_theta - log pi_old of a token and A its advantage, the built-in clipped objectives differ only
in where they average over the response:

    token      -A exp(clip(x))          PPO clip per token (GRPO, Dr. GRPO, DAPO)
    sequence   -A exp(clip(mean x))     GSPO, arXiv 2507.18071
    geometric  -A exp(mean clip(x))     GMPO, arXiv 2507.20673

clip is one-sided, as min(rho A, clip(rho) A) is: from above for A > 0, from below for A < 0.

The KL to the reference policy is estimated from the log-probs of the sampled tokens. Training depends on the
estimator's gradient, not on its value (arXiv 2506.09477, 2510.01555). For samples of pi:

    in the loss     k1  E grad = 0: noise
                    k2  E grad = grad KL(pi || pi_ref) of the token, given those before it
                    k3  E grad = grad KL(pi_ref || pi) of the token: the other direction
    in the reward   k1  E grad = -grad KL(pi || pi_ref) of the whole response
                    k2, k3  neither

Shape suffixes: A response rows of the micro-batch, R rollouts, T response tokens of the step.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_bicc import device, plugins
from megatron_bicc.algorithms.flat_arrays import segment_sums
from megatron_bicc.algorithms.policy_loss_cuda import policy_loss_kernel
from megatron_bicc.collective import SumOverRanks
from megatron_bicc.config import KlEstimator, LossConfig
from megatron_bicc.errors import UserError, first_line

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClipBounds:
    """Clip edges of the log ratio; a ratio at an edge is not clipped."""

    low: float
    """Below it a token of negative advantage is clipped; -inf: never"""
    high: float
    """Above it a token of positive advantage is clipped"""
    dual: float
    """Above it a token of negative advantage is clipped by the dual clip; inf: never"""


def clip_bounds(loss: LossConfig) -> ClipBounds:
    """Returns the edges of a resolved LossConfig. Raises ValueError if a setting is still None."""
    for name in ("objective", "clip_low", "clip_high", "dual_clip"):
        if getattr(loss, name) is None:
            raise ValueError(f"loss.{name} is not set; fill it in with algorithms.presets.resolve")
    dual = math.log(loss.dual_clip) if loss.dual_clip else math.inf
    if loss.objective == "geometric":
        return ClipBounds(-loss.clip_low, loss.clip_high, dual)
    low = math.log1p(-loss.clip_low) if loss.clip_low < 1.0 else -math.inf
    return ClipBounds(low, math.log1p(loss.clip_high), dual)


def kl_penalty(logp: Tensor, ref_logp: Tensor, estimator: KlEstimator) -> Tensor:
    """Estimates KL(pi || pi_ref) per token from samples of pi; same shape as logp, differentiable in it.

    With d = log pi_ref - log pi: "k1" -d and "k3" exp(d) - 1 - d, whose values are unbiased, and "k2"
    d^2 / 2, whose gradient is. John Schulman, "Approximating KL Divergence", 2020.
    """
    d = ref_logp - logp
    if estimator == "k1":
        return -d
    if estimator == "k2":
        return 0.5 * d.square()
    if estimator == "k3":
        return torch.expm1(d) - d
    raise ValueError(f"loss.kl_estimator is {estimator}; fill it in with algorithms.presets.resolve")


def kl_in_reward(
    rewards_R: np.ndarray,
    old_logp_T: np.ndarray,
    ref_logp_T: np.ndarray,
    offsets_R: np.ndarray,
    coefficient: float,
    estimator: KlEstimator,
) -> np.ndarray:
    """Returns the reward less coefficient times the summed token KL(old || reference): float64 [R]."""
    old, ref = (torch.from_numpy(np.asarray(logp, dtype=np.float64)) for logp in (old_logp_T, ref_logp_T))
    penalty_R = segment_sums(kl_penalty(old, ref, estimator).numpy(), offsets_R)
    return np.asarray(rewards_R, dtype=np.float64) - coefficient * penalty_R


@dataclass(frozen=True)
class SplitResponses:
    """The ranks over which context parallel divides the rows of a micro-batch's responses."""

    group: dist.ProcessGroup
    count: int
    """Responses of the micro-batch, on all ranks together"""


@dataclass(frozen=True)
class LossRows:
    """Inputs of the loss per response row, besides the policy's outputs; [A] each, on one device.

    Floating tensors are float32 or float64 without gradient. All rows of a response are in one micro-batch;
    under context parallel, `split`, each rank has some of them.
    """

    advantage: Tensor
    """Advantage of the row's rollout"""
    weight: Tensor
    """Weight of the row in the whole step's loss (advantages.token_weights, times mixing, pair scale and
    the weight of loss.correction)"""
    response: Tensor
    """int64: index of the row's response segment in this micro-batch. It rises, so the rows of a response are
    adjacent; without gaps unless `split`"""
    old_logp: Tensor | None = None
    """Log-prob of the row's token in the ratio's denominator; None: the current policy is the old policy, so
    the ratio is 1"""
    regularisation: Tensor | None = None
    """Weight of the row's KL and entropy in the step's loss (advantages.token_weights); None: the rows
    have neither, as under a context"""
    ref_logp: Tensor | None = None
    """Log-prob under the reference policy; needed for a KL in the loss"""
    split: SplitResponses | None = None
    """None: all rows of every response are here"""

    def __post_init__(self) -> None:
        for field in fields(self):
            tensor = getattr(self, field.name)
            if isinstance(tensor, Tensor) and tensor.shape != self.advantage.shape:
                raise ValueError(
                    f"LossRows.{field.name} has shape {tuple(tensor.shape)}, "
                    f"but advantage has {tuple(self.advantage.shape)}"
                )
        if self.response.dtype != torch.int64:
            raise ValueError(f"LossRows.response has dtype {self.response.dtype}; it must be torch.int64")


@dataclass(frozen=True)
class TokenLoss:
    """An objective's loss per row and its clip masks; [A] each."""

    loss: Tensor
    """Floating, differentiable in logp; unweighted: the caller multiplies it by LossRows.weight"""
    low: Tensor
    """bool: clipped, or masked, at the lower edge"""
    high: Tensor
    """bool: clipped, or masked, at the upper edge"""
    dual: Tensor
    """bool: clipped by the dual clip"""


class Objective(Protocol):
    """Turns log-probs and advantages into a loss per token; `loss.objective` names one."""

    def __call__(self, logp: Tensor, old_logp: Tensor, rows: LossRows, loss: LossConfig) -> TokenLoss:
        """Returns the loss of every response row of a micro-batch.

        Args:
            logp: float [A], log-prob of each row's token under the policy in training. The gradient must flow
                through it, and through nothing else.
            old_logp: float [A] without gradient, the ratio's denominator: log ratio = logp - old_logp. At the
                first update of a batch of rollouts it may be logp.detach().
            rows: advantage, response and weight of each row. rows.weight is the row's weight in the whole
                step's loss, over all micro-batches and ranks, with that of loss.correction. Do not apply it:
                policy_loss does, with KL and entropy.
            loss: the resolved settings; clip_bounds(loss) gives the edges in the log ratio.

        The rows of a micro-batch depend on packing and layout, so a loss that is not a function of the row's
        own response would make the gradient depend on them, too. A response's rows may lie on several
        ranks: `response_mean` averages over all of them.
        """


@dataclass(frozen=True)
class PolicyLoss:
    """A micro-batch's part of the step's loss."""

    share: Tensor
    """Scalar, a sum over rows"""
    low: Tensor
    """bool [A], as are the next two: the masks of TokenLoss"""
    high: Tensor
    dual: Tensor
    old_logp: Tensor
    """float [A]: log-probs in the ratios' denominators"""


def policy_loss(logp: Tensor, entropy: Tensor | None, rows: LossRows, loss: LossConfig) -> PolicyLoss:
    """Computes a micro-batch's part of the step's loss.

    Sums over rows: weight times token loss, plus regularisation times (KL term - entropy term). The parts of
    all micro-batches and ranks add up to the step's loss, and their gradients to its gradient. Where csrc's
    kernels compute, a kernel does so for the built-in objectives.

    Args:
        logp: float [A], log-probs of the rows' tokens under the policy in training.
        entropy: float [A] with its gradient, the policy's entropy at each row; needed for an entropy bonus.
        rows: of the same length.
        loss: resolved (presets.resolve).

    Raises:
        ValueError: a setting left None, or rows without what a setting needs.
        UserError: a user's loss.objective returned something unusable.
    """
    _check_terms(entropy, rows, loss)
    old_logp = logp.detach() if rows.old_logp is None else rows.old_logp
    if device.kernels() is not None and loss.objective in OBJECTIVES:
        return _by_kernel(logp, entropy, rows, loss, old_logp)
    tokens = load_objective(loss)(logp, old_logp, rows, loss)
    total = (rows.weight * tokens.loss).sum()
    if rows.regularisation is None:
        return PolicyLoss(total, tokens.low, tokens.high, tokens.dual, old_logp)
    if loss.kl_coefficient and loss.kl_in == "loss":
        kl = kl_penalty(logp, rows.ref_logp, loss.kl_estimator)
        total = total + loss.kl_coefficient * (rows.regularisation * kl).sum()
    if loss.entropy_coefficient:
        total = total - loss.entropy_coefficient * (rows.regularisation * entropy).sum()
    return PolicyLoss(total, tokens.low, tokens.high, tokens.dual, old_logp)


def _by_kernel(
    logp: Tensor, entropy: Tensor | None, rows: LossRows, loss: LossConfig, old_logp: Tensor
) -> PolicyLoss:
    """Computes what `policy_loss` does, for a built-in objective, in csrc's kernel."""
    bounds = clip_bounds(loss)
    regularised = rows.regularisation is not None
    has_kl = regularised and loss.kl_in == "loss" and loss.kl_coefficient > 0
    mean = None
    if rows.split is not None and loss.objective in AVERAGED:
        # the kernel averages over rows of this rank only
        mean = response_mean(AVERAGED[loss.objective](logp - old_logp, rows.advantage, bounds), rows)
    share, _, _, masks = policy_loss_kernel(
        logp,
        entropy,
        rows.old_logp,
        rows.advantage,
        rows.weight,
        rows.response,
        rows.regularisation,
        rows.ref_logp,
        mean,
        objective=loss.objective,
        low=bounds.low,
        high=bounds.high,
        dual=bounds.dual,
        kl_coefficient=loss.kl_coefficient if has_kl else 0.0,
        # without a KL any will do; None with one is refused as kl_penalty does
        kl_estimator=str(loss.kl_estimator) if has_kl else "k1",
        entropy_coefficient=loss.entropy_coefficient if regularised else 0.0,
    )
    return PolicyLoss(share, *masks, old_logp)


def load_objective(loss: LossConfig) -> Objective:
    """Returns the objective that loss.objective names: a built-in, or a user's by import path.

    A user's objective is checked at every call. Raises UserError for an unknown name or a path that cannot be
    imported.
    """
    name = loss.objective
    if name is None:
        raise ValueError("loss.objective is not set; fill it in with algorithms.presets.resolve")
    if not plugins.is_import_path(name):
        if name not in OBJECTIVES:
            raise UserError(
                f"loss.objective is {name!r}; it must be one of {', '.join(OBJECTIVES)}, or an import path "
                "package.module:name or path/to/file.py:name"
            )
        return OBJECTIVES[name]
    objective = plugins.load("loss.objective", name)

    def checked(logp: Tensor, old_logp: Tensor, rows: LossRows, loss: LossConfig) -> TokenLoss:
        try:
            found = objective(logp, old_logp, rows, loss)
        except Exception as error:
            # the traceback goes to the log of this rank; the command ends with one line
            logger.exception("loss.objective is %r; it raised", name)
            raise UserError(
                f"loss.objective is {name!r}; it raised {type(error).__name__}: {first_line(error)}"
            ) from error
        _check_objective(name, logp, found)
        return found

    return checked


def _check_objective(name: str, logp: Tensor, found: TokenLoss) -> None:
    returned = f"loss.objective is {name!r}; it returned"
    if not isinstance(found, TokenLoss):
        raise UserError(f"{returned} a {type(found).__name__}; return algorithms.policy_loss.TokenLoss")
    for field in fields(found):
        tensor = getattr(found, field.name)
        if not isinstance(tensor, Tensor):
            raise UserError(f"{returned} a {type(tensor).__name__} for {field.name}; return a tensor")
        if tensor.shape != logp.shape:
            raise UserError(
                f"{returned} {field.name} of shape {list(tensor.shape)}; return one value per response row, "
                f"{list(logp.shape)}"
            )
        if field.name != "loss" and tensor.dtype != torch.bool:
            raise UserError(f"{returned} {field.name} of dtype {tensor.dtype}; return torch.bool")
    if logp.requires_grad and len(logp) and not found.loss.requires_grad:
        raise UserError(f"{returned} a loss without a gradient; compute it from logp")
    # a log-prob that is not finite is not the objective's fault: the learner's check reports it
    bad = ~torch.isfinite(found.loss.detach()) & torch.isfinite(logp.detach())
    if bad.any():
        value = float(found.loss.detach()[bad][0])
        raise UserError(f"{returned} the loss {value} for a finite log-prob; return finite values")


def _check_terms(entropy: Tensor | None, rows: LossRows, loss: LossConfig) -> None:
    """Raises ValueError if a term of the loss lacks its input."""
    has_kl = loss.kl_coefficient and loss.kl_in == "loss"
    if rows.regularisation is None:
        return
    needed = (
        ("kl_coefficient", has_kl, "LossRows.ref_logp", rows.ref_logp),
        ("entropy_coefficient", loss.entropy_coefficient, "entropy", entropy),
    )
    for setting, is_set, name, tensor in needed:
        if is_set and tensor is None:
            raise ValueError(f"loss.{setting} is set, but {name} was not given")


def _clip(log_ratio: Tensor, advantage: Tensor, bounds: ClipBounds) -> Tensor:
    """Bounds x from above where A >= 0, from below where A < 0; the gradient is 0 beyond an edge only."""
    return torch.where(advantage < 0, log_ratio.clamp(min=bounds.low), log_ratio.clamp(max=bounds.high))


def _clipped(log_ratio: Tensor, advantage: Tensor, bounds: ClipBounds) -> tuple[Tensor, Tensor]:
    """Returns (low, high): masks of the rows that `_clip` moves."""
    return (log_ratio < bounds.low) & (advantage < 0), (log_ratio > bounds.high) & (advantage > 0)


def _dual_clip(log_ratio: Tensor, advantage: Tensor, bounds: ClipBounds) -> Tensor:
    """Bounds the loss by c |A| where A < 0 (arXiv 1912.09729)."""
    return torch.where(advantage < 0, log_ratio.clamp(max=bounds.dual), log_ratio)


def _dual_clipped(log_ratio: Tensor, advantage: Tensor, bounds: ClipBounds) -> Tensor:
    return (log_ratio > bounds.dual) & (advantage < 0)


def response_mean(values: Tensor, rows: LossRows) -> Tensor:
    """Returns at each row the mean of `values`, [A], over its response: [A], differentiable.

    Collective over the context-parallel ranks if they split responses, and so is its backward pass.
    """
    # One slot per row, although there are fewer responses: counting them would synchronise with the device.
    zeros = values.new_zeros(len(values) if rows.split is None else rows.split.count)
    sums = zeros.index_add(0, rows.response, values)
    counts = zeros.index_add(0, rows.response, torch.ones_like(values))
    if rows.split is not None:
        sums, counts = SumOverRanks.apply(torch.stack([sums, counts]), rows.split.group)
    return sums[rows.response] / counts[rows.response]


def _ppo(log_ratio: Tensor, advantage: Tensor, bounds: ClipBounds) -> TokenLoss:
    clipped = _clip(log_ratio, advantage, bounds)
    loss = -advantage * _dual_clip(clipped, advantage, bounds).exp()
    low, high = _clipped(log_ratio, advantage, bounds)
    return TokenLoss(loss, low, high, _dual_clipped(log_ratio, advantage, bounds))


def _token(logp: Tensor, old_logp: Tensor, rows: LossRows, loss: LossConfig) -> TokenLoss:
    return _ppo(logp - old_logp, rows.advantage, clip_bounds(loss))


def _sequence(logp: Tensor, old_logp: Tensor, rows: LossRows, loss: LossConfig) -> TokenLoss:
    bounds = clip_bounds(loss)
    mean = response_mean(AVERAGED["sequence"](logp - old_logp, rows.advantage, bounds), rows)
    return _ppo(mean, rows.advantage, bounds)


def _geometric(logp: Tensor, old_logp: Tensor, rows: LossRows, loss: LossConfig) -> TokenLoss:
    log_ratio, advantage, bounds = logp - old_logp, rows.advantage, clip_bounds(loss)
    mean = response_mean(AVERAGED["geometric"](log_ratio, advantage, bounds), rows)
    low, high = _clipped(log_ratio, advantage, bounds)
    token_loss = -advantage * _dual_clip(mean, advantage, bounds).exp()
    return TokenLoss(token_loss, low, high, _dual_clipped(mean, advantage, bounds))


def _aspo(logp: Tensor, old_logp: Tensor, rows: LossRows, loss: LossConfig) -> TokenLoss:
    """Masks tokens beyond the clip interval and flips the ratio for A > 0 (arXiv 2510.06062).

    The flipped ratio pi_old pi / sg(pi^2) has the value v = pi_old / pi and the gradient v grad log pi. Its
    dual clip is soft: it bounds the value and keeps the gradient. For A < 0 ratio and dual clip are PPO's.
    """
    log_ratio, advantage, bounds = logp - old_logp, rows.advantage, clip_bounds(loss)
    negative = advantage < 0
    flipped = (-log_ratio.detach()).clamp(max=bounds.dual) + (logp - logp.detach())
    log_weight = torch.where(negative, _dual_clip(log_ratio, advantage, bounds), flipped)
    masked = torch.where(negative, log_ratio < bounds.low, log_ratio > bounds.high)
    low, high = _clipped(log_ratio, advantage, bounds)
    dual = _dual_clipped(log_ratio, advantage, bounds) | ((-log_ratio > bounds.dual) & (advantage > 0))
    return TokenLoss(-advantage * log_weight.exp().masked_fill(masked, 0.0), low, high, dual)


def _cispo(logp: Tensor, old_logp: Tensor, rows: LossRows, loss: LossConfig) -> TokenLoss:
    """Computes -A sg(clip(rho)) log pi (arXiv 2506.13585); the dual clip bounds the weight where A < 0.

    Both edges apply to either sign of the advantage. Only the weight is clipped: no token loses its gradient.
    """
    log_ratio, advantage, bounds = (logp - old_logp).detach(), rows.advantage, clip_bounds(loss)
    log_weight = log_ratio.clamp(bounds.low, bounds.high)
    token_loss = -advantage * _dual_clip(log_weight, advantage, bounds).exp() * logp
    dual = _dual_clipped(log_weight, advantage, bounds)
    return TokenLoss(token_loss, log_ratio < bounds.low, log_ratio > bounds.high, dual)


AVERAGED: MappingProxyType[str, Callable[[Tensor, Tensor, ClipBounds], Tensor]] = MappingProxyType(
    {"sequence": lambda log_ratio, advantage, bounds: log_ratio, "geometric": _clip}
)
"""What the objectives of whole responses average, by the log ratio, the advantage and the edges"""
OBJECTIVES: MappingProxyType[str, Objective] = MappingProxyType(
    {"token": _token, "sequence": _sequence, "geometric": _geometric, "aspo": _aspo, "cispo": _cispo}
)
"""The built-in objectives by the name that loss.objective takes."""
