"""The optimizer and its learning-rate schedule, both megatron-core's."""

from collections.abc import Callable

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import (
    ChainedOptimizer,
    MegatronOptimizer,
    OptimizerConfig,
    get_megatron_optimizer,
)
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor

from megatron_bicc.config import Config
from megatron_bicc.model.megatron_settings import megatron_core_config


def optimizer_config(config: Config) -> OptimizerConfig:
    """Returns megatron-core's configuration of AdamW. Raises UserError for megatron.optimizer."""
    c = config.optimizer
    dtype = getattr(torch, config.model.dtype)
    return megatron_core_config(
        OptimizerConfig,
        config,
        optimizer="adam",
        lr=c.lr,
        min_lr=c.min_lr,
        weight_decay=c.weight_decay,
        adam_beta1=c.beta1,
        adam_beta2=c.beta2,
        adam_eps=c.eps,
        clip_grad=c.clip_grad,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=True,
    )


def make_optimizer(
    config: Config, chunks: list[DistributedDataParallel], gloo_groups: bool = True
) -> ChainedOptimizer:
    """Returns AdamW over the chunks' data-parallel shards, with fp32 main weights if the model is bf16.

    gloo_groups: as given to `start_model_parallel`.
    """
    optimizer = get_megatron_optimizer(optimizer_config(config), chunks, use_gloo_process_groups=gloo_groups)
    for part in optimizer.chained_optimizers:
        if isinstance(part.optimizer, torch.optim.AdamW):
            _start_state(part.optimizer)
            _load_steps(part)
        elif part.init_state_fn is not None:
            # Adam of Transformer Engine or apex, whose state also must exist before the first step: colocated
            # rollout servers take a share of the memory that is free when they start
            part.init_state_fn(part.optimizer, part.config)
    return optimizer


@torch.no_grad()
def step_if(optimizer: ChainedOptimizer, check: Callable[[float], None]) -> float:
    """Takes an optimizer step; returns the gradients' global norm before clipping. Collective.

    The same as `optimizer.step()`, with a call of `check(norm)` in between: by then every parameter that the
    optimizer steps on has its unclipped `grad`, and nothing has changed if `check` raises.
    """
    optimizer.prepare_grads()
    norm = optimizer.get_grad_norm()
    check(norm)
    for part in optimizer.chained_optimizers:
        parameters = part.get_parameters()
        if parameters and part.config.clip_grad > 0:
            clip_grad_by_total_norm_fp32(
                parameters,
                part.config.clip_grad,
                norm,
                use_decoupled_grad=part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8,
            )
    optimizer.step_with_ready_grads()
    return norm


def _start_state(optimizer: torch.optim.Optimizer) -> None:
    """Creates the state of torch's AdamW, which torch would create at the first step.

    Without it megatron-core can neither save nor load a checkpoint before that step.
    """
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        zeros = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.tensor(0.0), **zeros}


def _load_steps(optimizer: DistributedOptimizer) -> None:
    """Makes a checkpoint loadable into torch's AdamW, which counts steps in a tensor per parameter.

    megatron-core 0.16 looks for that count among the checkpoint's tensors, where it is not stored, and would
    share one tensor between all parameters, so that every one of them would increment it.
    """
    load = optimizer._set_main_param_and_optimizer_states

    def load_with_step(model_param: Tensor, tensors: dict[str, Tensor]) -> None:
        group, place = optimizer.model_param_group_index_map[model_param]
        state = optimizer.optimizer.state[optimizer.optimizer.param_groups[group]["params"][place]]
        state["step"] = state["step"].clone()
        load(model_param, tensors | {"step": state["step"]})

    optimizer._set_main_param_and_optimizer_states = load_with_step


def make_scheduler(config: Config, optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    """Returns the learning-rate schedule: warm-up, then optimizer.schedule over the run's optimizer steps.

    Update u of W warm-up updates has u / W of the peak. megatron-core's warm-up starts from 0, which would
    waste the first update's rollouts; so it starts at 1 / W here and ends W - 1 updates later. A decaying
    schedule reaches min_lr after the run's last update.
    """
    c = config.optimizer
    return OptimizerParamScheduler(
        optimizer,
        init_lr=c.lr / max(c.warmup_steps, 1),
        max_lr=c.lr,
        min_lr=c.min_lr,
        lr_warmup_steps=max(c.warmup_steps - 1, 0),
        lr_decay_steps=max(config.train.steps * config.train.updates_per_step, c.warmup_steps + 1),
        lr_decay_style=c.schedule,
        start_wd=c.weight_decay,
        end_wd=c.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        # a resumed run takes the number of updates from its checkpoint, the schedule from its settings
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
