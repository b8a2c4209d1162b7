"""Loads the policy's shards from a Hugging Face directory, and gathers and exports them, under any layout."""

import collections
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor
from torch.nn import Parameter
from transformers import PretrainedConfig

from megatron_bicc import run_lock
from megatron_bicc.collective import gathered, raised_on_all_ranks
from megatron_bicc.config import Config
from megatron_bicc.errors import UserError
from megatron_bicc.files import atomic_directory
from megatron_bicc.model.build import PolicyModel
from megatron_bicc.model.families import supported_config
from megatron_bicc.model.policy import Policy, is_finite
from megatron_bicc.weights.hf_files import (
    HfTensors,
    SafetensorsDirectory,
    TensorReader,
    copy_side_files,
    write_model,
)
from megatron_bicc.weights.hf_mapping import TensorRule, cut, from_whole, join, rule_for, to_whole


def load_policy(config: Config, tensors: HfTensors | None = None) -> Policy:
    """Builds the policy of model.path. Collective.

    tensors: those of model.path, if they are open already. Raises UserError on every rank for a model that is
    not supported, or weights that cannot be used.
    """
    with raised_on_all_ranks(UserError):
        hf_config = supported_config(config.model.path)
        tensors = tensors or SafetensorsDirectory(config.model.path)
    return Policy(config, hf_config, HfWeights(hf_config, tensors))


@dataclass(frozen=True)
class HfWeights:
    """A WeightSource: the tensors of a Hugging Face directory."""

    hf_config: PretrainedConfig
    tensors: HfTensors

    def load(self, modules: list[PolicyModel]) -> None:
        """Fills every parameter of this rank. Collective.

        Raises UserError on every rank, naming a tensor that is missing, misshapen or not finite on any.
        """
        with raised_on_all_ranks(UserError):
            fill_parameters(modules, self.hf_config, self.tensors)

    def named(self, module: PolicyModel) -> Iterator[tuple[tuple[str, ...], Parameter]]:
        """Yields every parameter with the names of its Hugging Face tensors."""
        first_expert = _first_expert(self.hf_config, parallel_state.get_expert_model_parallel_rank())
        for rule, parameter in _parameters(module, tied_output=True):
            yield rule.hf_names(first_expert), parameter


def fill_parameters(chunks: list[PolicyModel], hf_config: PretrainedConfig, source: TensorReader) -> None:
    """Fills every parameter of this rank from `source`; raises as `HfWeights.load` does, but on this rank."""
    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    first_expert = _first_expert(hf_config, parallel_state.get_expert_model_parallel_rank())
    for chunk in chunks:
        for rule, parameter in _parameters(chunk):
            tensors = {name: source.read(name) for name in rule.hf_names(first_expert)}
            shard = (rank, size) if rule.expert is None else (0, 1)  # tensor parallel does not cut experts
            try:
                whole = to_whole(rule.kind, list(tensors.values()), hf_config, size)
                part = cut(rule.kind, whole, *shard, parameter.shape)
            except RuntimeError as error:
                shapes = [tuple(x.shape) for x in tensors.values()]
                raise UserError(
                    f"{source.path}: {', '.join(tensors)}: shape {shapes} does not fit config.json"
                ) from error
            if not is_finite(part):
                bad = ", ".join(name for name, x in tensors.items() if not is_finite(x))
                raise UserError(f"{source.path}: {bad}: contains NaN or infinite values; take an intact copy")
            parameter.data.copy_(part)
        _load_tied_output(chunk, hf_config, source, rank, size)


def _parameters(chunk: PolicyModel, tied_output: bool = False) -> Iterator[tuple[TensorRule, Parameter]]:
    """Yields the chunk's parameters with their rules.

    tied_output: include the copy of the embedding that a later stage holds as its tied output layer.
    """
    layers = chunk.decoder.layers
    first_layer = layers[0].layer_number - 1 if len(layers) else 0
    for name, parameter in chunk.named_parameters():
        is_copy = name == "output_layer.weight" and chunk.share_embeddings_and_output_weights
        if is_copy and not tied_output:
            continue
        yield rule_for(name, first_layer, chunk.output_norms), parameter


def _first_expert(hf_config: PretrainedConfig, expert_rank: int) -> int:
    """Returns the index in the whole model of an expert-parallel rank's first expert; 0 without experts."""
    size = parallel_state.get_expert_model_parallel_world_size()
    return expert_rank * (getattr(hf_config, "num_experts", 0) // size)


def _load_tied_output(
    chunk: PolicyModel, hf_config: PretrainedConfig, source: TensorReader, rank: int, size: int
) -> None:
    """Fills a later stage's copy of the tied embedding."""
    if chunk.share_embeddings_and_output_weights and chunk.post_process and not chunk.pre_process:
        weight = chunk.output_layer.weight
        whole = to_whole("vocab", [source.read("model.embed_tokens.weight")], hf_config, size)
        weight.data.copy_(cut("vocab", whole, rank, size, weight.shape))


@torch.no_grad()
def hf_tensors(
    chunks: list[PolicyModel], hf_config: PretrainedConfig, views: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Yields every Hugging Face tensor of the policy, whole, on every rank, one at a time. Collective.

    views: a tensor that is whole on this rank may be a view of the policy's parameter, not a copy. The
    experts of a layer are yielded in order of their index, not of the rank that holds them. All ranks of the
    tensor-, expert- and pipeline-parallel groups must exhaust the iterator together.
    """
    pp_group = parallel_state.get_pipeline_model_parallel_group()
    tp_group = parallel_state.get_tensor_model_parallel_group()
    ep_group = parallel_state.get_expert_model_parallel_group()
    own = [parameter for chunk in chunks for _, parameter in _parameters(chunk)]
    # Every rank walks the tables of all stages in one order, so that all make the same collective calls: from
    # the stage that holds the parameter to the others, then from the other tensor or expert ranks.
    for stage, table in enumerate(_tables(chunks)):
        for owner, i in _in_order(table, ep_group.size()):
            rule, shape, dtype = table[i]
            here = owner in (None, ep_group.rank())
            mine = here and stage == pp_group.rank()
            whole_here = owner is not None or tp_group.size() == 1
            if not mine:
                part = torch.empty(shape, dtype=dtype, device=own[0].device)
            elif whole_here and not views:
                part = own[i].data.clone()
            else:
                part = own[i].data.contiguous()
            if here:
                dist.broadcast(part, group=pp_group, group_src=stage)
            if owner is None:
                yield from _to_hf(rule, _gather(part, tp_group), 0, hf_config)
            else:
                dist.broadcast(part, group=ep_group, group_src=owner)
                yield from _to_hf(rule, [part], _first_expert(hf_config, owner), hf_config)


def describe_hf(chunks: list[PolicyModel], hf_config: PretrainedConfig) -> dict[str, Tensor]:
    """Returns shape and dtype of all that `hf_tensors` yields, in its order, as meta tensors. Collective."""
    tensor = parallel_state.get_tensor_model_parallel_world_size()
    expert = parallel_state.get_expert_model_parallel_world_size()
    found: dict[str, Tensor] = {}
    for table in _tables(chunks):
        for owner, i in _in_order(table, expert):
            rule, shape, dtype = table[i]
            parts = [torch.empty(shape, dtype=dtype, device="meta")] * (tensor if owner is None else 1)
            found |= _to_hf(rule, parts, _first_expert(hf_config, owner or 0), hf_config)
    return found


Table = list[tuple[TensorRule, torch.Size, torch.dtype]]
"""A pipeline stage's parameters"""


def _tables(chunks: list[PolicyModel]) -> list[Table]:
    """Returns the table of every pipeline stage. Collective."""
    group = parallel_state.get_pipeline_model_parallel_group()
    own = [
        (rule, parameter.shape, parameter.dtype) for chunk in chunks for rule, parameter in _parameters(chunk)
    ]
    return gathered(own, group)


def _in_order(table: Table, expert_parallel: int) -> Iterator[tuple[int | None, int]]:
    """Yields (expert-parallel rank that holds it, index in the table); a layer's experts in their order.

    The rank is None for parameters outside of the experts, which every rank holds.
    """
    for is_expert, run in groupby(range(len(table)), key=lambda i: table[i][0].expert is not None):
        indices = list(run)
        for owner in range(expert_parallel) if is_expert else [None]:
            yield from ((owner, i) for i in indices)


def _gather(part: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    if group.size() == 1:
        return [part]
    parts = [torch.empty_like(part) for _ in range(group.size())]
    dist.all_gather(parts, part, group=group)
    return parts


def _to_hf(
    rule: TensorRule, parts: list[Tensor], first_expert: int, hf_config: PretrainedConfig
) -> Iterator[tuple[str, Tensor]]:
    whole = join(rule.kind, parts, hf_config)
    return zip(rule.hf_names(first_expert), from_whole(rule.kind, whole, hf_config), strict=True)


def step_export(output_dir: str, step: int) -> Path:
    """Returns the directory of the export of a run after a step."""
    return Path(output_dir) / "exports" / f"step_{step:08d}"


def save_hf(
    chunks: list[PolicyModel],
    hf_config: PretrainedConfig,
    source: Path,
    target: Path,
    is_writer: bool,
    largest_file: int = 5_000_000_000,
) -> None:
    """Writes a Hugging Face directory: the policy's weights with `source`'s configuration and tokenizer.

    Collective; one process has `is_writer` and holds one tensor at a time. Files have at most `largest_file`
    bytes, unless one tensor is larger. Written aside and renamed, so `target` is complete or absent; an
    earlier one is replaced at the end. Raises UserError, on the writer, if it cannot be written.
    """
    described, stream = describe_hf(chunks, hf_config), hf_tensors(chunks, hf_config)
    if not is_writer:  # takes part in every gather
        collections.deque(stream, maxlen=0)
        return
    fresh, old = (target.with_name(target.name + suffix) for suffix in (".new", ".old"))
    for leftover in (fresh, old):  # of a run that was killed while it replaced an earlier export
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        with atomic_directory(fresh) as partial:
            copy_side_files(source, partial)
            write_model(partial, described, ((name, tensor.cpu()) for name, tensor in stream), largest_file)
            run_lock.check()
    except UserError:
        collections.deque(stream, maxlen=0)  # the other processes are in its gathers
        raise
    try:
        if target.exists():  # rename does not replace a directory that holds files
            target.rename(old)
        fresh.rename(target)
    except OSError as error:
        raise UserError(f"{target}: cannot be written: {error.strerror or error}") from error
    shutil.rmtree(old, ignore_errors=True)
