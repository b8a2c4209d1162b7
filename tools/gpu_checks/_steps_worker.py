"""Run by torchrun: optimizer steps of a random policy on fixed rollouts.

_steps_worker.py ORDER, which is JSON: model, settings, rollouts, out
"""
# ruff: noqa: E402 the path, and which packages there are, must be set before the imports

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file

REPOSITORY = Path(__file__).parents[2]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tools"), str(REPOSITORY / "tests")]
if os.environ.get("WITHOUT_TRANSFORMER_ENGINE"):
    sys.modules["transformer_engine"] = None  # importing it fails, as where it is not installed

from benchmarks._steps import make_groups
from support.steps import TOKENIZER, hf_gradients, make_config

from megatron_bicc import device
from megatron_bicc.checkpoint.checkpoint import (
    CheckpointWriter,
    Progress,
    checkpoints,
    load_checkpoint,
    read_progress,
)
from megatron_bicc.config import Config
from megatron_bicc.errors import NotFiniteError
from megatron_bicc.metrics import Stopwatch
from megatron_bicc.model.policy import start_model_parallel
from megatron_bicc.rollout.types import Group
from megatron_bicc.training.learner import Learner
from megatron_bicc.weights.hf_weights import load_policy


def main(order: dict[str, Any]) -> None:
    """Takes a step and writes its outcome to OUT.json and OUT.safetensors, with OUT.resume a second one."""
    device.start_distributed()
    config = make_config(Path(order["model"]), "bicc", bicc__weight=0.5)
    for name, value in order["settings"].items():
        section, field = name.split(".")
        setattr(getattr(config, section), field, value)
    device.choose_kernels(config.model.kernels)
    start_model_parallel(config)
    learner = new_learner(config)
    groups = make_groups(*order["rollouts"], learner.policy.hf_config.vocab_size)
    facts = {}
    if "checkpoint.every" in order["settings"]:
        facts = checked_resume(learner, groups, Path(order["out"]))
    if device.has_cuda():
        torch.cuda.reset_peak_memory_stats()
    (result,) = learner.step(groups, Stopwatch())
    if device.has_cuda():
        facts["peak_bytes"] = torch.cuda.max_memory_allocated()
    facts |= {"loss": result.loss, "grad_norm": result.grad_norm}
    facts["layers"] = type(learner.policy.modules[0].decoder.layers[0].self_attention.linear_qkv).__name__
    gradients = {name: x.float().cpu().contiguous() for name, x in hf_gradients(learner.policy).items()}
    if dist.get_rank() == 0:
        Path(f"{order['out']}.json").write_text(json.dumps(facts))
        save_file(gradients, f"{order['out']}.safetensors")
    device.end_distributed()


def new_learner(config: Config) -> Learner:
    """Returns a learner of the policy in model.path."""
    return Learner(config, load_policy(config), TOKENIZER)


def checked_resume(learner: Learner, groups: list[Group], run: Path) -> dict[str, Any]:
    """Takes two steps, the second once more from a checkpoint of the first, and one with a NaN gradient.

    Returns the largest relative difference of a weight after both second steps, and whether the NaN was
    refused with all weights as they were. The learner's policy is as after the second step.
    """
    learner.step(groups, Stopwatch())
    writer = CheckpointWriter(str(run), keep=1)
    writer.snapshot(learner.policy, Progress(1, {}, learner.policy.scheduler.state_dict(), {}, {}))
    writer.start()
    writer.wait()
    learner.step(groups, Stopwatch())
    (checkpoint,) = checkpoints(str(run))
    resumed = new_learner(learner.config)
    load_checkpoint(checkpoint, resumed.policy, read_progress(checkpoint))
    resumed.step(groups, Stopwatch())
    pairs = zip(resumed.policy.host_copy(), learner.policy.host_copy(), strict=True)
    differences = [float((a - b).float().norm() / b.float().norm().clamp(min=1e-12)) for a, b in pairs]
    before = learner.policy.host_copy()
    learner.policy.modules[0].decoder.layers[0].self_attention.linear_qkv.weight.main_grad.fill_(np.nan)
    try:
        learner.policy.update()
        refused = False
    except NotFiniteError:
        refused = all(map(torch.equal, learner.policy.host_copy(), before))
    return {"resume_difference": max(differences), "nan_refused": refused}


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
