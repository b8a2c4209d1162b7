"""What ends a run at a weight sync.

SGLang servers while they take new weights: paused, updated, named by a version, and let go on.

The stream of whole tensors, checked against the model's own names and shapes, cut into buckets.

Weights by a broadcast from this process to every rank of its servers, over gloo or NCCL.

The weights of a sync as a Hugging Face directory that a server can load.

Weights in the body of an HTTP request.

The ways by which a bucket of weights reaches servers.
"""

import asyncio
import base64
import contextlib
import json
import pickle
import shutil
import socket
import subprocess
import sys
import uuid
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _new_process_group_helper, _world
from transformers import PretrainedConfig

from megatron_bicc import device
from megatron_bicc.errors import UserError
from megatron_bicc.sglang.client import ServerClient, ServerError, ServerRefusal, ServerUnavailable
from megatron_bicc.weights.hf_files import SafetensorsDirectory, copy_side_files, write_file, write_index


class WeightSyncError(RuntimeError):
    """The servers' weights are not, or would not be, the policy's. One line."""


INCOMPLETE = "incomplete"
"""Weight version of a server whose weights are not known to be one version's"""
GIVE_UP_S = 10.0
"""Seconds that a call to a server that has failed may take"""
Result = TypeVar("Result")


class Run(Protocol):
    """Runs a coroutine function in the event loop that the servers' clients live in, and waits for it."""

    def __call__(self, function: Callable[..., Awaitable[Result]], *args: Any) -> Result: ...


class Session:
    """A server between `open` and `close` or `give_up`.

    From `open` on it generates nothing and calls its weights incomplete, so that nobody takes a sample of
    mixed weights for a good one, even if this process ends before the sync does.
    """

    def __init__(self, client: ServerClient, timeout_s: float) -> None:
        """timeout_s: seconds that one call may take."""
        self.client = client
        self.timeout_s = timeout_s
        self.info: dict[str, Any] = {}
        """The server's arguments"""
        self.paths: set[str] = set()
        """What it can be asked for"""
        self.version = ""
        """Weight version that it had before"""
        self.error: ServerError | None = None
        """Why it does not get the weights; it takes no further part in the sync"""
        self._brackets = False

    @property
    def tensor_parallel(self) -> int:
        """The server's tensor-parallel size."""
        return int(self.info["tp_size"])

    @property
    def dtype(self) -> torch.dtype:
        """Type of the server's weights; if it does not say, the coarsest."""
        return getattr(torch, self.info["dtype"], torch.bfloat16)

    async def open(self, brackets: bool) -> None:
        """Pauses the server; running requests are aborted: no sequence is to be of two versions.

        brackets: whether begin and end must stand around the updates; servers before 0.5.21 have neither.
        Raises ServerError.
        """
        self.info = await self.client.server_info()
        self.paths = await self.client.paths()
        self.version = str((await self.client.model_info())["weight_version"])
        await self.client.pause("abort")
        await self._name(INCOMPLETE)
        self._brackets = brackets and "/begin_weight_update" in self.paths
        if self._brackets:
            await self._begin()

    async def _begin(self) -> None:
        try:
            await self.post("/begin_weight_update", {"selector": "all"})
        except ServerRefusal:  # a trainer that was killed left its session open
            await self.post("/end_weight_update", {})
            await self.post("/begin_weight_update", {"selector": "all"})

    async def end(self) -> None:
        """All weights have come: forgets the cache of the old ones. Raises ServerError."""
        if self._brackets:
            await self.post("/end_weight_update", {})
            self._brackets = False
        await self.client.flush_cache()

    async def close(self, version: int) -> None:
        """Names the weights and lets the server generate again. Raises ServerError."""
        await self._name(str(version))
        await self.client.resume()

    async def give_up(self) -> None:
        """After an error: lets the server generate if it can, its weights called incomplete."""
        for path in (
            ("/end_weight_update", "/continue_generation") if self._brackets else ("/continue_generation",)
        ):
            with contextlib.suppress(ServerError):
                await self.client.post(path, {}, GIVE_UP_S)

    async def post(self, path: str, body: dict[str, Any] | Sequence[bytes]) -> Any:
        """The server's answer within the sync's time. Raises ServerError."""
        return await self.client.post(path, body, self.timeout_s)

    async def _name(self, version: str) -> None:
        await self.post("/update_weight_version", {"new_version": version, "abort_all_requests": False})


class Sessions:
    """The servers of one process in one sync. What is asked of them is asked of all at once."""

    def __init__(self, clients: Sequence[ServerClient], timeout_s: float, run: Run) -> None:
        self._sessions = [Session(client, timeout_s) for client in clients]
        self.run = run

    def live(self) -> list[Session]:
        """Those that still take part."""
        return [session for session in self._sessions if session.error is None]

    def each(self, act: Callable[[Session], Awaitable[Result]]) -> list[Result]:
        """Does it with every live server; one that raises ServerError takes no further part.

        Returns what came of the others.
        """
        live = self.live()
        outcomes = self.run(_outcomes, [act(session) for session in live])
        for session, outcome in zip(live, outcomes, strict=True):
            if isinstance(outcome, ServerError):
                session.error = outcome
            elif isinstance(outcome, BaseException):
                raise outcome
        return [outcome for outcome in outcomes if not isinstance(outcome, ServerError)]

    def give_up(self, everything: bool) -> None:
        """Lets those go on that failed, or all."""
        lost = [session for session in self._sessions if everything or session.error]
        self.run(_outcomes, [session.give_up() for session in lost])

    def failed(self) -> dict[str, str]:
        """The reasons, by URL."""
        return {s.client.url: str(s.error) for s in self._sessions if s.error}


async def _outcomes(acts: list[Awaitable[Any]]) -> list[Any]:
    return await asyncio.gather(*acts, return_exceptions=True)


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
    tied output layer, are left out. Raises UserError for a directory that cannot be read.
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

    Raises UserError naming a tensor that the model does not have, that has another shape there or that comes
    twice, before it is passed on; at the stream's end, naming those that did not come.
    """
    missing = dict(expected)
    for name, tensor in tensors:
        if name not in missing:
            fault = "came twice" if name in expected else "is no parameter of the servers' model"
            raise UserError(f"weight sync: {name} {fault}")
        shape = missing.pop(name)
        if tuple(tensor.shape) != shape:
            raise UserError(
                f"weight sync: {name} has shape {tuple(tensor.shape)}, but {shape} in the servers' model"
            )
        yield name, tensor
    if missing:
        raise UserError(f"weight sync: no new weights came for {', '.join(sorted(missing))}")


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


BACKENDS = {"cpu": "gloo", "cuda": "nccl"}
"""By the device of the policy; that of the servers is to be the same"""
DISTRIBUTED_PATH = "/update_weights_from_distributed"


class Distributed:
    """This process and all ranks of its servers in one process group, made again when one of them is lost."""

    brackets = True
    reads_files = False

    def __init__(self) -> None:
        self._group: _Group | None = None

    def send(self, sessions: Sessions, bucket: Bucket) -> None:
        """Broadcasts every tensor.

        A server that was lost, or restarted since the last sync, breaks the group for all: then once more,
        in a group of those that are left.
        """
        if not self._try(sessions, bucket):
            self.close()
            self._try(sessions, bucket, last=True)

    def close(self) -> None:
        """Leaves the group, and makes the servers leave it."""
        if self._group:
            self._group.leave()
            self._group = None

    def _try(self, sessions: Sessions, bucket: Bucket, last: bool = False) -> bool:
        """Whether nothing failed. Servers without an answer are taken out; at last, all that failed."""
        live = sessions.live()
        if not live:
            return True
        if self._group is None or self._group.urls != [session.client.url for session in live]:
            self.close()
            self._group = _Group(live, sessions.run)
            if _take_out(live, self._group.join(), last):
                return False
        return not _take_out(live, self._group.broadcast(live, bucket), last)


def _take_out(sessions: list[Session], errors: list[ServerError | None], last: bool) -> bool:
    """Whether there are errors; keeps those that end a server's part in the sync."""
    for session, error in zip(sessions, errors, strict=True):
        if error and (last or isinstance(error, ServerUnavailable)):
            session.error = error
    return any(errors)


class _Group:
    """A process group apart from the default one: this process is rank 0, the servers' ranks follow."""

    def __init__(self, sessions: list[Session], run: Run) -> None:
        self.clients = [session.client for session in sessions]
        self.urls = [client.url for client in self.clients]
        self.sizes = [session.tensor_parallel for session in sessions]
        self.timeout = timedelta(seconds=sessions[0].timeout_s)
        # never used before: a server may still be in the group of a trainer that was killed
        self.name = f"weights_{uuid.uuid4().hex}"
        self.backend = BACKENDS[device.device().type]
        self.run = run
        self._process_group: dist.ProcessGroup | None = None

    def join(self) -> list[ServerError | None]:
        """Meets all servers in the group; what failed, a server each."""
        address = _address_for(self.urls[-1])
        store = _store(address, self._world_size(), self.timeout)
        posts = []
        for i, client in enumerate(self.clients):
            body = {
                "master_address": address,
                "master_port": store.port,
                "rank_offset": 1 + sum(self.sizes[:i]),
                "world_size": self._world_size(),
                "group_name": self.name,
                "backend": self.backend,
            }
            posts.append(client.post("/init_weights_update_group", body, self.timeout.total_seconds()))
        return self.run(_together, lambda: self._make(store), posts, self._abort, self._drop)

    def broadcast(self, sessions: list[Session], bucket: Bucket) -> list[ServerError | None]:
        """Sends every tensor to all; what failed, a server each."""
        body = {
            "names": [name for name, _ in bucket.tensors],
            "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket.tensors],
            "shapes": [list(tensor.shape) for _, tensor in bucket.tensors],
            "group_name": self.name,
            "flush_cache": False,
        }
        posts = [session.post(DISTRIBUTED_PATH, body) for session in sessions]
        return self.run(_together, lambda: self._send(bucket), posts, self._abort, self._drop)

    def leave(self) -> None:
        """Ends the group here and on the servers that still answer."""
        self.run(_leave, self.clients, self.name)
        self._drop()

    def _world_size(self) -> int:
        return 1 + sum(self.sizes)

    def _make(self, store: dist.Store) -> None:
        # the servers make theirs by the same function: it settles the keys by which ranks find each other
        group, _ = _new_process_group_helper(
            self._world_size(),
            0,
            [],
            dist.Backend(self.backend),
            dist.PrefixStore(self.name, store),
            group_name=self.name,
            timeout=self.timeout,
        )
        _world.pg_group_ranks[group] = {rank: rank for rank in range(self._world_size())}
        self._process_group = group

    def _send(self, bucket: Bucket) -> None:
        works = [
            dist.broadcast(tensor, group=self._process_group, group_src=0, async_op=True)
            for _, tensor in bucket.tensors
        ]
        try:
            while works:
                works.pop(0).wait()
        finally:
            works.clear()  # one that an exception's traceback kept would keep the connections

    def _abort(self) -> None:
        """Frees who waits here, over NCCL; over gloo that is for the other side to do, or for the time."""
        if self._process_group:
            self._process_group.abort()

    def _drop(self) -> None:
        """Ends the connections: servers that wait in the group are freed."""
        if self._process_group:
            dist.destroy_process_group(self._process_group)
            self._process_group = None


async def _together(
    work: Callable[[], None],
    posts: list[Awaitable[Any]],
    abort: Callable[[], None],
    drop: Callable[[], None],
) -> list[ServerError | None]:
    """Runs `work` in a thread beside the requests, which end together with it.

    At a failure `abort` ends the work, and after it `drop` the requests. Returns each request's failure. If
    only `work` fails, that stands for all.
    """
    thread = asyncio.ensure_future(asyncio.to_thread(work))
    requests = [asyncio.ensure_future(post) for post in posts]
    done, _ = await asyncio.wait([thread, *requests], return_when=asyncio.FIRST_EXCEPTION)
    if any(task.exception() for task in done):
        abort()
        await asyncio.wait([thread])
        drop()
        await asyncio.wait(requests)
    errors = [request.exception() for request in requests]
    unexpected = [error for error in errors if error and not isinstance(error, ServerError)]
    if unexpected:
        raise unexpected[0]
    if thread.exception() and not any(errors):
        raise RuntimeError("the broadcast failed, though no server says so") from thread.exception()
    return errors


async def _leave(clients: list[ServerClient], name: str) -> None:
    for client in clients:
        with contextlib.suppress(ServerError):
            await client.post("/destroy_weights_update_group", {"group_name": name}, GIVE_UP_S)


def _address_for(url: str) -> str:
    """This host's address as a server sees it: loopback where the server is on this host."""
    server = urlsplit(url)
    with socket.create_connection((server.hostname, server.port or 80), timeout=10) as connection:
        return connection.getsockname()[0]


def _store(address: str, world_size: int, timeout: timedelta) -> dist.TCPStore:
    """Where the ranks find each other; it listens at that address only, at a free port."""
    listener = socket.create_server(
        (address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET
    )
    port = listener.getsockname()[1]
    return dist.TCPStore(
        address,
        port,
        world_size,
        is_master=True,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


REMOVER = "import shutil, sys; sys.stdin.read(); shutil.rmtree(sys.argv[1], ignore_errors=True)"
"""A program whose standard input ends when its parent does, even if that is killed"""


class WeightFiles:
    """One version's directory at a time under `root`, a shard a bucket, beside the policy's configuration.

    Nothing stays under `root` when this process ends, however it does: it may be memory.
    """

    def __init__(self, root: Path, source: Path) -> None:
        """root: emptied and used by this process alone. source: the policy's Hugging Face directory."""
        self.root = root
        self.source = source
        self.complete: Path | None = None
        """The directory of the newest complete version"""
        self._tensors: dict[str, Tensor] = {}
        self._file_of: dict[str, str] = {}
        self._remover: subprocess.Popen | None = None

    def start(self) -> None:
        """Removes the version before and whatever a killed run left. Raises OSError."""
        self.remove()
        if self._remover is None:
            command = [sys.executable, "-S", "-c", REMOVER, str(self.root.absolute())]
            self._remover = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        self._partial.mkdir(parents=True)
        copy_side_files(self.source, self._partial)

    def write(self, bucket: Bucket) -> None:
        """One more shard. Raises OSError."""
        file = f"model-{len(set(self._file_of.values())) + 1:05}.safetensors"
        described = {name: tensor.to("meta") for name, tensor in bucket.tensors}
        write_file(self._partial / file, described, ((name, tensor.cpu()) for name, tensor in bucket.tensors))
        self._tensors |= described
        self._file_of |= dict.fromkeys(described, file)

    def finish(self, version: int) -> Path:
        """The directory, complete. Raises OSError."""
        write_index(self._partial, self._file_of, self._tensors)
        complete = self.root / f"version_{version}"
        self._partial.rename(complete)
        self.complete = complete
        return complete

    def remove(self) -> None:
        """Takes every file away."""
        shutil.rmtree(self.root, ignore_errors=True)
        self.complete, self._tensors, self._file_of = None, {}, {}

    @property
    def _partial(self) -> Path:
        return self.root / "partial"


TENSOR_PATH = "/update_weights_from_tensor"


def encode_bucket(bucket: Bucket) -> list[bytes]:
    """Base64, in parts, of what the server unpickles: a list of (name, tensor on the CPU).

    Holds 4/3 of the bucket's bytes beside it.
    """
    text = _Base64Writer()
    tensors = [(name, tensor.cpu()) for name, tensor in bucket.tensors]
    pickle.Pickler(text, protocol=4).dump(tensors)
    text.finish()
    return text.parts


def request_body(text: list[bytes], tensor_parallel: int) -> list[bytes]:
    """The parts of the request's JSON, `encode`'s text in it once a TP rank, nothing of it copied."""
    rest = json.dumps({"flush_cache": False}).encode()
    body = [b'{"serialized_named_tensors":[']
    for rank in range(tensor_parallel):
        body += [b',"' if rank else b'"', *text, b'"']
    return [*body, b"],", rest[1:]]


class _Base64Writer:
    """A file that keeps the base64 text of what is written to it."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self._rest = b""

    def write(self, data: bytes) -> int:
        view = memoryview(data).cast("B")
        if self._rest:
            missing = -len(self._rest) % 3
            self._rest, view = self._rest + bytes(view[:missing]), view[missing:]
            if len(self._rest) < 3:
                return len(data)
            self.parts.append(base64.b64encode(self._rest))
        whole = len(view) // 3 * 3
        self.parts.append(base64.b64encode(view[:whole]))
        self._rest = bytes(view[whole:])
        return len(data)

    def finish(self) -> None:
        """Writes out the last bytes, padded."""
        self.parts.append(base64.b64encode(self._rest))


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


class DiskTransport:
    """Servers read the files: they must see the directory under the same path."""

    brackets = False
    reads_files = True

    def send(self, sessions: Sessions, bucket: Bucket) -> None:
        """Nothing: the files are read at the end."""

    def close(self) -> None:
        """Nothing is kept."""


class TensorTransport:
    """HTTP carries the bytes."""

    brackets = True
    reads_files = False

    def send(self, sessions: Sessions, bucket: Bucket) -> None:
        """One request a server."""
        text = encode_bucket(bucket)
        sessions.each(partial(_post_text, text=text))

    def close(self) -> None:
        """Nothing is kept."""


async def _post_text(session: Session, text: list[bytes]) -> None:
    await session.post(TENSOR_PATH, request_body(text, session.tensor_parallel))


async def load_files(session: Session, directory: Path) -> None:
    """Makes the server load the directory. Raises ServerError."""
    body = {"model_path": str(directory.absolute()), "flush_cache": False}
    await session.post("/update_weights_from_disk", body)


METHODS: dict[str, type[Method]] = {
    "disk": DiskTransport,
    "tensor": TensorTransport,
    "distributed": Distributed,
}
