"""Settings of what is learned from rollouts: reward, BICC, RCC, loss."""

from dataclasses import dataclass
from typing import Literal


@dataclass
class RewardConfig:
    """Scoring of a finished response."""

    verifier: str = "math"
    """Name of a registered verifier (megatron_bicc.rewards)."""
    answer: Literal["auto", "boxed", "answer_line", "hash", "last_number"] = "auto"
    r"""How a final answer is marked: \boxed{X}, Answer: X, #### X, the last number; auto: the first three."""
    threshold: float = 0.5
    """A rollout is correct if its reward is greater than this."""
    overlong_penalty: float | None = None
    """Taken off the reward of a response as long as max_new_tokens; 0 is off; None: as the preset says."""
    overlong_share: float = 0.2
    """Last share of rollout.max_new_tokens, over which that penalty grows from 0."""


@dataclass
class BiccConfig:
    """Bilateral Context Conditioning (arXiv 2603.13134, section on BICC)."""

    enabled: bool | None = None
    """Train each response with the opposite partition in its context; None: as the preset says."""
    denominator: Literal["plain", "conditioned"] = "plain"
    """pi_old of the ratio: given the prompt alone (the paper), or given the same context."""
    weight: float = 1.0
    """w in J = w J_bicc + (1 - w) J_grpo, within [0, 1]; 1 is the paper."""
    context_ratio: float = 0.4
    """Share of train.max_sequence_tokens that a context may take, within [0, 1]."""
    context_source: Literal["partition", "pair"] = "partition"
    """The whole opposite partition in one context, or one opposite rollout a context."""
    truncation: Literal["equal", "in_order"] = "equal"
    """Opposite rollouts share the budget equally, or fill it one after another."""
    keep: Literal["head", "tail", "both_ends"] = "head"
    """The part of a truncated opposite rollout that stays."""
    wrong_header: str = "\n\nAn incorrect attempt:\n"
    """Text before each incorrect rollout in a context."""
    right_header: str = "\n\nA correct attempt:\n"
    """Text before each correct rollout in a context."""
    answer_header: str = "\n\nAnswer:\n"
    """Text between the context and the response that is trained."""


@dataclass
class RccConfig:
    """Reward-Confidence Correction of the baseline (arXiv 2603.13134, section on RCC)."""

    enabled: bool | None = None
    """Correct the baseline; None: as the preset says."""
    form: Literal["first_order", "exact"] = "first_order"
    """E[R] + 2 Cov(R, delta) (the paper), or the self-normalised E[w^2 R] / E[w^2]."""
    delta: Literal["token_mean", "sequence_sum"] = "token_mean"
    """Confidence of a rollout: mean or sum of its token log-ratios."""
    reference: Literal["ref", "rollout"] = "ref"
    """Log-ratio against the frozen reference policy, or against the rollout engine."""


@dataclass
class LossConfig:
    """The three choices that make a variant, and what may be added. None: as the preset says."""

    advantage: Literal["normalized", "centered"] | None = None
    """(r - b) / std of the group, or r - b."""
    objective: Literal["token", "sequence", "geometric", "aspo", "cispo"] | None = None
    """Ratio and clip: see docs/algorithms.md."""
    clip_low: float | None = None
    """Lower clip distance: the ratio is clipped at 1 - clip_low (geometric: log ratio at -clip_low)."""
    clip_high: float | None = None
    """Upper clip distance: the ratio is clipped at 1 + clip_high (geometric: log ratio at clip_high)."""
    dual_clip: float | None = None
    """c > 1 bounds the loss of a token with negative advantage by c |A|; 0 is off."""
    aggregation: Literal["sequence_mean", "constant", "token_mean"] | None = None
    """Mean over tokens then sequences; sum over tokens by max_new_tokens; mean over all tokens."""
    kl_coefficient: float = 0.0
    """Weight of the KL penalty towards the reference policy; 0 is off."""
    kl_estimator: Literal["k1", "k2", "k3"] | None = None
    """Estimator of that KL; None: the one whose gradient is the KL's, k2 in the loss, k1 in the reward."""
    kl_in: Literal["loss", "reward"] = "loss"
    """Where the penalty enters: at every token, also of groups without contrast; or off the reward."""
    entropy_coefficient: float = 0.0
    """Weight of the entropy bonus, also in groups without contrast; 0 is off."""
    tis_cap: float = 0.0
    """Cap c of the truncated importance weight min(pi_old / mu, c) for engine mismatch; 0 is off."""
