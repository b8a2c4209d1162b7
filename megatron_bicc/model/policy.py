"""The policy in training: model chunks, optimizer, and a step's passes over packed micro-batches.

Shape suffixes: A response rows of a micro-batch.
"""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any, Protocol

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
from torch.nn import Parameter
from transformers import PretrainedConfig

from megatron_bicc import device
from megatron_bicc.collective import gathered
from megatron_bicc.config import Config
from megatron_bicc.errors import NotFiniteError
from megatron_bicc.model import attention_cuda
from megatron_bicc.model.build import PolicyModel, build_modules, describe, transformer_config
from megatron_bicc.model.families import head_dim
from megatron_bicc.model.gradient_sketch import GradientSketch, sketch_directions
from megatron_bicc.model.megatron_settings import megatron_core_config, row_alignment
from megatron_bicc.model.moe_router import PolicyRouter, RouterLosses
from megatron_bicc.model.optimizer import make_optimizer, make_scheduler, step_if
from megatron_bicc.model.packed_batch import PackedBatch

logger = logging.getLogger(__name__)


def start_model_parallel(config: Config, gloo_groups: bool = True) -> None:
    """Creates megatron-core's process groups and random states; once per process.

    gloo_groups: create the gloo groups, of ranks that hold copies, over which checkpoints are gathered.
    """
    parallel = config.parallel
    with device.megatron():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor,
            pipeline_model_parallel_size=parallel.pipeline,
            virtual_pipeline_model_parallel_size=(
                parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None
            ),
            context_parallel_size=parallel.context,
            expert_model_parallel_size=parallel.expert,
            expert_tensor_parallel_size=1,
            create_gloo_process_groups=gloo_groups,
        )
        tensor_parallel.model_parallel_cuda_manual_seed(config.seed)


def ddp_config(config: Config) -> DistributedDataParallelConfig:
    """Returns megatron-core's configuration of the wrapper. Raises UserError for megatron.ddp."""
    return megatron_core_config(
        DistributedDataParallelConfig, config, use_distributed_optimizer=True, grad_reduce_in_fp32=True
    )


def data_parallel(
    config: Config, megatron_config: TransformerConfig, module: PolicyModel
) -> DistributedDataParallel:
    """Wraps a chunk: parameters and fp32 gradients get buffers that are sharded over the ranks with copies.

    The gradient of a weight is summed over all ranks that hold a copy of it: a dense weight's over the data-
    and context-parallel ranks, an expert's over megatron-core's expert-data-parallel group.
    """
    for name, parameter in module.named_parameters():
        if ".mlp.experts." in name:
            # megatron-core marks experts under expert parallel only. Without it, tensor-parallel ranks hold
            # copies of the experts too, and a checkpoint's entries must not depend on the layout.
            parameter.allreduce = False
    return DistributedDataParallel(megatron_config, ddp_config(config), module)


class WeightSource(Protocol):
    """Fills a new policy with weights; `weights.hf_weights.HfWeights` reads a Hugging Face directory."""

    def load(self, modules: list[PolicyModel]) -> None:
        """Fills every parameter of this rank. Collective.

        Raises UserError on every rank if a tensor is missing, misshapen or not finite on any.
        """
        ...

    def named(self, module: PolicyModel) -> Iterator[tuple[tuple[str, ...], Parameter]]:
        """Yields every parameter with the names of the tensors that it is made of, for messages."""
        ...


class Policy:
    """megatron-core model chunks of this rank under its data-parallel wrapper, and their optimizer."""

    def __init__(self, config: Config, hf_config: PretrainedConfig, source: WeightSource) -> None:
        """Builds the policy that `hf_config` describes with the weights of `source`. Collective.

        `weights.hf_weights.load_policy` makes one from model.path. Raises UserError for a layout that does
        not fit the model, or weights that cannot be used.
        """
        self.hf_config, self._source = hf_config, source
        self._row_alignment = row_alignment(config)
        self._parked: list[Tensor] | None = None
        """The policy's own weights on the host, while `weights` has others from there on the device"""
        self._recorded: list[Tensor] | None = None
        """Set while passes keep their experts (recorded_experts)"""
        self.megatron_config = transformer_config(hf_config, config)
        self.megatron_config.finalize_model_grads_func = _sum_gradients
        if dist.get_rank() == 0:
            logger.info(describe(hf_config))
        if device.has_cuda() and config.model.dtype != "float32":
            kernels = attention_cuda.choose_kernels(config.model.attention, head_dim(hf_config))
            if dist.get_rank() == 0:
                logger.info("attention kernels: %s", kernels)
        with device.megatron():
            self.modules = build_modules(
                self.megatron_config,
                hf_config,
                config.rollout.temperature,
                device.device(),
                entropy_in_loss=config.loss.entropy_coefficient != 0,
            )
            self.directions = sketch_directions(hf_config.vocab_size, hf_config.hidden_size)
            # before the optimizer, which copies bf16 weights to its fp32 main weights
            source.load(self.modules)
            self.chunks = [data_parallel(config, self.megatron_config, module) for module in self.modules]
            if self.chunks[0].ddp_config.overlap_grad_reduce:
                # gradients are complete, and may be reduced, after the last micro-batch only
                no_sync = [chunk.no_sync for chunk in self.chunks]
                self.megatron_config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
            self.optimizer = make_optimizer(config, self.chunks)
            self.scheduler = make_scheduler(config, self.optimizer)

    def log_probs(self, batches: list[PackedBatch]) -> list[Tensor]:
        """Runs a forward pass; returns float32 [2, A] (log-probs, entropy) of every micro-batch.

        The other pipeline stages than the last return an empty list.
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
    ) -> float:
        """Runs forward and backward over all micro-batches.

        `loss(index, log_probs_A, entropy_A)` returns a micro-batch's share of the step's loss: shares and
        their gradients are summed over micro-batches, data- and context-parallel ranks, nothing is averaged.
        Returns this rank's sum on the last pipeline stage, 0 on the others.
        """
        losses: dict[int, Tensor] = {}

        def weigh(index: int, output: Tensor) -> tuple[Tensor, Tensor, dict]:
            share = loss(index, output[0], output[1])
            losses[index] = share.detach()
            return share, _ONE, {}

        self.zero_gradients()
        self._run(batches, weigh, forward_only=False)
        # read together, at the end: reading one makes the host wait for all that it has launched before
        shares = [losses[i] for i in range(len(losses))]
        return sum(torch.stack(shares).tolist()) if shares else 0.0

    @property
    def layers(self) -> list[int]:
        """Numbers, from 0, of the layers of this pipeline stage, chunk after chunk."""
        return [layer.layer_number - 1 for module in self.modules for layer in module.decoder.layers]

    @contextmanager
    def recorded_experts(self) -> Iterator[list[Tensor]]:
        """Yields a list to which every `log_probs` in the block adds the experts of each micro-batch.

        They are PackedBatch.experts of the micro-batch without any row left to its router.
        """
        self._recorded = []
        for module in self.modules:
            module.records_experts = True
        try:
            yield self._recorded
        finally:
            self._recorded = None
            for module in self.modules:
                module.records_experts = False

    @contextmanager
    def gradient_sketch(self, num_groups: int) -> Iterator[GradientSketch]:
        """Yields the sketch of the output layer's gradient that backward passes in the block fill."""
        shard = self.modules[-1].vocab_shard()
        dtype = self.megatron_config.params_dtype
        sketch = GradientSketch(num_groups, self.directions, shard, dtype, device.device())
        self.modules[-1].sketch = sketch
        try:
            yield sketch
        finally:
            self.modules[-1].sketch = None

    @contextmanager
    def counted_experts(self) -> Iterator[Tensor]:
        """Yields the load of the experts, float64 [layers of the model, experts], to which passes add.

        A response row adds its weight to each of its experts; prefixes add nothing. The sum over all ranks is
        the whole: no two route the same row in the same layer. Without experts it is [layers, 0].
        """
        c = self.megatron_config
        shape = (c.num_layers, c.num_moe_experts or 0)
        load_XY = torch.zeros(shape, dtype=torch.float64, device=device.device())
        with self._routers() as routers:
            for router in routers:
                router.load_XY = load_XY
            yield load_XY

    @contextmanager
    def router_losses(self, losses: RouterLosses | None) -> Iterator[None]:
        """Adds the routers' losses, if there are any, to the gradient pass in the block."""
        with self._routers() as routers:
            for router in routers:
                router.losses = losses
            yield

    @contextmanager
    def _routers(self) -> Iterator[list[PolicyRouter]]:
        """Yields this rank's routers, and ends what they do for a pass."""
        routers = [router for module in self.modules for router in module.routers]
        try:
            yield routers
        finally:
            for router in routers:
                router.finish()

    def zero_gradients(self) -> None:
        """Clears the gradient buffers before a step."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    def update(self) -> float:
        """Takes one optimizer step with the accumulated gradients; returns their global norm before clipping.

        Raises NotFiniteError on every rank, before weights, optimizer or schedule are changed, if on any
        rank a gradient is not finite, or if the squares of all add up to more than float32 can represent:
        the norm would be infinite, and so would Adam's second moment. Collective.
        """
        with device.megatron():
            grad_norm = step_if(self.optimizer, self._check_gradients)
        self.scheduler.step(increment=1)
        return grad_norm

    def check_weights(self) -> None:
        """Raises NotFiniteError on every rank if any rank holds a weight that is not finite. Collective."""
        names = self._not_finite(lambda parameter: parameter)
        if names:
            raise NotFiniteError(f"the policy's weights are not finite: {_listed(names)}")

    def learning_rate(self) -> float:
        """Returns the learning rate of the next optimizer step."""
        return self.optimizer.param_groups[0]["lr"]

    def host_copy(self) -> list[Tensor]:
        """Returns a copy of this rank's weights on the host; of a GPU's in pinned memory."""
        return list(map(_on_host, self._all_parameters()))

    def reference_copy(self, config: Config) -> list[Tensor]:
        """Returns a copy of this rank's weights for `weights`, on the device or the host by model.reference.

        Servers that share the GPU (rollout.colocate) take the room that a copy on the device would need.
        """
        parameters, choice, free = self._all_parameters(), config.model.reference, device.unused_bytes()
        size = sum(parameter.nbytes for parameter in parameters)
        fits = not config.rollout.colocate and size <= free * REFERENCE_SHARE
        on_device = choice == "device" or (choice == "auto" and fits)
        if device.has_cuda() and dist.get_rank() == 0:
            place = "the GPU" if on_device else "the host"
            logger.info("reference policy: %.1f GB on %s (%.1f GB free)", size / 1e9, place, free / 1e9)
        return [parameter.detach().clone() for parameter in parameters] if on_device else self.host_copy()

    @contextmanager
    def weights(self, others: list[Tensor]) -> Iterator[None]:
        """Swaps in other weights in the block, for passes without gradients: a copy such as the reference's.

        Weights on the policy's device are exchanged in place, without copying them.
        """
        parameters = self._all_parameters()
        if others[0].device == parameters[0].device:
            _exchange(parameters, others)
            try:
                yield
            finally:
                _exchange(parameters, others)
            return
        if self._parked is None:  # kept: pinning memory takes longer than copying to it
            self._parked = self.host_copy()
        for parked, parameter in zip(self._parked, parameters, strict=True):
            parked.copy_(parameter.detach(), non_blocking=True)
        self.set_weights(others)
        try:
            yield
        finally:
            self.set_weights(self._parked)

    @torch.no_grad()
    def set_weights(self, others: list[Tensor]) -> None:
        """Copies weights into the policy; the optimizer's main weights are left as they are."""
        for parameter, weight in zip(self._all_parameters(), others, strict=True):
            parameter.copy_(weight, non_blocking=True)

    def _check_gradients(self, norm: float) -> None:
        """Raises NotFiniteError on every rank. Collective. megatron-core checks under a loss scaler only."""
        stepped = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        # megatron-core's precision-aware optimizer reads another attribute than grad
        own = [g for p in stepped if (g := getattr(p, "decoupled_grad", p.grad)) is not None]
        # The norm is not enough: it leaves out parameters that tensor-parallel ranks hold copies of.
        if _on_all_ranks(math.isfinite(norm) and is_finite(*own)):
            return
        names = self._not_finite(lambda parameter: parameter.main_grad)
        what = (
            f"the gradient is not finite: {_listed(names)}"
            if names
            else "the squares of the gradient's values add up to more than float32 can represent"
        )
        raise NotFiniteError(f"{what}; weights and optimizer were left as they were")

    @torch.no_grad()
    def _not_finite(self, of: Callable[[Parameter], Tensor]) -> list[str]:
        """Returns the names of the tensors of which `of(parameter)`, a weight or its gradient, holds NaN or
        infinite values on any rank. Collective.
        """
        if _on_all_ranks(is_finite(*map(of, self._all_parameters()))):  # the usual case, in one pass
            return []
        own = [
            name
            for module in self.modules
            for names, parameter in self._source.named(module)
            if not is_finite(of(parameter))
            for name in names
        ]
        return list(dict.fromkeys(name for names in gathered(own) for name in names))

    def _all_parameters(self) -> list[Tensor]:
        return [parameter for module in self.modules for parameter in module.parameters()]

    def _run(
        self,
        batches: list[PackedBatch],
        on_output: Callable[[int, Tensor], tuple[Tensor, Tensor, dict]],
        forward_only: bool,
    ) -> None:
        """Runs megatron-core's schedule over the micro-batches; the last stage calls `on_output`."""
        padding = self._schedule_padding(len(batches))
        # of each micro-batch, the experts of each chunk's layers
        experts: list[list[Tensor]] = [[] for _ in batches + padding]

        def forward_step(numbered: Iterator[tuple[int, PackedBatch]], chunk: torch.nn.Module) -> Any:
            index, packed = next(numbered)
            handle = _ignore if index >= len(batches) else partial(on_output, index)
            output = chunk.module.run(packed)
            if self._recorded is not None:
                experts[index].append(chunk.module.experts())
            return output, handle

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
        if self._recorded is not None:
            self._recorded += [torch.cat(parts, dim=1) for parts in experts[: len(batches)]]
        for module in self.modules:
            module.forget_experts()

    def _schedule_padding(self, count: int) -> list[PackedBatch]:
        """Returns empty micro-batches: the interleaved schedule requires a multiple of the stages."""
        stages = self.megatron_config.pipeline_model_parallel_size if len(self.chunks) > 1 else 1
        return [self._padding for _ in range(-count % stages)]

    @cached_property
    def _padding(self) -> PackedBatch:
        """An empty micro-batch; made once, since each costs several copies to the device."""
        return PackedBatch.padding(self._row_alignment, device.device())


def _ignore(output: Tensor) -> tuple[Tensor, Tensor, dict]:
    return output.sum() * 0.0, _ONE, {}


def _on_host(parameter: Tensor) -> Tensor:
    copy = torch.empty_like(parameter, device="cpu", pin_memory=parameter.is_cuda, requires_grad=False)
    return copy.copy_(parameter.detach())


def _exchange(parameters: list[Tensor], others: list[Tensor]) -> None:
    """Exchanges the memory of two lists of tensors of equal shapes and types."""
    for parameter, other in zip(parameters, others, strict=True):
        parameter.data, other.data = other.data, parameter.data


REFERENCE_SHARE = 0.25
"""Largest share of the GPU memory that is free before the first step for a copy of the reference policy's
weights; the rest is for activations, logits and buffers"""
_ONE = torch.ones((), dtype=torch.int)
"""Number of tokens that megatron-core would divide by; losses are normalised before"""


def is_finite(*tensors: Tensor) -> bool:
    """Returns whether all values are finite, in one pass and without a copy; meta tensors count as finite.

    aminmax propagates NaN, so the two extremes show any value that is not finite.
    """
    extremes = [torch.stack(torch.aminmax(x)).float() for x in tensors if x.numel() and not x.is_meta]
    return not extremes or bool(torch.cat(extremes).isfinite().all())


def _on_all_ranks(good: bool) -> bool:
    """Returns whether `good` holds on every rank. Collective."""
    everywhere = torch.tensor(int(good), device=device.device())
    dist.all_reduce(everywhere, dist.ReduceOp.MIN)
    return bool(everywhere)


def _listed(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more tensors" if len(names) > 1 else "")


def _sum_gradients(model: list[torch.nn.Module], num_tokens: Tensor | None = None, **kwargs: Any) -> None:
    """Drops the token count: gradients are already normalised, so megatron-core must not divide by it."""
    finalize_model_grads(model, None, **kwargs)
