"""Run by torchrun: one optimiser step under every layout of its number of processes.

torchrun --nproc-per-node 2 step_worker.py INPUTS OUT

INPUTS holds, for each model of LAYOUTS, the directories MODEL (the reference policy) and MODEL_moved (the
policy in training) and the file MODEL.pt (the groups). Rank 0 writes {layout: what run_step returns} to OUT.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.steps import CASES, TOKENIZER, make_config, to_groups

from megatron_bicc import platform
from megatron_bicc.config import Config
from megatron_bicc.errors import NotFiniteError
from megatron_bicc.monitoring.timing import Stopwatch
from megatron_bicc.platform.gather import gathered
from megatron_bicc.policy.hf_weights import hf_tensors, load_weights
from megatron_bicc.policy.policy import Policy, start_model_parallel
from megatron_bicc.training.learner import Learner

TP2, SP2 = {"parallel.tensor": 2}, {"parallel.tensor": 2, "parallel.sequence": True}
PP2, VPP2 = {"parallel.pipeline": 2}, {"parallel.pipeline": 2, "parallel.virtual_pipeline": 2}
EP2 = {"parallel.expert": 2}
DENSE = {
    1: {"one": {}},
    2: {"dp2": {}, "tp2": TP2, "tp2_sp": SP2, "pp2": PP2, "vpp2": VPP2},
    4: {
        "dp4": {},
        "tp2_dp2": TP2,
        "tp2_sp_dp2": SP2,
        "pp2_dp2": PP2,
        "vpp2_dp2": VPP2,
        "tp2_pp2": TP2 | PP2,
        "tp2_sp_pp2": SP2 | PP2,
        "tp2_vpp2": TP2 | VPP2,
        "tp2_sp_vpp2": SP2 | VPP2,
    },
}
EXPERTS = {
    2: {"ep2": EP2, "tp2_sp_ep2": SP2 | EP2},
    4: {"ep2_dp4": EP2, "ep2_vpp2_dp2": EP2 | VPP2, "tp2_sp_pp2_ep2": SP2 | PP2 | EP2},
}
RECOMPUTE = ("none", "selective", "full")
CASE = "bicc_rcc_mixed_conditioned"
"""Both packings, the reference policy, and a pass for the conditioned denominator"""


def layouts(processes: int) -> dict[str, tuple[str, dict]]:
    """Name: (model, settings by dotted name), such that those of equal process groups are neighbours."""
    dense = {
        f"{name}-{recompute}": ("dense", settings | {"model.recompute": recompute})
        for name, settings in DENSE[processes].items()
        for recompute in RECOMPUTE
    }
    return dense | {name: ("moe", settings) for name, settings in EXPERTS.get(processes, {}).items()}


def configure(path: Path, settings: dict) -> Config:
    """The case's configuration under a layout; micro-batches are small, so that there are several."""
    algorithm, choices = CASES[CASE]
    config = make_config(path, algorithm, **choices)
    # a large eps: else Adam's first update is the sign of the gradient, and rounding flips that of a tiny one
    config.optimizer.lr, config.optimizer.eps, config.optimizer.clip_grad = 1e-2, 1e-2, 1.0
    config.train.max_tokens_per_microbatch = 100
    for name, value in settings.items():
        section, field = name.split(".")
        setattr(getattr(config, section), field, value)
    return config


def run_step(inputs: Path, model: str, settings: dict) -> dict:
    """Loss, gradient norm, updated weights of a step, the response rows of each rank's micro-batches, and
    what every rank said to a NaN in a gradient of the last one."""
    config = configure(inputs / model, settings)
    policy = Policy(config)
    learner = Learner(config, policy, TOKENIZER)
    load_weights(policy.modules, policy.hf_config, str(inputs / f"{model}_moved"))
    policy.optimizer.reload_model_params()
    groups = to_groups(torch.load(inputs / f"{model}.pt", weights_only=False))
    result = learner.step(groups, Stopwatch())
    weights = {name: tensor.clone() for name, tensor in hf_tensors(policy.modules, policy.hf_config)}
    ranks = [rank for plan in result.plans.values() for rank in plan.ranks]
    return {
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "gradient": result.gradient,
        "weights": weights,
        "response_rows": [[batch.num_response_rows for batch in rank] for rank in ranks],
        "refusals": gathered(refusal(policy)),
    }


def refusal(policy: Policy) -> str:
    """What the policy says to an update where the last rank's gradients of norms, which tensor-parallel ranks
    hold twice, are NaN; nothing if its weights change all the same. Collective."""
    if dist.get_rank() == dist.get_world_size() - 1:
        for parameter in (p for module in policy.modules for p in module.parameters() if p.dim() == 1):
            parameter.main_grad.fill_(torch.nan)
    before = policy.host_copy()
    try:
        policy.update()
    except NotFiniteError as error:
        return str(error) if all(map(torch.equal, policy.host_copy(), before)) else ""
    return ""


def main(inputs: Path, out: str) -> None:
    """Every layout, one after another; process groups are made again where they differ."""
    platform.start_distributed()
    found, groups_of = {}, None
    for name, (model, settings) in layouts(dist.get_world_size()).items():
        parallel = configure(inputs / model, settings).parallel
        if parallel != groups_of:
            parallel_state.destroy_model_parallel()
            start_model_parallel(configure(inputs / model, settings))
            groups_of = parallel
        found[name] = run_step(inputs, model, settings)
    if dist.get_rank() == 0:
        torch.save(found, out)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
