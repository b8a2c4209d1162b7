"""A training step in plain Hugging Face models and autograd, one row per response: slow and obvious.

It uses nothing of the package but its configuration classes.
"""

import math
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from megatron_bicc.config import Config

EOS = 1
WRONG, RIGHT, ANSWER = [90, 91], [92], [93, 94, 95]


@dataclass
class Example:
    """A group: a prompt, its responses, their rewards, and the engine's log-probs of the responses."""

    prompt: list[int]
    responses: list[list[int]]
    rewards: list[float]
    rollout_logp: list[torch.Tensor]


def response_logp(
    model: PreTrainedModel, prefix: list[int], response: list[int], temperature: float
) -> torch.Tensor:
    """Returns log p of each response token, by one unpacked forward pass."""
    log_p = next_token_log_probs(model, prefix, response, temperature)
    return log_p.gather(-1, torch.tensor(response)[:, None])[:, 0]


def next_token_log_probs(
    model: PreTrainedModel, prefix: list[int], response: list[int], temperature: float
) -> torch.Tensor:
    """Returns log p of every token at each position of the response, [response length, vocabulary]."""
    logits = model(torch.tensor([prefix + response])).logits[0, len(prefix) - 1 : -1]
    return (logits / temperature).log_softmax(-1)


def context_of(group: Example, i: int) -> list[int]:
    """Returns the context: every opposite response after its header, without end token or budget."""
    right = group.rewards[i] > 0.5
    tokens: list[int] = []
    for response, reward in zip(group.responses, group.rewards, strict=True):
        if (reward > 0.5) != right:
            body = response[:-1] if response[-1] == EOS else response
            tokens += (WRONG if right else RIGHT) + body
    return tokens + ANSWER


def baseline(group: Example, delta: list[float], config: Config) -> float:
    """Returns the mean reward, or b* of RCC."""
    rewards, n = group.rewards, len(group.rewards)
    mean = sum(rewards) / n
    if not config.rcc.enabled:
        return mean
    if config.rcc.form == "exact":
        w2 = [math.exp(2 * d) for d in delta]
        return sum(w * r for w, r in zip(w2, rewards, strict=True)) / sum(w2)
    mean_delta = sum(delta) / n
    return mean + 2 * sum((r - mean) * (d - mean_delta) for r, d in zip(rewards, delta, strict=True)) / n


def token_loss(logp: torch.Tensor, old: torch.Tensor, advantage: float, config: Config) -> torch.Tensor:
    """Returns PPO's clipped loss of each token, with the dual clip if it is on."""
    ratio = (logp - old).exp()
    clipped = ratio.clamp(1 - config.loss.clip_low, 1 + config.loss.clip_high)
    loss = -torch.minimum(ratio * advantage, clipped * advantage)
    if config.loss.dual_clip and advantage < 0:
        loss = torch.minimum(loss, torch.tensor(-config.loss.dual_clip * advantage))
    return loss


def correction_weights(old: torch.Tensor, engine: torch.Tensor, config: Config) -> torch.Tensor:
    """Returns the weight of each token of one response, from log-probs given its prompt alone."""
    loss = config.loss
    ratio = (old.double() - engine.double()).exp()
    if loss.correction_veto and ratio.min() < loss.correction_veto:
        return torch.zeros_like(ratio)
    if loss.correction == "none":
        return torch.ones_like(ratio)
    low, high = loss.correction_low, loss.correction_high
    if loss.correction.startswith("sequence"):
        ratio = ratio.prod().expand_as(ratio)
    elif loss.correction.startswith("geometric"):
        ratio = ratio.prod().pow(1 / len(ratio)).expand_as(ratio)
    if loss.correction.endswith("tis"):
        return ratio.clamp(low, high)
    inside = (ratio >= low) & (ratio <= high)
    return inside.double() if loss.correction == "geometric_mask" else ratio * inside


def regularisation(
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    prompt: list[int],
    response: list[int],
    config: Config,
) -> torch.Tensor:
    """Returns KL penalty less entropy bonus at each token of a response, given the prompt alone."""
    temperature, loss = config.rollout.temperature, config.loss
    log_p = next_token_log_probs(policy, prompt, response, temperature)
    total = loss.entropy_coefficient * (log_p.exp() * log_p).sum(-1)
    if loss.kl_coefficient and loss.kl_in == "loss":
        with torch.no_grad():
            ref = response_logp(reference, prompt, response, temperature)
        d = ref - log_p.gather(-1, torch.tensor(response)[:, None])[:, 0]
        total = total + loss.kl_coefficient * {"k2": d**2 / 2, "k3": d.exp() - 1 - d}[loss.kl_estimator]
    return total


def router_logits(model: PreTrainedModel, prefix: list[int], response: list[int]) -> list[torch.Tensor]:
    """Returns each layer's router logits at the positions that predict the response, [length, experts]."""
    found = model(torch.tensor([prefix + response]), output_router_logits=True).router_logits
    return [layer[len(prefix) - 1 : -1] for layer in found]


def expert_counts(model: PreTrainedModel, groups: list[Example]) -> torch.Tensor:
    """Returns how many response tokens chose each expert, given the prompt alone: [layers, experts]."""
    c = model.config
    counts = torch.zeros(c.num_hidden_layers, c.num_experts)
    for group in groups:
        for response in group.responses:
            with torch.no_grad():
                layers = router_logits(model, group.prompt, response)
            for layer, logits in enumerate(layers):
                for token in logits:
                    for expert in token.topk(c.num_experts_per_tok).indices:
                        counts[layer, expert] += 1
    return counts


def router_losses(
    policy: PreTrainedModel, old: PreTrainedModel, groups: list[Example], config: Config
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (load balancing, z-loss) of each layer over groups with contrast, without coefficients.

    A token counts by the weight of its sequence, with or without a context, in the policy loss.
    """
    share_of_context = config.bicc.weight if config.bicc.enabled else 0.0
    counts = expert_counts(old, groups)
    experts = policy.config.num_experts
    balance = torch.zeros(len(counts))
    z = torch.zeros(len(counts))
    total = 0.0
    for group in groups:
        for i, response in enumerate(group.responses):
            for share, prefix in (
                (share_of_context, group.prompt + context_of(group, i)),
                (1 - share_of_context, group.prompt),
            ):
                if share == 0:
                    continue
                total += share * len(response)
                for layer, logits in enumerate(router_logits(policy, prefix, response)):
                    used = counts[layer] / counts[layer].sum()
                    balance[layer] += share * experts * (logits.softmax(-1) * used).sum()
                    z[layer] += share * (logits.exp().sum(-1).log() ** 2).sum()
    return balance / total, z / total


def reference_loss(
    policy: PreTrainedModel,
    old: PreTrainedModel,
    reference: PreTrainedModel,
    groups: list[Example],
    config: Config,
) -> torch.Tensor:
    """Returns the loss of a whole step under GRPO's aggregation, differentiable in `policy`."""
    total, count = torch.zeros(()), sum(len(group.responses) for group in groups)
    if config.loss.load_balancing_coefficient or config.loss.z_loss_coefficient:
        mixed = [group for group in groups if len({reward > 0.5 for reward in group.rewards}) == 2]
        balance, z = router_losses(policy, old, mixed, config)
        total = (
            config.loss.load_balancing_coefficient * balance.sum() + config.loss.z_loss_coefficient * z.sum()
        )
    weight = config.bicc.weight if config.bicc.enabled else 0.0
    for group in groups:
        if config.loss.entropy_coefficient or (config.loss.kl_coefficient and config.loss.kl_in == "loss"):
            for response in group.responses:
                total = (
                    total + regularisation(policy, reference, group.prompt, response, config).mean() / count
                )
        if len({reward > 0.5 for reward in group.rewards}) == 1:
            continue
        with torch.no_grad():
            temperature = config.rollout.temperature
            old_logp = [response_logp(old, group.prompt, o, temperature) for o in group.responses]
            ref_logp = [response_logp(reference, group.prompt, o, temperature) for o in group.responses]
        others = ref_logp if config.rcc.reference == "ref" else group.rollout_logp
        difference = [a - b for a, b in zip(old_logp, others, strict=True)]
        delta = [float(d.mean() if config.rcc.delta == "token_mean" else d.sum()) for d in difference]
        b = baseline(group, delta, config)
        mean = sum(group.rewards) / len(group.rewards)
        std = math.sqrt(sum((r - mean) ** 2 for r in group.rewards) / len(group.rewards))
        for i, response in enumerate(group.responses):
            advantage = (group.rewards[i] - b) / std
            weights = correction_weights(old_logp[i], group.rollout_logp[i], config)
            for share, prefix, conditioned in (
                (weight, group.prompt + context_of(group, i), True),
                (1 - weight, group.prompt, False),
            ):
                if share == 0:
                    continue
                denominator = old_logp[i]
                if conditioned and config.bicc.denominator == "conditioned":
                    with torch.no_grad():
                        denominator = response_logp(old, prefix, response, temperature)
                logp = response_logp(policy, prefix, response, temperature)
                loss = weights * token_loss(logp, denominator, advantage, config)
                total = total + share * loss.mean() / count
    return total
