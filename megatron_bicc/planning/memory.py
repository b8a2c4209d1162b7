"""Memory of the fullest rank at its fullest moment, and what a rollout server beside it may take."""

from dataclasses import dataclass

from megatron_bicc.config import Config
from megatron_bicc.planning.activations import saved_bytes
from megatron_bicc.planning.architecture import Sizes
from megatron_bicc.planning.gpus import Cluster
from megatron_bicc.planning.shards import Shard
from megatron_bicc.policy.log_probs import CHUNK_ELEMENTS

LOGITS_COPIES = 3
"""fp32 tensors of a chunk of logits that live at once in VocabParallelLogProbs"""


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank."""

    pipeline_rank: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    """Of all micro-batches in flight, and of the layer that is computed again"""
    logits: int
    """The chunk in work, with the output layer's gradient; last pipeline stage only"""
    sync_bucket: int
    """A bucket of whole tensors on its way to the rollout servers"""
    reserve: int

    @property
    def state(self) -> int:
        """What is there all the time."""
        return self.weights + self.gradients + self.optimizer + self.reserve

    @property
    def peak(self) -> int:
        """While training or while weights are sent, whichever is more."""
        return self.state + max(self.activations + self.logits, self.sync_bucket)


def in_flight(config: Config, micro_batches: int, stage: int) -> float:
    """Micro-batches whose activations a stage holds at once, in units of all its layers.

    megatron-core's 1F1B: its distance from the end; interleaved: chunks warm up twice as far, and round by
    round.
    """
    p = config.parallel
    if p.virtual_pipeline == 1:
        return min(micro_batches, p.pipeline - stage)
    chunks = 2 * (p.pipeline - stage - 1) + (p.virtual_pipeline - 1) * p.pipeline + 1
    return min(micro_batches * p.virtual_pipeline, chunks) / p.virtual_pipeline


def memory_of(shard: Shard, sizes: Sizes, config: Config, micro_batches: int, cluster: Cluster) -> Memory:
    """A rank's memory with full micro-batches, all of whose rows are responses."""
    c, stage = config.parallel, shard.pipeline_rank
    rows = config.train.max_tokens_per_microbatch
    saved = saved_bytes(sizes, config, rows, rows)
    flying, is_last = in_flight(config, micro_batches, stage), stage == c.pipeline - 1
    ends = (saved.first_stage if stage == 0 else 0) + (saved.last_stage if is_last else 0)
    again = saved.layer_whole if config.model.recompute == "full" else 0
    return Memory(
        pipeline_rank=stage,
        weights=shard.weight_bytes,
        gradients=shard.gradient_bytes,
        optimizer=shard.optimizer_bytes,
        activations=int(flying * (len(shard.layers) * saved.layer + ends)) + again,
        logits=_logits(sizes, config, rows) if is_last else 0,
        sync_bucket=_sync_bucket(sizes, config),
        reserve=int(cluster.reserve_bytes),
    )


def _logits(sizes: Sizes, config: Config, rows: int) -> int:
    """A chunk's logits, and the output layer's gradient: summed in fp32, then in the weights' type."""
    vocabulary = -(-sizes.vocabulary // config.parallel.tensor)
    chunk = min(rows, max(1, CHUNK_ELEMENTS // vocabulary)) * vocabulary
    element = 4 if config.model.dtype == "float32" else 2
    return 4 * LOGITS_COPIES * chunk + vocabulary * sizes.hidden * (4 + element)


def _sync_bucket(sizes: Sizes, config: Config) -> int:
    """A bucket, or the largest whole tensor with the parts that it is gathered from."""
    element = 4 if config.model.dtype == "float32" else 2
    largest = element * sizes.hidden * max(sizes.vocabulary, 2 * sizes.ffn)
    return int(max(config.weight_sync.bucket_mb * 2**20, largest)) + largest


@dataclass(frozen=True)
class KvSpace:
    """Room for SGLang's keys and values on the policy's own GPUs while it generates."""

    server_weights: int
    """Bytes of SGLang's weights on a GPU"""
    bytes: int
    """Left on a GPU beside the policy's state and SGLang's weights; negative: it does not fit"""
    tokens: int
    """That as many tokens of one server's requests"""


def kv_space(fullest: Memory, sizes: Sizes, cluster: Cluster, server_gpus: int) -> KvSpace:
    """What a server over `server_gpus` GPUs finds beside a policy that keeps all of its state there."""
    weights = 2 * sizes.parameters // server_gpus
    left = int(cluster.gpu.memory_bytes) - fullest.state - weights
    return KvSpace(weights, left, max(0, left) * server_gpus // sizes.kv_bytes_a_token)
