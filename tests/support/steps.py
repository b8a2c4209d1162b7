"""Inputs of steps that tests run by the package and by the reference: configurations, groups, policies."""

import copy
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from megatron_bicc.algorithms.presets import resolve
from megatron_bicc.config import Config
from megatron_bicc.data.prompts import Prompt
from megatron_bicc.metrics import Stopwatch
from megatron_bicc.model.policy import Policy
from megatron_bicc.rollout.types import Group, Sample
from megatron_bicc.training.learner import Learner, StepResult
from megatron_bicc.weights.hf_weights import hf_tensors, load_policy
from support.hf_reference import ANSWER, EOS, RIGHT, WRONG, Example, response_logp

HEADERS = {"wrong": WRONG, "right": RIGHT, "answer": ANSWER}
TOKENIZER = SimpleNamespace(
    eos_token_id=EOS, get_added_vocab=dict, encode=lambda text, add_special_tokens: HEADERS[text]
)
"""Test double of a tokenizer: it only encodes the headers, to given token ids."""


def make_config(path: Path, algorithm: str, **bicc_or_rcc: object) -> Config:
    """Returns a configuration in fp32, with micro-batches so small that a step has several."""
    config = Config(algorithm=algorithm)
    config.model.path, config.model.dtype = str(path), "float32"
    config.rollout.temperature = 0.8
    config.train.max_sequence_tokens, config.train.max_tokens_per_microbatch = 256, 256
    config.optimizer.lr, config.optimizer.clip_grad = 0.0, 0.0
    config.bicc.wrong_header, config.bicc.right_header, config.bicc.answer_header = HEADERS
    config.bicc.context_ratio = 0.8
    for name, value in bicc_or_rcc.items():
        section, field = name.split("__")
        setattr(getattr(config, section), field, value)
    return resolve(config)


OUTCOMES = ((1, 0, 0, 1, 1), (0, 0, 0, 1, 0, 0), (1, 1, 1), (1, 0))
"""Rewards of groups: mixed, one right in six, all right"""


def make_examples(
    model: PreTrainedModel, temperature: float, outcomes: Sequence[Sequence[int]] = OUTCOMES
) -> list[Example]:
    """Returns groups of unequal sizes and lengths, each with a response of one token."""
    rng = np.random.default_rng(3)
    groups = []
    for i, rewards in enumerate(outcomes):
        prompt = rng.integers(2, 90, size=4 + 5 * (i % 4)).tolist()
        responses = [rng.integers(2, 90, size=rng.integers(1, 14)).tolist() + [EOS] for _ in rewards]
        responses[-1] = responses[-1][:1]
        with torch.no_grad():
            mu = [response_logp(model, prompt, o, temperature) + 0.1 * torch.randn(len(o)) for o in responses]
        groups.append(Example(prompt, responses, [float(r) for r in rewards], mu))
    return groups


def to_groups(examples: list[Example]) -> list[Group]:
    """Converts the examples to the package's types."""
    return [
        Group(
            Prompt(i, [], np.array(e.prompt, np.int32), "", "", {}),
            [
                Sample(np.array(o, np.int32), mu.numpy(), "stop", 0)
                for o, mu in zip(e.responses, e.rollout_logp, strict=True)
            ],
            [""] * len(e.responses),
            np.array(e.rewards, np.float32),
        )
        for i, e in enumerate(examples)
    ]


def perturb(model: PreTrainedModel) -> PreTrainedModel:
    """Returns a policy that differs from the reference."""
    torch.manual_seed(5)
    moved = copy.deepcopy(model)
    for parameter in moved.parameters():
        parameter.data += 0.03 * torch.randn_like(parameter)
    return moved


CASES = {
    "grpo": ("grpo", {}),
    "bicc_plain": ("grpo+bicc", {}),
    "bicc_conditioned": ("grpo+bicc", {"bicc__denominator": "conditioned"}),
    "rcc_first_order": ("grpo+rcc", {}),
    "rcc_exact": ("grpo+rcc", {"rcc__form": "exact", "rcc__delta": "sequence_sum"}),
    "rcc_rollout": ("grpo+rcc", {"rcc__reference": "rollout"}),
    "bicc_rcc_mixed": ("bicc", {"bicc__weight": 0.5}),
    "bicc_rcc_mixed_conditioned": ("bicc", {"bicc__weight": 0.3, "bicc__denominator": "conditioned"}),
}
"""Name: (algorithm, settings as section__name)"""
KL = {"loss__kl_coefficient": 0.7, "loss__kl_estimator": "k2"}
ENTROPY = {"loss__entropy_coefficient": 0.4}
REGULARISED = {
    "grpo_kl": ("grpo", KL),
    "grpo_entropy": ("grpo", ENTROPY),
    "bicc_kl_entropy": ("grpo+bicc", KL | ENTROPY),
    "bicc_k3_conditioned": (
        "bicc",
        KL | {"loss__kl_estimator": "k3", "bicc__denominator": "conditioned"},
    ),
    "bicc_kl_entropy_mixed": ("bicc", KL | ENTROPY | {"bicc__weight": 0.5}),
    "bicc_kl_mixed_conditioned": (
        "bicc",
        KL | {"bicc__weight": 0.3, "bicc__denominator": "conditioned"},
    ),
}
"""Likewise, with KL penalties and entropy bonuses as large as the policy's loss"""


BOUNDS = {"loss__correction_low": 0.7, "loss__correction_high": 1.4}
VETO = {"loss__correction_veto": 0.4}
CORRECTED = {
    "grpo_token_tis": ("grpo", BOUNDS | {"loss__correction": "token_tis"}),
    "bicc_sequence_tis": ("grpo+bicc", BOUNDS | {"loss__correction": "sequence_tis"}),
    "grpo_token_mask": ("grpo", BOUNDS | VETO | {"loss__correction": "token_mask"}),
    "bicc_sequence_mask_kl_mixed": (
        "bicc",
        BOUNDS | VETO | KL | ENTROPY | {"loss__correction": "sequence_mask", "bicc__weight": 0.5},
    ),
    "grpo_geometric_mask": (
        "grpo",
        {"loss__correction": "geometric_mask", "loss__correction_low": 0.95, "loss__correction_high": 1.1},
    ),
}
"""Likewise, with every correction; bounds and veto apply to some of the tokens"""
ROUTERS = {"loss__load_balancing_coefficient": 0.3, "loss__z_loss_coefficient": 0.02}
ROUTED = {
    "grpo_routers": ("grpo", ROUTERS),
    "bicc_routers_mixed": ("bicc", ROUTERS | {"bicc__weight": 0.3, "bicc__denominator": "conditioned"}),
}
"""Likewise, with the losses of routers"""


def hf_model(policy: Policy, directory: Path) -> PreTrainedModel:
    """Returns the policy's weights as a Hugging Face model, after exporting them to the new `directory`."""
    directory.mkdir()
    shutil.copy(Path(policy.hf_config.name_or_path) / "config.json", directory)
    tensors = {name: x.clone().contiguous() for name, x in hf_tensors(policy.modules, policy.hf_config)}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def second_update(
    learner: Learner, groups: list[Group], directory: Path
) -> tuple[StepResult, PreTrainedModel]:
    """Takes two updates on all of `groups`. Returns the second one's result, and the policy before it, which
    the first has moved away from the old policy."""
    learner.config.train.updates_per_step, learner.config.optimizer.lr = 2, 1e-3
    start = learner.policy.host_copy()
    learner.policy = load_policy(learner.config)
    learner.policy.set_weights(start)
    learner.policy.optimizer.reload_model_params()
    moved: list[PreTrainedModel] = []
    take = learner.policy.update

    def update() -> float:
        norm = take()
        moved.append(hf_model(learner.policy, directory / f"after_{len(moved) + 1}"))
        return norm

    learner.policy.update = update
    _, result = learner.step(groups + groups, Stopwatch())
    return result, moved[0]


def hf_gradients(policy: Policy) -> dict[str, torch.Tensor]:
    """Returns the last step's gradients under Hugging Face names, whole, on every rank. Collective.

    Overwrites the policy's weights with them.
    """
    buckets = [
        (buckets.intra_distributed_optimizer_instance_group, bucket)
        for chunk in policy.chunks
        for buckets in (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups)
        for bucket in buckets.buckets
    ]
    for group, bucket in buckets:
        # each rank of the group, another one for experts, has the sum in its own share of the buffer
        own = bucket.grad_data.chunk(group.size())[group.rank()].clone()
        dist.all_gather_into_tensor(bucket.grad_data, own, group=group)
    policy.set_weights(
        [parameter.main_grad for module in policy.modules for parameter in module.parameters()]
    )
    return {name: x.clone() for name, x in hf_tensors(policy.modules, policy.hf_config)}


FUSED_EXPERTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def named_gradients(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The reference's gradients under the same names; in memory transformers fuses a layer's experts."""
    found: dict[str, torch.Tensor] = {}
    for name, gradient in ((n, p.grad) for n, p in model.named_parameters() if p.grad is not None):
        experts, _, kind = name.rpartition(".")
        if kind not in FUSED_EXPERTS:
            found[name] = gradient
            continue
        for e, expert in enumerate(gradient):
            names = [f"{experts}.{e}.{part}.weight" for part in FUSED_EXPERTS[kind]]
            found |= zip(names, expert.chunk(len(names)), strict=True)
    return found
