"""Accuracy on held-out prompts and benchmark files, sampled: the same in training and on its own."""

from transformers import PreTrainedTokenizerBase

from megatron_bicc.data import Prompt
from megatron_bicc.evaluation.answers import Answers, answers_of
from megatron_bicc.evaluation.statistics import Evaluation, pass_at_k, summarize
from megatron_bicc.rewards import Verifier
from megatron_bicc.rollout.collect import collect_groups
from megatron_bicc.rollout.types import Engine, Sampling

__all__ = ["Answers", "Evaluation", "answers_of", "ask", "evaluate", "pass_at_k", "summarize"]


def ask(
    prompts: list[Prompt],
    engine: Engine,
    verifier: Verifier,
    tokenizer: PreTrainedTokenizerBase,
    sampling: Sampling,
    samples: int,
    seed: int,
) -> list[Answers]:
    """`samples` scored answers to every prompt; the same seeds at every call. Collective."""
    groups = collect_groups(
        prompts, engine, verifier, tokenizer, sampling, samples, seed=(seed, "evaluation")
    )
    return [answers_of(group) for group in groups]


def evaluate(
    prompts: list[Prompt],
    engine: Engine,
    verifier: Verifier,
    tokenizer: PreTrainedTokenizerBase,
    sampling: Sampling,
    samples: int,
    seed: int,
    threshold: float,
) -> Evaluation:
    """avg@k and pass@k from `samples` answers to every prompt. Collective."""
    return summarize(ask(prompts, engine, verifier, tokenizer, sampling, samples, seed), threshold)
