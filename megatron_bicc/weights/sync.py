"""The policy's weights on their way to SGLang servers: one stream, every server.

The policy's weights on their way to the rollout engine.
"""

import contextlib
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import anyio
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_bicc import device
from megatron_bicc.collective import gathered
from megatron_bicc.config import Config
from megatron_bicc.errors import UserError
from megatron_bicc.model.policy import Policy
from megatron_bicc.rollout.types import Engine
from megatron_bicc.sglang.client import ServerClient, ServerError
from megatron_bicc.training.learner import Learner
from megatron_bicc.weights.hf_weights import hf_tensors
from megatron_bicc.weights.transport import (
    METHODS,
    Run,
    Session,
    Sessions,
    WeightFiles,
    WeightSyncError,
    buckets,
    checked,
    expected_shapes,
    load_files,
)
from megatron_bicc.weights.verify import Probe, Proof, differing, mismatch, take, wrong


class WeightSync:
    """Brings weights to this process's servers; every process of the run has one, with servers or without."""

    def __init__(self, config: Config, learner: Learner, run: Run) -> None:
        """`learner` gives the policy's log-probs, for servers whose weights have no checksums.

        Raises UserError for a model.path that cannot be read.
        """
        settings = config.weight_sync
        root = Path(settings.path or Path(config.output_dir) / "rollout_weights")
        self.files = WeightFiles(root / f"rank_{dist.get_rank()}", Path(config.model.path))
        self.expected = expected_shapes(config.model.path, learner.policy.hf_config)
        self.proof = Proof(learner.policy.hf_config)
        self.method = METHODS[settings.method]()
        self.writes_files = settings.keep_files or self.method.reads_files
        self.config = config
        self.learner = learner
        self.run = run
        self.version = -1
        """Version of the newest `push`"""

    def push(
        self, clients: list[ServerClient], tensors: Iterable[tuple[str, Tensor]], version: int
    ) -> dict[str, str]:
        """Streams the tensors into `clients`, this process's servers. Collective.

        A server that fails is left out, its weights called incomplete; `restore` mends it. Returns the
        reasons by URL, those of all processes.

        Raises:
            WeightSyncError: on every process, naming a tensor that is unknown, missing or has the wrong
                shape, what differs in a server, or a file that could not be written.
        """
        stream = checked(tensors, self.expected)
        failed: dict[str, str] = {}
        probes: list[Probe] = []
        fault = ""
        try:
            if clients:
                failed, probes = self._deliver(clients, stream, version)
        except OSError as error:
            fault = f"weight sync: files for rollout servers (weight_sync.path) cannot be written: {error}"
        except WeightSyncError as error:
            fault = str(error)
        except UserError as error:  # of the stream: the same on every process
            raise WeightSyncError(str(error)) from None
        _exhaust(stream)
        outcomes = gathered((failed, probes, fault))
        _raise_first([fault for _, _, fault in outcomes])
        self._judge([probe for _, some, _ in outcomes for probe in some], clients)
        return {url: reason for some, _, _ in outcomes for url, reason in some.items()}

    async def restore(self, client: ServerClient) -> None:
        """Gives a server that comes late the weights of the newest `push`, from its files. At any time.

        Raises ServerError if the server fails at it, WeightSyncError if no files are kept or if what it then
        has is not in them.
        """
        if self.files.complete is None:
            raise WeightSyncError(
                f"SGLang server {client.url} has no weights of version {self.version} until the next sync; "
                "weight_sync.keep_files=true would have kept them for it"
            )
        session = Session(client, self.config.weight_sync.timeout_s)
        try:
            await session.open(brackets=False)
            await load_files(session, self.files.complete)
            await session.end()
            await self.proof.check(session)
            await session.close(self.version)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await session.give_up()
            raise

    def close(self) -> None:
        """Removes the files and leaves the servers' process group."""
        self.method.close()
        self.files.remove()
        with contextlib.suppress(OSError):  # another process's files are in it
            self.files.root.parent.rmdir()

    def _deliver(
        self, clients: list[ServerClient], stream: Iterator[tuple[str, Tensor]], version: int
    ) -> tuple[dict[str, str], list[Probe]]:
        sessions = Sessions(clients, self.config.weight_sync.timeout_s, self.run)
        done = False
        try:
            sessions.each(partial(Session.open, brackets=self.method.brackets))
            self._stream(sessions, stream, version)
            sessions.each(Session.end)
            sessions.each(self.proof.check)
            sessions.each(partial(Session.close, version=version))
            probes = sessions.each(self._probe)
            done = True
        finally:
            sessions.give_up(everything=not done)
        return sessions.failed(), [probe for probe in probes if probe]

    async def _probe(self, session: Session) -> Probe | None:
        differ = self.proof.doubts.get(session.client.url)
        if differ is None:
            return None
        vocabulary = self.learner.policy.hf_config.vocab_size
        return await take(session, self.config.rollout.temperature, vocabulary, differ)

    def _judge(self, probes: list[Probe], clients: list[ServerClient]) -> None:
        """Raises WeightSyncError for a probe that is not the policy's. Collective."""
        if not probes:
            return
        dtype = getattr(torch, self.config.model.dtype)
        faults = [""]
        for probe in wrong(probes, self.learner.log_probs, dtype):
            faults += [self._fault(probe, client) for client in clients if client.url == probe.url]
        _raise_first([fault for some in gathered(faults) for fault in some])

    def _fault(self, probe: Probe, client: ServerClient) -> str:
        names = probe.differ
        if not names and self.files.complete:
            session = Session(client, self.config.weight_sync.timeout_s)
            with contextlib.suppress(ServerError):
                names = self.run(differing, session, self.files.complete)
        return str(mismatch(probe.url, names))

    def _stream(self, sessions: Sessions, stream: Iterator[tuple[str, Tensor]], version: int) -> None:
        self.proof.start(sessions.live())
        self.files.remove()
        if self.writes_files:
            self.files.start()
        for bucket in buckets(stream, self.config.weight_sync.bucket_mb * 2**20):
            if self.writes_files:
                self.files.write(bucket)
            self.proof.add(bucket)
            self.method.send(sessions, bucket)
        self.version = version
        if self.writes_files:
            directory = self.files.finish(version)
        if self.method.reads_files:
            sessions.each(partial(load_files, directory=directory))
            if not self.config.weight_sync.keep_files:
                self.files.remove()


def _exhaust(stream: Iterator[tuple[str, Tensor]]) -> None:
    """Takes part in the stream to its end, with those that still need it. Raises WeightSyncError."""
    try:
        for _ in stream:
            pass
    except UserError as error:
        raise WeightSyncError(str(error)) from None


def _raise_first(faults: list[str]) -> None:
    for fault in faults:
        if fault:
            raise WeightSyncError(fault)


class EngineSync:
    """Until w-rollout is merged: its interface over Engine.update_weights."""

    def __init__(self, policy: Policy, engine: Engine) -> None:
        self._policy, self._engine = policy, engine

    def sync(self, version: int) -> int:
        """As sync_weights."""
        return sync_weights(self._policy, self._engine, version)

    def close(self) -> None:
        """Nothing."""


def make_weight_sync(config: Config, policy: Policy, engine: Engine, log_probs: object) -> EngineSync:
    """Until w-rollout is merged."""
    return EngineSync(policy, engine)


def sync_weights(policy: Policy, engine: Engine, version: int) -> int:
    """Streams every parameter, whole and under its Hugging Face name, into the engine. Collective.

    Returns the bytes of the whole model. Raises UserError naming a parameter that the engine lacks or did
    not get, NotFiniteError naming one that is not finite, before anything is sent.
    """
    policy.check_weights()
    sizes: list[int] = []
    with device.megatron():
        tensors = hf_tensors(policy.modules, policy.hf_config)
        engine.update_weights(_measured(tensors, sizes), version)
    return sum(sizes)


def _measured(tensors: Iterable[tuple[str, Tensor]], sizes: list[int]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors:
        sizes.append(tensor.nbytes)
        yield name, tensor
