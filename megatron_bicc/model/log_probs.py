"""Log-probs and entropy of labels over a vocabulary that is sharded over tensor-parallel ranks.

Computed in chunks of rows: no [A, V] tensor outlives a chunk, and backward recomputes each chunk's logits.
That takes four matrix products instead of three, but the logits of a micro-batch, by far its largest tensor,
are never stored.

Where `device.kernels` has csrc's kernels, a chunk's logits are read once forward, and once backward, when
their gradient overwrites them. Plain torch elsewhere, which is also the reference: some ten passes.

Shape suffixes: A response rows, L rows of a chunk, V tokens of this rank's part of the vocabulary. The hidden
size is spelled out.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_bicc import device
from megatron_bicc.model.log_probs_kernels import logit_gradient, logit_statistics

CHUNK_ELEMENTS = {"cpu": 2**26, "cuda": 2**28}
"""Maximum number of logits of a chunk on this rank, by type of device: larger products keep a GPU busy"""


@dataclass(frozen=True)
class VocabShard:
    """This rank's part of the vocabulary."""

    first: int
    """Token id of its first row"""
    size: int
    """Number of rows that are tokens, at least one; the padding rows after them are left out"""
    group: dist.ProcessGroup
    """The tensor-parallel group"""


OnGradient = Callable[[int, Tensor, Tensor], None]
"""Called with (first row of a chunk, gradient of its logits [L, V], hidden [L, hidden size])"""


class VocabParallelLogProbs(torch.autograd.Function):
    """Maps (hidden, weight, labels int64 [A], temperature, shard) to (log-probs [A], entropy [A]).

    Shapes: hidden [A, hidden size], weight [V, hidden size].

    Outputs are float32 for inputs of lower precision, entropy in nats, both at the temperature. The entropy
    has a gradient only if `entropy_in_loss`: without it backward takes fewer passes over every chunk's
    [L, V]. The gradient of `hidden` is this rank's part: the caller reduces it over the tensor-parallel
    group. The backward pass calls `on_gradient` with every chunk. Collective, forward only.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        temperature: float,
        shard: VocabShard,
        entropy_in_loss: bool,
        on_gradient: OnGradient | None = None,
    ) -> tuple[Tensor, Tensor]:
        of_rows = _by_kernels if _for_kernels(hidden) else _by_torch
        log_probs, entropy, lse = of_rows(hidden, weight, labels, temperature, shard)
        ctx.save_for_backward(hidden, weight, labels, lse, entropy)
        ctx.temperature, ctx.shard, ctx.on_gradient = temperature, shard, on_gradient
        ctx.entropy_in_loss = entropy_in_loss
        # copies, since the outputs share memory with what is saved: callers may change outputs in place
        log_probs, entropy = log_probs.clone(), entropy.clone()
        if not entropy_in_loss:
            ctx.mark_non_differentiable(entropy)
        return log_probs, entropy

    @staticmethod
    def backward(ctx: Any, grad_log_probs: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, lse, entropy = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        # summed over chunks in fp32: bf16 would lose the small contributions of later chunks
        grad_weight = torch.zeros(weight.shape, dtype=lse.dtype, device=weight.device)
        tokens = slice(0, ctx.shard.size)
        gradient = logit_gradient if _for_kernels(hidden) else _gradient
        for rows in _chunks(hidden, weight):
            grad_logits = gradient(
                _logits(hidden[rows], weight, ctx.shard),
                labels[rows],
                ctx.shard.first,
                ctx.temperature,
                lse[rows],
                entropy[rows],
                grad_log_probs[rows],
                grad_entropy[rows] if ctx.entropy_in_loss else None,
                weight.dtype,
            )
            grad_hidden[rows] = grad_logits @ weight[tokens]
            _add_product(grad_weight[tokens], grad_logits.t(), hidden[rows])
            if ctx.on_gradient is not None:
                ctx.on_gradient(rows.start, grad_logits, hidden[rows])
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None, None


def _for_kernels(hidden: Tensor) -> bool:
    return device.kernels() is not None and hidden.dtype != torch.float64


def _chunks(hidden: Tensor, weight: Tensor) -> list[slice]:
    """Returns slices of the rows; one empty slice if there are none: all ranks make the same collectives."""
    rows = max(1, CHUNK_ELEMENTS[hidden.device.type] // weight.shape[0])
    return [slice(i, i + rows) for i in range(0, max(1, hidden.shape[0]), rows)]


def _logits(hidden: Tensor, weight: Tensor, shard: VocabShard) -> Tensor:
    """Returns logits in at least float32, without the padding: [L, V]."""
    weight_t = weight[: shard.size].t()
    wide = _at_least_float32(hidden)
    if hidden.is_cuda and hidden.dtype != wide:
        return torch.mm(hidden, weight_t, out_dtype=wide)  # products are summed in fp32: nothing is rounded
    return (hidden @ weight_t).to(wide)


def _at_least_float32(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _by_kernels(
    hidden: Tensor, weight: Tensor, labels_A: Tensor, temperature: float, shard: VocabShard
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (log-probs, entropy, log-sum-exp), each [A]; two all-reduces for all rows.

    Sums relative to this rank's largest z become sums relative to the largest of all ranks.
    """
    found = torch.empty(4, hidden.shape[0], dtype=torch.float32, device=hidden.device)
    for rows in _chunks(hidden, weight):
        logits = _logits(hidden[rows], weight, shard)
        found[:, rows] = logit_statistics(logits, labels_A[rows], shard.first, temperature)
    largest, total, weighted, label_z = found
    own_largest = largest.clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=shard.group)
    less = own_largest - largest
    # one rank holds the label's z and the others contribute 0, so that the sum over ranks is that z
    sums = torch.stack([less.exp() * total, less.exp() * (weighted + less * total), label_z])
    dist.all_reduce(sums, group=shard.group)
    total, weighted, label_z = sums
    log_total = total.log()
    return label_z - largest - log_total, log_total - weighted / total, log_total + largest


def _by_torch(
    hidden: Tensor, weight: Tensor, labels_A: Tensor, temperature: float, shard: VocabShard
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (log-probs, entropy, log-sum-exp), each [A]; two all-reduces for every chunk."""
    found = torch.empty(3, hidden.shape[0], dtype=_at_least_float32(hidden), device=hidden.device)
    for rows in _chunks(hidden, weight):
        logits = _over(_logits(hidden[rows], weight, shard), temperature)
        found[:, rows] = _forward_chunk(logits, labels_A[rows], shard)
    log_probs, entropy, lse = found
    return log_probs, entropy, lse


def _over(logits: Tensor, temperature: float) -> Tensor:
    """Returns logits over the temperature, in place."""
    return logits if temperature == 1.0 else logits.div_(temperature)


def _forward_chunk(logits: Tensor, labels_L: Tensor, shard: VocabShard) -> Tensor:
    """Returns [3, L]: log-probs, entropy, log-sum-exp; overwrites `logits`.

    With z the logits less their maximum and E the softmax's mean: log p = z[label] - log sum exp z, and
    entropy = log sum exp z - E[z]. Two all-reduces: the maximum, then all three sums together.
    """
    largest = logits.amax(-1)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=shard.group)
    logits.sub_(largest.unsqueeze(-1))
    # one rank holds the label's logit and the others contribute 0, so that the sum over ranks is that logit
    local, is_local = _local_labels(labels_L, shard.first, logits.shape[1])
    label_logit = logits.gather(-1, local).squeeze(-1).where(is_local, torch.zeros_like(largest))
    exp = logits.exp()
    # a batched dot product: the elementwise product would be another [L, V] tensor
    weighted = (exp.unsqueeze(1) @ logits.unsqueeze(2)).flatten()
    sums = torch.stack([exp.sum(-1), weighted, label_logit])
    dist.all_reduce(sums, group=shard.group)
    total, weighted, label_logit = sums
    log_total = total.log()
    return torch.stack([label_logit - log_total, log_total - weighted / total, log_total + largest])


def _gradient(
    logits: Tensor,
    labels_L: Tensor,
    first: int,
    temperature: float,
    lse_L: Tensor,
    entropy_L: Tensor,
    grad_log_probs_L: Tensor,
    grad_entropy_L: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Returns the gradient of the logits [L, V] in `dtype`; overwrites `logits`.

    d log p[label] / d z = onehot - p and d entropy / d z = -p (log p + entropy), z = logits / temperature.
    """
    log_p = _over(logits, temperature).sub_(lse_L.unsqueeze(-1))
    grad_log_probs_L = grad_log_probs_L / temperature
    if grad_entropy_L is None:
        grad = log_p.exp_().mul_(-grad_log_probs_L.unsqueeze(-1))
    else:
        slope = grad_log_probs_L.unsqueeze(-1) + (grad_entropy_L / temperature).unsqueeze(-1) * (
            log_p + entropy_L.unsqueeze(-1)
        )
        grad = log_p.exp_().mul_(slope).neg_()
    local, is_local = _local_labels(labels_L, first, logits.shape[1])
    return grad.scatter_add_(-1, local, (grad_log_probs_L * is_local).unsqueeze(-1)).to(dtype)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Adds left @ right to `total`, whose type is that of the factors or float32."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif total.is_cuda:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:  # the CPU has no product of half-precision factors in fp32
        total += left @ right


def _local_labels(labels_L: Tensor, first: int, size: int) -> tuple[Tensor, Tensor]:
    """Returns (this rank's column of each label or 0, [L, 1]; whether the label is this rank's, [L])."""
    local = labels_L - first
    is_local = (local >= 0) & (local < size)
    return local.where(is_local, torch.zeros_like(local)).unsqueeze(-1), is_local
