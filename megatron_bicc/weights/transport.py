"""Sends weights to SGLang servers: buckets of whole tensors, the receiving servers, and the transports.

A sync streams whole tensors under their Hugging Face names, checks them against the model's names and shapes,
cuts the stream into buckets and sends each bucket by the transport of each server:

    tensor       in memory of this host that the servers read
    disk         as files of a Hugging Face directory that the server loads at the end
    distributed  by a broadcast from this process to every rank of its servers, over gloo or NCCL
    changes      as a file of the elements that changed since the last sync (weight_sync.delta)
"""

import asyncio
import base64
import contextlib
import pickle
import shutil
import socket
import subprocess
import uuid
from collections.abc import Awaitable, Callable, Container, Iterable, Iterator, Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _new_process_group_helper, _set_pg_timeout, _world
from transformers import PretrainedConfig

from megatron_bicc import device
from megatron_bicc.config import PauseMode
from megatron_bicc.errors import UserError
from megatron_bicc.files import remove_at_end
from megatron_bicc.sglang.client import ServerClient, ServerError, ServerRefusal, ServerUnavailable
from megatron_bicc.sglang.process import CHANGES_LOADER
from megatron_bicc.weights.changes import LastWeights, write_changes
from megatron_bicc.weights.handles import FlatBucket, SharedMemory, flatten
from megatron_bicc.weights.hf_files import SafetensorsDirectory, copy_side_files, write_file, write_index


class WeightSyncError(RuntimeError):
    """A server's weights differ from the policy's, or would. One line."""


INCOMPLETE = "incomplete"
"""Weight version of a server while its weights may be of more than one version"""
ABANDON_S = 10.0
"""Timeout of the requests that clean up after a failed server"""
JOIN_S = 15.0
"""Seconds in which all servers must have joined a process group, before those that wait for others give up"""
CONNECT_S = 5.0
"""Seconds in which the other servers connect to the rendezvous store, when one has failed to join.

A server that finds the store closed before it has connected would try again for half an hour.
"""
Result = TypeVar("Result")


class PortalCall(Protocol):
    """Runs a coroutine function in the event loop of the servers' clients and returns its result."""

    def __call__(self, function: Callable[..., Awaitable[Result]], *args: Any) -> Result: ...


# ---- The stream: checked, and cut into buckets


class Bucket:
    """Consecutive tensors of the stream, each with its own storage, on the policy's device."""

    def __init__(self, tensors: list[tuple[str, Tensor]]) -> None:
        self.tensors = tensors
        self.nbytes = sum(tensor.nbytes for _, tensor in tensors)
        self._host: list[tuple[str, Tensor]] | None = None

    @property
    def host(self) -> list[tuple[str, Tensor]]:
        """The tensors in host memory: one device-to-host copy, shared by servers, files and checksums."""
        if self._host is None:
            self._host = [(name, tensor.cpu()) for name, tensor in self.tensors]
        return self._host

    def share(self, memory: SharedMemory) -> FlatBucket:
        """Makes shared memory the bucket's host memory. Raises MemoryError if /dev/shm has no room."""
        flat = flatten(self._host or self.tensors, memory)
        self._host = flat.tensors()
        return flat

    def keep_host(self) -> None:
        """Frees the tensors on the policy's device; those in host memory take their place."""
        self.tensors = self.host

    def clear(self) -> None:
        """Frees the tensors even while the bucket is still referenced."""
        self.tensors.clear()
        self._host = None


def expected_shapes(path: str, hf_config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """Returns name and shape of every parameter of the model in the Hugging Face directory `path`.

    They are read from the headers of its safetensors, without the buffers of old checkpoints and without the
    second copy of a tied output layer. Raises UserError for a directory that cannot be read.
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
    """Yields the same tensors after checking them: SGLang reports success even for an unknown name.

    Raises WeightSyncError, before the tensor is yielded, for an unknown or repeated name or a wrong shape; at
    the end for missing names.
    """
    missing = dict(expected)
    for name, tensor in tensors:
        if name not in missing:
            fault = "came twice" if name in expected else "is not a parameter of the servers' model"
            raise WeightSyncError(f"weight sync: {name} {fault}")
        shape = missing.pop(name)
        if tuple(tensor.shape) != shape:
            raise WeightSyncError(
                f"weight sync: {name} has shape {tuple(tensor.shape)}, but {shape} in the servers' model"
            )
        yield name, tensor
    if missing:
        raise WeightSyncError(f"weight sync: missing tensors: {', '.join(sorted(missing))}")


def buckets(
    tensors: Iterable[tuple[str, Tensor]],
    capacity: int,
    holds: bool = True,
    lasting: Container[int] = frozenset(),
) -> Iterator[Bucket]:
    """Yields the stream in order, in buckets of at most `capacity` bytes; a larger tensor is its own bucket.

    The caller clears a bucket that has been sent. holds: False for empty buckets, which end at the same
    tensors, on a process that sends nothing. lasting: pointers of storages that outlive the buckets, whose
    views are not copied.
    """
    held: list[tuple[str, Tensor]] = []
    size = 0
    for name, tensor in tensors:
        if size and size + tensor.nbytes > capacity:
            yield Bucket(held)
            held, size = [], 0
        if holds:
            held.append((name, _own_storage(tensor, lasting)))
        size += tensor.nbytes
    if size:
        yield Bucket(held)


def in_step(cut: Iterable[Bucket]) -> Iterator[Bucket]:
    """Yields the buckets; no process makes the next one before all have taken this one. Collective.

    A sender takes a bucket when its servers have the one before, so a process that sends nothing is at most
    two buckets ahead of them. Without this, such processes would queue the broadcasts of the whole model on
    their GPUs, and NCCL would abort them if the sender needs longer than the process group's timeout.
    """
    for bucket in cut:
        yield bucket
        dist.barrier()


def _own_storage(tensor: Tensor, lasting: Container[int]) -> Tensor:
    """Copies a view that would keep a larger tensor in memory, or that is not contiguous."""
    storage = tensor.untyped_storage()
    stays = storage.nbytes() == tensor.nbytes or storage.data_ptr() in lasting
    return tensor if stays and tensor.is_contiguous() else tensor.clone(memory_format=torch.contiguous_format)


# ---- The servers


class Receiver:
    """A server during a weight update: between `begin` and `resume` or `abandon`.

    From `begin` on it generates nothing and its weight version is INCOMPLETE, so that a sample of mixed
    weights is always recognized as such, even if this process dies during the sync.
    """

    def __init__(self, client: ServerClient, timeout_s: float) -> None:
        """timeout_s: timeout of one request in seconds."""
        self.client = client
        self.timeout_s = timeout_s
        self.info: dict[str, Any] = {}
        """The server's arguments"""
        self.paths: set[str] = set()
        """Its HTTP paths"""
        self.error: ServerError | None = None
        """Why it takes no further part in the sync"""
        self.pause_mode: PauseMode = "abort"
        self._updating = False

    @property
    def tensor_parallel(self) -> int:
        """The server's tensor-parallel size."""
        return int(self.info["tp_size"])

    @property
    def dtype(self) -> torch.dtype:
        """Type of the server's weights; bfloat16, the coarsest, if it is not stated."""
        return getattr(torch, self.info["dtype"], torch.bfloat16)

    async def begin(self, explicit: bool, pause_mode: PauseMode = "abort") -> None:
        """Pauses the server.

        explicit: wrap the transport's updates in /begin_weight_update and /end_weight_update, which servers
        before 0.5.21 do not have. pause_mode: what becomes of running requests (docs/rollout.md). Raises
        ServerError.
        """
        self.info = await self.client.server_info()
        self.paths = await self.client.paths()
        self.pause_mode = pause_mode
        await self.client.pause(pause_mode)
        await self._set_version(INCOMPLETE)
        if explicit and "/begin_weight_update" in self.paths:
            self._updating = True
            try:
                await self.post("/begin_weight_update", {"selector": "all"})
            except ServerRefusal:  # a trainer that was killed left an update open
                await self.post("/end_weight_update", {})
                await self.post("/begin_weight_update", {"selector": "all"})

    async def end(self) -> None:
        """Ends the update and drops the prefix cache of the old weights, if it can be. Raises ServerError."""
        if self._updating:
            await self.post("/end_weight_update", {})
            self._updating = False
        if self.pause_mode != "in_place":  # there requests use it: `ServerPool.ask` keeps it from others
            await self.client.flush_cache()

    async def resume(self, version: int) -> None:
        """Sets the weight version and resumes generation. Raises ServerError."""
        await self._set_version(str(version))
        await self.client.resume()

    async def abandon(self) -> None:
        """Resumes generation after an error, if the server answers; its version stays INCOMPLETE."""
        paths = ["/end_weight_update"] if self._updating else []
        for path in (*paths, "/continue_generation"):
            with contextlib.suppress(ServerError):
                await self.client.post(path, {}, ABANDON_S)

    async def load_files(self, directory: Path) -> None:
        """Loads the weights of a Hugging Face directory. Raises ServerError."""
        body = {"model_path": str(directory.absolute()), "flush_cache": False}
        await self.post("/update_weights_from_disk", body)

    async def post(self, path: str, body: dict[str, Any]) -> Any:
        """Returns the answer to a POST. Raises ServerError."""
        return await self.client.post(path, body, self.timeout_s)

    async def _set_version(self, version: str) -> None:
        await self.post("/update_weight_version", {"new_version": version, "abort_all_requests": False})


def live(receivers: list[Receiver]) -> list[Receiver]:
    """Returns the receivers that still take part in the sync."""
    return [receiver for receiver in receivers if receiver.error is None]


def each(
    run: PortalCall, receivers: list[Receiver], act: Callable[[Receiver], Awaitable[Result]]
) -> list[Result]:
    """Runs `act` on all live receivers at once and returns the results of those that succeed.

    One that raises ServerError takes no further part. Any other exception is raised after all have ended.
    """
    acting = live(receivers)
    outcomes = run(_outcomes, [act(receiver) for receiver in acting])
    results = []
    for receiver, outcome in zip(acting, outcomes, strict=True):
        if isinstance(outcome, ServerError):
            receiver.error = outcome
        elif isinstance(outcome, BaseException):
            raise outcome
        else:
            results.append(outcome)
    return results


def abandon(run: PortalCall, receivers: list[Receiver]) -> None:
    """Resumes generation after an error on the servers that answer."""
    run(_outcomes, [receiver.abandon() for receiver in receivers])


async def _outcomes(acts: list[Awaitable[Any]]) -> list[Any]:
    return await asyncio.gather(*acts, return_exceptions=True)


# ---- The transports


class Transport(Protocol):
    """Sends buckets to servers. A server that fails gets its `error` set and takes no further part."""

    explicit: bool
    """True if the servers must be sent /begin_weight_update and /end_weight_update around the buckets"""
    needs_device: bool
    """True if `send` reads the bucket's tensors on the policy's device, not those in host memory"""

    def stage(self, bucket: Bucket) -> None:
        """Puts the bucket where servers read it, before `send`, which may run beside other transports'."""

    def send(self, receivers: list[Receiver], bucket: Bucket) -> None:
        """Sends the bucket to every live server."""

    def finish(self, receivers: list[Receiver], directory: Path | None) -> None:
        """Called after the last bucket. directory: all weights as files; None if none are written."""

    def close(self) -> None:
        """Frees what is kept between syncs."""


class TensorTransport:
    """Copies each bucket into memory that the servers of this host read; a request carries only handles."""

    explicit, needs_device = True, False
    path = "/update_weights_from_tensor"

    def __init__(self, run: PortalCall) -> None:
        self._run = run
        self._memory = SharedMemory()
        self._flat: FlatBucket | None = None

    def stage(self, bucket: Bucket) -> None:
        """Copies the bucket into the memory. Raises WeightSyncError if /dev/shm has no room for it."""
        try:
            self._flat = bucket.share(self._memory)
        except MemoryError as error:
            raise WeightSyncError(
                f"weight sync: {error}; give it more (docker run --shm-size), or lower weight_sync.bucket_mb"
            ) from error

    def send(self, receivers: list[Receiver], bucket: Bucket) -> None:
        """Makes every live server read the bucket that was staged."""
        each(self._run, receivers, partial(self._post, flat=self._flat))

    def finish(self, receivers: list[Receiver], directory: Path | None) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Removes the shared memory."""
        self._flat = None
        self._memory.close()

    async def _post(self, receiver: Receiver, flat: FlatBucket) -> None:
        # a tensor-parallel rank of every pipeline stage reads the same payload
        stages = int(receiver.info.get("pp_size", 1))
        payloads = [flat.payload(stages) for _ in range(receiver.tensor_parallel)]
        await receiver.post(self.path, tensor_request(payloads))


def tensor_request(payloads: list[bytes]) -> dict[str, Any]:
    """Returns the body of a request of TensorTransport. payloads: one for each rank of the server."""
    return {
        "serialized_named_tensors": [base64.b64encode(payload).decode() for payload in payloads],
        "load_format": "flattened_bucket",
        "flush_cache": False,
    }


class ChangesTransport:
    """Writes the elements of each bucket that changed to a file that the servers read.

    They must see it under the same path, must have been started with CHANGES_LOADER, and must have the
    version that was sent last.
    """

    explicit, needs_device = True, False

    def __init__(self, run: PortalCall, root: Path) -> None:
        """root: directory of the file, removed when this process ends."""
        self.version: int | None = None
        """Version of the weights that were staged last; None while they are of two"""
        self.takers: set[str] = set()
        """URLs of the servers that get only what changed, in this sync"""
        self.nbytes = 0
        """Bytes of the files of this sync"""
        self._run = run
        self._root = root
        self._last = LastWeights()
        self._remover: subprocess.Popen | None = None

    def stage(self, bucket: Bucket) -> None:
        """Finds the changes, also for the next sync's, and writes them if a server takes them.

        Raises WeightSyncError if the file cannot be written.
        """
        changes = self._last.changes(bucket.host)
        if not self.takers:
            return
        with _writing():
            if self._remover is None:
                self._root.mkdir(parents=True, exist_ok=True)
                self._remover = remove_at_end(self._root)
            self.nbytes += write_changes(self._file, changes)

    def send(self, receivers: list[Receiver], bucket: Bucket) -> None:
        """Makes every live server apply the file."""
        payload = base64.b64encode(pickle.dumps([(str(self._file.absolute()), torch.empty(0))])).decode()

        async def post(receiver: Receiver) -> None:
            body = {"serialized_named_tensors": [payload] * receiver.tensor_parallel, "flush_cache": False}
            await receiver.post(TensorTransport.path, body | {"load_format": CHANGES_LOADER})

        each(self._run, receivers, post)

    def finish(self, receivers: list[Receiver], directory: Path | None) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Removes the file."""
        if self._remover:
            self._remover.communicate()
            self._remover = None

    def begin(self) -> None:
        """Starts a sync, in which no server takes changes yet."""
        self.takers.clear()
        self.nbytes = 0

    @property
    def _file(self) -> Path:
        return self._root / "changes.safetensors"


class DiskTransport:
    """Makes servers load the files of the sync; they must see the directory under the same path."""

    explicit, needs_device = False, False

    def __init__(self, run: PortalCall) -> None:
        self._run = run

    def stage(self, bucket: Bucket) -> None:
        """Does nothing."""

    def send(self, receivers: list[Receiver], bucket: Bucket) -> None:
        """Does nothing: the sync writes the bucket's file."""

    def finish(self, receivers: list[Receiver], directory: Path | None) -> None:
        """Makes every live server load the directory."""
        each(self._run, receivers, partial(Receiver.load_files, directory=directory))

    def close(self) -> None:
        """Does nothing."""


def on_this_host(url: str) -> bool:
    """Returns whether a server is on this host, so that it can read this host's memory."""
    host = urlsplit(url).hostname
    with contextlib.suppress(OSError):  # an unknown name, or no address of this host
        for family, kind, _, _, address in socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM):
            with socket.socket(family, kind) as probe:
                probe.bind(address)
                return True
    return False


BACKENDS = {"cpu": "gloo", "cuda": "nccl"}
"""By the type of the policy's device; the servers' must be the same"""


_PRINT_NCCL = (
    "from importlib.metadata import distributions as all\n"
    "print(*{d.version for d in all() if str(d.metadata['Name']).startswith('nvidia-nccl-cu')})"
)


def check_nccl(python: str) -> None:
    """Raises UserError if servers that this Python runs have another NCCL than this process.

    NCCL makes no communicator of different versions. Does nothing if the Python's version is unknown.
    """
    done = subprocess.run([python, "-c", _PRINT_NCCL], capture_output=True, text=True)
    theirs = done.stdout.strip()
    if theirs and theirs != _nccl_version():
        raise UserError(
            f"weight_sync.method is distributed, but NCCL is {_nccl_version()} here and {theirs} in "
            f"rollout.sglang.python={python}; install the same version in both, or set "
            "weight_sync.method=tensor"
        )


def _nccl_version() -> str:
    return ".".join(map(str, torch.cuda.nccl.version()))


class DistributedTransport:
    """Broadcasts in one process group of this process and all ranks of its servers.

    The group is kept between syncs and recreated when a server is lost.
    """

    explicit, needs_device = True, True

    def __init__(self, run: PortalCall) -> None:
        self._run = run
        self._group: BroadcastGroup | None = None

    def stage(self, bucket: Bucket) -> None:
        """Does nothing."""

    def send(self, receivers: list[Receiver], bucket: Bucket) -> None:
        """Broadcasts every tensor of the bucket.

        A server that died or restarted since the last sync breaks the group for all. After a failure the
        bucket is therefore sent once more, in a new group of the remaining servers.
        """
        if not self._try(receivers, bucket):
            self._leave(receivers)
            self._try(receivers, bucket, last=True)

    def finish(self, receivers: list[Receiver], directory: Path | None) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Leaves the group, and makes the servers leave it."""
        self._leave([])

    def _leave(self, receivers: list[Receiver]) -> None:
        """Leaves the group, with all of its servers but those of the receivers that have failed."""
        if self._group:
            self._group.leave({receiver.client.url for receiver in receivers if receiver.error})
            self._group = None

    def _try(self, receivers: list[Receiver], bucket: Bucket, last: bool = False) -> bool:
        """Returns whether nothing failed. last: servers that fail for any reason take no further part."""
        now = live(receivers)
        if not now:
            return True
        if self._group is None or self._group.urls != [receiver.client.url for receiver in now]:
            self._leave(receivers)
            self._group = BroadcastGroup(now, self._run)
            if _take_out(now, self._group.join(), last):
                return False
        return not _take_out(now, self._group.broadcast(now, bucket), last)


def _take_out(receivers: list[Receiver], errors: list[ServerError | None], last: bool) -> bool:
    """Returns whether there are errors. Drops only unreachable servers, unless it is the last try.

    A refusal may come from a server that only lost its group; a new group repairs that.
    """
    for receiver, error in zip(receivers, errors, strict=True):
        if error and (last or isinstance(error, ServerUnavailable)):
            receiver.error = error
    return any(errors)


class BroadcastGroup:
    """A process group besides the default one: this process is rank 0, the servers' ranks follow."""

    def __init__(self, receivers: list[Receiver], run: PortalCall) -> None:
        self.clients = [receiver.client for receiver in receivers]
        self.urls = [client.url for client in self.clients]
        self.sizes = [receiver.tensor_parallel for receiver in receivers]
        self.timeout_s = receivers[0].timeout_s
        # a new name: a server may still be in the group of a trainer that was killed
        self.name = f"weights_{uuid.uuid4().hex}"
        self.backend = BACKENDS[device.device().type]
        self._run = run
        self._store: dist.Store | None = None
        """The rendezvous store, which listens in this process. Servers that wait in it fail when it closes"""
        self._process_group: dist.ProcessGroup | None = None

    def join(self) -> list[ServerError | None]:
        """Creates the group with all servers. Returns each server's failure.

        A server that can't join is an error of that server; those that waited for it have a ServerRefusal.
        """
        try:
            address = _address_for(self.urls[-1])
        except OSError as error:
            unreachable = ServerUnavailable(self.urls[-1], "", f"no connection: {error}")
            return [*[None] * (len(self.urls) - 1), unreachable]
        self._store = _store(address, self._world_size())
        posts, most_s = [], JOIN_S + CONNECT_S + ABANDON_S
        for i, client in enumerate(self.clients):
            body = {
                "master_address": address,
                "master_port": self._store.port,
                "rank_offset": 1 + sum(self.sizes[:i]),
                "world_size": self._world_size(),
                "group_name": self.name,
                "backend": self.backend,
            }
            posts.append(client.post("/init_weights_update_group", body, most_s))
        return self._run(self._together, partial(self._make, address, self._store.port), posts, CONNECT_S)

    def broadcast(self, receivers: list[Receiver], bucket: Bucket) -> list[ServerError | None]:
        """Sends every tensor to all servers. Returns each server's failure."""
        body = {
            "names": [name for name, _ in bucket.tensors],
            "dtypes": [device.dtype_name(tensor.dtype) for _, tensor in bucket.tensors],
            "shapes": [list(tensor.shape) for _, tensor in bucket.tensors],
            "group_name": self.name,
            "flush_cache": False,
        }
        posts = [receiver.post("/update_weights_from_distributed", body) for receiver in receivers]
        return self._run(self._together, lambda: self._send(bucket), posts)

    def leave(self, without: set[str]) -> None:
        """Destroys the group here and on the servers, except those with these URLs."""
        self._run(self._leave_servers, [client for client in self.clients if client.url not in without])
        self._drop()

    async def _together(
        self, work: Callable[[], None], posts: list[Awaitable[Any]], grace_s: float = 0
    ) -> list[ServerError | None]:
        """Runs `work` in a thread, concurrently with the requests that need it. Returns each one's failure.

        Each side waits for the other, so a failure on one must end the other: aborting the group ends `work`,
        dropping its connections ends the requests. grace_s: seconds between a failure and that.
        """
        thread = asyncio.ensure_future(asyncio.to_thread(work))
        requests = [asyncio.ensure_future(post) for post in posts]
        done, _ = await asyncio.wait([thread, *requests], return_when=asyncio.FIRST_EXCEPTION)
        if any(task.exception() for task in done):
            await asyncio.wait([thread, *requests], timeout=grace_s)
            self._abort()
            await asyncio.wait([thread])  # the group must not be destroyed while the thread is still in it
            self._drop()
            await asyncio.wait(requests)
        errors = [request.exception() for request in requests]
        if self.backend == "nccl":
            for error in filter(None, errors):
                error.args = (
                    f"{error} (the trainer's NCCL is {_nccl_version()}; the server's must be the same)",
                )
        unexpected = [error for error in errors if error and not isinstance(error, ServerError)]
        if unexpected:
            raise unexpected[0]
        if thread.exception() and not any(errors):
            raise RuntimeError("the broadcast failed, but no server reports an error") from thread.exception()
        return errors

    async def _leave_servers(self, clients: list[ServerClient]) -> None:
        path, body = "/destroy_weights_update_group", {"group_name": self.name}
        await _outcomes([client.post(path, body, ABANDON_S) for client in clients])

    def _world_size(self) -> int:
        return 1 + sum(self.sizes)

    def _make(self, address: str, port: int) -> None:
        timeout = timedelta(seconds=JOIN_S)
        # another connection than the listener's own: it fails when that closes
        store = dist.TCPStore(address, port, self._world_size(), timeout=timeout, wait_for_workers=False)
        # the servers call the same private function: both sides must derive the same keys in the store
        group, _ = _new_process_group_helper(
            self._world_size(),
            0,
            [],
            dist.Backend(self.backend),
            dist.PrefixStore(self.name, store),
            group_name=self.name,
            timeout=timeout,
        )
        _set_pg_timeout(timedelta(seconds=self.timeout_s), group)
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
            works.clear()  # an exception's traceback keeps this frame, and a work keeps the connections open

    def _abort(self) -> None:
        """Aborts pending NCCL work; gloo has no abort: it fails when the other side closes, or times out."""
        self._store = None
        if self._process_group:
            self._process_group.abort()

    def _drop(self) -> None:
        """Closes the connections, so that servers waiting in the group fail."""
        self._store = None
        if self._process_group:
            dist.destroy_process_group(self._process_group)
            self._process_group = None


def _address_for(url: str) -> str:
    """Returns this host's address on the route to a server: loopback for a server on this host."""
    server = urlsplit(url)
    with socket.create_connection((server.hostname, server.port or 80), timeout=10) as connection:
        return connection.getsockname()[0]


def _store(address: str, world_size: int) -> dist.TCPStore:
    """Returns the rendezvous store of the group; it listens at that address only, on a free port."""
    listener = socket.create_server(
        (address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET
    )
    port = listener.getsockname()[1]
    return dist.TCPStore(
        address,
        port,
        world_size,
        is_master=True,
        timeout=timedelta(seconds=JOIN_S),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


TRANSPORTS: dict[str, Callable[[PortalCall], Transport]] = {
    "tensor": TensorTransport,
    "disk": DiskTransport,
    "distributed": DistributedTransport,
}
"""By weight_sync.method"""


# ---- The weights as files


class WeightFiles:
    """The weights of the newest sync as a Hugging Face directory under `root`, one shard per bucket.

    `root` is removed when this process ends, even by kill -9, since it may be in memory (/dev/shm). Raises
    WeightSyncError if a file cannot be written.
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
        """Removes the previous version and leftovers of a killed run, and begins a new version."""
        self.remove()
        if self._remover is None:
            self._remover = remove_at_end(self.root)
        with _writing():
            self._partial.mkdir(parents=True)
            copy_side_files(self.source, self._partial)

    def write(self, bucket: Bucket) -> None:
        """Writes one shard."""
        file = f"model-{len(set(self._file_of.values())) + 1:05}.safetensors"
        described = {name: tensor.to("meta") for name, tensor in bucket.tensors}
        with _writing():
            write_file(self._partial / file, described, bucket.host)
        self._tensors |= described
        self._file_of |= dict.fromkeys(described, file)

    def finish(self, version: int) -> Path:
        """Returns the complete directory."""
        complete = self.root / f"version_{version}"
        with _writing():
            write_index(self._partial, self._file_of, self._tensors)
            self._partial.rename(complete)
        self.complete = complete
        return complete

    def remove(self) -> None:
        """Removes all files."""
        shutil.rmtree(self.root, ignore_errors=True)
        self.complete, self._tensors, self._file_of = None, {}, {}

    @property
    def _partial(self) -> Path:
        return self.root / "partial"


@contextlib.contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise WeightSyncError(
            f"weight sync: files for rollout servers (weight_sync.path) cannot be written: {error}"
        ) from error
