"""Copies the policy's weights to the rollout engine after each optimizer step.

The policy's parameters are gathered one by one from their shards, whole and under their Hugging Face names.
The stream either fills the model of an engine in the training processes, or is sent to SGLang servers by the
transports (weights.transport), whose weights are then verified (weights.verify). One bucket of it is gathered
while the one before is sent and loaded.
"""

import concurrent.futures
import contextlib
import logging
import os
import socket
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
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
from megatron_bicc.sglang.process import CHANGES_LOADER
from megatron_bicc.weights.handles import SHARED_MEMORY
from megatron_bicc.weights.hf_weights import hf_tensors, step_export
from megatron_bicc.weights.transport import (
    BACKENDS,
    TRANSPORTS,
    Bucket,
    ChangesTransport,
    Receiver,
    Transport,
    WeightFiles,
    WeightSyncError,
    abandon,
    buckets,
    check_nccl,
    checked,
    each,
    expected_shapes,
    in_step,
    live,
    on_this_host,
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
    share_of,
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
        self.methods: dict[str, str] = {}
        """Of this process's servers, by URL"""
        with raised_on_all_ranks(UserError):
            self._choose_methods(config, pool)
        root = Path(settings.path or Path(config.output_dir) / "rollout_weights")
        self.files = WeightFiles(root / f"rank_{dist.get_rank()}", Path(config.model.path))
        self.expected = expected_shapes(config.model.path, policy.hf_config)
        self.transports = {method: make(pool.portal.call) for method, make in TRANSPORTS.items()}
        """By method. Each server has one of them"""
        self.changes: ChangesTransport | None = None
        if settings.delta and pool.own:
            directory = root.parent if settings.method == "disk" else SHARED_MEMORY
            self.changes = ChangesTransport(
                pool.portal.call, directory / f"bicc_changes_{socket.gethostname()}_{os.getpid()}"
            )
        self.pool = pool
        self.version = -1
        """Version of the latest `push`"""
        self._started = time.time()
        self._config = config
        self._policy = policy
        self._log_probs = log_probs
        self._checksums: dict[ServerLayout, Checksums] = {}
        """Checksums of the newest weights, for each layout of comparable servers"""
        self._shares = 0
        """Syncs that compared a share of the parameters: which share is next"""
        self._confirmed: set[ServerLayout] = set()
        """Layouts whose checksums were equal at least once, so that unequal ones prove wrong weights"""
        pool.on_stale = self._restore_or_reason

    def sync(self, version: int) -> int:
        """As WeightSync.sync. A server that fails is not used until the health check has restored it."""
        self._policy.check_weights()
        self.pool.pause()  # a health check must not restore a server while its weights change
        self.pool.expect(str(version))
        dist.barrier()  # every process does so before a server is paused, and answers with this version
        stream = Measured(hf_tensors(self._policy.modules, self._policy.hf_config, views=True))
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
        # parameters do not change before all buckets have been sent
        parameters = {p.untyped_storage().data_ptr() for m in self._policy.modules for p in m.parameters()}
        cut = in_step(buckets(stream, capacity, bool(self.pool.own), parameters))
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
        """Loads the weights of the latest `push` into a restarted or late server, from files that have them.

        Not collective, and may run at any time: it verifies by checksums only, as the policy may be busy.
        Raises ServerError if the server fails, WeightSyncError if there are no such files or the server's
        weights differ afterwards.
        """
        directory = self.files.complete or self._saved()
        if directory is None:
            raise WeightSyncError(
                f"SGLang server {client.url} has no weights of version {self.version} until the next sync; "
                "weight_sync.keep_files=true would have kept them for it"
            )
        receiver = Receiver(client, self._config.weight_sync.timeout_s)
        try:
            await receiver.begin(explicit=False)
            await receiver.load_files(directory)
            await self.pool.take_cache(client)
            await receiver.end()
            await self._compare_checksums(receiver)
            await receiver.resume(self.version)
            log.info(
                "SGLang server %s loaded the weights of version %d from %s",
                client.url,
                self.version,
                directory,
            )
        except BaseException:
            with anyio.CancelScope(shield=True):  # also when cancelled: the server must not stay paused
                await receiver.abandon()
            raise

    def close(self) -> None:
        """Leaves the servers' process group and removes the files."""
        self.pool.pause()  # no health check may read the files any more
        for transport in (*self.transports.values(), *([self.changes] if self.changes else [])):
            transport.close()
        self.files.remove()
        with contextlib.suppress(OSError):  # other processes may have files in it
            self.files.root.parent.rmdir()

    def _saved(self) -> Path | None:
        """Returns a Hugging Face directory with exactly the weights of the latest `push`, if there is one."""
        if self.version == 0:  # no optimizer step has been taken, and no checkpoint was resumed from
            return Path(self._config.model.path)
        exported = step_export(self._config.output_dir, self.version)
        with contextlib.suppress(OSError):
            # an export of an earlier run in this directory may have other weights
            if exported.stat().st_mtime >= self._started:
                return exported
        return None

    def _choose_methods(self, config: Config, pool: ServerPool) -> None:
        """Chooses the methods of servers without one, and logs them. Raises UserError."""
        unknown = [client.url for client in pool.own if client.url not in self.methods]
        chosen = {url: _method(config.weight_sync.method, url) for url in unknown}
        for url, method in chosen.items():
            if method == "tensor" and not on_this_host(url):
                raise UserError(
                    f"weight_sync.method is tensor, but rollout server {url} is on another host and cannot "
                    "read this host's memory; set weight_sync.method=auto"
                )
            if method == "distributed" and config.rollout.colocate:
                raise UserError(
                    f"rollout.colocate is true, but rollout server {url} is on another host than the process "
                    "that sends it weights; start it on that host, or set rollout.colocate=false"
                )
        used = set(chosen.values())
        uses_nccl = "distributed" in used and BACKENDS[device.device().type] == "nccl"
        if uses_nccl and config.rollout.launch == "spawn":
            check_nccl(config.rollout.sglang.python)
        by_method = {
            method: ", ".join(url for url, found in chosen.items() if found == method)
            for method in sorted(used)
        }
        if used:
            log.info(
                "weight sync: %s", "; ".join(f"{method} to {urls}" for method, urls in by_method.items())
            )
        self.methods |= chosen

    def _groups(self, receivers: list[Receiver]) -> list[tuple[Transport, list[Receiver]]]:
        """Returns each transport that live receivers use, with them."""
        found: dict[Transport, list[Receiver]] = {}
        for receiver in live(receivers):
            found.setdefault(self._transport(receiver), []).append(receiver)
        return list(found.items())

    def _transport(self, receiver: Receiver) -> Transport:
        url = receiver.client.url
        takes_changes = self.changes and url in self.changes.takers
        return self.changes if takes_changes else self.transports[self.methods[url]]

    async def _restore_or_reason(self, client: ServerClient) -> str:
        try:
            await self.restore(client)
        except WeightSyncError as error:
            return str(error)
        return ""

    def _deliver(self, cut: Iterator[Bucket], version: int) -> tuple[dict[str, str], list[Probe]]:
        """Sends the buckets to this process's servers. Returns why some failed, and the others' probes."""
        run = self.pool.portal.call
        receivers = [Receiver(client, self._config.weight_sync.timeout_s) for client in self.pool.own]
        if not receivers:
            return {}, []
        try:
            self._choose_methods(self._config, self.pool)  # of workers that have joined a router
        except UserError as error:
            raise WeightSyncError(str(error)) from error
        try:
            with waiting_for(f"the weights of version {version} to reach {len(receivers)} servers"):
                if self.changes:
                    self.changes.begin()
                each(run, receivers, self._begin)
                self._stream(receivers, cut, version)
                probes = each(run, receivers, lambda receiver: self._complete(receiver, version))
        except BaseException:
            abandon(run, receivers)
            raise
        failed = [receiver for receiver in receivers if receiver.error]
        abandon(run, failed)
        return {receiver.client.url: str(receiver.error) for receiver in failed}, probes

    async def _begin(self, receiver: Receiver) -> None:
        """Pauses a server. Raises ServerError."""
        found = str((await receiver.client.model_info())["weight_version"])
        if await self._takes_changes(receiver, found):
            self.changes.takers.add(receiver.client.url)
        # what a server with other weights than the last sync's generates and caches is of no use
        mode = self.pool.pause_mode if found == self.pool.version else "abort"
        await receiver.begin(self._transport(receiver).explicit, mode)

    async def _takes_changes(self, receiver: Receiver, found: str) -> bool:
        """Returns whether a server, whose weight version is `found`, can apply changes of the last sync's."""
        client = receiver.client
        if self.changes is None or self.methods[client.url] == "distributed":
            return False
        loaders = (await client.server_info()).get("custom_weight_loader") or []
        return CHANGES_LOADER in loaders and found == str(self.changes.version)

    def _stream(self, receivers: list[Receiver], cut: Iterator[Bucket], version: int) -> None:
        """Sends the buckets: one is on its way while the next one is gathered."""
        settings = self._config.weight_sync
        self._checksums = self._new_checksums(receivers)
        used = {transport for transport, _ in self._groups(receivers)}
        writes_files = settings.keep_files or self.transports["disk"] in used
        if self.changes:
            self.changes.version = None
        self.files.remove()
        if writes_files:
            self.files.start()
        with ThreadPoolExecutor(2 + len(self.transports), "weight sync") as threads:
            sending: Future[None] | None = None
            for bucket in cut:
                if sending:
                    sending.result()
                sending = threads.submit(self._send, receivers, bucket, threads, writes_files)
            if sending:
                sending.result()
        self.version = version
        if self.changes:
            self.changes.version = version
        directory = self.files.finish(version) if writes_files else None
        for transport, group in self._groups(receivers):
            transport.finish(group, directory)
        if not settings.keep_files:
            self.files.remove()

    def _new_checksums(self, receivers: list[Receiver]) -> "dict[ServerLayout, Checksums]":
        """Returns checksums for the layouts of these and of earlier servers, which may be restored later.

        They are of a share of the parameters, in turn. They are of all before a layout is confirmed, and
        where files are kept, as a server that loads them is verified by nothing else.
        """
        layouts = {_layout(receiver) for receiver in live(receivers) if comparable(receiver)}
        layouts |= self._checksums.keys()
        names = None
        if layouts <= self._confirmed and not self._config.weight_sync.keep_files:
            names = share_of(self.expected, self._shares)
            self._shares += 1
        return {layout: Checksums(self._policy.hf_config, *layout, names) for layout in layouts}

    def _send(
        self, receivers: list[Receiver], bucket: Bucket, threads: ThreadPoolExecutor, writes_files: bool
    ) -> None:
        """Sends a bucket by all transports at once, and frees it. Its checksums are computed meanwhile."""
        groups = self._groups(receivers)
        staging = {transport for transport, _ in groups}
        if self.changes:
            staging.add(self.changes)
        for transport in staging:
            transport.stage(bucket)
        if not any(transport.needs_device for transport, _ in groups):
            bucket.keep_host()
        sending = [threads.submit(transport.send, group, bucket) for transport, group in groups]
        try:
            if writes_files:
                self.files.write(bucket)
            for checksums in self._checksums.values():
                for name, tensor in bucket.host:
                    checksums.add(name, tensor)
        finally:
            concurrent.futures.wait(sending)
        for one in sending:
            one.result()
        bucket.clear()

    async def _complete(self, receiver: Receiver, version: int) -> Probe:
        """Ends a server's update and resumes it. Raises ServerError, or WeightSyncError for wrong weights."""
        await self.pool.take_cache(receiver.client)
        await receiver.end()
        unequal = await self._compare_checksums(receiver)
        await receiver.resume(version)
        return await self._probe(receiver, unequal)

    async def _probe(self, receiver: Receiver, unequal: set[str]) -> Probe:
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


def _method(given: str, url: str) -> str:
    """Returns a server's method: `given`, the setting, or the one that auto chooses."""
    if given != "auto":
        return given
    return "tensor" if on_this_host(url) else "distributed"


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
