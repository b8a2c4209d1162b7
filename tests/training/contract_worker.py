"""Run by torchrun on two processes: one optimizer step of every preset under every kind of parallelism, and
of a policy with experts.

torchrun --nproc-per-node 2 contract_worker.py INPUTS OUT

INPUTS: written by support.contract.save_inputs. Rank 0 writes {(layout, algorithm or case):
support.contract.Step} to OUT.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))

from support import emulated_kernels
from support.contract import ALGORITHMS, EXPERT_CASES, Stepper, expert_step
from support.model_parallel import leave_model_parallel

from megatron_bicc import device
from megatron_bicc.config import Config, ParallelConfig
from megatron_bicc.model.policy import start_model_parallel

LAYOUTS = {"dp2": {}, "tp2": {"tensor": 2}, "pp2": {"pipeline": 2}, "cp2": {"context": 2}}
KERNELS = ("gspo+bicc+rcc", "gmpo+bicc+rcc", "grpo+bicc+rcc")
"""Taken once more under cp2 through csrc's kernels, compiled for the host: "kernels" """
MICRO_BATCHES = 3
PP2 = {"parallel__pipeline": 2}
EXPERT_LAYOUTS = {
    "dp2": {},
    "cp2": {"parallel__context": 2},
    "ep2": {"parallel__expert": 2, "model__recompute": "selective"},
    "tp2_ep2": {"parallel__tensor": 2, "parallel__sequence": True, "parallel__expert": 2},
    "pp2": PP2 | {"model__recompute": "full"},
    # the experts of a layer are recomputed without the rest of it
    "vpp2": PP2
    | {
        "parallel__virtual_pipeline": 2,
        "model__recompute": "selective",
        "megatron__transformer": {"recompute_modules": ["moe"]},
    },
}
"""Settings as section__name, by layout of the policy with experts"""
TOKENS = 100
"""Of its micro-batches, of which there are several"""


def main(inputs: Path, out: str) -> None:
    """Every preset under every layout; a layout's process groups are made once."""
    device.start_distributed()
    found = {}
    for name, parallel in LAYOUTS.items():
        start_model_parallel(Config(parallel=ParallelConfig(**parallel)))
        stepper = Stepper(inputs, **parallel)
        found |= {(name, algorithm): stepper.step(algorithm, MICRO_BATCHES) for algorithm in ALGORITHMS}
        if name == "cp2":
            device._kernels = emulated_kernels.build()
            found |= {("kernels", algorithm): stepper.step(algorithm, MICRO_BATCHES) for algorithm in KERNELS}
            device._kernels = None
        del stepper  # refers to the groups
        leave_model_parallel()
    for name, settings in EXPERT_LAYOUTS.items():
        parallel = {
            key.split("__")[1]: value for key, value in settings.items() if key.startswith("parallel")
        }
        start_model_parallel(Config(parallel=ParallelConfig(**parallel)))
        # of one context rank
        tokens = TOKENS // settings.get("parallel__context", 1)
        found |= {(name, case): expert_step(inputs, case, tokens, **settings) for case in EXPERT_CASES}
        leave_model_parallel()
    if dist.get_rank() == 0:
        torch.save(found, out)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
