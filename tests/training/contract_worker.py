"""Run by torchrun on two processes: one optimizer step of every preset under every kind of parallelism.

torchrun --nproc-per-node 2 contract_worker.py INPUTS OUT

INPUTS: written by support.contract.save_inputs. Rank 0 writes {(layout, algorithm): support.contract.Step} to
OUT.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state

sys.path.insert(0, str(Path(__file__).parents[1]))

from support import emulated_kernels
from support.contract import ALGORITHMS, Stepper

from megatron_bicc import device
from megatron_bicc.config import Config, ParallelConfig
from megatron_bicc.model.policy import start_model_parallel

LAYOUTS = {"dp2": {}, "tp2": {"tensor": 2}, "pp2": {"pipeline": 2}, "cp2": {"context": 2}}
KERNELS = ("gspo+bicc+rcc", "gmpo+bicc+rcc", "grpo+bicc+rcc")
"""Taken once more under cp2 through csrc's kernels, compiled for the host: "kernels" """
MICRO_BATCHES = 3


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
        parallel_state.destroy_model_parallel()
    if dist.get_rank() == 0:
        torch.save(found, out)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
