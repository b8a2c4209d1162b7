"""Run by torchrun: compares logits of two processes with transformers', log-probs with log_softmax.

Log-probs by plain torch in float64, and by csrc's kernels, which run on the host here, in float32.

torchrun --nproc-per-node 2 logits_worker.py BROKEN MODEL ...

BROKEN holds a model with a NaN in the second process's part of BROKEN_TENSOR.
"""

import sys
from functools import partial
from pathlib import Path

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))

from support import emulated_kernels
from support.layout import causal_batch
from support.steps import make_config

from megatron_bicc import device
from megatron_bicc.errors import UserError
from megatron_bicc.model.log_probs import VocabParallelLogProbs, VocabShard
from megatron_bicc.model.policy import start_model_parallel
from megatron_bicc.weights.hf_weights import load_policy

BROKEN_TENSOR = "model.layers.0.self_attn.q_proj.weight"


def check_refusal(path: str) -> None:
    """Raises AssertionError unless this process names the tensor, whoever has the NaN in its part."""
    config = make_config(Path(path), "grpo")
    config.parallel.tensor = 2
    try:
        load_policy(config)
    except UserError as error:
        assert f"{path}: {BROKEN_TENSOR}: contains NaN or infinite values" in str(error), error
    else:
        raise AssertionError(f"{path} was loaded")


def check_log_probs(dtype: torch.dtype, error: float) -> None:
    """Raises AssertionError where a log-prob, an entropy or a gradient differs; 19 tokens on 10 + 10 rows."""
    group, random = parallel_state.get_tensor_model_parallel_group(), torch.Generator().manual_seed(1)
    hidden, weight, seeds = (
        torch.randn(*shape, generator=random, dtype=torch.float64) for shape in ((13, 8), (20, 8), (2, 13))
    )
    labels, first = torch.randint(0, 19, (13,), generator=random), 10 * group.rank()
    leaves = [x.to(dtype, copy=True).requires_grad_() for x in (hidden, weight[first : first + 10])]
    shard = VocabShard(first, min(10, 19 - first), group)
    found = torch.stack(VocabParallelLogProbs.apply(*leaves, labels, 0.7, shard, True))
    grad_hidden, grad_weight = torch.autograd.grad((found * seeds).sum(), leaves)
    torch.distributed.all_reduce(grad_hidden, group=group)

    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    log_p = (hidden @ weight[:19].t() / 0.7).log_softmax(-1)
    truth = torch.stack([log_p.gather(-1, labels[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)])
    true_hidden, true_weight = torch.autograd.grad((truth * seeds).sum(), leaves)
    torch.testing.assert_close(found.double(), truth, rtol=error, atol=error)
    torch.testing.assert_close(grad_hidden.double(), true_hidden, rtol=100 * error, atol=error)
    true_part = true_weight[first : first + 10]
    torch.testing.assert_close(grad_weight.double(), true_part, rtol=100 * error, atol=error)


def check(path: str) -> None:
    """Raises AssertionError where a logit differs by more than 1e-5 of the largest."""
    config = make_config(Path(path), "grpo")
    config.parallel.tensor = 2
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokens = torch.randint(0, model.config.vocab_size, (150,), generator=torch.Generator().manual_seed(0))
    module = load_policy(config).modules[0]
    module._postprocess = partial(GPTModel._postprocess, module)
    with torch.no_grad(), device.megatron():
        part = module(tokens[None], torch.arange(150)[None], None, packed_seq_params=causal_batch(tokens))
        ours = gather_from_tensor_model_parallel_region(part)[..., : model.config.vocab_size]
        theirs = model(tokens[None]).logits
    difference = float((ours - theirs).abs().max())
    assert difference < 1e-5 * max(1.0, float(theirs.abs().max())), f"{path}: {difference:.1e}"


if __name__ == "__main__":
    two = make_config(Path(sys.argv[1]), "grpo")
    two.parallel.tensor = 2
    device.start_distributed()
    start_model_parallel(two)
    check_log_probs(torch.float64, 1e-12)
    device._kernels = emulated_kernels.build()
    check_log_probs(torch.float32, 2e-6)
    device._kernels = None
    check_refusal(sys.argv[1])
    for directory in sys.argv[2:]:
        check(directory)
    torch.distributed.destroy_process_group()
