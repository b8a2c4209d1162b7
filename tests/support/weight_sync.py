"""A policy's weights and a real server's log-probs, for the tests of the weight sync."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from anyio.from_thread import BlockingPortal
from transformers import PreTrainedModel

from megatron_bicc import device
from megatron_bicc.config import Config
from megatron_bicc.rollout.types import unscored
from megatron_bicc.sglang.client import ServerClient
from megatron_bicc.sglang.pool import ServerPool
from megatron_bicc.training.learner import Learner
from megatron_bicc.weights.handles import SharedMemory, flatten
from megatron_bicc.weights.hf_weights import hf_tensors
from megatron_bicc.weights.sync import ServerWeightSync
from megatron_bicc.weights.transport import TensorTransport, tensor_request

TOKENS = [int(t) for t in np.random.default_rng(0).integers(2, 90, 40)]


def move(learner: Learner, seed: int) -> None:
    """Another policy."""
    torch.manual_seed(seed)
    for module in learner.policy.modules:
        for parameter in module.parameters():
            parameter.data += 0.03 * torch.randn_like(parameter)


def stream(learner: Learner) -> Iterator[tuple[str, torch.Tensor]]:
    """Returns the policy's tensors. Collective."""
    with device.megatron():
        yield from hf_tensors(learner.policy.modules, learner.policy.hf_config)


def make_sync(config: Config, learner: Learner, pool: ServerPool) -> ServerWeightSync:
    """Returns the policy's weight sync to the pool's servers."""
    return ServerWeightSync(config, learner.policy, pool, lambda some: learner.log_probs(unscored(some)))


def hf_log_probs(model: PreTrainedModel, tokens: list[int]) -> np.ndarray:
    """Returns Hugging Face's log-probs of tokens[1:]."""
    with torch.no_grad():
        log_p = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
    return log_p[:-1].gather(-1, torch.tensor(tokens[1:])[:, None])[:, 0].numpy()


def served(portal: BlockingPortal, client: ServerClient, tokens: list[int]) -> tuple[np.ndarray, str]:
    """Returns the server's log-probs of tokens[1:], and the weight version in its answer."""
    sampling = {"max_new_tokens": 1, "temperature": 0}
    body = {"input_ids": tokens, "sampling_params": sampling, "return_logprob": True, "logprob_start_len": 0}
    meta = portal.call(client.generate, body, 30)["meta_info"]
    rows = meta["input_token_logprobs"][1:]
    return np.array([row[0] for row in rows]), meta["weight_version"]


def greedy(portal: BlockingPortal, client: ServerClient, tokens: list[int]) -> tuple[int, float]:
    """Returns the server's next token and its log-prob; the server may have cached keys of `tokens`."""
    sampling = {"max_new_tokens": 1, "temperature": 0}
    body = {"input_ids": tokens, "sampling_params": sampling, "return_logprob": True}
    log_prob, token, *_ = portal.call(client.generate, body, 30)["meta_info"]["output_token_logprobs"][0]
    return token, log_prob


def tamper(portal: BlockingPortal, client: ServerClient, name: str, shape: list[int]) -> Any:
    """Sets one of a server's parameters to zero, outside of any sync; returns the answer."""
    memory = SharedMemory()
    flat = flatten([(name, torch.zeros(shape))], memory)
    portal.call(client.post, "/begin_weight_update", {"selector": "all"})
    answer = portal.call(client.post, TensorTransport.path, tensor_request([flat.payload()]))
    portal.call(client.post, "/end_weight_update", {})
    memory.close()
    return answer
