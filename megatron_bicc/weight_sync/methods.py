"""The ways by which a bucket of weights reaches servers."""

from functools import partial
from pathlib import Path
from typing import Protocol

from megatron_bicc.weight_sync import tensor
from megatron_bicc.weight_sync.buckets import Bucket
from megatron_bicc.weight_sync.distributed import Distributed
from megatron_bicc.weight_sync.session import Session, Sessions


class Method(Protocol):
    """Brings buckets to servers; a server that fails is taken out of the sessions."""

    brackets: bool
    """Whether the servers' begin and end must stand around it"""
    reads_files: bool
    """Whether the servers read the whole directory at the end"""

    def send(self, sessions: Sessions, bucket: Bucket) -> None:
        """Gives the bucket to every live server."""

    def close(self) -> None:
        """Ends what it keeps from sync to sync."""


class Disk:
    """Servers read the files: they must see the directory under the same path."""

    brackets = False
    reads_files = True

    def send(self, sessions: Sessions, bucket: Bucket) -> None:
        """Nothing: the files are read at the end."""

    def close(self) -> None:
        """Nothing is kept."""


class Tensor:
    """HTTP carries the bytes."""

    brackets = True
    reads_files = False

    def send(self, sessions: Sessions, bucket: Bucket) -> None:
        """One request a server."""
        text = tensor.encode(bucket)
        sessions.each(partial(_post_text, text=text))

    def close(self) -> None:
        """Nothing is kept."""


async def _post_text(session: Session, text: list[bytes]) -> None:
    await session.post(tensor.PATH, tensor.request_body(text, session.tensor_parallel))


async def load_files(session: Session, directory: Path) -> None:
    """Makes the server load the directory. Raises ServerError."""
    body = {"model_path": str(directory.absolute()), "flush_cache": False}
    await session.post("/update_weights_from_disk", body)


METHODS: dict[str, type[Method]] = {"disk": Disk, "tensor": Tensor, "distributed": Distributed}
