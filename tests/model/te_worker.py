"""Run as two processes: steps and checkpoints, with megatron-core's own layers or Transformer Engine's.

te_worker.py INPUTS OUT [OUT ...]

INPUTS is what training/step_worker.py reads. If the first OUT is empty, it takes the first step of every
layout, and leaves a run's checkpoint of each of SAVED in OUT/NAME. Then it takes the step after the
checkpoints of each OUT: its own, and others, by either kind of layer. Rank 0 writes OUT/report.pt.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.steps import hf_gradients
from training.step_worker import Training, configure, leave_model_parallel

from megatron_bicc import device
from megatron_bicc.model.build import backend
from megatron_bicc.model.policy import start_model_parallel

TP2, SP2 = {"parallel.tensor": 2}, {"parallel.tensor": 2, "parallel.sequence": True}
LAYOUTS = {
    "dense": ("dense", {"model.recompute": "selective"}),
    "dense_tp2_sp": ("dense", SP2 | {"model.recompute": "full"}),
    "biased_tp2": ("biased", TP2),
    "windows_tp2_sp": ("windows", SP2),
    "moe": ("moe", {}),
    "moe_tp2_sp": ("moe", SP2 | {"model.recompute": "full"}),
    "shared_tp2_sp_ep2": ("shared", SP2 | {"parallel.expert": 2}),
    "moe_ep2": ("moe", {"parallel.expert": 2, "model.recompute": "selective"}),
}
"""Name: (model, settings by dotted name)"""
SAVED = {"dense_tp2_sp": "dense", "moe_ep2": "moe"}
"""Layouts of which a checkpoint is left after the first step, and those that load it"""


def enter(inputs: Path, name: str) -> Training:
    model, settings = LAYOUTS[name]
    leave_model_parallel()
    start_model_parallel(configure(inputs / model, settings))
    return Training(inputs, model, settings)


def first_step(inputs: Path, out: Path, name: str) -> dict:
    """The first step of a layout, its gradients and its modules' classes; leaves a checkpoint of SAVED."""
    training = enter(inputs, name)
    found = training.step()
    if name in SAVED:
        training.save(out / name)
    found["classes"] = {type(module).__name__ for module in training.policy.modules[0].modules()}
    return found | {"gradients": hf_gradients(training.policy)}


def second_step(inputs: Path, checkpoint: Path, name: str) -> dict:
    """The step after a checkpoint that `first_step` left."""
    training = enter(inputs, SAVED[name])
    training.load(checkpoint / name)
    return training.step()


def main(inputs: Path, out: Path, *others: Path) -> None:
    device.start_distributed()
    report = {"backend": backend()}
    if not any(out.iterdir()):
        report["first"] = {name: first_step(inputs, out, name) for name in LAYOUTS}
    report["second"] = {
        path.name: {name: second_step(inputs, path, name) for name in SAVED} for path in (out, *others)
    }
    if dist.get_rank() == 0:
        torch.save(report, out / "report.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
