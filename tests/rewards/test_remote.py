"""Tests rewards by HTTP against a real server that is slow, flaky and wrong."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest

from megatron_bicc.config import RewardConfig
from megatron_bicc.errors import UserError
from megatron_bicc.rewards.registry import get_scorer
from megatron_bicc.rewards.types import Completion, Scores

Answer = Callable[[int, list[dict[str, Any]]], Any]
"""(number of the request, completions) -> scores, or an HTTP status, or bytes to answer"""


class Served:
    """What a server was asked."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.requests: list[list[dict[str, Any]]] = []
        self.now = self.most = 0


@contextmanager
def server(answer: Answer) -> Iterator[Served]:
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["completions"]
            with lock:
                number = len(served.requests)
                served.requests.append(sent)
                served.now += 1
                served.most = max(served.most, served.now)
            found = answer(number, sent)
            with lock:
                served.now -= 1
            if found is None:  # as a server that is killed
                self.close_connection = True
                return
            status = found if isinstance(found, int) else 200
            body = found if isinstance(found, bytes) else json.dumps({"scores": found}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served = Served(f"http://127.0.0.1:{httpd.server_port}/score")
    threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
    yield served
    httpd.shutdown()
    httpd.server_close()


def completions(count: int) -> list[Completion]:
    messages = [{"role": "user", "content": "1+1="}]
    tokens = np.arange(2, dtype=np.int32)
    return [
        Completion(messages, str(i), "2", "sums", {"level": 3}, 7, tokens, "length") for i in range(count)
    ]


def scores(served: Served, count: int = 1, **settings: Any) -> Scores:
    scorer = get_scorer(RewardConfig(function="remote", url=served.url, **settings))
    found = scorer.score(completions(count))
    scorer.close()
    return found


def test_what_is_sent_and_what_may_be_answered() -> None:
    with server(lambda number, sent: [1, {"reward": 0.5, "style": 2, "feedback": "good"}]) as served:
        found = scores(served, 2)
    assert found.rewards.tolist() == [1.0, 0.5]
    assert found.metrics == [{}, {"style": 2.0}] and found.feedback == ["", "good"]
    (sent,) = served.requests
    assert sent[0] == {
        "messages": [{"role": "user", "content": "1+1="}],
        "response": "0",
        "ground_truth": "2",
        "data_source": "sums",
        "extra": {"level": 3},
        "row": 7,
        "token_ids": [0, 1],
        "finish_reason": "length",
    }


def test_batches_and_requests_at_a_time() -> None:
    def slow(number: int, sent: list[dict[str, Any]]) -> list[float]:
        time.sleep(0.05)
        return [float(each["response"]) for each in sent]

    with server(slow) as served:
        scorer = get_scorer(RewardConfig(function="remote", url=served.url, batch_size=3, concurrency=2))
        futures = [scorer.submit(completions(7)) for _ in range(2)]
        for future in futures:
            assert future.result().rewards.tolist() == list(range(7))
        scorer.close()
    assert sorted(len(each) for each in served.requests) == [1, 1, 3, 3, 3, 3]
    assert served.most == 2


def test_a_server_that_is_slow_and_flaky() -> None:
    """Its first answers are an error, none within the time, and a closed connection."""

    def flaky(number: int, sent: list[dict[str, Any]]) -> Any:
        if number == 1:
            time.sleep(1.2)
        return [503, [0.0], None, [1.0]][min(number, 3)]

    with server(flaky) as served:
        assert scores(served, timeout_s=0.8).rewards.tolist() == [1.0]
        assert len(served.requests) >= 4
    with server(lambda number, sent: 429) as served:
        with pytest.raises(UserError, match="row 7: .*/score: HTTP 429: .*, after 2 attempts"):
            scores(served, retries=1)
        assert len(served.requests) == 2


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (404, "HTTP 404"),
        (b"<html>", "the answer is not JSON: <html>"),
        ([1.0, 2.0], "has no list 'scores' of 1, one per completion"),
        (["good"], "returned 'good', a str; return a number"),
        ([None], "returned 'None', a NoneType"),
        (b'{"scores": [NaN]}', "the reward is nan"),
        ([{"score": 1}], "it needs 'reward'"),
    ],
)
def test_a_server_that_is_wrong_is_asked_once(answer: Any, said: str) -> None:
    with server(lambda number, sent: answer) as served:
        with pytest.raises(UserError, match=said):
            scores(served)
        assert len(served.requests) == 1
        assert scores(served, on_error="zero").failed.tolist() == [True]


def test_no_server() -> None:
    with server(lambda number, sent: 200) as served:
        pass
    with pytest.raises(UserError, match="ConnectError: .*after 1 attempts"):
        scores(served, retries=0)
