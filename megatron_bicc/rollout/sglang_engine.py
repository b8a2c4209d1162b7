"""Groups of samples on their way: asked for by the trainer's thread, awaited in the event loop.

The engine whose samples come from SGLang servers.
"""

import ipaddress
import os
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from itertools import groupby
from queue import Empty, SimpleQueue

import anyio
import torch.distributed as dist
from anyio.abc import TaskGroup, TaskStatus
from anyio.from_thread import BlockingPortal, start_blocking_portal
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from megatron_bicc import device
from megatron_bicc.collective import gathered
from megatron_bicc.config import Config
from megatron_bicc.data.encoding import end_token_ids
from megatron_bicc.errors import UserError
from megatron_bicc.model.families import supported_config
from megatron_bicc.rollout.types import Request, Sample, Sampling
from megatron_bicc.sglang.checks import check_model, until_well
from megatron_bicc.sglang.client import ServerClient, generate_body, read_samples
from megatron_bicc.sglang.pool import UNTOUCHED, ServerPool
from megatron_bicc.sglang.process import SpawnedServer
from megatron_bicc.sglang.settings import server_urls
from megatron_bicc.training.learner import Learner
from megatron_bicc.weights.sync import WeightSync
from megatron_bicc.weights.verify import WeightSyncError

SampleGroup = Callable[[list[Request]], Awaitable[list[Sample]]]


class GroupStream:
    """rollout.types.Stream over an event loop that runs in another thread."""

    def __init__(
        self, portal: BlockingPortal, tasks: TaskGroup, sample: SampleGroup, most_samples: int
    ) -> None:
        """most_samples: those worked on at a time; a group waits until it fits."""
        self._portal, self._tasks, self._sample, self._most = portal, tasks, sample, most_samples
        self._slots: anyio.Semaphore | None = None
        self._finished: SimpleQueue[tuple[int, list[Sample] | Exception]] = SimpleQueue()
        self._outstanding = 0

    def ask(self, key: int, requests: list[Request]) -> None:
        """Asks for the samples of one prompt; `next` gives them under this key. Does not wait."""
        if self._slots is None:
            self._slots = anyio.Semaphore(max(1, self._most // len(requests)))
        self._outstanding += 1
        self._portal.call(self._start, key, requests)

    def next(self, seconds: float | None) -> tuple[int, list[Sample]] | None:
        """The key and the samples of a group that is finished; None if none is within so many seconds.

        seconds: None waits for as long as it takes. Raises RolloutError for a group that cannot be had.
        """
        try:
            key, outcome = self._finished.get(timeout=seconds)
        except Empty:
            return None
        self._outstanding -= 1
        if isinstance(outcome, Exception):
            raise outcome
        return key, outcome

    def outstanding(self) -> int:
        """Groups asked for that `next` has not given."""
        return self._outstanding

    def _start(self, key: int, requests: list[Request]) -> None:
        # gives nothing back: the portal would await a task
        self._tasks.start_soon(self._run, key, requests)

    async def _run(self, key: int, requests: list[Request]) -> None:
        outcome: list[Sample] | Exception
        async with self._slots:
            try:
                outcome = await self._sample(requests)
            except Exception as error:  # for the thread that asked
                outcome = error
        self._finished.put((key, outcome))


@contextmanager
def group_stream(portal: BlockingPortal, sample: SampleGroup, most_samples: int) -> Iterator[GroupStream]:
    """A stream. What is not finished when the context ends is cancelled, and has ended when it is left."""
    ended, tasks = portal.start_task(_task_group)
    try:
        yield GroupStream(portal, tasks, sample, most_samples)
    finally:
        portal.call(tasks.cancel_scope.cancel)
        ended.result()


async def _task_group(*, task_status: TaskStatus[TaskGroup]) -> None:
    async with anyio.create_task_group() as tasks:
        task_status.started(tasks)
        await anyio.sleep_forever()


class SglangEngine:
    """Every process asks all servers that it can reach; each server gets its weights from one process: from
    the first when they were attached, from the first of its node when that started them."""

    def __init__(self, config: Config, tokenizer: PreTrainedTokenizerBase, learner: Learner | None) -> None:
        """Starts or finds the servers and waits for them. Collective.

        learner: whose weights the servers get; without one they keep those that they started with. Raises
        ValueError, one line and on every process, for a server that does not come up or that serves
        another model.
        """
        self._settings = config.rollout.sglang
        self._hf_config = supported_config(config.model.path)
        self._ends = end_token_ids(self._hf_config, tokenizer, config.model.path)
        self._loop = start_blocking_portal()
        self._portal = self._loop.__enter__()
        self._sync = WeightSync(config, learner, self._portal.call) if learner else None
        self._spawned: list[SpawnedServer] = []
        urls, own = self._servers(config)
        key = os.environ.get(self._settings.api_key_variable) if self._settings.api_key_variable else None
        clients = {url: ServerClient(url, key) for url in urls}
        self._own = [clients[url] for url in own]
        first = dist.get_rank() % len(urls)
        self._pool = ServerPool(list(clients.values()), self._settings, self._own, self._restore, first)
        self._per_process = max(1, self._settings.max_concurrency // dist.get_world_size())
        self._watched = False
        self._watcher = self._portal.start_task_soon(self._pool.watch)
        self._start()

    def generate(self, requests: list[Request], sampling: Sampling) -> list[Sample]:
        """One sample a request, in the requests' order; requests of one prompt, side by side, go together.

        Raises RolloutError when no server has done its work for rollout.sglang.retry_timeout_s seconds,
        ValueError for a token that is not in the vocabulary.
        """
        groups = [list(group) for _, group in groupby(requests, key=lambda r: r.token_ids.tobytes())]
        samples: dict[int, list[Sample]] = {}
        with (
            self.stream(sampling) as stream,
            tqdm(total=len(requests), desc="rollouts", leave=False, disable=device.quiet()) as bar,
        ):
            for i, group in enumerate(groups):
                stream.ask(i, group)
            while stream.outstanding():
                i, samples[i] = stream.next(None)
                bar.update(len(samples[i]))
        return [sample for i in range(len(groups)) for sample in samples[i]]

    def stream(self, sampling: Sampling) -> AbstractContextManager[GroupStream]:
        """Groups one by one. What is not finished when the context ends is aborted on the servers."""
        return group_stream(self._portal, partial(self._group, sampling=sampling), self._per_process)

    def update_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Streams the tensors to all servers. Collective.

        A server that fails is not used until it has been given them. Raises WeightSyncError for a tensor that
        is unknown, missing or misshapen, and if a server's weights are not ours afterwards.
        """
        self._leave_alone()
        failed = self._sync.push(self._own, tensors, version)
        self._pool.hold(str(version), failed)
        self._watch()

    @contextmanager
    def memory_released(self) -> Iterator[None]:
        """Inside it the servers hold no weights and no cache; afterwards new weights must come."""
        self._leave_alone()
        self._portal.call(self._each_own, ServerClient.release_memory)
        yield
        self._portal.call(self._each_own, ServerClient.take_memory)

    def counts(self) -> dict[str, float]:
        """Over all processes, since the last call: rollouts that were asked for again after a server failed,
        and rollouts refused for stale weights. Collective."""
        parts = gathered((self._pool.resent, self._pool.stale))
        self._pool.resent = self._pool.stale = 0
        resent, stale = (float(sum(column)) for column in zip(*parts, strict=True))
        return {"rollout/resent": resent, "rollout/stale": stale}

    def close(self) -> None:
        """Ends the servers that this process started, and the connections to the others."""
        self._watcher.cancel()
        if self._sync:
            self._sync.close()
        for server in self._pool.servers:
            self._portal.call(server.client.aclose)
        self._loop.__exit__(None, None, None)
        for server in self._spawned:
            server.stop()

    def _servers(self, config: Config) -> tuple[list[str], list[str]]:
        """URLs of the servers that this process asks, and of those to which it sends weights. Collective."""
        if config.rollout.launch == "attach":
            urls = server_urls(self._settings.servers)
            return urls, urls if dist.get_rank() == 0 else []
        if device.local_rank() == 0:
            count = self._settings.servers_per_node
            self._spawned = [SpawnedServer(config, index) for index in range(count)]
        own = [server.url for server in self._spawned]
        nodes = gathered((device.node_rank(), own))
        alone = ipaddress.ip_address(self._settings.host).is_loopback
        reachable = (urls for node, urls in nodes if not alone or node == device.node_rank())
        return [url for urls in reachable for url in urls], own

    def _start(self) -> None:
        """Waits for own servers and checks them. Raises UserError on every process. Collective."""
        error = ""
        try:
            self._portal.call(self._each_own, self._started)
            for server in self._spawned:
                server.ready()
        except* UserError as errors:
            error = str(errors.exceptions[0])
        for fault in filter(None, gathered(error)):
            self.close()
            raise UserError(fault)
        if self._sync is None:
            self._pool.hold(UNTOUCHED, {})
            self._watch()

    def _leave_alone(self) -> None:
        if self._watched:
            self._portal.call(self._pool.close_gates)
        self._watched = False

    def _watch(self) -> None:
        self._portal.call(self._pool.open_gates)
        self._watched = True

    async def _started(self, client: ServerClient) -> None:
        spawned = [server for server in self._spawned if server.url == client.url]
        check_starting = spawned[0].check_starting if spawned else lambda: None
        await until_well(client, self._settings.start_timeout_s, check_starting)
        await check_model(client, self._hf_config)

    async def _each_own(self, act: Callable[[ServerClient], Awaitable[None]]) -> None:
        async with anyio.create_task_group() as tasks:
            for client in self._own:
                tasks.start_soon(act, client)

    async def _restore(self, client: ServerClient) -> str:
        if client not in self._own or self._sync is None:
            return f"{client.url}: its weights are not of version {self._pool.version}"
        try:
            await self._sync.restore(client)
        except WeightSyncError as error:
            return str(error)
        return ""

    async def _group(self, group: list[Request], sampling: Sampling) -> list[Sample]:
        version, vocab_size, prompt = self._pool.version, self._hf_config.vocab_size, group[0].token_ids
        if prompt.min() < 0 or prompt.max() >= vocab_size:
            raise UserError(
                f"a prompt has token {prompt.max()}; the policy's vocabulary has {vocab_size} tokens, and "
                "the rollout server would end on it"
            )
        read = partial(
            read_samples, count=len(group), version=version, vocab_size=vocab_size, ends=self._ends
        )
        return await self._pool.ask(generate_body(group, sampling, self._ends), read)
