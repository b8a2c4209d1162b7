"""Tests which processes, devices and settings the demo takes on hosts with one GPU, eight, and none.

`nvidia-smi` and Python are test doubles, shell scripts; no training is started.
"""

import os
import re
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PYTHON = """#!/bin/bash
printf '<%s> ' "$@"
echo "WORLD_SIZE=${WORLD_SIZE:-} MEGATRON_BICC_DEVICE=${MEGATRON_BICC_DEVICE:-}"
"""


@pytest.fixture
def demo(tmp_path: Path):
    """Returns a function that runs the demo on a host with that many GPUs: None is one without nvidia-smi.

    It returns the script's own line, and the settings, processes and device of the training command.
    """

    def run(gpus: int | None, *arguments: str, **variables: str) -> tuple[str, dict[str, str]]:
        doubles = {"python": PYTHON}
        if gpus is not None:
            answer = f"seq 0 {gpus - 1}" if gpus else "echo 'No devices were found'; exit 6"
            doubles["nvidia-smi"] = f"#!/bin/bash\n{answer}\n"
        for name, text in doubles.items():
            (tmp_path / name).write_text(text)
            (tmp_path / name).chmod(0o755)
        hidden = ("CUDA_VISIBLE_DEVICES", "MEGATRON_BICC_DEVICE")
        environment = {name: value for name, value in os.environ.items() if name not in hidden}
        environment |= {"PATH": f"{tmp_path}:/usr/bin:/bin", "PYTHON": str(tmp_path / "python")} | variables
        command = ["examples/run_bicc_tiny.sh", *arguments]
        done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        said, dry_run, started = done.stdout.splitlines()
        words = re.findall(r"<([^>]*)>", started)
        processes = words[words.index("--nproc-per-node") + 1]
        # both see the same host and settings
        assert f"WORLD_SIZE={processes} " in dry_run and "<dry_run=true>" in dry_run
        settings = dict(word.split("=", 1) for word in words if "=" in word)
        device = started.rpartition("MEGATRON_BICC_DEVICE=")[2]
        assert device == dry_run.rpartition("MEGATRON_BICC_DEVICE=")[2]
        return said, settings | {"processes": processes, "device": device}

    return run


@pytest.mark.parametrize(("gpus", "processes"), [(1, "1"), (2, "2"), (8, "2")])
def test_a_process_for_each_of_at_most_two_gpus(demo, gpus: int, processes: str) -> None:
    said, found = demo(gpus, STEPS="3")
    assert said == f"demo: {processes} of {gpus} GPUs, bfloat16"
    assert (found["processes"], found["parallel.tensor"], found["device"]) == (processes, processes, "")
    assert found["model.dtype"] == "bfloat16" and found["train.steps"] == "3"
    assert not any(name.startswith("rollout.") for name in found)


@pytest.mark.parametrize(
    ("gpus", "variables"),
    [
        (None, {}),
        (0, {}),
        (8, {"MEGATRON_BICC_DEVICE": "cpu"}),
        (8, {"CUDA_VISIBLE_DEVICES": ""}),
    ],
)
def test_two_cpu_processes_without_a_gpu_or_where_asked(demo, gpus: int | None, variables: dict) -> None:
    said, found = demo(gpus, ENGINE="sglang", **variables)
    assert said == "demo: 2 processes on the CPU, float32"
    assert found == {"rollout.engine": "sglang", "processes": "2", "device": "cpu"}


@pytest.mark.parametrize(
    ("gpus", "variables", "first", "processes"),
    [
        (1, {}, "0", "1"),
        (8, {}, "0", "2"),
        (8, {"CUDA_VISIBLE_DEVICES": "5,6,7"}, "5", "2"),
        (8, {"CUDA_VISIBLE_DEVICES": "3"}, "3", "1"),
    ],
)
def test_the_server_shares_the_first_gpu(
    demo, gpus: int, variables: dict[str, str], first: str, processes: str
) -> None:
    _, found = demo(gpus, "seed=5", ENGINE="sglang", **variables)
    assert (found["rollout.colocate"], found["rollout.sglang.gpus"]) == ("true", first)
    assert "--attention-backend triton" in found["rollout.sglang.server_args"]
    assert (found["processes"], found["seed"]) == (processes, "5")
