"""Run by torchrun: log-probs over a vocabulary that the processes share. _log_probs_worker.py OUT ROWS"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[2]))

from megatron_bicc import device
from megatron_bicc.model.log_probs import VocabParallelLogProbs, VocabShard

VOCABULARY, HIDDEN, TEMPERATURE = 151_936, 512, 0.8


def main(out: str, rows: int) -> None:
    """Rank 0 writes {quantity: relative error}."""
    device.start_distributed()
    device.choose_kernels("auto")
    where = device.device()
    # the CPU's products round bf16 logits to bf16
    dtype = torch.bfloat16 if device.has_cuda() else torch.float32
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, HIDDEN, generator=random).to(where, dtype).requires_grad_()
    weight = (torch.randn(VOCABULARY, HIDDEN, generator=random) / HIDDEN**0.5).to(where, dtype)
    labels = torch.randint(0, VOCABULARY, (rows,), generator=random).to(where)
    grad_log_probs, grad_entropy = torch.randn(2, rows, generator=random).to(where)

    size = VOCABULARY // dist.get_world_size()
    first = size * dist.get_rank()
    own = weight[first : first + size].clone().requires_grad_()
    shard = VocabShard(first, size, dist.group.WORLD)
    found = VocabParallelLogProbs.apply(hidden, own, labels, TEMPERATURE, shard, True)
    torch.autograd.backward(found, (grad_log_probs, grad_entropy))
    hidden_grad = hidden.grad.float()
    dist.all_reduce(hidden_grad)  # the caller's part, as tensor parallel does

    dense_hidden, dense_weight = (x.detach().float().requires_grad_() for x in (hidden, weight))
    log_p = (dense_hidden @ dense_weight.t() / TEMPERATURE).log_softmax(-1)
    expected = log_p.gather(-1, labels[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
    torch.autograd.backward(expected, (grad_log_probs, grad_entropy))
    pairs = {
        "log_probs": (found[0], expected[0]),
        "entropy": (found[1], expected[1]),
        "hidden's gradient": (hidden_grad, dense_hidden.grad),
        "weight's gradient": (own.grad.float(), dense_weight.grad[first : first + size]),
    }
    errors = torch.stack([(a - b).norm() / b.norm() for a, b in pairs.values()]).detach()
    dist.all_reduce(errors, dist.ReduceOp.MAX)
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(dict(zip(pairs, errors.tolist(), strict=True))))
    device.end_distributed()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
