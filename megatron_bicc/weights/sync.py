"""Copies the policy's weights to the rollout engine after each optimizer step.

The policy's parameters are gathered one by one from their shards, whole and under their Hugging Face names.
The stream either fills the model of an engine in the training processes, or is sent to SGLang servers by one
of the transports (weights.transport), whose weights are then verified (weights.verify).
"""

import contextlib
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import anyio
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_bicc import device
from megatron_bicc.collective import gathered, raised_on_all_ranks
from megatron_bicc.config import Config
from megatron_bicc.errors import UserError
from megatron_bicc.metrics import waiting_for
from megatron_bicc.model.policy import Policy
from megatron_bicc.sglang.client import ServerClient, ServerError
from megatron_bicc.sglang.pool import ServerPool
from megatron_bicc.weights.hf_weights import hf_tensors
from megatron_bicc.weights.transport import (
    BACKENDS,
    TRANSPORTS,
    Bucket,
    Receiver,
    WeightFiles,
    WeightSyncError,
    abandon,
    buckets,
    check_nccl,
    check_same_host,
    checked,
    each,
    expected_shapes,
    in_step,
    live,
)
from megatron_bicc.weights.verify import (
    Checksums,
    LogProbs,
    Probe,
    changed_by_files,
    comparable,
    disagreeing,
    listed,
    mismatch,
    probe,
    unequal_parameters,
)

log = logging.getLogger(__name__)


class WeightSync(Protocol):
    """Keeps the weights of a rollout engine equal to the policy's. Every process of the run has one."""

    def sync(self, version: int) -> int:
        """Sends the policy's weights to the engine under this version. Returns their bytes. Collective.

        Raises NotFiniteError for weights that are not finite, before anything is sent, and WeightSyncError,
        on every process, if the engine does not have the policy's weights afterwards.
        """

    def close(self) -> None:
        """Frees what was kept between syncs. Called before the engine is closed."""


class LoadsWeights(Protocol):
    """An engine whose model lives in the training processes."""

    def load_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Takes every parameter once, whole, under its Hugging Face name. Collective."""


def make_weight_sync(config: Config, policy: Policy, engine: Any, log_probs: LogProbs) -> WeightSync:
    """Returns the weight sync that fits the engine's attributes (rollout.types.Engine). Collective.

    log_probs: the policy's, to verify servers. Raises UserError if the engine cannot take weights or
    model.path cannot be read.
    """
    if isinstance(getattr(engine, "pool", None), ServerPool):
        return ServerWeightSync(config, policy, engine.pool, log_probs)
    if callable(getattr(engine, "load_weights", None)):
        return EngineWeightSync(policy, engine)
    raise UserError(
        f"rollout.engine is {config.rollout.engine!r}; it cannot take new weights: give it a method "
        "load_weights(tensors, version), or a ServerPool as its attribute pool"
    )


class EngineWeightSync:
    """Fills the model of an engine that lives in the training processes."""

    def __init__(self, policy: Policy, engine: LoadsWeights) -> None:
        self._policy, self._engine = policy, engine

    def sync(self, version: int) -> int:
        """As WeightSync.sync; raises what the engine's load_weights raises."""
        self._policy.check_weights()
        stream = Measured(hf_tensors(self._policy.modules, self._policy.hf_config))
        with device.megatron():
            tensors = iter(stream)
            self._engine.load_weights(tensors, version)
            unread = [name for name, _ in tensors]  # each takes a gather by all ranks: read them to the end
        if unread:
            raise UserError(
                f"rollout.engine: load_weights left {len(unread)} tensors unread, such as {unread[0]}; "
                "it must load all of them, or rollouts come from old weights"
            )
        return stream.nbytes

    def close(self) -> None:
        """Does nothing."""


class ServerWeightSync:
    """Streams the weights to this process's SGLang servers; every process takes part, with servers or not."""

    def __init__(self, config: Config, policy: Policy, pool: ServerPool, log_probs: LogProbs) -> None:
        """Raises UserError for a model.path that cannot be read, or servers that the method cannot reach.

        Collective.
        """
        settings = config.weight_sync
        with raised_on_all_ranks(UserError):
            self._check_servers(config, pool)
        root = Path(settings.path or Path(config.output_dir) / "rollout_weights")
        self.files = WeightFiles(root / f"rank_{dist.get_rank()}", Path(config.model.path))
        self.expected = expected_shapes(config.model.path, policy.hf_config)
        self.transport = TRANSPORTS[settings.method](pool.portal.call)
        self.pool = pool
        self.version = -1
        """Version of the latest `push`"""
        self._config = config
        self._policy = policy
        self._log_probs = log_probs
        self._checksums: dict[ServerLayout, Checksums] = {}
        """Checksums of the newest weights, for each layout of comparable servers"""
        self._confirmed: set[ServerLayout] = set()
        """Layouts whose checksums were equal at least once, so that unequal ones prove wrong weights"""
        pool.on_stale = self._restore_or_reason

    def sync(self, version: int) -> int:
        """As WeightSync.sync. A server that fails is not used until the health check has restored it."""
        self._policy.check_weights()
        self.pool.pause()  # a health check must not restore a server while its weights change
        self.pool.expect(str(version))
        dist.barrier()  # every process does so before a server is paused, and answers with this version
        stream = Measured(hf_tensors(self._policy.modules, self._policy.hf_config))
        with device.megatron():
            failed = self.push(iter(stream), version)
        self.pool.hold(str(version), failed)
        self.pool.resume()
        return stream.nbytes

    def push(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> dict[str, str]:
        """Streams the tensors into this process's servers and verifies their weights. Collective.

        A server that fails is left out, its version INCOMPLETE, until `restore` repairs it. Returns the
        failures of all processes, reason by URL. Raises WeightSyncError, on every process, naming a tensor
        that is unknown, missing or misshapen, what differs in a server, or a file that cannot be written.
        """
        capacity = int(self._config.weight_sync.bucket_mb * 2**20)
        stream = checked(tensors, self.expected)
        cut = in_step(buckets(stream, capacity, holds=bool(self.pool.own)))
        with raised_on_all_ranks(WeightSyncError):
            try:
                failed, probes = self._deliver(cut, version)
            except WeightSyncError:
                _exhaust(cut)
                raise
            _exhaust(cut)
        outcomes = gathered((failed, probes))
        self._compare_log_probs([one for _, some in outcomes for one in some])
        return {url: reason for some, _ in outcomes for url, reason in some.items()}

    async def restore(self, client: ServerClient) -> None:
        """Loads the weights of the latest `push` into a restarted or late server, from the files it kept.

        Not collective, and may run at any time: it verifies by checksums only, as the policy may be busy.
        Raises ServerError if the server fails, WeightSyncError if no files are kept or the server's weights
        differ afterwards.
        """
        if self.files.complete is None:
            raise WeightSyncError(
                f"SGLang server {client.url} has no weights of version {self.version} until the next sync; "
                "weight_sync.keep_files=true would have kept them for it"
            )
        receiver = Receiver(client, self._config.weight_sync.timeout_s)
        try:
            await receiver.begin(explicit=False)
            await receiver.load_files(self.files.complete)
            await self.pool.take_cache(client)
            await receiver.end()
            await self._compare_checksums(receiver)
            await receiver.resume(self.version)
        except BaseException:
            with anyio.CancelScope(shield=True):  # also when cancelled: the server must not stay paused
                await receiver.abandon()
            raise

    def close(self) -> None:
        """Leaves the servers' process group and removes the files."""
        self.pool.pause()  # no health check may read the files any more
        self.transport.close()
        self.files.remove()
        with contextlib.suppress(OSError):  # other processes may have files in it
            self.files.root.parent.rmdir()

    def _check_servers(self, config: Config, pool: ServerPool) -> None:
        method, rollout = config.weight_sync.method, config.rollout
        if method == "tensor":
            for client in pool.own:
                check_same_host(client.url)
        uses_nccl = method == "distributed" and BACKENDS[device.device().type] == "nccl"
        if uses_nccl and pool.own and rollout.launch == "spawn":
            check_nccl(rollout.sglang.python)

    async def _restore_or_reason(self, client: ServerClient) -> str:
        try:
            await self.restore(client)
        except WeightSyncError as error:
            return str(error)
        return ""

    def _deliver(self, cut: Iterator[Bucket], version: int) -> tuple[dict[str, str], list[Probe]]:
        """Sends the buckets to this process's servers. Returns why some failed, and the others' probes."""
        run, explicit = self.pool.portal.call, self.transport.explicit
        receivers = [Receiver(client, self._config.weight_sync.timeout_s) for client in self.pool.own]
        if not receivers:
            return {}, []
        try:
            with waiting_for(f"the weights of version {version} to reach {len(receivers)} servers"):
                each(run, receivers, lambda receiver: self._begin(receiver, explicit))
                self._stream(receivers, cut, version)
                probes = each(run, receivers, lambda receiver: self._complete(receiver, version))
        except BaseException:
            abandon(run, receivers)
            raise
        failed = [receiver for receiver in receivers if receiver.error]
        abandon(run, failed)
        return {receiver.client.url: str(receiver.error) for receiver in failed}, probes

    async def _begin(self, receiver: Receiver, explicit: bool) -> None:
        """Pauses a server. Raises ServerError."""
        found = str((await receiver.client.model_info())["weight_version"])
        # what a server with other weights than the last sync's generates and caches is of no use
        await receiver.begin(explicit, self.pool.pause_mode if found == self.pool.version else "abort")

    def _stream(self, receivers: list[Receiver], cut: Iterator[Bucket], version: int) -> None:
        settings, hf_config = self._config.weight_sync, self._policy.hf_config
        # layouts of earlier syncs too: a server that failed meanwhile may be restored later
        layouts = {_layout(receiver) for receiver in live(receivers) if comparable(receiver)}
        self._checksums = {
            layout: Checksums(hf_config, *layout) for layout in layouts | self._checksums.keys()
        }
        writes_files = settings.keep_files or settings.method == "disk"
        self.files.remove()
        if writes_files:
            self.files.start()
        for bucket in cut:
            if writes_files:
                self.files.write(bucket)
            for checksums in self._checksums.values():
                for name, tensor in bucket.host:
                    checksums.add(name, tensor)
            self.transport.send(receivers, bucket)
        self.version = version
        self.transport.finish(receivers, self.files.finish(version) if writes_files else None)
        if not settings.keep_files:
            self.files.remove()

    async def _complete(self, receiver: Receiver, version: int) -> Probe:
        """Ends a server's update and resumes it. Raises ServerError, or WeightSyncError for wrong weights."""
        await self.pool.take_cache(receiver.client)
        await receiver.end()
        unequal = await self._compare_checksums(receiver)
        await receiver.resume(version)
        temperature, vocabulary = self._config.rollout.temperature, self._policy.hf_config.vocab_size
        return await probe(receiver, temperature, vocabulary, unequal)

    async def _compare_checksums(self, receiver: Receiver) -> set[str]:
        """Returns the parameters whose checksums differ; none for a server that is not comparable.

        Raises WeightSyncError naming them, unless this layout's checksums have never been equal: then the
        server may fuse or pad its weights in an unexpected way, and the log-probs decide.
        """
        layout = _layout(receiver)
        if layout not in self._checksums or not comparable(receiver):
            return set()
        unequal = await unequal_parameters(receiver, self._checksums[layout])
        if not unequal:
            self._confirmed.add(layout)
        elif layout in self._confirmed:
            raise mismatch(receiver.client.url, unequal)
        else:
            log.warning(
                "SGLang server %s: checksums differ at the first weight sync; the log-probs decide: %s",
                receiver.client.url,
                listed(unequal),
            )
        return unequal

    def _compare_log_probs(self, probes: list[Probe]) -> None:
        """Raises WeightSyncError for a probe that does not agree with the policy. Collective."""
        if not probes:
            return
        # the same on every process; the one that owns the server can find the parameters
        wrong = disagreeing(probes, self._log_probs, getattr(torch, self._config.model.dtype))
        with raised_on_all_ranks(WeightSyncError):
            for one in wrong:
                for client in self.pool.own:
                    if client.url == one.url:
                        raise mismatch(one.url, self._wrong_parameters(one, client))

    def _wrong_parameters(self, one: Probe, client: ServerClient) -> Iterable[str]:
        """Returns the parameters that are wrong in a server; empty if they cannot be determined."""
        if one.unequal or self.files.complete is None:
            return one.unequal
        receiver = Receiver(client, self._config.weight_sync.timeout_s)
        try:
            return self.pool.portal.call(changed_by_files, receiver, self.files.complete)
        except ServerError:
            return []


ServerLayout = tuple[int, torch.dtype]
"""Tensor-parallel size and type of a server's weights"""


def _layout(receiver: Receiver) -> ServerLayout:
    return receiver.tensor_parallel, receiver.dtype


def _exhaust(cut: Iterator[Bucket]) -> None:
    """Reads the buckets to their end: it is collective, and other processes may still need their tensors."""
    for _ in cut:
        pass


class Measured:
    """A stream of tensors that counts its bytes."""

    def __init__(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        self._tensors = tensors
        self.nbytes = 0

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self._tensors:
            self.nbytes += tensor.nbytes
            yield name, tensor
