"""Accuracy on held-out prompts and benchmark files, sampled: the same in training and on its own."""

from megatron_bicc.data import Prompt
from megatron_bicc.evaluation.answers import Answers, answers_of
from megatron_bicc.evaluation.statistics import Evaluation, pass_at_k, summarize
from megatron_bicc.rollout.collect import GroupSampler

__all__ = ["Answers", "Evaluation", "answers_of", "ask", "evaluate", "pass_at_k", "summarize"]


def ask(prompts: list[Prompt], sampler: GroupSampler, seed: int) -> list[Answers]:
    """The sampler's answers to every prompt, scored; the same seeds at every call. Collective."""
    return [answers_of(group) for group in sampler.collect(prompts, (seed, "evaluation"))]


def evaluate(prompts: list[Prompt], sampler: GroupSampler, seed: int, threshold: float) -> Evaluation:
    """avg@k and pass@k from the sampler's k answers to every prompt. Collective."""
    return summarize(ask(prompts, sampler, seed), threshold)
