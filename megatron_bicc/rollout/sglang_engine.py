"""The engine that samples on SGLang servers: requests, answers, and groups in flight."""

import base64
import time
from collections.abc import Awaitable, Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import anyio
import numpy as np
import torch.distributed as dist
from anyio import CancelScope
from anyio.abc import TaskGroup, TaskStatus
from anyio.from_thread import BlockingPortal
from tqdm import tqdm
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from megatron_bicc import device
from megatron_bicc.collective import gathered, raised_on_all_ranks
from megatron_bicc.config import Config
from megatron_bicc.data.encoding import end_token_ids
from megatron_bicc.errors import UserError
from megatron_bicc.model.families import experts_type, supported_config
from megatron_bicc.rollout.types import Request, RolloutError, Sample, Sampling, Stream
from megatron_bicc.sglang.client import ServerError
from megatron_bicc.sglang.pool import BadAnswer, RequestFailed, ServerPool, StaleWeights, start_servers
from megatron_bicc.weights.hf_files import INDEX, SINGLE, weight_map

LEAST_LOG_PROB = float(np.finfo(np.float32).min)
LOG_PROB_ROUNDING = 1e-3
"""Largest log-prob above 0 that is accepted as rounding of a probability of 1"""
ACCEPTED: dict[str, Any] = {
    "rope_is_neox_style": True,
    "dual_chunk_attention_config": None,
    "scale_emb": None,
    "original_num_attention_heads": None,
}
"""Entries of config.json that only SGLang reads, and their value without effect"""
RELEASE_TIMEOUT_S = 60.0
"""Seconds in which the memory that servers release must be free"""
RELEASE_POLL_S = 0.1
"""Seconds between two looks at the free memory"""
SampleGroup = Callable[[list[Request]], Awaitable[list[Sample]]]


@dataclass(frozen=True)
class Aborted(Sample):
    """The beginning of a response that a server ended early, as for a weight sync; may have no token."""


NOTHING = Aborted(np.empty(0, np.int32), np.empty(0, np.float32), "length", 0)
"""The beginning of every response"""


class SglangEngine:
    """Sends each group as one request to one server of the pool."""

    def __init__(
        self, config: Config, tokenizer: PreTrainedTokenizerBase, pool: ServerPool, server_bytes: int = 0
    ) -> None:
        """pool: servers with the model of model.path; closed by `close`.

        server_bytes: what they took of this process's GPU when they started, as far as it is known.
        """
        self.pool = pool
        self._server_bytes = server_bytes
        self._colocate = config.rollout.colocate
        self._asynchronous = config.rollout.max_staleness > 0
        hf_config = supported_config(config.model.path)
        self._hf_config = hf_config
        self._ends = end_token_ids(hf_config, tokenizer, config.model.path)
        self._per_process = max(1, config.rollout.sglang.max_concurrency // dist.get_world_size())

    def generate(self, requests: list[Request], sampling: Sampling) -> list[Sample]:
        """Returns one sample per request, in their order. Adjacent requests of one prompt are one group.

        All tokens are of one weight version, also while requests of a stream are in flight. Raises
        RolloutError when no server has answered for rollout.sglang.retry_timeout_s seconds, UserError for a
        token that is not in the vocabulary.
        """
        groups = [list(group) for _, group in groupby(requests, key=lambda r: r.token_ids.tobytes())]
        samples: dict[int, list[Sample]] = {}
        with (
            self._stream(sampling, strict=True) as stream,
            tqdm(total=len(requests), desc="rollouts", leave=False, disable=device.quiet()) as bar,
        ):
            for i, group in enumerate(groups):
                stream.submit(i, group)
            while stream.outstanding():
                i, samples[i] = stream.next(None)
                bar.update(len(samples[i]))
        return [sample for i in range(len(groups)) for sample in samples[i]]

    def stream(self, sampling: Sampling) -> AbstractContextManager[Stream]:
        """Returns a context with a stream. Unfinished groups are aborted on the servers when it ends.

        With rollout.max_staleness it may be open during weight syncs: samples then have Sample.versions.
        """
        return self._stream(sampling, strict=not self._asynchronous)

    def _stream(self, sampling: Sampling, strict: bool) -> AbstractContextManager[Stream]:
        """strict: every token of a group is of the same version."""
        if self._colocate:
            device.free_memory()  # what a weight sync or an export took: servers generate in it
        self.pool.resume()
        sample = partial(self._group, sampling=sampling, strict=strict)
        return group_stream(self.pool.portal, sample, self._per_process)

    @contextmanager
    def memory_released(self) -> Iterator[None]:
        """Frees the servers' memory inside the context; after it they need new weights. Collective.

        After it they have memory for weights; a weight sync gives them the rest. All of it is allocated again
        even if the block raises, as attached servers outlive the run. Raises RolloutError, on every process,
        if a server fails or its memory does not become free.
        """
        device.free_memory()
        unused = device.unused_bytes()
        dist.barrier()  # every process has its samples, and has measured
        with _server_errors():
            self.pool.release_memory()
        with raised_on_all_ranks(RolloutError):
            self._wait_for_memory(unused)
        try:
            yield
        except BaseException:
            with suppress(ServerError):  # the first error is the one to raise
                self.pool.take_memory()
            raise
        device.free_memory()
        dist.barrier()  # the memory of every process's GPU is free
        with _server_errors():
            self.pool.take_weights()

    def _wait_for_memory(self, unused: int) -> None:
        """Waits until half of what the servers took is free, and no more becomes free.

        Not all of it is released: a server keeps its CUDA context and buffers. unused: unused bytes before
        the release. A server may answer before the memory is free. Raises RolloutError after
        RELEASE_TIMEOUT_S seconds.
        """
        end, before = time.monotonic() + RELEASE_TIMEOUT_S, -1
        while (now := device.unused_bytes()) > before or 2 * (now - unused) < self._server_bytes:
            if time.monotonic() > end:
                raise RolloutError(
                    f"rollout servers released {(now - unused) / 1e9:.1f} GB of a GPU within "
                    f"{RELEASE_TIMEOUT_S:g} s, of {self._server_bytes / 1e9:.1f} GB that they took"
                )
            before = now
            time.sleep(RELEASE_POLL_S)

    def counts(self) -> dict[str, float]:
        """Returns the rollouts of all processes that were requested again since the last call. Collective.

        rollout/resent: after any failure; rollout/stale: those of them sampled with stale weights.
        """
        parts = gathered(self.pool.drain_counts())
        resent, stale = (float(sum(column)) for column in zip(*parts, strict=True))
        return {"rollout/resent": resent, "rollout/stale": stale}

    def close(self) -> None:
        """Closes the connections and ends the servers that the run started."""
        self.pool.close()

    async def _group(self, group: list[Request], sampling: Sampling, strict: bool) -> list[Sample]:
        """Returns a sample for each request of a group. Responses that were aborted are continued."""
        prompt = group[0].token_ids
        vocab_size = self._hf_config.vocab_size
        if prompt.min() < 0 or prompt.max() >= vocab_size:
            raise UserError(
                f"a prompt has token {prompt.max()}; the policy's vocabulary has {vocab_size} tokens, "
                "and the rollout server would crash on it"
            )
        routing = Routing.of(self._hf_config, len(prompt)) if sampling.routing else None
        samples: list[Sample] = [NOTHING] * len(group)
        while places := [i for i, sample in enumerate(samples) if isinstance(sample, Aborted)]:
            begun = [samples[i] for i in places]
            body = generate_body([group[i] for i in places], sampling, self._ends, begun)
            read = partial(self._read, count=len(places), routing=routing, strict=strict)
            try:
                answered = await self.pool.ask(body, read, strict)
            except RequestFailed as error:
                raise RolloutError(str(error)) from error
            for i, more in zip(places, answered, strict=True):
                samples[i] = joined(samples[i], more, sampling.max_new_tokens)
        return samples

    def _read(
        self, answer: Any, versions: Collection[str], count: int, routing: "Routing | None", strict: bool
    ) -> list[Sample]:
        """As read_samples. Raises BadAnswer for aborted samples that are not to be continued."""
        samples = read_samples(answer, count, versions, self._hf_config.vocab_size, self._ends, routing)
        is_new = self.pool.is_updating or any(len(sample.token_ids) for sample in samples)
        if any(isinstance(sample, Aborted) for sample in samples) and (strict or not is_new):
            raise BadAnswer("the server aborted a sample")
        return samples


@contextmanager
def _server_errors() -> Iterator[None]:
    """Raises a ServerError of any process as a RolloutError on all of them. Collective."""
    with raised_on_all_ranks(RolloutError):
        try:
            yield
        except ServerError as error:
            raise RolloutError(str(error)) from error


def make_sglang_engine(config: Config, tokenizer: PreTrainedTokenizerBase) -> SglangEngine:
    """Starts the servers, or attaches to them, and returns their engine. Collective; see start_servers."""
    device.free_memory()  # a colocated server takes a share of what is free when it starts
    unused = device.unused_bytes()
    dist.barrier()  # every process has measured: a server takes memory of several processes' GPUs
    pool = start_servers(config, supported_config(config.model.path))
    return SglangEngine(config, tokenizer, pool, unused - device.unused_bytes())


class GroupStream:
    """rollout.types.Stream over an event loop that runs in another thread."""

    def __init__(
        self, portal: BlockingPortal, tasks: TaskGroup, sample: SampleGroup, most_samples: int
    ) -> None:
        """most_samples: limit on samples in flight; a group waits until it fits."""
        self._portal, self._tasks, self._sample, self._most = portal, tasks, sample, most_samples
        self._slots: anyio.Semaphore | None = None
        self._finished: SimpleQueue[tuple[int, list[Sample] | Exception, CancelScope]] = SimpleQueue()
        self._running: dict[int, CancelScope] = {}
        """Of the submitted groups that were neither returned nor aborted, by key"""

    def submit(self, key: int, requests: list[Request]) -> None:
        """Submits the requests of one prompt; `next` returns their samples under this key. Does not block."""
        if self._slots is None:
            self._slots = anyio.Semaphore(max(1, self._most // len(requests)))
        self._running[key] = self._portal.call(self._start, key, requests)

    def next(self, seconds: float | None) -> tuple[int, list[Sample]] | None:
        """Returns key and samples of a finished group, or None if none finishes within `seconds`.

        seconds: None waits without limit. Raises RolloutError for a group that failed.
        """
        end = None if seconds is None else time.monotonic() + seconds
        while True:
            try:
                left = None if end is None else max(0.0, end - time.monotonic())
                key, outcome, scope = self._finished.get(timeout=left)
            except Empty:
                return None
            if self._running.get(key) is not scope:  # aborted after it had finished
                continue
            del self._running[key]
            if isinstance(outcome, Exception):
                raise outcome
            return key, outcome

    def abort(self, key: int) -> None:
        """Drops a submitted group: `next` never returns it, even if it has just finished. Does not block.

        Its requests are aborted on their server.
        """
        self._portal.call(self._running.pop(key).cancel)

    def outstanding(self) -> int:
        """Returns the number of submitted groups that `next` has not returned and that were not aborted."""
        return len(self._running)

    def _start(self, key: int, requests: list[Request]) -> CancelScope:
        # not a coroutine: the portal would wait for its end
        scope = CancelScope()
        self._tasks.start_soon(self._run, key, requests, scope)
        return scope

    async def _run(self, key: int, requests: list[Request], scope: CancelScope) -> None:
        outcome: list[Sample] | Exception
        with scope:
            async with self._slots:
                try:
                    outcome = await self._sample(requests)
                except Exception as error:  # raised by `next`, in the thread that waits for it
                    outcome = error
            self._finished.put((key, outcome, scope))


@contextmanager
def group_stream(portal: BlockingPortal, sample: SampleGroup, most_samples: int) -> Iterator[GroupStream]:
    """Yields a stream. On exit cancels unfinished groups and waits until they have ended."""
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


def joined(begun: Sample, more: Sample, max_new_tokens: int) -> Sample:
    """Returns the response of which one answer has the beginning and the next one what follows.

    It is an Aborted if `more` is one and there are fewer tokens than max_new_tokens.
    """
    if len(begun.token_ids):
        more = replace(
            more,
            token_ids=np.concatenate([begun.token_ids, more.token_ids]),
            log_probs=np.concatenate([begun.log_probs, more.log_probs]),
            **_tags(np.concatenate([begun.token_versions(), more.token_versions()])),
        )
    is_full = isinstance(more, Aborted) and len(more.token_ids) == max_new_tokens
    return Sample(**vars(more)) if is_full else more


def _tags(versions: np.ndarray) -> dict[str, Any]:
    """Returns Sample.weight_version and Sample.versions of tokens of these versions: int32 [T]."""
    is_mixed = len(versions) and (versions != versions[0]).any()
    return {
        "weight_version": int(versions[0]) if len(versions) else 0,
        "versions": versions if is_mixed else None,
    }


def generate_body(
    requests: list[Request], sampling: Sampling, ends: tuple[int, ...], begun: list[Sample]
) -> dict[str, Any]:
    """Returns the JSON of POST /generate for requests of one prompt. ends: ids of the end tokens.

    begun: the beginning of each response, which is sent with the prompt and counts in max_new_tokens.

    The whole distribution is sampled: top_p and the like, which a server or a generation_config may set by
    default, are switched off explicitly, since SGLang does not renormalise log-probs for them.
    """
    settings = {
        "temperature": sampling.temperature,
        "stop_token_ids": list(ends),
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "repetition_penalty": 1.0,
        "skip_special_tokens": False,
    }
    pairs = list(zip(requests, begun, strict=True))
    return {
        "input_ids": [[*request.token_ids.tolist(), *sample.token_ids.tolist()] for request, sample in pairs],
        "sampling_params": [
            settings
            | {
                "sampling_seed": request.seed,
                "max_new_tokens": sampling.max_new_tokens - len(sample.token_ids),
            }
            for request, sample in pairs
        ],
        "return_logprob": True,
        "logprob_start_len": -1,
        **({"return_routed_experts": True} if sampling.routing else {}),
    }


@dataclass(frozen=True)
class Routing:
    """The routing that a server returns with every sample of a group."""

    prompt_tokens: int
    layers: int
    experts: int
    """Number of experts of a layer"""
    per_token: int
    """Number of experts that a token has"""

    @classmethod
    def of(cls, hf_config: PretrainedConfig, prompt_tokens: int) -> "Routing":
        """Returns the routing of a model with experts for a prompt of so many tokens."""
        c = hf_config
        return cls(prompt_tokens, c.num_hidden_layers, c.num_experts, c.num_experts_per_tok)

    def read(self, text: str, response_tokens: int) -> np.ndarray:
        """Returns what base64 of int32 encodes: [P + T - 1, layers, per_token], a row for each token read.

        Raises BadAnswer for another number of rows, and for a row that is not of distinct experts, such as
        the zeros of a token of which the server has no record.
        """
        try:
            found = np.frombuffer(base64.b64decode(text, validate=True), np.int32)
            rows = self.prompt_tokens + response_tokens - 1
            found = found.reshape(rows, self.layers, self.per_token)
        except ValueError as error:  # binascii.Error is one
            raise BadAnswer(f"routed_experts cannot be read: {error}") from error
        if found.size and not (found.min() >= 0 and found.max() < self.experts):
            raise BadAnswer(f"routed_experts are not all of {self.experts} experts")
        found = found.astype(experts_type(self.experts))
        ordered = np.sort(found, axis=-1)
        if (ordered[..., 1:] == ordered[..., :-1]).any():
            raise BadAnswer("routed_experts name an expert twice for a token")
        return found


def read_samples(
    answer: Any,
    count: int,
    versions: Collection[str],
    vocab_size: int,
    ends: tuple[int, ...],
    routing: Routing | None = None,
) -> list[Sample]:
    """Returns the samples in an answer to the `generate_body` of `count` requests; Aborted ones among them.

    routing: read it, too; the prompt's is that of the first sample, since a group shares the prompt's rows.
    Raises StaleWeights if any token of a sample was generated by weights other than of `versions`, and
    BadAnswer if the answer is incomplete, a token is not in the policy's vocabulary, or a sample stopped at
    a token that is not one of `ends`.
    """
    if not isinstance(answer, list) or len(answer) != count:
        raise BadAnswer(f"{count} samples were requested; the answer is {str(answer)[:100]}")
    try:
        samples = [
            _sample(item["output_ids"], item["meta_info"], versions, vocab_size, ends) for item in answer
        ]
        if routing is None:
            return samples
        return [
            _routed(sample, routing, item["meta_info"]["routed_experts"], keep_prompt=place == 0)
            for place, (sample, item) in enumerate(zip(samples, answer, strict=True))
        ]
    except (KeyError, IndexError) as error:
        raise BadAnswer(f"an answer without {error}") from error
    except (TypeError, AttributeError) as error:
        raise BadAnswer(f"an answer of another shape: {error}") from error


def _sample(
    output_ids: Any, meta: dict[str, Any], versions: Collection[str], vocab_size: int, ends: tuple[int, ...]
) -> Sample:
    reason = meta["finish_reason"]["type"]
    if reason not in ("stop", "length", "abort"):
        raise BadAnswer(f"a sample ended by {meta['finish_reason']}")
    if reason == "abort" and output_ids == []:  # before its first token
        return NOTHING
    _check_versions(meta, versions)
    _check_tokens(output_ids, vocab_size)
    ended = output_ids[-1] in ends
    if reason == "stop" and not ended:
        raise BadAnswer(
            f"a sample stopped at token {output_ids[-1]}, which is not an end token of model.path: the "
            "server's model has another generation_config.json or tokenizer"
        )
    log_probs = [entry[0] for entry in meta["output_token_logprobs"]]
    if [entry[1] for entry in meta["output_token_logprobs"]] != output_ids:
        raise BadAnswer("the log-probs are not those of the tokens")
    _check_log_probs(log_probs)
    kind = Aborted if reason == "abort" and not ended else Sample
    return kind(
        np.array(output_ids, np.int32),
        np.array(log_probs, np.float32),
        # by the last token, as in the local engine: an end token may be the max_new_tokens-th
        "stop" if ended else "length",
        **_tags(_token_versions(meta, versions, len(output_ids))),
    )


def _check_versions(meta: dict[str, Any], versions: Collection[str]) -> None:
    found = {str(span["version"]) for span in meta.get("weight_versions") or ()}
    found.add(str(meta["weight_version"]))
    if not found <= set(versions):
        accepted = " or ".join(versions)
        raise StaleWeights(f"a sample of weight version {', '.join(sorted(found))}, not {accepted}")


def _token_versions(meta: dict[str, Any], versions: Collection[str], tokens: int) -> np.ndarray:
    """Returns which of `versions` sampled each token: int32 [T]; 0 for weights that the run has not sent."""
    if len(versions) == 1:
        return np.full(tokens, _number(*versions), np.int32)
    spans = meta.get("weight_versions") or ()
    found: list[int] = []
    for span in spans:
        if span["start"] == len(found) < span["end"] <= tokens:
            found += [_number(str(span["version"]))] * (span["end"] - span["start"])
    if len(found) != tokens:
        raise BadAnswer(
            f"{tokens} tokens whose weight_versions are {str(spans)[:100]}; rollout.max_staleness needs "
            "those of every token, as SGLang 0.5.23 returns them"
        )
    return np.array(found, np.int32)


def _number(version: str) -> int:
    return int(version) if version.isdigit() else 0


def _routed(sample: Sample, routing: Routing, text: str, keep_prompt: bool) -> Sample:
    """Returns the sample with its experts, and with those of the prompt if they are to be kept."""
    prompt, own = np.split(routing.read(text, len(sample.token_ids)), [routing.prompt_tokens - 1])
    # copies: a view would keep the rows of both in memory
    return replace(sample, experts=own.copy(), prompt_experts=prompt.copy() if keep_prompt else None)


def _check_tokens(output_ids: Any, vocab_size: int) -> None:
    if not isinstance(output_ids, list) or not output_ids:
        raise BadAnswer(f"a sample whose tokens are {str(output_ids)[:100]}")
    for token in output_ids:
        if type(token) is not int:  # isinstance would accept JSON's true as an int
            raise BadAnswer(f"a sample with {str(token)[:100]} for a token")
        if not 0 <= token < vocab_size:
            raise BadAnswer(f"token {str(token)[:100]} was sampled, but the policy has {vocab_size} tokens")


def _check_log_probs(log_probs: list[Any]) -> None:
    for value in log_probs:
        # a comparison with NaN is false, so NaN is rejected
        if type(value) not in (int, float) or not LEAST_LOG_PROB <= value <= LOG_PROB_ROUNDING:
            raise BadAnswer(f"a sample with {str(value)[:100]} for a log-prob")


def check_model_files(path: Path, hf_config: PretrainedConfig, files: set[str]) -> None:
    """Raises UserError, one line, if a server would load other files than `files`, or compute another model.

    SGLang loads the files that the index names if there is one, else all safetensors files of the directory.
    """
    index = path / INDEX
    if index.is_file():
        theirs = set(weight_map(index).values())
    else:
        theirs = {file.name for file in path.glob("*.safetensors")}
        if theirs == {"consolidated.safetensors", SINGLE}:
            theirs = {SINGLE}
    for name in sorted(theirs ^ files):
        named = f"both {SINGLE} and {INDEX} exist: " if index.is_file() else ""
        reader, other = ("SGLang", "transformers") if name in theirs else ("transformers", "SGLang")
        raise UserError(f"{path}: {named}{reader} reads {name} and {other} does not; remove the surplus file")
    for key, value in ACCEPTED.items():
        found = vars(hf_config).get(key, value)
        if found != value:
            raise UserError(
                f"{path}/config.json: {key} is {found!r}, which SGLang computes and the policy does not; "
                "remove it or use rollout.engine=local"
            )
