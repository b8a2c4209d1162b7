"""The policy's weights on their way to the rollout engine."""

from megatron_bicc import platform
from megatron_bicc.policy.hf_weights import hf_tensors
from megatron_bicc.policy.policy import Policy
from megatron_bicc.rollout.types import Engine


def sync_weights(policy: Policy, engine: Engine, version: int) -> None:
    """Streams every parameter, whole and under its Hugging Face name, into the engine. Collective.

    Raises ValueError naming a parameter that the engine lacks or did not get.
    """
    with platform.megatron():
        tensors = hf_tensors(policy.modules, policy.hf_config)
        engine.update_weights(tensors, version)
