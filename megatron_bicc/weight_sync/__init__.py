"""The policy's weights on their way to the rollout engine."""

from collections.abc import Iterable, Iterator

from torch import Tensor

from megatron_bicc import platform
from megatron_bicc.policy.hf_weights import hf_tensors
from megatron_bicc.policy.policy import Policy
from megatron_bicc.rollout.types import Engine


def sync_weights(policy: Policy, engine: Engine, version: int) -> int:
    """Streams every parameter, whole and under its Hugging Face name, into the engine. Collective.

    Returns the bytes of the whole model. Raises ValueError naming a parameter that the engine lacks or did
    not get, NotFiniteError naming one that is not finite, before anything is sent.
    """
    policy.check_weights()
    sizes: list[int] = []
    with platform.megatron():
        tensors = hf_tensors(policy.modules, policy.hf_config)
        engine.update_weights(_measured(tensors, sizes), version)
    return sum(sizes)


def _measured(tensors: Iterable[tuple[str, Tensor]], sizes: list[int]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors:
        sizes.append(tensor.nbytes)
        yield name, tensor
