"""Run by torchrun: logits of two tensor-parallel processes against those of transformers.

torchrun --nproc-per-node 2 logits_worker.py BROKEN MODEL ...

BROKEN holds a model with a NaN in the second process's part of BROKEN_TENSOR.
"""

import sys
from functools import partial
from pathlib import Path

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.layout import causal_batch
from support.steps import make_config

from megatron_bicc import platform
from megatron_bicc.policy.policy import Policy, start_model_parallel

BROKEN_TENSOR = "model.layers.0.self_attn.q_proj.weight"


def check_refusal(path: str) -> None:
    """Raises AssertionError unless this process names the tensor, whoever has the NaN in its part."""
    config = make_config(Path(path), "grpo")
    config.parallel.tensor = 2
    try:
        Policy(config)
    except ValueError as error:
        assert f"{path}: {BROKEN_TENSOR}: holds NaN or infinite values" in str(error), error
    else:
        raise AssertionError(f"{path} was loaded")


def check(path: str) -> None:
    """Raises AssertionError where a logit differs by more than 1e-5 of the largest."""
    config = make_config(Path(path), "grpo")
    config.parallel.tensor = 2
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokens = torch.randint(0, model.config.vocab_size, (150,), generator=torch.Generator().manual_seed(0))
    module = Policy(config).modules[0]
    module._postprocess = partial(GPTModel._postprocess, module)
    with torch.no_grad(), platform.megatron():
        part = module(tokens[None], torch.arange(150)[None], None, packed_seq_params=causal_batch(tokens))
        ours = gather_from_tensor_model_parallel_region(part)[..., : model.config.vocab_size]
        theirs = model(tokens[None]).logits
    difference = float((ours - theirs).abs().max())
    assert difference < 1e-5 * max(1.0, float(theirs.abs().max())), f"{path}: {difference:.1e}"


if __name__ == "__main__":
    two = make_config(Path(sys.argv[1]), "grpo")
    two.parallel.tensor = 2
    platform.start_distributed()
    start_model_parallel(two)
    check_refusal(sys.argv[1])
    for directory in sys.argv[2:]:
        check(directory)
    torch.distributed.destroy_process_group()
