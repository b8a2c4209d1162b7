"""The policy's weights on their way to SGLang servers: one stream, every server."""

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from megatron_bicc.config import Config
from megatron_bicc.policy.policy import Policy
from megatron_bicc.rollout.sglang.client import ServerClient
from megatron_bicc.weight_sync.buckets import buckets, checked, expected_shapes
from megatron_bicc.weight_sync.files import WeightFiles
from megatron_bicc.weight_sync.methods import METHODS, load_files
from megatron_bicc.weight_sync.proof import Proof, WeightSyncError
from megatron_bicc.weight_sync.session import Run, Session, Sessions


class WeightSync:
    """Brings weights to this process's servers; every process of the run has one, with servers or without."""

    def __init__(self, config: Config, policy: Policy, run: Run) -> None:
        """Raises ValueError for a model.path that cannot be read."""
        settings = config.weight_sync
        root = Path(settings.path or Path(config.output_dir) / "rollout_weights")
        self.files = WeightFiles(root / f"rank_{dist.get_rank()}", Path(config.model.path))
        self.expected = expected_shapes(config.model.path, policy.hf_config)
        self.proof = Proof(policy.hf_config)
        self.method = METHODS[settings.method]()
        self.writes_files = settings.keep_files or self.method.reads_files
        self.keeps_files = settings.keep_files
        self.capacity = int(settings.bucket_mb * 2**20)
        self.timeout_s = settings.timeout_s
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
            ValueError: on every process, naming a tensor that is unknown, missing or has the wrong shape.
            WeightSyncError: on every process, naming what differs in a server, or a file that could not be
                written.
        """
        stream = checked(tensors, self.expected)
        failed: dict[str, str] = {}
        fault = ""
        try:
            if clients:
                failed = self._deliver(clients, stream, version)
        except (OSError, WeightSyncError) as error:
            fault = str(error)
        for _ in stream:  # the other processes are still in it
            pass
        return _agree(failed, fault)

    async def restore(self, client: ServerClient) -> None:
        """Gives a server that comes late the weights of the newest `push`, from its files. At any time.

        Raises ServerError if the server fails at it, WeightSyncError if no files are kept.
        """
        if self.files.complete is None:
            raise WeightSyncError(
                f"SGLang server {client.url} has no weights of version {self.version} until the next sync; "
                "weight_sync.keep_files=true would have kept them for it"
            )
        session = Session(client, self.timeout_s)
        try:
            await session.open(brackets=False)
            await load_files(session, self.files.complete)
            await session.end()
            await self.proof.check(session)
            await session.close(self.version)
        except BaseException:
            await session.give_up()
            raise

    def close(self) -> None:
        """Removes the files."""
        self.files.remove()

    def _deliver(
        self, clients: list[ServerClient], stream: Iterator[tuple[str, Tensor]], version: int
    ) -> dict[str, str]:
        sessions = Sessions(clients, self.timeout_s, self.run)
        done = False
        try:
            sessions.each(partial(Session.open, brackets=self.method.brackets))
            self._stream(sessions, stream, version)
            sessions.each(Session.end)
            sessions.each(self.proof.check)
            sessions.each(partial(Session.close, version=version))
            done = True
        finally:
            sessions.give_up(everything=not done)
        return sessions.failed()

    def _stream(self, sessions: Sessions, stream: Iterator[tuple[str, Tensor]], version: int) -> None:
        self.proof.start(sessions.live())
        self.files.remove()
        if self.writes_files:
            self.files.start()
        for bucket in buckets(stream, self.capacity):
            if self.writes_files:
                self.files.write(bucket)
            self.proof.add(bucket)
            self.method.send(sessions, bucket)
        self.version = version
        if self.writes_files:
            directory = self.files.finish(version)
        if self.method.reads_files:
            sessions.each(partial(load_files, directory=directory))
            if not self.keeps_files:
                self.files.remove()


def _agree(failed: dict[str, str], fault: str) -> dict[str, str]:
    """Brings what happened to every process. Raises WeightSyncError for the first fault. Collective."""
    outcomes: list[tuple[dict[str, str], str]] = [({}, "")] * dist.get_world_size()
    dist.all_gather_object(outcomes, (failed, fault))
    for _, reason in outcomes:
        if reason:
            raise WeightSyncError(f"weight sync: {reason}")
    return {url: reason for part, _ in outcomes for url, reason in part.items()}
