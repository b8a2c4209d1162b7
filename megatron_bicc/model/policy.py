"""The policy in training: model chunks, optimizer, and a step's passes over packed micro-batches.

Shape suffixes: A response rows of a micro-batch.
"""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
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
from megatron_bicc.model.build import PolicyModel, build_modules, describe, transformer_config
from megatron_bicc.model.gradient_sketch import GradientSketch, sketch_directions
from megatron_bicc.model.optimizer import make_optimizer, make_scheduler, step_if
from megatron_bicc.model.packed_batch import PackedBatch

logger = logging.getLogger(__name__)


def start_model_parallel(config: Config, gloo_groups: bool = True) -> None:
    """Creates megatron-core's process groups and random states; once per process.

    gloo_groups: create the data-parallel gloo groups over which checkpoints are gathered.
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


def data_parallel(megatron_config: TransformerConfig, module: PolicyModel) -> DistributedDataParallel:
    """Wraps a chunk: parameters and fp32 gradients get buffers that are sharded over data-parallel ranks.

    The gradient of a weight is summed over all ranks that hold a copy of it: a dense weight's over the
    data-parallel group, an expert's over megatron-core's expert-data-parallel group.
    """
    for name, parameter in module.named_parameters():
        if ".mlp.experts." in name:
            # megatron-core marks experts under expert parallel only. Without it, tensor-parallel ranks hold
            # copies of the experts too, and a checkpoint's entries must not depend on the layout.
            parameter.allreduce = False
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
    return DistributedDataParallel(megatron_config, ddp, module)


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
        self.megatron_config = transformer_config(hf_config, config)
        self.megatron_config.finalize_model_grads_func = _sum_gradients
        if dist.get_rank() == 0:
            logger.info(describe(hf_config))
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
            self.chunks = [data_parallel(self.megatron_config, module) for module in self.modules]
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
        their gradients are summed over micro-batches and data-parallel ranks, nothing is averaged. Returns
        this rank's sum on the last pipeline stage, 0 on the others.
        """
        losses: dict[int, float] = {}

        def weigh(index: int, output: Tensor) -> tuple[Tensor, Tensor, dict]:
            share = loss(index, output[0], output[1])
            losses[index] = float(share.detach())
            return share, _ONE, {}

        self.zero_gradients()
        self._run(batches, weigh, forward_only=False)
        return sum(losses[i] for i in range(len(losses)))

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
        """Returns a copy of this rank's weights on the host."""
        return [parameter.detach().to("cpu", copy=True) for parameter in self._all_parameters()]

    @contextmanager
    def weights(self, host_weights: list[Tensor]) -> Iterator[None]:
        """Swaps in other weights in the block, a `host_copy` such as the reference's."""
        own = self.host_copy()
        self.set_weights(host_weights)
        try:
            yield
        finally:
            self.set_weights(own)

    @torch.no_grad()
    def set_weights(self, host_weights: list[Tensor]) -> None:
        """Copies a `host_copy` into the policy; the optimizer's main weights are left as they are."""
        for parameter, weight in zip(self._all_parameters(), host_weights, strict=True):
            parameter.copy_(weight)

    def _check_gradients(self, norm: float) -> None:
        """Raises NotFiniteError on every rank. Collective. megatron-core checks under a loss scaler only."""
        own = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
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
        """Returns empty micro-batches: the interleaved schedule requires a multiple of the stages."""
        stages = self.megatron_config.pipeline_model_parallel_size if len(self.chunks) > 1 else 1
        rows = self.megatron_config.tensor_model_parallel_size
        return [PackedBatch.padding(rows, device.device())] * (-count % stages)


def _ignore(output: Tensor) -> tuple[Tensor, Tensor, dict]:
    return output.sum() * 0.0, _ONE, {}


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
