"""Experts of the tokens that an engine has read, for tests of routing replay."""

from dataclasses import replace

import numpy as np
from transformers import PretrainedConfig

from megatron_bicc.rollout.types import Group
from support.hf_reference import Example

Experts = dict[tuple[int, ...], np.ndarray]
"""By a sequence's tokens, of each of its positions: [length, layers, experts per token]; -1: free"""


def sequences(example: Example) -> list[tuple[int, ...]]:
    """Returns each response after its prompt."""
    return [(*example.prompt, *response) for response in example.responses]


def with_experts(groups: list[Group], examples: list[Example], found: Experts) -> list[Group]:
    """Returns the groups as an engine returns them that has chosen these experts."""
    routed = []
    for group, example in zip(groups, examples, strict=True):
        last, samples = len(example.prompt) - 1, []
        for i, (sample, sequence) in enumerate(zip(group.samples, sequences(example), strict=True)):
            experts = found[sequence].astype(np.uint8)
            prompt = None if i else experts[:last]
            samples.append(replace(sample, experts=experts[last:-1], prompt_experts=prompt))
        routed.append(replace(group, samples=samples))
    return routed


def drawn(examples: list[Example], c: PretrainedConfig) -> Experts:
    """Returns random experts, distinct at each position, of each response's sequence."""
    rng = np.random.default_rng(8)
    return {
        sequence: np.array(
            [
                [rng.permutation(c.num_experts)[: c.num_experts_per_tok] for _ in range(c.num_hidden_layers)]
                for _ in sequence
            ]
        )
        for example in examples
        for sequence in sequences(example)
    }
