"""The stream of whole tensors, checked against the model's own names and shapes, cut into buckets."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PretrainedConfig

from megatron_bicc.policy.hf_files import SafetensorsDirectory


@dataclass(frozen=True)
class Bucket:
    """Some of the stream's tensors. Each has a storage of its own, on its device."""

    tensors: list[tuple[str, Tensor]]

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(tensor.nbytes for _, tensor in self.tensors)


def expected_shapes(path: str, hf_config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of the model in the Hugging Face directory `path`.

    Taken from the headers of its safetensors; buffers that old checkpoints carry, and the second copy of a
    tied output layer, are left out. Raises ValueError for a directory that cannot be read.
    """
    shapes = {
        name: tuple(tensor.shape)
        for name, tensor in SafetensorsDirectory(path).describe().items()
        if name.endswith((".weight", ".bias"))
    }
    if hf_config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    return shapes


def checked(
    tensors: Iterable[tuple[str, Tensor]], expected: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, Tensor]]:
    """The same stream. A server answers success for a name that it does not know: this does not.

    Raises ValueError naming a tensor that the model does not have, that has another shape there or that comes
    twice, before it is passed on; at the stream's end, naming those that did not come.
    """
    missing = dict(expected)
    for name, tensor in tensors:
        if name not in missing:
            fault = "came twice" if name in expected else "is no parameter of the servers' model"
            raise ValueError(f"weight sync: {name} {fault}")
        shape = missing.pop(name)
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"weight sync: {name} has shape {tuple(tensor.shape)}, but {shape} in the servers' model"
            )
        yield name, tensor
    if missing:
        raise ValueError(f"weight sync: no new weights came for {', '.join(sorted(missing))}")


def buckets(tensors: Iterable[tuple[str, Tensor]], capacity: int) -> Iterator[Bucket]:
    """The stream in its order, in buckets of at most `capacity` bytes; a larger tensor is a bucket by itself.

    A bucket is emptied when the next one is asked for: at most one and the tensor that did not fit into it
    are in memory.
    """
    held: list[tuple[str, Tensor]] = []
    size = 0
    for name, tensor in tensors:
        if held and size + tensor.nbytes > capacity:
            yield Bucket(held)
            held.clear()
            held, size = [], 0
        held.append((name, _alone(tensor)))
        size += tensor.nbytes
    if held:
        yield Bucket(held)


def _alone(tensor: Tensor) -> Tensor:
    """A part of a larger tensor would keep, and send, all of it."""
    owns_all = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if owns_all else tensor.clone(memory_format=torch.contiguous_format)
