"""Tests set-up on hosts with GPUs: which locks it installs, what make te and make apex miss, a failing nvcc.

The virtual environment's Python, nvidia-smi and the compilers are test doubles, shell scripts: nothing is
installed or compiled.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
CONTENTS = """
case "$*" in
*"pip --version"*) ;;
*check_environment*) [ -z "$OLD_DRIVER" ] || { echo "the driver is too old" >&2; exit 1; } ;;
*"sys.exit(torch.version.cuda is None)"*) [ -n "$TORCH_CUDA" ] ;;
*"print(torch.version.cuda)"*) echo "$TORCH_CUDA" ;;
*"pip install"*)
    printf '<%s> ' "$@"; echo
    for argument; do case $argument in /dev/fd/*) cat "$argument" ;; esac; done ;;
esac
"""
GPU_LISTED = "echo 'GPU 0: NVIDIA H100'"


@pytest.fixture
def setup(tmp_path: Path):
    """Returns a function that runs a stage of tools/setup.sh in a copy of its files, with doubles on PATH."""
    (tmp_path / "tools").mkdir()
    shutil.copy(REPOSITORY / "tools/setup.sh", tmp_path / "tools")
    for lock in REPOSITORY.glob("requirements*.lock"):
        shutil.copy(lock, tmp_path)
    for name in (".venv", ".venv-sglang"):
        (tmp_path / name / "lib").mkdir(parents=True)
        double(tmp_path / name / "bin/python", CONTENTS)
    for tool in ("bash", "dirname", "find", "grep", "cat", "df", "tail", "cut"):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))

    def run(stage: str, doubles: dict[str, str], **variables: str) -> subprocess.CompletedProcess:
        for name, text in doubles.items():
            double(tmp_path / "bin" / name, text)
        environment = {"PATH": str(tmp_path / "bin"), "PYTHON": sys.executable, **variables}
        command = [str(tmp_path / "tools/setup.sh"), stage]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    return run


def double(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


def test_a_host_with_gpus_gets_torch_of_the_cuda_lock(setup) -> None:
    done = setup("packages", {"nvidia-smi": GPU_LISTED}, TORCH_CUDA="13.0")
    assert done.returncode == 0 and done.stderr == ""
    assert "<requirements-cuda.lock>" in done.stdout and "megatron-core==" in done.stdout
    assert "torch==" not in done.stdout  # of requirements.lock: the CPU's


@pytest.mark.parametrize(
    ("doubles", "variables"),
    [
        ({}, {}),
        ({"nvidia-smi": "exit 9"}, {}),
        ({"nvidia-smi": GPU_LISTED}, {"MEGATRON_BICC_DEVICE": "cpu"}),
    ],
)
def test_a_host_without_gpus_or_for_the_cpu(setup, doubles: dict[str, str], variables: dict) -> None:
    done = setup("packages", doubles, **variables)
    assert done.returncode == 0, done.stderr
    assert "<requirements.lock>" in done.stdout and "requirements-cuda.lock" not in done.stdout


def test_servers_on_a_host_with_gpus_are_installed_as_locked(setup) -> None:
    done = setup("sglang", {"nvidia-smi": GPU_LISTED}, TORCH_CUDA="13.0")
    assert done.returncode == 0, done.stderr
    assert "<--no-deps> <-r> <requirements-sglang-cuda.lock>" in done.stdout


@pytest.mark.parametrize("stage", ["packages", "sglang"])
def test_an_old_driver_ends_the_set_up_before_anything_is_installed(setup, stage: str) -> None:
    done = setup(stage, {"nvidia-smi": GPU_LISTED}, OLD_DRIVER="1")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "the driver is too old\n")


GOOD = {"g++": "", "git": "", "nvcc": "echo 'Cuda compilation tools, release 13.0, V13.0.88'"}


@pytest.mark.parametrize(
    ("stage", "missing", "torch_cuda", "part"),
    [
        ("te", {}, "", "Transformer Engine needs a CUDA build of torch in .venv"),
        ("te", {"g++": None}, "13.0", "Transformer Engine needs a C++ compiler"),
        ("te", {"df": "echo Avail; echo 3000000"}, "13.0", "needs 10 GB of disk to build; .venv has 3 GB"),
        ("apex", {}, "", "apex needs a CUDA build of torch in .venv"),
        ("apex", {"git": None}, "13.0", "apex needs git"),
        ("apex", {"nvcc": None}, "13.0", "apex needs nvcc: install the CUDA toolkit"),
        ("apex", {}, "12.8", "apex needs nvcc 12.8, which torch is built with; nvcc is 13.0"),
    ],
)
def test_what_a_build_misses_is_named(
    setup, tmp_path: Path, stage: str, missing: dict[str, str | None], torch_cuda: str, part: str
) -> None:
    doubles = {name: text for name, text in (GOOD | missing).items() if text is not None}
    if "df" in doubles:
        (tmp_path / "bin/df").unlink()
    done = setup(stage, doubles, TORCH_CUDA=torch_cuda)
    assert done.returncode == 1 and "pip" not in done.stdout
    (line,) = done.stderr.splitlines()
    assert part in line


def test_transformer_engine_is_built_against_this_torch(setup) -> None:
    done = setup("te", GOOD, TORCH_CUDA="13.0")
    assert done.returncode == 0, done.stderr
    _, needed, *pins, built = done.stdout.splitlines()
    assert "<--no-deps>" in needed and any(pin.startswith("nvidia-cuda-crt==") for pin in pins)
    assert not any(pin.startswith("transformer-engine-torch==") for pin in pins)
    assert "<--no-build-isolation> <transformer-engine-torch==" in built and "<--no-deps>" in built


def test_apex_is_nvidias_at_a_commit(setup) -> None:
    done = setup("apex", GOOD, TORCH_CUDA="13.0")
    assert done.returncode == 0, done.stderr
    built = done.stdout.splitlines()[-1]
    assert "<--no-build-isolation> <apex @ git+https://github.com/NVIDIA/apex.git@" in built


COMPILER = """
while [ $# -gt 0 ]; do case $1 in -o) echo built >"$2" ;; esac; shift; done
"""
ARCHITECTURES = '[ "$1" != --list-gpu-arch ] || { echo compute_75; echo compute_80; echo compute_90; exit; }'


@pytest.fixture
def extensions(tmp_path: Path):
    """Returns a function that builds the extensions in place, in a copy of their files, with an nvcc."""
    shutil.copytree(REPOSITORY / "csrc", tmp_path / "csrc")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, tmp_path)
    (tmp_path / "megatron_bicc").mkdir()
    (tmp_path / "megatron_bicc/__init__.py").touch()
    for compiler in ("cc", "c++"):
        double(tmp_path / "bin" / compiler, COMPILER)

    def build(nvcc: str) -> subprocess.CompletedProcess:
        double(tmp_path / "bin/nvcc", nvcc)
        path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        environment = os.environ | {
            "PATH": path,
            "CC": str(tmp_path / "bin/cc"),
            "CXX": str(tmp_path / "bin/c++"),
        }
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done

    return build


def built(tmp_path: Path) -> list[str]:
    return sorted(path.name.partition(".")[0] for path in (tmp_path / "megatron_bicc").glob("*.so"))


def test_a_failing_nvcc_leaves_the_rest_built_and_no_older_kernels(extensions, tmp_path: Path) -> None:
    arguments = tmp_path / "arguments"
    extensions(f"{ARCHITECTURES}\necho $* >{arguments}\n{COMPILER}")
    assert built(tmp_path) == ["_C", "_C_cuda"]
    # the targets that this nvcc knows, of those that are wanted
    options = arguments.read_text()
    assert "sm_80" in options and "code=compute_90" in options
    assert "sm_75" not in options and "sm_100" not in options
    done = extensions(f"{ARCHITECTURES}\necho 'unsupported GNU version!' >&2; exit 1")
    assert built(tmp_path) == ["_C"]
    assert "unsupported GNU version!" in done.stderr
    assert "warning: megatron_bicc._C_cuda is not built: nvcc fails" in done.stderr


def test_an_nvcc_that_does_not_know_its_targets(extensions, tmp_path: Path) -> None:
    done = extensions("echo 'unknown option --list-gpu-arch' >&2; exit 1")
    assert built(tmp_path) == ["_C"] and "_C_cuda is not built" in done.stderr
