"""Run by torchrun: logits of two tensor-parallel processes against those of transformers."""

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
    for directory in sys.argv[1:]:
        check(directory)
    torch.distributed.destroy_process_group()
