"""Tests how errors end a run: one line on stderr, or a line and the traceback."""

import logging

import pytest
import torch.distributed as dist

from megatron_bicc import device, evaluate, train
from megatron_bicc.checkpoint.checkpoint import CheckpointError
from megatron_bicc.errors import NotFiniteError, UserError, first_line
from megatron_bicc.rollout.sampling import NoContrastError
from megatron_bicc.rollout.types import RolloutError
from megatron_bicc.training.step_metrics import EngineMismatch
from megatron_bicc.weights.transport import WeightSyncError

LOST = (
    RuntimeError("[/gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.2]:43210"),
    RuntimeError(
        "[../third_party/gloo/gloo/transport/tcp/pair.cc:460] writev [10.0.0.2]:1: Connection reset by peer"
    ),
    dist.DistNetworkError("The client socket has failed to connect to 10.0.0.1:29500"),
    dist.DistBackendError(
        "NCCL error in: ProcessGroupNCCL.cpp:3, remote process exited or there was a network error"
    ),
)
OTHER = (
    RuntimeError("[/gloo/allreduce.cc:22] gloo: sizes of the tensors differ"),
    RuntimeError("[/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv operation"),
    dist.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp:3, unhandled cuda error"),
    dist.DistStoreError("wait timeout after 300000ms, keys: /default_pg/0//cpu//0"),
    RuntimeError("CUDA error: device-side assert triggered"),
    RuntimeError("Connection closed by peer"),  # of a library that is not a collective
    ValueError("gloo Connection closed by peer"),
)


def test_first_line() -> None:
    assert first_line(ValueError("\n  what went wrong \n  a page of traceback")) == "what went wrong"
    assert first_line(ValueError(" \n")) == "ValueError"
    assert len(first_line(ValueError("x" * 1000))) == 300


@pytest.mark.parametrize("error", [*LOST, *OTHER], ids=str)
def test_only_a_closed_connection_is_a_lost_peer(error: Exception) -> None:
    assert device.is_connection_loss(error) == (error in LOST)


def raising(error: BaseException) -> object:
    def run(*_: object) -> None:
        raise error

    return run


@pytest.mark.parametrize(
    "kind", [UserError, CheckpointError, NotFiniteError, EngineMismatch, NoContrastError]
)
@pytest.mark.parametrize("command", [train, evaluate])
def test_a_users_error_is_one_line(
    kind: type, command: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(command, "run", raising(kind("seed is -1; it must be at least 0")))
    monkeypatch.setattr(evaluate, "_parse", lambda argv: (None, []))
    with pytest.raises(SystemExit) as ended:
        command.main([])
    assert ended.value.code == 2
    program = f"python -m {command.__name__}"
    assert capsys.readouterr().err == f"{program}: error: seed is -1; it must be at least 0\n"


@pytest.mark.parametrize("error", [RolloutError("no server"), WeightSyncError("no server"), *LOST], ids=repr)
def test_an_operational_failure_is_one_line_above_its_traceback(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(train, "run", raising(error))
    with pytest.raises(type(error)) as raised:
        train.main([])
    assert raised.value is error
    (record,) = caplog.records
    line = record.getMessage()
    assert record.levelno == logging.ERROR and "\n" not in line
    assert str(error) in line and line.endswith(
        "resume from the newest checkpoint with checkpoint.resume=true"
    )
    assert ("process 3 on host" in line and "lost the connection" in line) == (error in LOST)


@pytest.mark.parametrize("error", [*OTHER, KeyError("a bug"), OSError("no space")], ids=repr)
@pytest.mark.parametrize("command", [train, evaluate])
def test_every_other_exception_leaves_as_it_is(
    error: Exception, command: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(command, "run", raising(error))
    monkeypatch.setattr(evaluate, "_parse", lambda argv: (None, []))
    with pytest.raises(type(error)) as raised:
        command.main([])
    assert raised.value is error
    assert capsys.readouterr().err == ""
