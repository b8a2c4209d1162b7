"""Probes that explain the results: the effect of a context on log-probs, and the noise of each estimator.

They use transformers' forward passes, one row per response, and autograd, and update no weights. The rollouts
of a probe are drawn from one policy, so all comparisons are on the same texts.

Shape suffixes: B groups with contrast, R rollouts of a group, W parameters.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from megatron_bicc import device
from megatron_bicc.algorithms.advantages import rcc_baseline, sequence_delta
from megatron_bicc.algorithms.policy_loss import LossRows, policy_loss
from megatron_bicc.algorithms.presets import resolve
from megatron_bicc.config import BiccConfig, Config, DeltaKind, RccForm, RewardConfig
from megatron_bicc.data.prompts import load_prompts
from megatron_bicc.rewards.registry import get_verifier
from megatron_bicc.rollout.collect import GroupSampler
from megatron_bicc.rollout.local import LocalEngine
from megatron_bicc.rollout.types import Group, Sampling

PROMPTS, GROUP_SIZE, MAX_PROMPT, MAX_NEW = 64, 8, 32, 32
CONTEXTS = ("none", "own", "shuffled")
RCC = tuple((form, delta) for delta in ("token_mean", "sequence_sum") for form in ("first_order", "exact"))
"""Pairs of the settings rcc.form and rcc.delta"""
ESTIMATORS = ("grpo", *(f"rcc {form}, {delta}" for form, delta in RCC), "bicc plain", "bicc conditioned")


@dataclass(frozen=True)
class Texts:
    """A group with contrast as token ids."""

    prompt: list[int]
    responses: list[list[int]]
    right_R: np.ndarray
    """bool [R]"""


@dataclass(frozen=True)
class Headers:
    """The delimiters of a context as token ids."""

    wrong: list[int]
    right: list[int]
    answer: list[int]


def draw_groups(policy: Path, data: Path, seed: int) -> tuple[list[Texts], Headers]:
    """Samples the first PROMPTS prompts of a file with a Hugging Face policy, temperature 1. Collective."""
    tokenizer = AutoTokenizer.from_pretrained(policy)
    prompts = load_prompts(data, tokenizer, MAX_PROMPT)[:PROMPTS]
    engine = LocalEngine(str(policy), tokenizer, torch.float32, device.device(), batch_size=256)
    sampler = GroupSampler(
        engine, get_verifier(RewardConfig()), tokenizer, Sampling(1.0, MAX_NEW), GROUP_SIZE
    )
    drawn = sampler.collect(prompts, (seed, "probe"))
    return [texts for group in drawn if (texts := _texts(group)) is not None], _headers(tokenizer)


def _texts(group: Group) -> Texts | None:
    right_R = group.rewards > 0.5
    if right_R.all() or not right_R.any():
        return None
    return Texts(group.prompt.token_ids.tolist(), [s.token_ids.tolist() for s in group.samples], right_R)


def _headers(tokenizer: PreTrainedTokenizerBase) -> Headers:
    bicc = BiccConfig()
    texts = (bicc.wrong_header, bicc.right_header, bicc.answer_header)
    return Headers(*(tokenizer.encode(text, add_special_tokens=False) for text in texts))


def context(source: Texts, for_right: bool, headers: Headers) -> list[int]:
    """Returns the context of the right (wrong) responses of a group: its wrong (right) attempts, uncut."""
    header = headers.wrong if for_right else headers.right
    opposite = [o for o, right in zip(source.responses, source.right_R, strict=True) if right != for_right]
    # an attempt's last token is the end token, which contexts leave out
    return [token for o in opposite for token in header + o[:-1]] + headers.answer


def log_probs(model: PreTrainedModel, prefixes: list[list[int]], responses: list[list[int]]) -> list[Tensor]:
    """Returns the log-prob of every token of each response after its prefix: float32 [its length] each."""
    rows = [torch.tensor(p + o) for p, o in zip(prefixes, responses, strict=True)]
    ids = pad_sequence(rows, batch_first=True)
    # padding is on the right, so causality hides it
    logp = model(input_ids=ids[:, :-1]).logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    return [
        logp[i, len(p) - 1 : len(p) + len(o) - 1]
        for i, (p, o) in enumerate(zip(prefixes, responses, strict=True))
    ]


def load(policy: Path) -> PreTrainedModel:
    """Loads a Hugging Face directory in float32."""
    return AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32).eval()


@torch.no_grad()
def reading(model: PreTrainedModel, groups: list[Texts], headers: Headers) -> dict[str, dict[str, float]]:
    """Returns, by context, the log-probs of right and wrong responses and their difference in a group.

    Means over groups, in nats. none: the prompt only. own: the group's own opposite attempts, as in training.
    shuffled: those of the next group.
    """
    return {kind: _reading(model, groups, headers, kind) for kind in CONTEXTS}


def _reading(model: PreTrainedModel, groups: list[Texts], headers: Headers, kind: str) -> dict[str, float]:
    right_B, wrong_B = [], []
    for group, following in zip(groups, groups[1:] + groups[:1], strict=True):
        source = following if kind == "shuffled" else group
        shown = [[] if kind == "none" else context(source, bool(right), headers) for right in group.right_R]
        logp = log_probs(model, [group.prompt + c for c in shown], group.responses)
        total_R = np.array([float(x.sum()) for x in logp])
        right_B.append(total_R[group.right_R].mean())
        wrong_B.append(total_R[~group.right_R].mean())
    right, wrong = float(np.mean(right_B)), float(np.mean(wrong_B))
    return {"right": right, "wrong": wrong, "margin": right - wrong}


def estimators(
    model: PreTrainedModel, start: PreTrainedModel, groups: list[Texts], headers: Headers
) -> dict[str, dict[str, float]]:
    """Measures noise and direction of the first on-policy gradient of ESTIMATORS; the reference is `start`.

    variance: trace of the covariance over groups of a group's gradient; relative: that over the squared norm
    of the expected gradient; cosine: of the expected gradient with GRPO's. Norm and inner products of
    expectations are unbiased: products of two different groups only.
    """
    parts = {name: [] for name in ESTIMATORS}
    for group in groups:
        for name, gradient_W in zip(ESTIMATORS, _gradients(model, start, group, headers), strict=True):
            parts[name].append(gradient_W)
    return _moments({name: torch.stack(gradients) for name, gradients in parts.items()})


def _moments(parts: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """Returns the figures of each estimator; parts: [B, W] by name."""
    grpo_BW = parts["grpo"]
    moments = {}
    for name, own_BW in parts.items():
        norm2 = _between(own_BW, own_BW)
        variance = float(own_BW.var(0).sum())
        cosine = _between(own_BW, grpo_BW) / (norm2 * _between(grpo_BW, grpo_BW)) ** 0.5
        moments[name] = {"variance": variance, "relative": variance / norm2, "cosine": cosine}
    return moments


def _between(a_BW: Tensor, b_BW: Tensor) -> float:
    """Returns the unbiased inner product of the expectations of a and b."""
    count = len(a_BW)
    return float((a_BW.sum(0) @ b_BW.sum(0) - (a_BW * b_BW).sum()) / (count * (count - 1)))


def _gradients(
    model: PreTrainedModel, start: PreTrainedModel, group: Texts, headers: Headers
) -> list[Tensor]:
    """Returns one group's gradient [W] of each of ESTIMATORS."""
    plain = [group.prompt] * len(group.responses)
    shown = [group.prompt + context(group, bool(right), headers) for right in group.right_R]
    new = log_probs(model, plain, group.responses)
    old = [x.detach() for x in new]
    with torch.no_grad():
        reference = log_probs(start, plain, group.responses)
    rewards_R = group.right_R.astype(float)
    mean, std = rewards_R.mean(), rewards_R.std()
    corrected = [_baseline(rewards_R, old, reference, form, delta) for form, delta in RCC]

    def gradient(logp: list[Tensor], denominator: list[Tensor], baseline: float) -> Tensor:
        return _gradient(model, logp, denominator, (rewards_R - baseline) / std)

    by_baseline = [gradient(new, old, b) for b in (mean, *corrected)]
    given = log_probs(model, shown, group.responses)
    own = [x.detach() for x in given]
    return [*by_baseline, gradient(given, old, mean), gradient(given, own, mean)]


def _baseline(
    rewards_R: np.ndarray, old: list[Tensor], reference: list[Tensor], form: RccForm, delta: DeltaKind
) -> float:
    """Returns the group's b* of RCC."""
    offsets_R = np.cumsum([0] + [len(x) for x in old])
    delta_R = sequence_delta(torch.cat(old).numpy(), torch.cat(reference).numpy(), offsets_R, delta)
    return float(rcc_baseline(rewards_R, delta_R, np.array([0, len(old)]), form).baseline_B[0])


def _gradient(
    model: PreTrainedModel, logp: list[Tensor], old: list[Tensor], advantage_R: np.ndarray
) -> Tensor:
    """Returns the gradient [W] of the group's loss with the clipping of the bicc preset."""
    lengths = torch.tensor([len(x) for x in logp])
    rows = LossRows(
        old_logp=torch.cat(old),
        advantage=torch.tensor(advantage_R, dtype=torch.float32).repeat_interleave(lengths),
        weight=(1.0 / lengths / len(logp)).repeat_interleave(lengths),
        response=torch.arange(len(logp)).repeat_interleave(lengths),
    )
    loss = policy_loss(torch.cat(logp), None, rows, resolve(Config(algorithm="grpo+bicc")).loss).share
    parameters = list(model.parameters())
    return parameters_to_vector(torch.autograd.grad(loss, parameters, retain_graph=True)).detach()
