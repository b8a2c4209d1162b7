"""Tests the SGLang engine without SGLang: HTTP, answers, settings, the pool, the guard of a process."""

import base64
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote

import anyio
import numpy as np
import psutil
import pytest
from transformers import PretrainedConfig

from megatron_bicc.config import Config, ModelConfig, RolloutConfig, SglangConfig
from megatron_bicc.errors import UserError
from megatron_bicc.rollout.sglang_engine import NOTHING, Routing, SglangEngine, generate_body, read_samples
from megatron_bicc.rollout.types import Request, Sampling
from megatron_bicc.sglang.client import ServerClient, ServerError, ServerRefusal, ServerUnavailable
from megatron_bicc.sglang.guard import finish, start
from megatron_bicc.sglang.pool import (
    Attempts,
    BadAnswer,
    RequestFailed,
    ServerPool,
    StaleWeights,
    check_model,
    wait_until_ready,
)
from megatron_bicc.sglang.process import CPU_ARGUMENTS, CPU_ENVIRONMENT, _command, _environment
from megatron_bicc.sglang.settings import check_servers
from megatron_bicc.startup import read_tokenizer

KEY = "a-secret-key"


class Answers(BaseHTTPRequestHandler):
    """/STATUS/TEXT answers with that status and text, HEADER for the key's header; 403 without the key."""

    def do_GET(self) -> None:
        _, status, text = unquote(self.path).split("/", 2)
        if self.headers.get("Authorization") != f"Bearer {KEY}":
            status = "403"
        text = text.replace("HEADER", str(self.headers.get("Authorization")))
        self.send_response(int(status))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(text.encode())

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Answers)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@contextmanager
def serving(text: str, kind: str = "application/json", status: int = 200) -> Iterator[str]:
    """The URL of a server with one answer to everything."""

    class Same(Answers):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.end_headers()
            self.wfile.write(text.encode())

        do_POST = do_GET

    server = HTTPServer(("127.0.0.1", 0), Same)
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def ask(url: str, path: str, key: str | None = KEY) -> Any:
    return anyio.run(ServerClient(url, key, timeout_s=5.0).post, path, {})


def test_the_key_is_sent_and_not_told(url: str) -> None:
    assert ask(url, '/200/{"success":true}') == {"success": True}
    with pytest.raises(ServerRefusal, match="HTTP 403"):
        ask(url, "/200/{}", key=None)
    for path in ("/500/{}", "/400/{}", "/200/[", "/401/HEADER", "/200/HEADER"):
        with pytest.raises(ServerError) as error:
            ask(url, path)
        assert KEY not in str(error.value) + repr(error.value)
        assert "HEADER" not in path or "Bearer ***" in str(error.value)
    client = ServerClient(url, KEY)
    assert KEY not in repr(client.__dict__) + repr(client._http.headers)


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/500/oops", ServerUnavailable),
        ('/200/{"output_ids":', ServerUnavailable),
        ("/404/gone", ServerRefusal),
        ('/200/{"success":false,"message":"no parameter x"}', ServerRefusal),
    ],
)
def test_errors_name_the_server_and_what_it_said(url: str, path: str, kind: type) -> None:
    with pytest.raises(kind) as error:
        ask(url, path)
    assert url in str(error.value) and "\n" not in str(error.value)
    assert path.split("/", 2)[2].strip("{}")[:11] in str(error.value) or "no parameter x" in str(error.value)


NAMED = {"model_path": "m", "weight_version": "default"}


@pytest.mark.parametrize(
    ("info", "kind", "status"),
    [
        ("{}", "application/json", 200),
        ("[]", "application/json", 200),
        ("null", "application/json", 200),
        (json.dumps(NAMED | {"architectures": "Qwen3"}), "application/json", 200),
        *((json.dumps({name: NAMED[name]}), "application/json", 200) for name in NAMED),
        ("<html>\n</html>", "text/html", 200),
        ("", "text/html", 204),
    ],
)
def test_what_is_no_sglang_server_is_named(info: str, kind: str, status: int) -> None:
    model = PretrainedConfig(architectures=["Qwen3ForCausalLM"], vocab_size=8)
    with serving(info, kind, status) as url, pytest.raises(UserError) as error:
        anyio.run(wait_until_ready, ServerClient(url), 5.0)
        anyio.run(check_model, ServerClient(url), model)
    assert str(error.value).startswith(f"{url} is not an SGLang server: /model_info answered ")
    assert "\n" not in str(error.value)


def test_json_of_endless_depth_is_unavailable() -> None:
    with serving("[" * 100_000) as url, pytest.raises(ServerUnavailable, match="the answer is not JSON"):
        anyio.run(ServerClient(url).get, "/")


def test_architectures_of_another_kind_are_told() -> None:
    model = PretrainedConfig(architectures=["Qwen3ForCausalLM"], vocab_size=8)
    with serving(json.dumps(NAMED | {"architectures": [1]})) as url, pytest.raises(UserError) as error:
        anyio.run(check_model, ServerClient(url), model)
    assert "whose architecture is 1; model.path has Qwen3ForCausalLM" in str(error.value)


@pytest.mark.parametrize("ask_for", [ServerClient.server_info, ServerClient.paths])
def test_facts_of_another_shape_are_unavailable(ask_for: Any) -> None:
    with (
        serving('["paths"]') as url,
        pytest.raises(ServerUnavailable, match=f"{url} is not an SGLang server"),
    ):
        anyio.run(ask_for, ServerClient(url))


def test_a_connection_that_breaks_costs_a_second_look_only() -> None:
    """The first connection is closed without an answer, as a server does to one that idled too long."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        listener.accept()[0].close()
        connection, _ = listener.accept()
        connection.recv(4096)
        connection.sendall(
            b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
        )

    Thread(target=serve, daemon=True).start()
    with listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        assert anyio.run(ServerClient(url, timeout_s=5.0).get, "/model_info") == {}


def test_no_server_is_unavailable() -> None:
    with pytest.raises(ServerUnavailable, match="http://127.0.0.1:9/x"):
        ask("http://127.0.0.1:9", "/x")


ENDS = (1, 5)


def answer(**meta: Any) -> list[dict[str, Any]]:
    known = {
        "finish_reason": {"type": "stop"},
        "weight_version": "3",
        "weight_versions": [{"version": "3", "start": 0, "end": 2}],
        "output_token_logprobs": [[-0.5, 7, None], [-1.5, 1, None]],
    }
    return [{"output_ids": [7, 1], "meta_info": known | meta}]


def with_tokens(*tokens: Any) -> list[dict[str, Any]]:
    """An answer that has these for token ids, in both places that name them."""
    (item,) = answer(output_token_logprobs=[[-0.5, token, None] for token in tokens])
    return [item | {"output_ids": list(tokens)}]


def with_log_prob(value: Any) -> list[dict[str, Any]]:
    return answer(output_token_logprobs=[[-0.5, 7, None], [value, 1, None]])


def test_a_good_answer() -> None:
    (sample,) = read_samples(answer(), 1, ["3"], 10, ENDS)
    np.testing.assert_array_equal(sample.token_ids, [7, 1])
    np.testing.assert_array_equal(sample.log_probs, np.float32([-0.5, -1.5]))
    assert (sample.token_ids.dtype, sample.log_probs.dtype) == (np.int32, np.float32)
    assert (sample.finish_reason, sample.weight_version) == ("stop", 3)


@pytest.mark.parametrize(
    ("last", "reason", "expected"),
    [(1, "stop", "stop"), (5, "stop", "stop"), (5, "length", "stop"), (7, "length", "length")],
)
def test_what_ends_with_an_end_token_is_not_truncated(last: int, reason: str, expected: str) -> None:
    (item,) = with_tokens(7, last)
    item["meta_info"]["finish_reason"] = {"type": reason}
    assert read_samples([item], 1, ["3"], 10, ENDS)[0].finish_reason == expected


@pytest.mark.parametrize("value", [0, -0.0, 2e-7, -1, -3.4e38])
def test_log_probs_that_can_be(value: float) -> None:
    """A sure token's comes as 0 or, by rounding, as a little more."""
    assert read_samples(with_log_prob(value), 1, ["3"], 10, ENDS)[0].log_probs[1] == np.float32(value)


@pytest.mark.parametrize(
    ("spoiled", "error", "message"),
    [
        (answer(weight_version="2"), StaleWeights, "of weight version 2, 3, not 3"),
        (answer(weight_versions=[{"version": "2"}, {"version": "3"}]), StaleWeights, "2, 3, not 3"),
        (answer(finish_reason={"type": "error"}), BadAnswer, "ended by {'type': 'error'}"),
        (answer(output_token_logprobs=[[-0.5, 7, None]]), BadAnswer, "log-probs"),
        (answer(output_token_logprobs=[[-0.5, 8, None], [-1, 1, None]]), BadAnswer, "log-probs"),
        (answer(output_token_logprobs=[[float("nan"), 7, 0], [-1, 1, 0]]), BadAnswer, "nan for a log-prob"),
        (answer()[0], BadAnswer, "1 samples were requested"),
        (answer() * 2, BadAnswer, "1 samples were requested"),
        ([{"output_ids": [7, 1]}], BadAnswer, "meta_info"),
        (["text"], BadAnswer, "another shape"),
        ([{"output_ids": [7, 1], "meta_info": "text"}], BadAnswer, "another shape"),
        (with_tokens("a", 1), BadAnswer, "with a for a token"),
        (with_tokens([1], [2]), BadAnswer, r"with \[1\] for a token"),
        (with_tokens([1], 2), BadAnswer, r"with \[1\] for a token"),
        (with_tokens(1.0, 1), BadAnswer, "with 1.0 for a token"),
        (with_tokens(True, 1), BadAnswer, "with True for a token"),
        (with_tokens(None, 1), BadAnswer, "with None for a token"),
        (with_tokens(2**70, 1), BadAnswer, f"token {2**70} was sampled"),
        (with_tokens(1, -1), BadAnswer, "token -1 was sampled"),
        (with_tokens(), BadAnswer, r"tokens are \[\]"),
        ([answer()[0] | {"output_ids": "71"}], BadAnswer, "tokens are 71"),
        (with_tokens(7, 2), BadAnswer, "stopped at token 2, which is not an end token of model.path"),
        (with_log_prob("-0.5"), BadAnswer, "with -0.5 for a log-prob"),
        (with_log_prob({}), BadAnswer, "with {} for a log-prob"),
        (with_log_prob(True), BadAnswer, "with True for a log-prob"),
        (with_log_prob(0.01), BadAnswer, "with 0.01 for a log-prob"),
        (with_log_prob(-1e39), BadAnswer, "with -1e[+]39 for a log-prob"),
        (with_log_prob(-(10**400)), BadAnswer, "for a log-prob"),
        (with_log_prob(float("inf")), BadAnswer, "with inf for a log-prob"),
        (with_log_prob(float("-inf")), BadAnswer, "with -inf for a log-prob"),
    ],
)
def test_spoiled_answers(spoiled: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        read_samples(spoiled, 1, ["3"], 10, ENDS)


ROUTING = Routing(prompt_tokens=3, layers=2, experts=300, per_token=2)
EXPERTS = np.array([[[0, 299], [1, 2]], [[3, 4], [5, 6]], [[7, 8], [9, 10]], [[11, 12], [13, 14]]], np.int32)
"""Of a prompt of three tokens and a response of two, whose last is not read"""


def with_routing(experts: np.ndarray) -> list[dict[str, Any]]:
    return answer(routed_experts=base64.b64encode(experts.tobytes()).decode())


def test_routing_is_read_and_the_prompts_is_the_first_samples() -> None:
    first, second = read_samples(with_routing(EXPERTS) * 2, 2, ["3"], 10, ENDS, ROUTING)
    np.testing.assert_array_equal(first.prompt_experts, EXPERTS[:2])
    for sample in (first, second):
        np.testing.assert_array_equal(sample.experts, EXPERTS[2:])
        assert sample.experts.dtype == np.int16
    assert second.prompt_experts is None
    few = read_samples(with_routing(EXPERTS % 16), 1, ["3"], 10, ENDS, replace(ROUTING, experts=255))
    assert few[0].experts.dtype == np.uint8


@pytest.mark.parametrize(
    ("spoiled", "message"),
    [
        (answer(), "without 'routed_experts'"),
        (answer(routed_experts=None), "another shape"),
        (answer(routed_experts="@"), "routed_experts cannot be read"),
        (with_routing(EXPERTS[1:]), "routed_experts cannot be read: cannot reshape array of size 12"),
        (with_routing(EXPERTS + 1), "routed_experts are not all of 300 experts"),
        (with_routing(EXPERTS - 1), "routed_experts are not all of 300 experts"),
        (with_routing(EXPERTS * np.int32([[[1]], [[1]], [[0]], [[1]]])), "name an expert twice"),
    ],
)
def test_spoiled_routing(spoiled: Any, message: str) -> None:
    """The last is what a server without a record of a token answers."""
    with pytest.raises(BadAnswer, match=message):
        read_samples(spoiled, 1, ["3"], 10, ENDS, ROUTING)


def test_a_token_beyond_the_vocabulary_is_refused() -> None:
    with pytest.raises(BadAnswer, match="token 7 was sampled, but the policy has 7 tokens"):
        read_samples(answer(), 1, ["3"], 7, ENDS)


def test_nothing_is_cut_off_the_distribution() -> None:
    request = Request(np.array([5], dtype=np.int32), seed=11)
    body = generate_body([request, request], Sampling(0.7, 9), (1, 5), [NOTHING] * 2)
    (settings, _) = body["sampling_params"]
    assert (settings["temperature"], settings["top_p"], settings["top_k"], settings["min_p"]) == (
        0.7,
        1,
        -1,
        0,
    )
    assert settings["sampling_seed"] == 11 and settings["max_new_tokens"] == 9
    assert settings["stop_token_ids"] == [1, 5]
    assert "return_routed_experts" not in body
    routed = generate_body([request], Sampling(0.7, 9, routing=True), (1,), [NOTHING])
    assert routed["return_routed_experts"] is True


@pytest.mark.parametrize(
    ("launch", "settings", "message"),
    [
        ("attach", {}, "rollout.launch is attach; name the servers"),
        ("attach", {"servers": "localhost:30000"}, "'localhost:30000'; write http://host:port"),
        ("attach", {"servers": "http://host"}, "'http://host'; write http://host:port"),
        ("attach", {"servers": "http://host:99999"}, "'http://host:99999'; write http://host:port"),
        ("attach", {"servers": "http://host:b"}, "'http://host:b'; write http://host:port"),
        ("attach", {"servers": "http://a b:3"}, "'http://a b:3'; write http://host:port"),
        ("attach", {"servers": "http://a%20b:3"}, "'http://a%20b:3'; write http://host:port"),
        ("attach", {"servers": "http://a\0:3"}, r"'http://a\\x00:3'; write http://host:port"),
        ("attach", {"servers": "http://a\nb:3"}, r"'http://a\\nb:3'; write http://host:port"),
        ("attach", {"servers": "http://h:1,http://h:1"}, "http://h:1 more than once"),
        ("attach", {"servers": "http://h:1, http://h:1/"}, "http://h:1 more than once"),
        ("attach", {"servers": "http://H:1,HTTP://h:1"}, "http://h:1 more than once"),
        ("attach", {"servers": "http://h:1", "server_args": "--api-key x"}, "launch=spawn: leave it empty"),
        ("attach", {"servers": "http://h:1", "gpus": "0"}, "rollout.sglang.gpus is set; it needs"),
        ("attach", {"servers": "http://me:pw@host:1"}, "contains a password"),
        ("attach", {"servers": "http://h:1", "api_key_variable": "NOT_SET_X"}, "a variable that is not set"),
        ("spawn", {"servers": "http://h:1"}, "it needs rollout.launch=attach"),
        ("spawn", {"python": "no/such/python"}, "make sglang"),
        ("spawn", {"api_key_variable": "HOME"}, "writes its key"),
        ("spawn", {"host": "somewhere"}, "must be an IPv4 address"),
        ("spawn", {"host": "::1"}, "must be an IPv4 address"),
        ("spawn", {"host": "192.0.2.1"}, "'192.0.2.1'; servers cannot bind to it here"),
        ("spawn", {"server_args": "--port=1"}, "server_args has --port"),
        ("spawn", {"server_args": "--api-key x"}, "server_args has --api-key; a server writes it"),
        ("spawn", {"server_args": '--preferred-sampling-params {"top_p":0.9}'}, "whole distribution"),
        ("spawn", {"server_args": "--tp 2 --api-ke x"}, "has --api-ke, which is short for --api-key; a serv"),
        ("spawn", {"server_args": "--hos=0.0.0.0"}, "--hos, which is short for --host; the run sets it"),
        ("spawn", {"server_args": "--weight-version 7"}, "server_args has --weight-version; the run sets it"),
        ("spawn", {"server_args": "--load-format dummy"}, "--load-format dummy; .* random weights"),
        ("spawn", {"server_args": "--load-fo=dummy"}, "--load-format dummy; .* random weights"),
        ("spawn", {"server_args": "'"}, "No closing quotation"),
        ("spawn", {"gpus": "0/1"}, "rollout.sglang.servers_per_node = 1"),
        ("spawn", {"gpus": "0,1", "servers_per_node": 2}, "rollout.sglang.servers_per_node = 2"),
        ("spawn", {"gpus": "all"}, "'all' is not a GPU"),
        ("spawn", {"gpus": "0,,1"}, "'' is not a GPU"),
        ("spawn", {"gpus": "0/-1", "servers_per_node": 2}, "'-1' is not a GPU"),
        ("spawn", {"gpus": "0,1/1,2", "servers_per_node": 2}, "two servers share 1, but not"),
        ("spawn", {"gpus": "2,2"}, "names a GPU of one server twice"),
        (
            "spawn",
            {"gpus": "0,1/2,3", "servers_per_node": 2, "server_args": "--tp-size 4"},
            r"names 2 GPUs \(0,1\) for a server that needs 4: --tp-size is 4",
        ),
        ("spawn", {"gpus": "0", "server_args": "--tensor-parallel-size=2"}, "1 GPUs .0. .* needs 2"),
        ("spawn", {"gpus": "0,1,2", "server_args": "--tp 2 --pp 2"}, "needs 4: .* --pp-size 2"),
    ],
)
def test_settings_that_do_not_fit(launch: str, settings: dict, message: str) -> None:
    sglang = SglangConfig(**({"python": sys.executable} | settings))
    with pytest.raises(UserError, match=message) as error:
        check_servers(RolloutConfig("sglang", launch, sglang=sglang))
    assert "pw" not in str(error.value)


@pytest.mark.parametrize("gpus", ["", "0,1/2,3", "0,1/1,0", "GPU-8932f937-d72c/MIG-GPU-8932f937-d72c", "0/0"])
def test_gpus_that_can_be_named(gpus: str) -> None:
    sglang = SglangConfig(python=sys.executable, gpus=gpus, servers_per_node=2)
    check_servers(RolloutConfig("sglang", "spawn", sglang=sglang))


@pytest.mark.parametrize("arguments", ["--tp-size 4", "--tp 2 --pp 2", "--tp-size 2"])
def test_servers_that_their_gpus_hold(arguments: str) -> None:
    sglang = SglangConfig(python=sys.executable, gpus="0,1,2,3", server_args=arguments)
    check_servers(RolloutConfig("sglang", "spawn", sglang=sglang))


@pytest.mark.parametrize("key", [f"{KEY}\n", f"{KEY}\r", f"{KEY} ", f"{KEY}\u20ac"])
def test_a_key_that_no_header_carries_is_refused_and_not_told(key: str, monkeypatch: Any) -> None:
    monkeypatch.setenv("A_KEY", key)
    for variable, message in (("A_KEY", "no HTTP header can carry"), (KEY, "not the key")):
        sglang = SglangConfig(servers="http://h:1", api_key_variable=variable)
        with pytest.raises(UserError, match=message) as error:
            check_servers(RolloutConfig("sglang", "attach", sglang=sglang))
        assert KEY not in str(error.value)


@pytest.mark.parametrize(
    "arguments",
    ["--tp 2 --mem-fraction-static 0.5", "--load-format auto", "--log-level dummy"],
)
def test_arguments_that_can_be_given(arguments: str) -> None:
    sglang = SglangConfig(python=sys.executable, server_args=arguments)
    check_servers(RolloutConfig("sglang", "spawn", sglang=sglang))


@pytest.fixture
def pool() -> Iterator[ServerPool]:
    """Two servers that do not exist; the weights of the first are this process's to send."""
    pool = ServerPool(["http://127.0.0.1:9", "http://127.0.0.1:10"], ["http://127.0.0.1:9"], SglangConfig())
    yield pool
    pool.close()


def test_a_server_that_failed_in_a_sync_is_logged_by_the_process_that_sent_it_weights(
    pool: ServerPool, caplog: pytest.LogCaptureFixture
) -> None:
    ours, others = (server.client.url for server in pool.servers)
    pool.hold("3", {ours: f"{ours}: out of memory", others: f"{others}: out of memory"})
    assert [record.getMessage() for record in caplog.records] == [
        f"rollout server marked unhealthy: {ours}: out of memory"
    ]
    assert pool.reasons() == f"{ours}: out of memory; {others}: out of memory"


def test_a_colocated_server_on_a_gpu_leaves_memory_to_its_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's arguments come later: SGLang takes the last of two."""
    monkeypatch.setattr("megatron_bicc.device.has_cuda", lambda: True)
    sglang = SglangConfig(server_args="--mem-fraction-static 0.6")
    config = Config(rollout=RolloutConfig("sglang", colocate=True, sglang=sglang))
    command = _command(config, "http://127.0.0.1:1", seed=1)
    assert "--enable-memory-saver" in command
    fractions = [command[i + 1] for i, word in enumerate(command) if word == "--mem-fraction-static"]
    assert fractions == ["0.8", "0.6"]
    config.rollout.colocate = False
    alone = _command(config, "http://127.0.0.1:1", seed=1)
    assert "--enable-memory-saver" not in alone and "0.8" not in alone


@pytest.mark.parametrize("variable", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
@pytest.mark.parametrize(
    ("trainers", "servers"),
    [
        ("expandable_segments:True", None),
        ("max_split_size_mb:64,expandable_segments:True", "max_split_size_mb:64"),
        ("max_split_size_mb:64", "max_split_size_mb:64"),
    ],
)
def test_servers_do_not_inherit_expandable_segments(
    variable: str, trainers: str, servers: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, trainers)
    assert _environment(Config(), 0).get(variable) == servers


def test_a_server_that_does_not_come_up_is_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("megatron_bicc.metrics.WAIT_S", 0.2)
    with caplog.at_level("INFO"), pytest.raises(UserError, match="not ready within 1.2 s") as error:
        anyio.run(wait_until_ready, ServerClient("http://127.0.0.1:9"), 1.2)
    assert isinstance(error.value.__cause__, ServerUnavailable)
    (line,) = (record.getMessage() for record in caplog.records)
    assert line == "process 0: still waiting for rollout server http://127.0.0.1:9, at most 1.2 s (0 s)"


@pytest.mark.parametrize("seconds", [0.1, 0.3])
def test_a_server_has_its_start_timeout(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    monkeypatch.setattr("megatron_bicc.sglang.pool.POLL_S", 0.02)
    url, begun = "http://127.0.0.1:9", time.monotonic()
    with (
        closing(ServerPool([url], [url], SglangConfig(start_timeout_s=seconds))) as pool,
        pytest.raises(UserError, match=f"not ready within {seconds} s"),
    ):
        pool.start(PretrainedConfig(), colocate=False)
    assert time.monotonic() - begun > seconds


@pytest.mark.parametrize("seconds", [0.1, 0.3])
def test_an_answer_has_the_request_timeout(seconds: float) -> None:
    """The server takes the connection and says nothing."""
    settings = SglangConfig(request_timeout_s=seconds, retry_timeout_s=0.01)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with (
            closing(ServerPool([url], [], settings)) as pool,
            pytest.raises(RequestFailed, match=f"/generate: no answer within {seconds} s"),
        ):
            pool.portal.call(pool.ask, {"input_ids": [[1]]}, lambda answer, versions: answer)


@pytest.mark.parametrize(("allowed", "processes", "most"), [(6, 1, 6), (2, 1, 2), (6, 3, 2), (1, 3, 1)])
def test_no_more_samples_are_in_flight_than_max_concurrency(
    pool: ServerPool, monkeypatch: pytest.MonkeyPatch, allowed: int, processes: int, most: int
) -> None:
    """Over all processes together."""
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: processes)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    in_flight = []

    async def ask(body: dict[str, Any], read: Any, strict: bool) -> Any:
        in_flight.append(in_flight[-1] + 1 if in_flight else 1)
        await anyio.sleep(0.02)
        in_flight.append(in_flight[-1] - 1)
        cut = {"finish_reason": {"type": "length"}, "weight_version": "default", "weight_versions": []}
        return read(answer(**cut), ["default"])

    monkeypatch.setattr(pool, "ask", ask)
    policy = str(Path(__file__).parents[2] / "examples/tiny_policy")
    rollout = RolloutConfig(sglang=SglangConfig(max_concurrency=allowed))
    engine = SglangEngine(Config(model=ModelConfig(policy), rollout=rollout), read_tokenizer(policy), pool)
    prompts = [Request(np.array([i + 2], np.int32), seed=i) for i in range(12)]
    assert len(engine.generate(prompts, Sampling(1.0, 8))) == len(prompts)
    assert max(in_flight) == most and in_flight[-1] == 0


def test_the_documented_command_for_a_cpu_is_that_of_the_run() -> None:
    text = (Path(__file__).parents[2] / "docs/rollout.md").read_text(encoding="utf-8")
    (command,) = (shlex.split(block) for block in text.split("```")[1::2] if "--device cpu" in block)
    documented = " ".join(word for word in command if word != "\n")
    assert CPU_ARGUMENTS in documented
    assert {f"{name}={value}" for name, value in CPU_ENVIRONMENT.items()} <= set(command)
    launched = _command(Config(), "http://127.0.0.1:1", seed=1)
    ours = {word for word in launched if word.startswith("--")} - {"--log-level-http"}
    assert ours <= set(command)


def test_colocation_needs_servers() -> None:
    with pytest.raises(UserError, match="rollout.colocate is true"):
        check_servers(RolloutConfig("local", colocate=True))


def test_attempts_end_when_the_time_is_up() -> None:
    attempts = Attempts(retry_timeout_s=0.6)

    async def fail_for_ever() -> None:
        while True:
            await attempts.begin()
            attempts.failed("the reason")

    with pytest.raises(RequestFailed, match="after 0.6 s of attempts; the last: the reason"):
        anyio.run(fail_for_ever)


PARENT = "import signal,subprocess,time; child = subprocess.Popen(['sleep', '500']); "
PARENT += "print(child.pid, flush=True); "
STUBBORN = "signal.signal(15, signal.SIG_IGN); "
SLEEP = "time.sleep(500)"


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[tuple[subprocess.Popen, Path]]:
    """A guard whose "server" is a process with a child."""
    log = tmp_path / "log"
    command = [
        sys.executable,
        "-m",
        "megatron_bicc.sglang.guard",
        str(log),
        sys.executable,
        "-c",
        PARENT + SLEEP,
    ]
    guard = subprocess.Popen(command, stdin=subprocess.PIPE)
    yield guard, log
    guard.kill()


def child(log: Path, count: int) -> psutil.Process:
    """The child of the server's count-th start."""
    while not log.exists() or log.read_text().count("\n") < count:
        time.sleep(0.05)
    return psutil.Process(int(log.read_text().split()[count - 1]))


def gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_a_server_is_started_again(guarded: tuple[subprocess.Popen, Path]) -> None:
    guard, log = guarded
    first = child(log, 1)
    guard.stdin.write(b"r")
    guard.stdin.flush()
    time.sleep(1)
    first.parent().kill()
    second = child(log, 2)
    assert gone(first) and not gone(second)
    guard.stdin.close()
    assert guard.wait() == 0
    assert gone(second)


def test_a_server_that_does_not_start_ends_its_guard(guarded: tuple[subprocess.Popen, Path]) -> None:
    guard, log = guarded
    first = child(log, 1)
    first.parent().kill()
    assert guard.wait() != 0
    assert gone(first)


def test_signals_of_the_terminal_do_not_end_a_guard(guarded: tuple[subprocess.Popen, Path]) -> None:
    guard, log = guarded
    first = child(log, 1)
    os.kill(guard.pid, signal.SIGINT)
    time.sleep(1)
    assert guard.poll() is None and not gone(first)
    guard.stdin.close()
    guard.wait()
    assert gone(first)


def test_a_guard_that_is_killed_takes_its_server_with_it(guarded: tuple[subprocess.Popen, Path]) -> None:
    guard, log = guarded
    first = child(log, 1)
    server = first.parent()
    guard.kill()
    server.wait(60)
    first.kill()  # a real server ends its own


def test_a_server_that_does_not_want_to_end_is_killed(tmp_path: Path) -> None:
    log, shared = tmp_path / "log", Path("/dev/shm/megatron_bicc_test")
    shared.write_text("left over")
    server = start(str(log), [sys.executable, "-c", PARENT + STUBBORN + SLEEP])
    first = child(log, 1)
    finish(server, {str(shared)}, patience_s=0.3)
    assert server.returncode == -signal.SIGKILL and gone(first)
    assert not shared.exists()
