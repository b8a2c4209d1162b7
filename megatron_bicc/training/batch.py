"""A step's rollouts as flat arrays, and its micro-batches as the gradient pass reads them.

Shape suffixes: B groups, R rollouts, T response tokens (of a step or of a part of it); A response rows of a
micro-batch; E elements and S segments of a flat array; X kinds of values per token.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from megatron_bicc import device
from megatron_bicc.algorithms.advantages import Advantages, TokenLogProbs
from megatron_bicc.algorithms.flat_arrays import check_log_probs, check_offsets, check_rewards
from megatron_bicc.algorithms.policy_loss import LossRows, SplitResponses
from megatron_bicc.config import Config
from megatron_bicc.data.encoding import end_token_ids
from megatron_bicc.model.megatron_settings import row_alignment
from megatron_bicc.model.packed_batch import PackedBatch
from megatron_bicc.packing.pack import pack
from megatron_bicc.packing.pack_cuda import DeviceRollouts, pack_on_device
from megatron_bicc.packing.types import Layout, PackingSettings, RolloutBatch, StepPlan
from megatron_bicc.rollout.types import Group, Sample
from megatron_bicc.training.routing import engine_table, select_experts


@dataclass(frozen=True)
class StepBatch:
    """Rollouts as flat arrays. `collate` makes and checks them; later functions do not check again."""

    rollouts: RolloutBatch
    rollout_logp_T: np.ndarray
    """float32 [T]: log-probs computed by the rollout engine"""
    versions_T: np.ndarray
    """int32 [T]: version of the weights that sampled each token"""
    experts: np.ndarray | None = None
    """Experts that the rollout engine chose: [training.routing.TokenRows, layers, experts per token]"""

    @property
    def num_groups(self) -> int:
        """Number of groups, B."""
        return len(self.rollouts.group_offsets_B) - 1

    @property
    def lengths_R(self) -> np.ndarray:
        """int64 [R]: tokens of each response."""
        return np.diff(self.rollouts.offsets_R)

    def select(self, groups: np.ndarray) -> "StepBatch":
        """Returns the batch of the given groups (indices), in the given order."""
        if np.array_equal(groups, np.arange(self.num_groups)):
            return self
        r = self.rollouts
        prompt_tokens, prompt_offsets_B = _select(r.prompt_tokens, r.prompt_offsets_B, groups)
        members, group_offsets_B = _select(np.arange(len(r.rewards_R)), r.group_offsets_B, groups)
        tokens, offsets_R = _select(r.tokens, r.offsets_R, members)
        logp_T, _ = _select(self.rollout_logp_T, r.offsets_R, members)
        versions_T, _ = _select(self.versions_T, r.offsets_R, members)
        chosen = RolloutBatch(
            prompt_tokens, prompt_offsets_B, tokens, offsets_R, group_offsets_B, r.rewards_R[members]
        )
        experts = None if self.experts is None else select_experts(self.experts, r, groups)
        return StepBatch(chosen, logp_T, versions_T, experts)


def _select(
    values_E: np.ndarray, offsets_S: np.ndarray, segments: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (values of the chosen segments, their offsets)."""
    parts = [values_E[offsets_S[s] : offsets_S[s + 1]] for s in segments]
    return np.concatenate([values_E[:0], *parts]), _offsets([len(part) for part in parts])


def collate(groups: list[Group]) -> StepBatch:
    """Concatenates groups, in their order, to flat arrays; the only place where rollouts are checked.

    Raises ValueError for a group, prompt or response without items and for log-probs, versions or experts
    that do not match the tokens; NotFiniteError for a reward or a log-prob of the engine that is not finite.
    """
    samples = [sample for group in groups for sample in group.samples]
    prompts = [group.prompt.token_ids for group in groups]
    rollouts = RolloutBatch(
        prompt_tokens=_concatenate(prompts, np.int32),
        prompt_offsets_B=_offsets([len(p) for p in prompts]),
        tokens=_concatenate([s.token_ids for s in samples], np.int32),
        offsets_R=_offsets([len(s.token_ids) for s in samples]),
        group_offsets_B=_offsets([len(group.samples) for group in groups]),
        rewards_R=_concatenate([group.rewards for group in groups], np.float32),
    )
    log_probs = _concatenate([s.log_probs for s in samples], np.float32)
    check_offsets(
        rollouts.prompt_offsets_B, len(rollouts.prompt_tokens), "prompt_offsets_B", "prompt of group"
    )
    check_offsets(rollouts.group_offsets_B, len(rollouts.rewards_R), "group_offsets_B", "group")
    check_offsets(rollouts.offsets_R, len(log_probs), "offsets_R", "rollout")
    check_rewards(rollouts.rewards_R)
    check_log_probs(log_probs, rollouts.offsets_R, "log-prob of the rollout engine")
    return StepBatch(rollouts, log_probs, _versions(samples), engine_table(groups, rollouts))


def _versions(samples: list[Sample]) -> np.ndarray:
    """Returns the version of the weights that sampled each token: int32 [T]."""
    found = []
    for i, sample in enumerate(samples):
        length, versions = len(sample.token_ids), sample.token_versions()
        if len(versions) != length:
            raise ValueError(f"rollout {i} has {length} tokens, but {len(versions)} weight versions")
        found.append(versions)
    return _concatenate(found, np.int32)


def _offsets(lengths: list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def _concatenate(parts: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype), *parts]).astype(dtype, copy=False)


def packing_settings(
    config: Config, hf_config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[PackingSettings, PackingSettings]:
    """Returns the packer's settings for (plain layout, bilateral layout) of a resolved configuration."""

    def encode(text: str) -> tuple[int, ...]:
        return tuple(tokenizer.encode(text, add_special_tokens=False))

    plain = PackingSettings(
        layout="plain",
        max_sequence_tokens=config.train.max_sequence_tokens,
        max_tokens_per_microbatch=config.train.max_tokens_per_microbatch,
        vocab_size=hf_config.vocab_size,
        reward_threshold=config.reward.threshold,
        context_ratio=config.bicc.context_ratio,
        context_source=config.bicc.context_source,
        truncation=config.bicc.truncation,
        keep=config.bicc.keep,
        wrong_header=encode(config.bicc.wrong_header),
        right_header=encode(config.bicc.right_header),
        answer_header=encode(config.bicc.answer_header),
        end_token_ids=end_token_ids(hf_config, tokenizer, config.model.path),
        alignment=row_alignment(config),
        context_ranks=config.parallel.context,
        token_cost=6 * hf_config.hidden_size,
    )
    return plain, replace(plain, layout="bilateral")


class Packer:
    """Packs the rollouts of an optimizer step in one layout after another: this rank's rows of them.

    csrc's kernel fills the rows where it is built; else csrc fills them on the host and they are copied.
    """

    def __init__(self, rollouts: RolloutBatch) -> None:
        """rollouts: whole on every rank."""
        self._rollouts = rollouts
        self._on_device = DeviceRollouts.upload(rollouts, device.device()) if device.kernels() else None

    def pack(self, settings: PackingSettings) -> tuple[StepPlan, list[PackedBatch]]:
        """Returns the plan of all ranks and this rank's rows of its micro-batches, on the device.

        Raises ValueError as packing.pack.pack does.
        """
        size = parallel_state.get_data_parallel_world_size()
        rank, where = parallel_state.get_data_parallel_rank(), device.device()
        context_rank = parallel_state.get_context_parallel_rank()
        if self._on_device is None:
            packed = pack(self._rollouts, settings, size, rank, context_rank=context_rank)
            return packed.plan, [PackedBatch.make(m, where) for m in packed.micro_batches]
        plan, rows = pack_on_device(self._rollouts, self._on_device, settings, size, rank, context_rank)
        return plan, PackedBatch.make_all(plan.ranks[rank], rows, context_rank, where)


@dataclass(frozen=True)
class StepValues:
    """What the loss needs of every token and rollout of an optimizer step, on the device."""

    old_T: Tensor
    """float32 [T]: log-probs of the old policy given the prompt alone"""
    correction_T: Tensor
    """float32 [T] (algorithms.corrections)"""
    ref_T: Tensor | None
    """float32 [T]: log-probs of the reference policy, where there is one"""
    advantage_R: Tensor
    """float32 [R]"""
    token_weight_R: Tensor
    """float64 [R], over the whole optimizer step (algorithms.advantages.token_weights)"""

    @classmethod
    def upload(
        cls,
        log_probs: TokenLogProbs,
        correction_T: np.ndarray,
        advantages: Advantages,
        token_weight_R: np.ndarray,
    ) -> "StepValues":
        """Copies the values to the device, in one transfer."""
        values = {
            "old_T": log_probs.old_T,
            "correction_T": correction_T,
            "advantage_R": advantages.advantage_R.astype(np.float32),
            "token_weight_R": token_weight_R,
        }
        if log_probs.ref_T is not None:
            values["ref_T"] = log_probs.ref_T
        uploaded = dict(zip(values, device.upload(list(values.values()), device.device()), strict=True))
        return cls(**{"ref_T": None, **uploaded})


@dataclass(frozen=True)
class TrainBatch:
    """This rank's rows of a micro-batch with the inputs of their loss, on the device."""

    packed: PackedBatch
    layout: Layout
    share: float
    """Weight of the layout in the policy loss: bicc.weight, or 1 - bicc.weight"""
    rows: LossRows

    @classmethod
    def make(
        cls,
        packed: PackedBatch,
        layout: Layout,
        share: float,
        old_logp_A: Tensor | None,
        values: StepValues,
    ) -> "TrainBatch":
        """Gathers each row's values from those of the optimizer step.

        old_logp_A: log-probs in the ratio's denominator; None: the ratio is 1.
        """
        context = parallel_state.get_context_parallel_group()
        # scale: a rollout trained by several segments (context_source=pair) counts once in total
        weight_A = values.token_weight_R[packed.rollout_A] * packed.scale_A.double()
        rows = LossRows(
            advantage=values.advantage_R[packed.rollout_A],
            weight=(weight_A * share * values.correction_T[packed.token_A]).float(),
            response=packed.response_A,
            old_logp=old_logp_A,
            # KL and entropy are of the policy given the prompt alone, in full whatever bicc.weight is: the
            # tokens were sampled so, and only then are the estimators expectations under the policy
            regularisation=weight_A.float() if layout == "plain" else None,
            ref_logp=None if values.ref_T is None else values.ref_T[packed.token_A],
            split=SplitResponses(context, packed.num_responses) if context.size() > 1 else None,
        )
        return cls(packed, layout, share, rows)


def gather_tokens(
    found: Iterable[tuple[PackedBatch, Tensor | None]], kinds: int, num_tokens: int
) -> np.ndarray:
    """Returns each token's values on every rank: float32 [kinds, T]. Collective.

    found: this rank's rows of its micro-batches with their values, float or bool [kinds, A]; None except on
    the last pipeline stage. A token that several segments train gets the mean of its values, one that no
    micro-batch has gets NaN.
    """
    # double precision: the order in which ranks and segments are added must not change the float32 result
    sums = torch.zeros(kinds + 1, num_tokens, dtype=torch.float64, device=device.device())
    for packed, values_XA in found:
        if values_XA is not None:
            sums[:kinds].index_add_(1, packed.token_A, values_XA.double())
            sums[kinds].index_add_(0, packed.token_A, torch.ones_like(packed.token_A, dtype=torch.float64))
    sums = _sum_over_ranks(sums)
    # the last row counts segments: 1 for most tokens, 0 / 0 = NaN for a token that is not trained
    return (sums[:kinds] / sums[kinds]).float().cpu().numpy()


def sum_scalar(value: float) -> float:
    """Sums a number over all ranks but tensor-parallel ones; earlier pipeline stages pass 0. Collective."""
    return float(_sum_over_ranks(torch.tensor(value, dtype=torch.float64, device=device.device())))


def sum_over_all(values: Tensor) -> Tensor:
    """Sums over all ranks, in place, values of which no two ranks hold the same part. Collective."""
    dist.all_reduce(values)
    return values


def _sum_over_ranks(values: Tensor) -> Tensor:
    # not over tensor-parallel ranks: they hold the same values
    dist.all_reduce(values, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    dist.all_reduce(values, group=parallel_state.get_pipeline_model_parallel_group())
    return values
