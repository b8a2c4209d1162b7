"""Measures bytes of weights, gradients and optimizer of real policies, rank by rank, and plans them.

torchrun --nproc-per-node 2 state_worker.py TINY SMALL EXPERTS out.json
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoConfig

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.model_parallel import leave_model_parallel

from megatron_bicc import device
from megatron_bicc.collective import gathered
from megatron_bicc.config import Config
from megatron_bicc.model.policy import Policy, start_model_parallel
from megatron_bicc.planning.shards import build_shards
from megatron_bicc.weights.hf_weights import load_policy

LAYOUTS = {
    "tiny, tensor": (0, "float32", {"tensor": 2}),
    "tiny, data": (0, "float32", {}),
    "small, tensor, sequence": (1, "bfloat16", {"tensor": 2, "sequence": True}),
    "small, pipeline, virtual": (1, "bfloat16", {"pipeline": 2, "virtual_pipeline": 2}),
    "small, data": (1, "bfloat16", {}),
    "experts": (2, "bfloat16", {"expert": 2}),
    "experts, tensor": (2, "bfloat16", {"tensor": 2, "sequence": True}),
    "small, context": (1, "bfloat16", {"context": 2}),
    "experts, context": (2, "bfloat16", {"context": 2, "expert": 2}),
}
MANY = 16
"""Processes of jobs that are only planned: every rank's shard, and those of distinct sizes"""
MANY_LAYOUTS = {
    "tiny": (0, "float32", {"tensor": 2, "pipeline": 2, "context": 2}),
    "experts": (2, "bfloat16", {"tensor": 2, "sequence": True, "context": 2, "expert": 4}),
}


def configure(path: str, dtype: str, layout: dict) -> Config:
    config = Config()
    config.model.path, config.model.dtype = path, dtype
    for name, value in layout.items():
        setattr(config.parallel, name, value)
    return config


def measure(policy: Policy) -> dict[str, int]:
    """Bytes in megatron-core's own buffers, and in the tensors that torch's optimizer steps on."""
    experts = [b for chunk in policy.chunks for b in chunk.expert_parallel_buffers]
    buffers = [b for chunk in policy.chunks for b in chunk.buffers] + experts
    moments = main = 0
    for part in policy.optimizer.chained_optimizers:
        main += sum(p.nbytes for group in part.shard_fp32_from_float16_groups for p in group)
        states = part.optimizer.state.values()
        moments += sum(state[name].nbytes for state in states for name in ("exp_avg", "exp_avg_sq"))
    return {
        "parameters": sum(p.numel() for module in policy.modules for p in module.parameters()),
        "weight_bytes": sum(b.param_data.nbytes for b in buffers),
        "gradient_bytes": sum(b.grad_data.nbytes for b in buffers),
        "expert_weight_bytes": sum(b.param_data.nbytes for b in experts),
        "expert_gradient_bytes": sum(b.grad_data.nbytes for b in experts),
        "optimizer_bytes": main + moments,
    }


def measure_all(paths: list[str]) -> dict[str, list[dict[str, int]]]:
    """Every layout's figures, one a rank; after an update, so that every tensor is there."""
    found = {}
    for name, (model, dtype, layout) in LAYOUTS.items():
        config = configure(paths[model], dtype, layout)
        start_model_parallel(config)
        policy = load_policy(config)
        policy.zero_gradients()
        policy.update()
        found[name] = gathered(measure(policy))
        del policy  # refers to the groups
        leave_model_parallel()
    return found


def plan_all(paths: list[str], world_size: int) -> dict[str, list[dict[str, int]]]:
    """The same figures without other processes."""
    found = {}
    for name, (model, dtype, layout) in LAYOUTS.items():
        config = configure(paths[model], dtype, layout)
        hf_config = AutoConfig.from_pretrained(config.model.path)
        shards = build_shards(config, hf_config, world_size, ranks=range(world_size))
        found[name] = [asdict(shard) for shard in shards]
    return found


def plan_many(paths: list[str]) -> dict[str, dict[str, list[dict]]]:
    """Shards of every rank, and those that a dry run builds."""
    found = {}
    for name, (model, dtype, layout) in MANY_LAYOUTS.items():
        config = configure(paths[model], dtype, layout)
        hf_config = AutoConfig.from_pretrained(config.model.path)
        found[name] = {
            kind: [asdict(shard) for shard in build_shards(config, hf_config, MANY, ranks=ranks)]
            for kind, ranks in (("every", range(MANY)), ("distinct", None))
        }
    return found


if __name__ == "__main__":
    torch.manual_seed(0)
    device.start_distributed()
    rank, size = dist.get_rank(), dist.get_world_size()
    measured = measure_all(sys.argv[1:4])
    dist.destroy_process_group()
    if rank == 0:
        with open(sys.argv[4], "w") as file:
            planned = {"planned": plan_all(sys.argv[1:4], size), "many": plan_many(sys.argv[1:4])}
            json.dump({"measured": measured} | planned, file)
