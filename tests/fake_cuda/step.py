"""Takes the whole training step on a fake cuda:0. To be imported after device_guard has loaded the device."""

import contextlib
import functools
import json
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed._tools.fake_collectives
from fake_cuda.cases import Case
from fake_cuda.watch import Watch
from megatron.core.dist_checkpointing import state_dict_utils
from megatron.core.distributed import param_and_grad_buffer
from megatron.core.optimizer import clip_grads
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.transformer.moe import token_dispatcher
from megatron.core.utils import local_multi_tensor_l2_norm
from support.steps import TOKENIZER, make_config
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from megatron_bicc import device, device_cpu
from megatron_bicc.checkpoint.checkpoint import collect_tensors, host_state
from megatron_bicc.config import Config
from megatron_bicc.data.prompts import Prompt
from megatron_bicc.metrics import Stopwatch
from megatron_bicc.model.build import backend
from megatron_bicc.model.families import supported_config
from megatron_bicc.model.packed_batch import PackedBatch
from megatron_bicc.model.policy import Policy, start_model_parallel
from megatron_bicc.rollout.types import Group, Sample
from megatron_bicc.training.batch import TrainBatch
from megatron_bicc.training.learner import Learner
from megatron_bicc.weights.hf_files import SafetensorsDirectory
from megatron_bicc.weights.hf_weights import hf_tensors, load_policy
from megatron_bicc.weights.transport import buckets, checked, expected_shapes

REWARDS = ((1, 0, 0), (1, 0))
BUCKET_BYTES = 20_000
UNUSED_BYTES = 10**9
"""Of the fake GPU's memory: the reference policy stays there"""
PHASES = (
    *((Policy, "log_probs"), (Policy, "accumulate_gradients"), (Policy, "update")),
    *((PackedBatch, "make"), (TrainBatch, "make")),
)
"""Methods that Watch counts by themselves; the others of the step are "rest" """


def configuration(case: Case, models: Path) -> Config:
    """Returns the configuration of a case."""
    layers = case.layers * (1 if case.stage is None else 2)
    denominator = "plain" if case.replay == "old" else "conditioned"
    mixed = {"bicc__weight": 0.5, "bicc__denominator": denominator} if case.algorithm == "bicc" else {}
    config = make_config(models / f"{case.model}_{layers}", case.algorithm, **mixed)
    config.model.dtype, config.model.recompute = case.dtype, case.recompute
    config.model.routing_replay = case.replay
    config.parallel.tensor, config.parallel.sequence = case.tensor, case.sequence
    config.parallel.context = case.context
    config.parallel.pipeline = 1 if case.stage is None else 2
    config.train.max_tokens_per_microbatch = 1024 // case.context
    config.optimizer.clip_grad = 1.0
    return config


def groups() -> list[Group]:
    """Returns rollouts of random tokens."""
    random = np.random.default_rng(3)
    tokens = lambda most: random.integers(2, 90, random.integers(1, most), dtype=np.int32)  # noqa: E731
    # one token: it has no rows before its responses, so these have no keys there
    prompts = [tokens(40) if i else tokens(2) for i, _ in enumerate(REWARDS)]
    experts = lambda rows: np.zeros((rows, 2, 2), np.uint8)  # noqa: E731 of at most two layers
    sample = lambda prompt, ids: Sample(  # noqa: E731
        ids, np.zeros(len(ids), np.float32), "stop", 0, experts(len(ids)), experts(len(prompt) - 1)
    )
    return [
        Group(
            Prompt(i, [], prompt, "", "", {}),
            [sample(prompt, tokens(60)) for _ in rewards],
            [""] * len(rewards),
            np.array(rewards, np.float32),
        )
        for i, (prompt, rewards) in enumerate(zip(prompts, REWARDS, strict=True))
    ]


# ---- What stands in for a GPU, NCCL and other ranks


@contextlib.contextmanager
def replaced(target: Any, name: str, value: Any) -> Iterator[None]:
    """Sets an attribute in the block."""
    original = getattr(target, name)
    setattr(target, name, value)
    try:
        yield
    finally:
        setattr(target, name, original)


def apply(self: torch.nn.Module, function: Callable[[Tensor], Tensor], _: bool = True) -> torch.nn.Module:
    """Module._apply: a fake tensor cannot change its device in place, so parameters become new ones."""
    for child in self.children():
        child._apply(function)
    for name, old in self._parameters.items():
        if old is not None:
            new = torch.nn.Parameter(function(old.detach()), old.requires_grad)
            marks = {k: v for k, v in vars(old).items() if k not in vars(new) and k not in OF_FAKE_TENSOR}
            new.__dict__.update(marks)
            self._parameters[name] = new
    return self


OF_FAKE_TENSOR = ("fake_mode", "fake_device", "constant", "pytype", "dispatch_keys", "real_tensor")
"""Attributes that FakeTensor gives itself"""


def array(self: Tensor) -> np.ndarray:
    """Tensor.numpy: a fake tensor has no values; zeros are read in their place."""
    if isinstance(self, FakeTensor):
        return np.zeros(tuple(self.shape), str(self.dtype).removeprefix("torch."))
    return NUMPY(self)


NUMPY = Tensor.numpy


def read_real(source: SafetensorsDirectory, read: Callable[..., Tensor], name: str) -> Tensor:
    """SafetensorsDirectory.read: of files on the host."""
    with _disable_current_modes():
        return read(source, name)


class Handle:
    """Of an operation that has ended."""

    def append(self, *args: Any) -> None:
        pass

    def wait(self) -> None:
        pass


@contextlib.contextmanager
def coalescing(*args: Any, **kwargs: Any) -> Iterator[Handle]:
    """Starts the collectives of the block at once; the fake process group cannot collect them."""
    yield Handle()


class Stages:
    """The shapes that the neighbouring pipeline stages would announce: those of this pass's micro-batches."""

    def __init__(self) -> None:
        self._run = Policy._run

    def run(self, policy: Policy, batches: list[PackedBatch], *args: Any, **kwargs: Any) -> None:
        """Policy._run"""
        config = policy.megatron_config
        tensor = config.tensor_model_parallel_size if config.sequence_parallel else 1
        shapes = [[len(batch.tokens_N) // tensor, 1, config.hidden_size] for batch in batches]
        self._previous, self._next = iter(shapes), iter(shapes)
        self._run(policy, batches, *args, **kwargs)

    def announced(self, sent_next: Tensor, sent_previous: Tensor, previous: bool, next_: bool) -> tuple:
        """P2PCommunicator._communicate_shapes"""
        return next(self._previous) if previous else None, next(self._next) if next_ else None


def gather_objects(values: list[Any], value: Any, group: Any = None) -> None:
    """dist.all_gather_object: every rank has this rank's object."""
    values[:] = [value] * len(values)


def new_group(make: Callable, *args: Any, backend: str | None = None, **kwargs: Any) -> dist.ProcessGroup:
    """dist.new_group: all are fake, those for gloo as well."""
    return make(*args, **kwargs)


def in_order(
    watch: Watch, rows: Tensor, sizes: Tensor, order: Tensor, probs: Tensor | None = None, **_: Any
) -> tuple[Tensor, Tensor | None]:
    """token_dispatcher.sort_chunks_by_idxs: the chunks of one rank's experts are in order."""
    each = watch.listed(sizes.ravel())
    return torch.cat(rows.split(each)), None if probs is None else torch.cat(probs.split(each))


def norm(watch: Watch, chunk: int, overflow: Tensor, lists: list[list[Tensor]], *args: Any) -> tuple:
    """clip_grads.l2_norm_impl without Transformer Engine and apex: reads the norm of every tensor."""
    for _ in tree_leaves(lists):
        watch.synced("megatron/core/utils.py:local_multi_tensor_l2_norm")
    return torch.stack([x.norm() for x in tree_leaves(lists)]).norm()[None], None


@contextlib.contextmanager
def fake_cuda(watch: Watch, kernels: bool) -> Iterator[None]:
    """In the block torch's, megatron-core's and the package's CUDA branches run on fake tensors."""
    stages = Stages()
    seams = device_cpu._seams

    def with_syncs(*where: str) -> list:
        return [
            (module, name, watch.synchronize if name == "synchronize" else stand_in)
            for module, name, stand_in in seams(*where)
        ]

    without_library = clip_grads.l2_norm_impl is local_multi_tensor_l2_norm
    doubles = (
        *([(clip_grads, "l2_norm_impl", functools.partial(norm, watch))] if without_library else []),
        (device, "has_cuda", lambda: True),
        (device, "unused_bytes", lambda: UNUSED_BYTES),
        # an operator's fake implementation does not call it
        (device, "_kernels", object() if kernels else None),
        (device, "megatron", lambda: device_cpu.CudaOnCpu("cuda:0")),
        (device_cpu, "_seams", with_syncs),
        (torch.cuda, "get_device_capability", lambda *args: (9, 0)),
        (torch.nn.Module, "_apply", apply),
        (Tensor, "numpy", array),
        (SafetensorsDirectory, "read", functools.partialmethod(read_real, SafetensorsDirectory.read)),
        (FakeTensor, "tolist", lambda self: watch.listed(self)),
        (token_dispatcher, "sort_chunks_by_idxs", functools.partial(in_order, watch)),
        (Tensor, "record_stream", lambda *args: None),
        # what Transformer Engine keeps beside its weights has no values to write here
        (torch, "save", lambda *args, **kwargs: None),
        # the shards of the other ranks are not there
        (state_dict_utils, "validate_sharding_integrity", lambda *args, **kwargs: None),
        (dist, "all_gather_object", gather_objects),
        (dist, "new_group", functools.partial(new_group, dist.new_group)),
        (param_and_grad_buffer, "_coalescing_manager", coalescing),
        (Policy, "_run", lambda *args, **kwargs: stages.run(*args, **kwargs)),
        (P2PCommunicator, "_communicate_shapes", lambda self, *args: stages.announced(*args)),
    )
    with contextlib.ExitStack() as stack:
        for double in doubles:
            stack.enter_context(replaced(*double))
        for of, name in PHASES:
            stack.enter_context(replaced(of, name, watched(watch, of, name)))
        yield


def watched(watch: Watch, of: type, name: str) -> Any:
    """Returns the method, counting under "Class.method"."""
    function, phase = getattr(of, name), f"{of.__name__}.{name}"

    @functools.wraps(function)
    def counting(*args: Any, **kwargs: Any) -> Any:
        watch.calls[phase] += 1
        with watch.during(phase):
            return function(*args, **kwargs)

    return counting if not isinstance(vars(of)[name], classmethod) else staticmethod(counting)


# ---- The step


def take(case: Case, models: Path, directory: Path) -> dict[str, Any]:
    """Takes the step; returns the report. Raises what a GPU would, a mismatch of devices for instance."""
    config = configuration(case, models)
    watch = Watch(getattr(supported_config(config.model.path), "num_experts_per_tok", 0))
    assert backend() == case.backend, backend()
    dist.init_process_group("fake", store=FakeStore(), rank=case.rank, world_size=case.processes)
    with fake_cuda(watch, case.kernels):
        start_model_parallel(config)
        with FakeTensorMode(allow_non_fake_inputs=True), watch:
            policy = load_policy(config)
            learner = Learner(config, policy, TOKENIZER)
            with watch.during("rest"):
                (result,) = learner.step(groups(), Stopwatch())
            with watch.during("checkpoint"), device.megatron():
                directory.mkdir()
                state = collect_tensors(directory, host_state(policy))
            with watch.during("sync"):
                sent = sizes_of_buckets(policy, config)
    return watch.record() | {
        "micro_batches": [len(policy_layout.plan.ranks[0]) for policy_layout in result.trained],
        "tensors": len(policy.host_copy()),
        "types": types(policy),
        "checkpoint": sorted({f"{x.device.type}" for x in tree_leaves(state) if isinstance(x, Tensor)}),
        "buckets": sent,
    }


def sizes_of_buckets(policy: Policy, config: Config) -> list[list[str]]:
    """Returns the devices and types of each bucket's tensors, on the device and on the host."""
    stream = hf_tensors(policy.modules, policy.hf_config, views=True)
    if config.parallel.pipeline == 1:  # else the names of the other stage are not known
        stream = checked(stream, expected_shapes(config.model.path, policy.hf_config))
    kinds = lambda tensors: {f"{x.device.type} {x.dtype}" for _, x in tensors}  # noqa: E731
    return [sorted(kinds(b.tensors) | kinds(b.host)) for b in buckets(stream, BUCKET_BYTES)]


def types(policy: Policy) -> dict[str, list[str]]:
    """Returns the devices and types of the state that stays on the device."""
    parameters = [p for module in policy.modules for p in module.parameters()]
    groups = [group for part in policy.optimizer.chained_optimizers for group in part.optimizer.param_groups]
    states = [
        state for part in policy.optimizer.chained_optimizers for state in part.optimizer.state.values()
    ]
    found = {
        "weights": parameters,
        "gradients": [p.main_grad for p in parameters],
        "main weights": [p for group in groups for p in group["params"]],
        "moments": [state[name] for state in states for name in ("exp_avg", "exp_avg_sq")],
    }
    return {name: sorted({f"{x.device.type} {x.dtype}" for x in xs}) for name, xs in found.items()}


def report(case: Case, models: Path, path: Path) -> None:
    """Writes the report of a case."""
    try:
        found = take(case, models, path.with_suffix(".checkpoint"))
    except Exception:
        found = {"error": traceback.format_exc()}
    path.write_text(json.dumps(found))
