"""One optimizer step of every preset, split in many ways, for the tests of the normalisation contract."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import count
from pathlib import Path

import numpy as np
import torch
from megatron.core import parallel_state

from megatron_bicc.algorithms.advantages import TokenLogProbs
from megatron_bicc.algorithms.presets import PRESETS
from megatron_bicc.config import Config
from megatron_bicc.metrics import Stopwatch
from megatron_bicc.packing.pack import plan_step
from megatron_bicc.rollout.types import Group
from megatron_bicc.training.batch import StepBatch, collate, packing_settings
from megatron_bicc.training.learner import Learner, PackedLayout
from megatron_bicc.weights.hf_files import SafetensorsDirectory
from megatron_bicc.weights.hf_weights import HfWeights, load_policy
from support.models import make_model
from support.steps import ROUTED, TOKENIZER, hf_gradients, make_config, make_examples, perturb, to_groups

ALGORITHMS = tuple(f"{preset}{additions}" for preset in PRESETS for additions in ("", "+bicc+rcc"))
OUTCOMES = (*3 * ((1, 0, 0, 1, 1), (0, 1, 0, 1, 0, 0), (1, 0), (0, 0, 1)), (1, 1, 1))
"""Rewards of 13 groups; the last has no contrast, but counts in every denominator"""

LONGEST_ROW = 32
"""Smallest budget of a micro-batch in rows: a prompt and a response"""


@dataclass(frozen=True)
class Step:
    """The outcome of a step."""

    loss: float
    gradients: dict[str, torch.Tensor]
    micro_batches: list[int]
    """Number per data-parallel rank, in the bilateral layout if there are two layouts"""
    experts: dict[str, float]
    """StepResult.experts"""


EXPERT_CASES = {
    "off": ("qwen3_moe", "grpo", {}),
    "routers": ("qwen3_moe", *ROUTED["bicc_routers_mixed"]),
    "shared": ("qwen2_moe", *ROUTED["grpo_routers"]),
}
"""Name: (model, algorithm, settings) of a step of a policy with experts; shared: with one for all tokens"""


class OffPolicyLearner(Learner):
    """Uses the engine's log-probs as the old policy's: ratios differ from 1, so that clipping acts.

    The engine's then differ from them by a function of each token, so that a correction acts.
    """

    def _log_probs(
        self, batch: StepBatch, plain: PackedLayout
    ) -> tuple[TokenLogProbs, torch.Tensor, list[torch.Tensor] | None]:
        log_probs, load_XY, recorded = super()._log_probs(batch, plain)
        old_T = batch.rollout_logp_T
        rollout_T = old_T + np.float32(0.2) * np.sin(40 * old_T)
        return replace(log_probs, old_T=old_T, rollout_T=rollout_T), load_XY, recorded


class Stepper:
    """Takes steps of every preset, with one policy under the existing process groups."""

    def __init__(self, inputs: Path, **parallel: int) -> None:
        """inputs: the directory that `save_inputs` wrote."""
        self.path, self.parallel = inputs / "reference", parallel
        self.groups: list[Group] = torch.load(inputs / "groups.pt", weights_only=False)
        self.dp_size = parallel_state.get_data_parallel_world_size()
        self.policy = load_policy(self._configure("grpo"))
        self.reference = self.policy.host_copy()
        moved = SafetensorsDirectory(inputs / "moved")
        HfWeights(self.policy.hf_config, moved).load(self.policy.modules)
        self.moved = self.policy.host_copy()

    def step(self, algorithm: str, micro_batches: int, order: Sequence[int] = range(len(OUTCOMES))) -> Step:
        """Takes a step with that many micro-batches per rank, over the groups in that order."""
        config = self._configure(algorithm)
        config.train.max_tokens_per_microbatch = self._budgets(config.bicc.enabled)[micro_batches]
        self.policy.set_weights(self.reference)
        learner = OffPolicyLearner(config, self.policy, TOKENIZER)
        self.policy.set_weights(self.moved)
        (result,) = learner.step([self.groups[i] for i in order], Stopwatch())
        assert result.trained[0].layout == ("bilateral" if config.bicc.enabled else "plain")
        masked_T = result.corrections.masked_T
        assert 0 < masked_T.mean() < 1 if "+" in algorithm else not masked_T.any()
        ranks = result.trained[0].plan.ranks
        return Step(result.loss, hf_gradients(self.policy), [len(rank) for rank in ranks], result.experts)

    def _configure(self, algorithm: str) -> Config:
        """Returns a configuration; with BICC and RCC, every other term of the loss is on as well."""
        terms = {
            "loss__kl_coefficient": 0.1,
            "loss__entropy_coefficient": 0.01,
            "loss__correction": "sequence_mask",
            "loss__correction_low": 0.7,
            "loss__correction_high": 1.5,
        }
        config = make_config(self.path, algorithm, **(terms if "+" in algorithm else {}))
        config.train.max_sequence_tokens, config.bicc.context_ratio = 64, 0.25  # contexts are cut
        config.parallel = replace(config.parallel, **self.parallel)
        return config

    @cache  # noqa: B019 a test keeps one
    def _budgets(self, bicc: bool) -> dict[int, int]:
        """Returns, for each possible number of micro-batches per rank, a token budget that gives it."""
        config = self._configure("bicc" if bicc else "grpo")
        settings = packing_settings(config, self.policy.hf_config, TOKENIZER)[bicc]
        rollouts = collate(self.groups[:-1]).rollouts
        found: dict[int, int] = {}
        for budget in count(LONGEST_ROW, 2):
            each = budget // config.parallel.context  # of the ranks that share a micro-batch
            plan = plan_step(rollouts, replace(settings, max_tokens_per_microbatch=each), self.dp_size)
            found.setdefault(len(plan.ranks[0]), each)
            if 1 in found:
                return found


def expert_step(inputs: Path, case: str, tokens: int, **settings: object) -> Step:
    """Takes a step of a policy with experts, with micro-batches of at most that many tokens."""
    model, algorithm, choices = EXPERT_CASES[case]
    config = make_config(inputs / model, algorithm, **(choices | settings))
    config.train.max_tokens_per_microbatch = tokens
    policy = load_policy(config)
    learner = Learner(config, policy, TOKENIZER)
    HfWeights(policy.hf_config, SafetensorsDirectory(inputs / f"{model}_moved")).load(policy.modules)
    examples = torch.load(inputs / f"{model}.pt", weights_only=False)
    (result,) = learner.step(to_groups(examples), Stopwatch())
    ranks = result.trained[0].plan.ranks
    return Step(result.loss, hf_gradients(policy), [len(rank) for rank in ranks], result.experts)


def save_inputs(root: Path) -> None:
    """Saves the reference policy, the policy in training, which differs from it, and the groups; of policies
    with experts likewise."""
    model = make_model("qwen3_tied")
    model.save_pretrained(root / "reference")
    perturb(model).save_pretrained(root / "moved")
    torch.save(to_groups(make_examples(model, 0.8, OUTCOMES)), root / "groups.pt")
    for name in {name for name, _, _ in EXPERT_CASES.values()}:
        model = make_model(name, layers=4)
        model.save_pretrained(root / name)
        perturb(model).save_pretrained(root / f"{name}_moved")
        torch.save(make_examples(model, 0.8), root / f"{name}.pt")
