"""Tests which device a run takes, and each redirection by which megatron-core runs on a CPU.

A new megatron-core version fails by the redirection's name. `nvidia-smi` is a test double, a shell script.
"""

import importlib.metadata
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from megatron.core.transformer.moe import moe_utils
from support import warm

from megatron_bicc import device, evaluate
from megatron_bicc import device_cpu as cpu
from megatron_bicc.config import Config
from megatron_bicc.errors import UserError
from megatron_bicc.sglang.process import _environment
from megatron_bicc.train import main

TINY = ["--config", "examples/configs/tiny.yaml", "parallel.tensor=1", "train.steps=1", "evaluation.data="]
OFFLOAD = [
    "megatron.optimizer.optimizer_cpu_offload=true",
    "megatron.optimizer.optimizer_offload_fraction=1.0",
]


@pytest.mark.parametrize("seam", cpu._seams(), ids=lambda seam: f"{seam[0].__name__}.{seam[1]}")
def test_seam_is_where_megatron_looks(seam: tuple) -> None:
    module, name, _ = seam
    version = importlib.metadata.version("megatron-core")
    assert hasattr(module, name), (
        f"megatron-core {version} has no {module.__name__}.{name}: see device_cpu.py"
    )


def test_kernels_run_in_order_for_trainers_only(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "CUDA_DEVICE_MAX_CONNECTIONS"
    monkeypatch.delenv(name, raising=False)
    with pytest.raises(SystemExit):
        main(["--help"])
    assert os.environ[name] == "1"
    assert name not in _environment(Config(), 0)
    monkeypatch.setenv(name, "8")
    device.limit_connections()
    assert os.environ[name] == "8"


def test_redirection_ends_with_its_context() -> None:
    before = torch.cuda.current_device
    with cpu.CudaOnCpu(), cpu.CudaOnCpu():
        assert torch.zeros(2, device="cuda").device.type == "cpu"
        assert torch.zeros(2).cuda().device.type == "cpu"
        assert torch.zeros(2).to("cuda:0").device.type == "cpu"
        assert torch.zeros(2).type() == "torch.cuda.FloatTensor"
        assert not torch.zeros(2, pin_memory=True).is_pinned()
        assert not torch.zeros(2).pin_memory().is_pinned()
    assert torch.cuda.current_device is before
    assert torch.zeros(2).type() == "torch.FloatTensor"


def test_random_state_is_the_cpu_generator() -> None:
    with cpu.CudaOnCpu():
        torch.cuda.manual_seed(3)
        state = torch.cuda.get_rng_state()
        first = torch.rand(4)
        torch.cuda.set_rng_state(state)
        assert torch.equal(torch.rand(4), first)


def test_split_sizes_of_any_sequence_reach_gloo(single_process: None) -> None:
    sent, received = torch.arange(3.0), torch.zeros(3)
    with cpu.CudaOnCpu():
        torch.distributed.all_to_all_single(received, sent, np.array([3]), np.array([3]))
    assert torch.equal(received, sent)


def test_name_that_megatron_forgets_without_transformer_engine_is_there() -> None:
    assert moe_utils.HAVE_TE or moe_utils.te_general_gemm is None


def test_world_size_is_torchruns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "6")
    assert device.world_size() == 6


def test_alone_a_host_is_at_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert device.node_address() == "127.0.0.1"


@pytest.mark.parametrize(
    "wanted, has_cuda, is_built, chosen",
    [
        ("auto", True, True, "csrc's CUDA kernels"),
        ("auto", True, False, "plain torch: csrc's CUDA kernels are not built"),
        ("auto", False, True, "plain torch: no GPU"),
        ("torch", True, True, "plain torch, as model.kernels=torch asks"),
    ],
)
def test_kernels_are_chosen_once_and_say_why(
    monkeypatch: pytest.MonkeyPatch, wanted: str, has_cuda: bool, is_built: bool, chosen: str
) -> None:
    built = ModuleType("megatron_bicc._C_cuda") if is_built else None  # None: the import fails
    monkeypatch.setitem(sys.modules, "megatron_bicc._C_cuda", built)
    monkeypatch.delattr("megatron_bicc._C_cuda", raising=False)
    monkeypatch.setattr(device, "has_cuda", lambda: has_cuda)
    monkeypatch.setattr(device, "_kernels", None)
    assert device.choose_kernels(wanted).startswith(chosen)
    assert device.kernels() is (built if chosen == "csrc's CUDA kernels" else None)


not_cuda = pytest.mark.skipif(torch.version.cuda is not None, reason="torch is a CUDA build")


@not_cuda
def test_a_run_that_would_ignore_the_gpus_ends_with_one_line(
    gpu_host: Callable[..., None], tmp_path: Path
) -> None:
    gpu_host("535.129.03", "535.129.03")
    variables = {"PATH": os.environ["PATH"], "MEGATRON_BICC_DEVICE": ""}
    done = warm.run(["-m", "megatron_bicc.train", *TINY, f"output_dir={tmp_path / 'run'}"], **variables)
    assert done.returncode == 2, done.stderr
    line = done.stderr.splitlines()[-1]
    assert "nvidia-smi lists 2 GPUs with driver 535.129.03, and torch" in line
    assert "a build for the CPU, cannot use one: install a CUDA build" in line
    assert line.endswith("or set MEGATRON_BICC_DEVICE=cpu to train on the CPU")


UNREADABLE = ["--model", "examples/tiny_policy", "--benchmark", "missing.jsonl"]


@not_cuda
@pytest.mark.parametrize(
    "drivers, variable, found",
    [
        (["535.129.03"], "", "nvidia-smi lists 1 GPU with driver 535.129.03, and torch"),
        ([], "gpu", "MEGATRON_BICC_DEVICE is 'gpu'; it must be cpu, or unset"),
    ],
    ids=["unusable GPU", "wrong name"],
)
@pytest.mark.parametrize(
    "program, arguments",
    [
        (main, [*TINY, "model.attention=fa3"]),
        (main, [*TINY, *OFFLOAD]),
        (main, [*TINY, "data.train=missing.jsonl"]),
        (evaluate.main, UNREADABLE),
    ],
    ids=["attention", "optimizer", "no prompts", "evaluation"],
)
def test_the_device_is_chosen_before_other_settings_and_files(
    gpu_host: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    program: Callable[[list[str]], None],
    arguments: list[str],
    drivers: list[str],
    variable: str,
    found: str,
) -> None:
    gpu_host(*drivers)
    monkeypatch.setenv("MEGATRON_BICC_DEVICE", variable)
    with pytest.raises(SystemExit):
        program(arguments)
    assert f": error: {found}" in capsys.readouterr().err


@not_cuda
def test_a_dry_run_needs_no_usable_gpu(gpu_host: Callable[..., None], capsys: pytest.CaptureFixture) -> None:
    """It reads its files, and so finds that one is missing."""
    gpu_host("535.129.03")
    with pytest.raises(SystemExit):
        main([*TINY, "--dry-run", "data.train=missing.jsonl"])
    assert "data.train is missing.jsonl; there is no such file" in capsys.readouterr().err


def test_a_cuda_build_that_cannot_use_the_gpus_is_refused(
    gpu_host: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu_host("570.86.10")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(UserError) as refused:
        device.start_distributed()
    found = "nvidia-smi lists 1 GPU with driver 570.86.10"
    assert str(refused.value).startswith(f"{found}, and torch {torch.__version__}, a build for CUDA 13.0,")
    assert "install NVIDIA driver 580 or newer" in str(refused.value)


def test_without_a_gpu_a_cuda_build_computes_on_the_cpu_and_the_log_says_so(
    gpu_host: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu_host()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    device.choose_device()  # not refused: what pip installs on a laptop is such a build
    assert device.description().endswith(", built for CUDA 13.0, but no GPU is visible")


def test_the_cpu_is_taken_on_a_host_with_gpus_where_it_is_asked_for(
    gpu_host: Callable[..., None], tmp_path: Path
) -> None:
    """The run's log says so; a later process of it sees no GPU either."""
    gpu_host("580.95.05")
    variables = {"PATH": os.environ["PATH"], "MEGATRON_BICC_DEVICE": "cpu", "CUDA_VISIBLE_DEVICES": "0"}
    out = tmp_path / "run"
    engine = tmp_path / "engine.py"
    engine.write_text(
        "import os\n"
        "from megatron_bicc.errors import UserError\n"
        "def make(*_):\n"
        "    raise UserError(f'it sees GPUs {os.environ[\"CUDA_VISIBLE_DEVICES\"]!r}')\n"
    )
    settings = [f"output_dir={out}", f"rollout.engine={engine}:make"]
    done = warm.run(["-m", "megatron_bicc.train", *TINY, *settings], **variables)
    assert f"process group: 1 processes, CPU, torch {torch.__version__}" in done.stderr
    assert "it sees GPUs ''" in done.stderr.splitlines()[-1]


def test_another_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGATRON_BICC_DEVICE", "gpu")
    with pytest.raises(UserError, match="MEGATRON_BICC_DEVICE is 'gpu'; it must be cpu, or unset"):
        device.start_distributed()


def test_cuda_is_not_asked_for_where_the_cpu_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not device.has_cuda()  # the tests set MEGATRON_BICC_DEVICE=cpu
    monkeypatch.delenv("MEGATRON_BICC_DEVICE")
    assert device.has_cuda()


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEGATRON_BICC_DEVICE")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="has local rank 1, but torch sees 1 GPU: .*--nproc-per-node 1"):
        device.start_distributed()


def test_the_log_names_the_gpu_and_the_versions(
    gpu_host: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu_host("580.95.05")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 30, 7))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    expected = f"NVIDIA H100, driver 580.95.05, torch {torch.__version__}, CUDA 13.0, NCCL 2.30.7"
    assert device.description() == expected
