"""Run as two processes: training steps under fields of megatron-core's configurations.

megatron_settings_worker.py INPUTS OUT

INPUTS is as step_worker.py's. Rank 0 writes {name of CASES: result of Training.step, twice} to OUT.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))

from training.step_worker import Training

from megatron_bicc import device
from megatron_bicc.config import Config
from megatron_bicc.model.policy import start_model_parallel

CASES = {
    "plain": ("dense", {}),
    "plain_moe": ("moe", {}),
    "overlap": ("dense", {"megatron.ddp": {"overlap_grad_reduce": True, "bucket_size": 5000}}),
    "overlap_moe": ("moe", {"megatron.ddp": {"overlap_grad_reduce": True, "bucket_size": 5000}}),
}


def main(inputs: Path, out: str) -> None:
    """Every case, one after another."""
    device.start_distributed()
    start_model_parallel(Config())
    found = {}
    for name, (model, settings) in CASES.items():
        training = Training(inputs, model, settings)
        found[name] = [training.step(), training.step()]
        found[name][0]["buckets"] = sum(
            len(groups.buckets) for groups in training.policy.chunks[0].bucket_groups
        )
    if dist.get_rank() == 0:
        torch.save(found, out)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
