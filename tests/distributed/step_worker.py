"""Run by torchrun: one optimiser step of every case under one layout; rank 0 writes what came out.

torchrun --nproc-per-node 2 step_worker.py MODEL_DIR MOVED_DIR EXAMPLES OUT parallel.tensor=2 ...
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.steps import CASES, TOKENIZER, make_config, to_groups

from megatron_bicc import platform
from megatron_bicc.config import Config
from megatron_bicc.monitoring.timing import Stopwatch
from megatron_bicc.policy.hf_weights import hf_tensors
from megatron_bicc.policy.policy import Policy, start_model_parallel
from megatron_bicc.training.learner import Learner

LAYOUT_CASES = ("grpo", "bicc_plain", "bicc_rcc_mixed_conditioned")


def configure(path: str, case: str, overrides: list[str]) -> Config:
    """The case's configuration under the layout that the overrides say."""
    algorithm, settings = CASES[case]
    config = make_config(Path(path), algorithm, **settings)
    # a large eps: else Adam's first update is the sign of the gradient, and rounding flips that of a tiny one
    config.optimizer.lr, config.optimizer.eps, config.optimizer.clip_grad = 1e-2, 1e-2, 1.0
    for override in overrides:
        name, value = override.split("=")
        section, field = name.split(".")
        setattr(getattr(config, section), field, type(getattr(getattr(config, section), field))(eval(value)))
    return config


def run_case(model: str, moved: str, examples: str, case: str, overrides: list[str]) -> dict:
    """Loss, gradient norm and updated weights of one step; the reference policy is `model`."""
    policy = Policy(configure(model, case, overrides))
    learner = Learner(configure(model, case, overrides), policy, TOKENIZER)
    policy.set_weights(Policy(configure(moved, case, overrides)).host_copy())
    policy.optimizer.reload_model_params()
    result = learner.step(to_groups(torch.load(examples, weights_only=False)), Stopwatch())
    with platform.megatron():
        weights = {name: tensor.clone() for name, tensor in hf_tensors(policy.modules, policy.hf_config)}
    return {"loss": result.loss, "grad_norm": result.grad_norm, "weights": weights}


def main(model: str, moved: str, examples: str, out: str, *overrides: str) -> None:
    """LAYOUT_CASES, one after another, in the same process groups."""
    platform.start_distributed()
    start_model_parallel(configure(model, "grpo", list(overrides)))
    found = {case: run_case(model, moved, examples, case, list(overrides)) for case in LAYOUT_CASES}
    if dist.get_rank() == 0:
        torch.save(found, out)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
