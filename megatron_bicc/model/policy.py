"""The policy in training: model chunks, optimizer, and a step's passes over packed micro-batches.

Shape suffixes: N response rows of a micro-batch.
"""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from transformers import PretrainedConfig

from megatron_bicc import device
from megatron_bicc.config import Config
from megatron_bicc.errors import NotFiniteError
from megatron_bicc.model.batch import PackedBatch
from megatron_bicc.model.build import PolicyModel
from megatron_bicc.model.families import describe, transformer_config
from megatron_bicc.model.gradient_sketch import GradientSketch, sketch_directions
from megatron_bicc.model.optimizer import make_optimizer, make_scheduler
from megatron_bicc.weights.hf_files import supported_config
from megatron_bicc.weights.hf_mapping import rule_for
from megatron_bicc.weights.hf_weights import is_finite, load_weights, not_finite

logger = logging.getLogger(__name__)


def start_model_parallel(config: Config, gloo_groups: bool = True) -> None:
    """Makes megatron-core's process groups and random states; once a process.

    gloo_groups: whether data-parallel ranks get the gloo groups over which checkpoints are gathered.
    """
    parallel = config.parallel
    with device.megatron():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor,
            pipeline_model_parallel_size=parallel.pipeline,
            virtual_pipeline_model_parallel_size=(
                parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None
            ),
            expert_model_parallel_size=parallel.expert,
            expert_tensor_parallel_size=1,
            create_gloo_process_groups=gloo_groups,
        )
        tensor_parallel.model_parallel_cuda_manual_seed(config.seed)


def build_modules(
    megatron_config: TransformerConfig,
    hf_config: PretrainedConfig,
    temperature: float,
    device: torch.device,
) -> list[PolicyModel]:
    """This rank's model chunks, one a virtual pipeline stage, without weights."""
    virtual = parallel_state.get_virtual_pipeline_model_parallel_world_size()
    stages: list[int | None] = [None] if virtual is None else list(range(virtual))
    modules = [PolicyModel(megatron_config, hf_config, temperature, stage) for stage in stages]
    return [module.to(device, megatron_config.params_dtype) for module in modules]


def data_parallel(megatron_config: TransformerConfig, module: PolicyModel) -> DistributedDataParallel:
    """A chunk with its parameters and fp32 gradients in buffers that data-parallel ranks share out.

    The gradient of a weight is summed over all ranks that hold a copy of it: a dense weight's over the
    data-parallel group, an expert's over megatron-core's expert-data-parallel group.
    """
    for name, parameter in module.named_parameters():
        if rule_for(name, first_layer=0).expert is not None:
            # megatron-core sets it under expert parallel only, but without that, too, tensor-parallel ranks
            # hold copies of the experts. The same under every layout: so are a checkpoint's entries.
            parameter.allreduce = False
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
    return DistributedDataParallel(megatron_config, ddp, module)


class Policy:
    """megatron-core model chunks of this rank under its data-parallel wrapper, and their optimizer."""

    def __init__(self, config: Config) -> None:
        """Builds the policy that `config` names and loads its weights.

        Raises UserError for an unsupported architecture or unreadable weights.
        """
        self.hf_config: PretrainedConfig = supported_config(config.model.path)
        self.megatron_config = transformer_config(self.hf_config, config)
        self.megatron_config.finalize_model_grads_func = _sum_gradients
        if dist.get_rank() == 0:
            logger.info(describe(self.hf_config))
        with device.megatron():
            self.modules = build_modules(
                self.megatron_config, self.hf_config, config.rollout.temperature, device.device()
            )
            self.directions = sketch_directions(self.hf_config.vocab_size, self.hf_config.hidden_size)
            load_weights(self.modules, self.hf_config, config.model.path)
            self.chunks = [data_parallel(self.megatron_config, module) for module in self.modules]
            self.optimizer = make_optimizer(config, self.chunks)
            self.scheduler = make_scheduler(config, self.optimizer)

    def log_probs(self, batches: list[PackedBatch]) -> list[Tensor]:
        """Forward pass: float32 [2, N] (log-probs, entropy) of every micro-batch.

        On the last pipeline stage; an empty list on the others.
        """
        found: dict[int, Tensor] = {}

        def keep(index: int, output: Tensor) -> tuple[Tensor, Tensor, dict]:
            found[index] = output.detach()
            return output.sum(), _ONE, {}

        with torch.no_grad():
            self._run(batches, keep, forward_only=True)
        return [found[i] for i in range(len(found))]

    def accumulate_gradients(
        self, batches: list[PackedBatch], loss: Callable[[int, Tensor, Tensor], Tensor]
    ) -> tuple[float, list[Tensor]]:
        """Forward and backward over all micro-batches.

        `loss(index, log_probs_N, entropy_N)` is a micro-batch's share of the step's loss: shares and their
        gradients are summed over micro-batches and data-parallel ranks, nothing is averaged. Returns this
        rank's sum and the detached log-probs of every micro-batch (last pipeline stage; else 0 and []).
        """
        losses: dict[int, float] = {}
        found: dict[int, Tensor] = {}

        def weigh(index: int, output: Tensor) -> tuple[Tensor, Tensor, dict]:
            share = loss(index, output[0], output[1])
            losses[index], found[index] = float(share.detach()), output[0].detach()
            return share, _ONE, {}

        self.zero_gradients()
        self._run(batches, weigh, forward_only=False)
        return sum(losses[i] for i in range(len(losses))), [found[i] for i in range(len(found))]

    @contextmanager
    def gradient_sketch(self, num_groups: int) -> Iterator[GradientSketch]:
        """What backward passes inside it add to the output layer's gradient, by group."""
        shard = self.modules[-1].vocab_shard()
        dtype = self.megatron_config.params_dtype
        sketch = GradientSketch(num_groups, self.directions, shard, dtype, device.device())
        self.modules[-1].sketch = sketch
        try:
            yield sketch
        finally:
            self.modules[-1].sketch = None

    def zero_gradients(self) -> None:
        """Clears the gradient buffers before a step."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    def update(self) -> float:
        """One optimizer step with the accumulated gradients; returns their global norm before clipping.

        Raises NotFiniteError on every rank, before weights, optimizer or schedule are changed, if on any
        rank a gradient is not finite, or if the squares of all add up to more than float32 holds: the norm
        would be infinite, and so would Adam's second moment. Collective.
        """
        with device.megatron():
            self._check_gradients()
            _, grad_norm, _ = self.optimizer.step()
        self.scheduler.step(increment=1)
        return float(grad_norm)

    def check_weights(self) -> None:
        """Raises NotFiniteError on every rank if any rank holds a weight that is not finite. Collective."""
        names = not_finite(self.modules, self.hf_config, lambda parameter: parameter)
        if names:
            raise NotFiniteError(f"the policy's weights are not finite: {_listed(names)}")

    def learning_rate(self) -> float:
        """Learning rate of the next optimizer step."""
        return self.optimizer.param_groups[0]["lr"]

    def host_copy(self) -> list[Tensor]:
        """This rank's weights, copied to the host."""
        return [parameter.detach().to("cpu", copy=True) for parameter in self._all_parameters()]

    @contextmanager
    def weights(self, host_weights: list[Tensor]) -> Iterator[None]:
        """Inside it the policy has other weights, such as the reference's `host_copy`; then its own again."""
        own = self.host_copy()
        self.set_weights(host_weights)
        try:
            yield
        finally:
            self.set_weights(own)

    @torch.no_grad()
    def set_weights(self, host_weights: list[Tensor]) -> None:
        """Copies another policy's `host_copy` into this one; the optimizer's main weights stay."""
        for parameter, weight in zip(self._all_parameters(), host_weights, strict=True):
            parameter.copy_(weight)

    def _check_gradients(self) -> None:
        """megatron-core 0.16 looks for gradients that are not finite only where there is a loss scaler."""
        self.optimizer.prepare_grads()
        norm = self.optimizer.get_grad_norm()
        own = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        # the norm leaves out what tensor-parallel ranks hold twice
        good = math.isfinite(norm) and is_finite(*own)
        everywhere = torch.tensor(int(good), device=device.device())
        dist.all_reduce(everywhere, dist.ReduceOp.MIN)
        if everywhere:
            return
        names = not_finite(self.modules, self.hf_config, lambda parameter: parameter.main_grad)
        what = (
            f"the gradient is not finite: {_listed(names)}"
            if names
            else "the squares of the gradient's values add up to more than float32 holds"
        )
        raise NotFiniteError(f"{what}; weights and optimizer were left as they were")

    def _all_parameters(self) -> list[Tensor]:
        return [parameter for module in self.modules for parameter in module.parameters()]

    def _run(
        self,
        batches: list[PackedBatch],
        on_output: Callable[[int, Tensor], tuple[Tensor, Tensor, dict]],
        forward_only: bool,
    ) -> None:
        """Megatron-core's schedule over the micro-batches; `on_output(index, output)` on the last stage."""
        padding = self._schedule_padding(len(batches))

        def forward_step(numbered: Iterator[tuple[int, PackedBatch]], chunk: torch.nn.Module) -> Any:
            index, packed = next(numbered)
            handle = _ignore if index >= len(batches) else partial(on_output, index)
            return chunk.module.run(packed), handle

        iterators = [iter(list(enumerate(batches + padding))) for _ in self.chunks]
        with device.megatron():
            get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=iterators if len(iterators) > 1 else iterators[0],
                model=self.chunks,
                num_microbatches=len(batches + padding),
                seq_length=max(len(batch.tokens_N) for batch in batches),
                micro_batch_size=1,
                forward_only=forward_only,
            )

    def _schedule_padding(self, count: int) -> list[PackedBatch]:
        """Empty micro-batches up to a multiple of the stages, which the interleaved schedule asks for."""
        stages = self.megatron_config.pipeline_model_parallel_size if len(self.chunks) > 1 else 1
        rows = self.megatron_config.tensor_model_parallel_size
        return [PackedBatch.padding(rows, device.device())] * (-count % stages)


def _ignore(output: Tensor) -> tuple[Tensor, Tensor, dict]:
    return output.sum() * 0.0, _ONE, {}


_ONE = torch.ones((), dtype=torch.int)


def _listed(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more tensors" if len(names) > 1 else "")


def _sum_gradients(model: list[torch.nn.Module], num_tokens: Tensor | None = None, **kwargs: Any) -> None:
    """Gradients are already weighted per token: megatron-core is not to divide by its own count."""
    finalize_model_grads(model, None, **kwargs)
