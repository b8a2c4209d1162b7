"""Tests the launch scripts: dry runs, errors on a machine without GPUs, and the torchrun command line.

If a test needs GPUs or SLURM, `PYTHON`, `srun` and `scontrol` are test doubles that print their arguments.
"""

import re
import shutil
import sys
from pathlib import Path

import pytest
from support import warm
from support.launch_scripts import REPOSITORY, command, files, make_doubles, run

from megatron_bicc.algorithms.presets import resolve
from megatron_bicc.cli import parse_config

# several processes or many shards; a busy machine needs minutes for that
pytestmark = pytest.mark.timeout(900)
SCRIPTS = ("run_bicc_70b.sh", "run_bicc_qwen3_4b.sh")


@pytest.fixture
def doubles(tmp_path: Path) -> Path:
    """A directory of programs that print their name, arguments and WORLD_SIZE, and of `files`."""
    return make_doubles(tmp_path)


def launched(path: Path, script: str, *arguments: str, **variables: str) -> dict[str, str]:
    """The settings of the training command, with those of torchrun under their option's names."""
    last = command(path, script, *arguments, **variables)
    options = {last[i]: last[i + 1] for i in range(2, last.index("megatron_bicc.train") - 1, 2)}
    return options | dict(setting.split("=", 1) for setting in last if "=" in setting)


def dry_run(path: Path, script: str, *arguments: str, **variables: str) -> str:
    """What the script prints with DRY_RUN=1; the command that it starts runs in a warm process."""
    status, out, err = run(
        script, *arguments, path=path, DRY_RUN="1", PYTHON=str(path / "python"), **variables
    )
    assert status == 0, err
    last = out.splitlines()[-1]
    done = warm.run(re.findall(r"<([^>]*)>", last), WORLD_SIZE=last.rpartition("WORLD_SIZE=")[2])
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_llama_70b_on_paper(doubles: Path) -> None:
    """64 processes. A layer has 150,994,944 parameters in its attention and 704,643,072 in its MLP, cut over
    8 ranks, and two norms of 8192 on each; stage 0 has an eighth of the embedding's 128,256 x 8192 too."""
    out = dry_run(doubles, "run_bicc_70b.sh", "parallel.virtual_pipeline=4")
    assert "64 processes: tensor 8 with sequence parallel, pipeline 4 x 4 chunks, data 2, expert 1" in out
    assert "shards of 4 sizes" in out and "stage 1: layers 6-10, 26-30, 46-50, 66-70, " in out
    layers = 20 * ((150_994_944 + 704_643_072) // 8 + 2 * 8192)
    assert f"{layers + 128256 * 8192 // 8:,} parameters" in out
    assert "synthetic step: 32 groups of 8" in out


def test_llama_70b_at_32k_on_paper(doubles: Path) -> None:
    """The longest sequence, of 49,152 rows, is shared by two context ranks."""
    out = dry_run(doubles, "run_bicc_70b.sh", MODEL="llama_32k")
    assert "64 processes: tensor 8 with sequence parallel, context 2, pipeline 4, data 1, expert 1" in out
    assert "synthetic step: 32 groups of 8" in out


def test_qwen3_4b_on_paper(doubles: Path) -> None:
    out = dry_run(doubles, "run_bicc_qwen3_4b.sh")
    assert "8 processes: tensor 2 with sequence parallel, pipeline 1, data 4, expert 1" in out


def test_qwen3_30b_a3b_on_paper(doubles: Path) -> None:
    """64 processes. Of a layer a rank has a quarter of the attention (18,874,368 parameters), 16 of 128
    experts, and whole a router, two norms of 2048, and norms of queries and keys; a quarter of the embedding
    and of the output layer, 151,936 x 2048 each, and the last norm."""
    out = dry_run(doubles, "run_bicc_qwen3_30b_a3b.sh")
    assert "64 processes: tensor 4 with sequence parallel, pipeline 1, data 16, expert 8" in out
    layer = 18_874_368 // 4 + 16 * 3 * 2048 * 768 + 128 * 2048 + 2 * 2048 + 2 * 128
    assert f"{48 * layer + 2 * 151_936 * 2048 // 4 + 2048:,} parameters" in out


def test_qwen3_235b_a22b_on_paper(doubles: Path) -> None:
    """256 processes. A layer has 71,303,168 parameters in its attention, and 18,874,368 in each expert."""
    out = dry_run(doubles, "run_bicc_qwen3_235b_a22b.sh")
    assert "256 processes: tensor 4 with sequence parallel, pipeline 2, data 32, expert 32" in out
    assert "stage 1: layers 48-94, " in out
    layer = 71_303_168 // 4 + 4 * 18_874_368 + 128 * 4096 + 2 * 4096 + 2 * 128
    assert f"{47 * layer + 151_936 * 4096 // 4:,} parameters" in out


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="this machine has a GPU's driver")
@pytest.mark.parametrize("script", SCRIPTS)
def test_without_gpus_it_ends_with_one_line(script: str, tmp_path: Path) -> None:
    variables = {"NNODES": "1", "OUT": str(tmp_path), "PYTHON": sys.executable, **files(tmp_path)}
    status, out, err = run(script, **variables)
    assert status == 1 and out == ""
    (line,) = err.splitlines()
    assert "nvidia-smi is not installed" in line


def test_plain_hosts(doubles: Path) -> None:
    found = launched(doubles, "run_bicc_70b.sh", "seed=5", NNODES="8", NODE_RANK="3", MASTER_ADDR="host0")
    assert found["--nnodes"] == "8" and found["--nproc-per-node"] == "8"
    assert found["--rdzv-endpoint"] == "host0:29500" and found["--rdzv-conf"] == "is_host=0"
    assert found["checkpoint.resume"] == "true"
    assert found["model.path"] == f"{doubles}/model" and found["data.train"] == f"{doubles}/train.parquet"
    assert found["rollout.colocate"] == "true" and found["rollout.sglang.gpus"] == "0,1,2,3,4,5,6,7"
    assert found["seed"] == "5"


@pytest.mark.parametrize(
    ("script", "layout"),
    [
        (SCRIPTS[0], (8, 4, 1)),
        (SCRIPTS[1], (2, 1, 1)),
        ("run_bicc_qwen3_30b_a3b.sh", (4, 1, 8)),
        ("run_bicc_qwen3_235b_a22b.sh", (4, 2, 32)),
    ],
)
def test_the_papers_settings(
    doubles: Path, script: str, layout: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that the run resolves, wherever they are written: in the script, its file or the defaults."""
    arguments = command(doubles, script, MASTER_ADDR="host0", SERVERS="http://server0:30000")
    monkeypatch.chdir(REPOSITORY)
    config = resolve(parse_config(arguments[arguments.index("megatron_bicc.train") + 1 :]))
    assert (config.bicc.enabled, config.rcc.enabled, config.bicc.weight) == (True, True, 1.0)
    assert (config.optimizer.lr, config.bicc.context_ratio) == (1e-6, 0.4)
    assert (config.loss.clip_low, config.loss.clip_high) == (0.2, 0.2)
    assert (config.rollout.prompts_per_step, config.rollout.group_size) == (32, 8)
    assert (config.rollout.max_new_tokens, config.train.max_sequence_tokens) == (8192, 16384)
    assert (config.train.max_tokens_per_microbatch, config.model.recompute) == (16384, "full")
    assert (config.parallel.tensor, config.parallel.pipeline, config.parallel.expert) == layout
    assert config.checkpoint.resume
    placed = (config.rollout.colocate, config.rollout.launch, config.weight_sync.method)
    # beside the policy's state a GPU of 80 GB has no room for an eighth of the largest policy's weights
    elsewhere = script == "run_bicc_qwen3_235b_a22b.sh"
    assert placed == ((False, "attach", "distributed") if elsewhere else (True, "spawn", "auto"))


def test_the_environment_is_checked_first(doubles: Path) -> None:
    variables = {"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "host0", "OUT": "runs/x"}
    env = files(doubles) | {"PYTHON": str(doubles / "python")} | variables
    _, out, _ = run("run_bicc_70b.sh", path=doubles, **env)
    check, dry_run, _ = out.splitlines()
    for part in ("<tools/check_environment.py>", "<--nodes> <2>", "<--shared> <runs/x>", "<--gpus> <8>"):
        assert part in check
    assert "<--dry-run>" in dry_run and dry_run.endswith("WORLD_SIZE=16")


@pytest.mark.parametrize("own", ["", "max_split_size_mb:64"])
def test_trainers_have_segments_that_grow(doubles: Path, own: str) -> None:
    """Unless the user has set the variable, even to nothing."""
    (doubles / "python").write_text('#!/bin/sh\necho "<$PYTORCH_CUDA_ALLOC_CONF>"\n')
    variables = {"MASTER_ADDR": "host0", "PYTHON": str(doubles / "python"), **files(doubles)}
    for given, expected in (({}, "expandable_segments:True"), ({"PYTORCH_CUDA_ALLOC_CONF": own}, own)):
        status, out, err = run("run_bicc_70b.sh", path=doubles, **variables, **given)
        assert status == 0, err
        assert out.splitlines()[-1] == f"<{expected}>"


def test_servers_apart_on_the_same_nodes(doubles: Path) -> None:
    found = launched(doubles, "run_bicc_70b.sh", ROLLOUT="split", NNODES="8", MASTER_ADDR="host0")
    assert found["--nproc-per-node"] == "4" and found["rollout.sglang.gpus"] == "4,5,6,7"
    assert found["parallel.tensor"] == "4" and "rollout.colocate" not in found


def test_servers_elsewhere(doubles: Path) -> None:
    url = "http://server0:30000"
    found = launched(doubles, "run_bicc_qwen3_4b.sh", ROLLOUT="attach", SERVERS=url)
    assert found["rollout.launch"] == "attach" and found["rollout.sglang.servers"] == url
    assert found["weight_sync.method"] == "distributed" and found["--nproc-per-node"] == "8"


def test_several_servers_on_a_node(doubles: Path) -> None:
    found = launched(doubles, "run_bicc_qwen3_4b.sh")
    assert (
        found["rollout.sglang.servers_per_node"] == "4" and found["rollout.sglang.gpus"] == "0,1/2,3/4,5/6,7"
    )


def test_slurm_starts_the_script_on_every_node(doubles: Path) -> None:
    variables = {"SLURM_JOB_ID": "1", "SLURM_SUBMIT_DIR": str(REPOSITORY)}
    status, out, err = run("run_bicc_70b.sh", "seed=5", path=doubles, **variables)
    assert status == 0, err
    assert out.startswith("srun <--ntasks-per-node=1>") and "<examples/run_bicc_70b.sh> <seed=5>" in out


def test_slurm_names_nodes_and_ranks(doubles: Path) -> None:
    step = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_NODES": "2", "SLURM_NODEID": "1"}
    job = {"SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "host[7-8]", "SLURM_SUBMIT_DIR": str(REPOSITORY)}
    found = launched(doubles, "run_bicc_70b.sh", **step, **job)
    assert (found["--nnodes"], found["--rdzv-endpoint"]) == ("2", "host7:29500")


@pytest.mark.parametrize(
    ("variables", "part"),
    [
        ({"MODEL": "gpt"}, "MODEL is gpt; it must be llama, llama_32k or qwen"),
        ({"ROLLOUT": "elsewhere"}, "ROLLOUT is elsewhere; it must be colocate, split or attach"),
        ({"ROLLOUT": "attach"}, "needs SERVERS"),
        ({"SERVER_GPUS": "3"}, "SERVER_GPUS=3 does not divide GPUS_PER_NODE=8"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR is not set"),
        ({"MODEL_PATH": ""}, "MODEL_PATH is not set"),
        ({"MODEL_PATH": "/nowhere"}, "MODEL_PATH is /nowhere; there is no such directory"),
        ({"TRAIN_DATA": ""}, "TRAIN_DATA is not set"),
        ({"TRAIN_DATA": "/nowhere"}, "TRAIN_DATA is /nowhere; there is no such file"),
        ({"GPUS_PER_NODE": "all"}, "GPUS_PER_NODE is all; it must be a whole number from 1"),
        ({"GPUS_PER_NODE": "08"}, "GPUS_PER_NODE is 08; it must be a whole number from 1"),
        ({"SERVER_GPUS": "0"}, "SERVER_GPUS is 0; it must be a whole number from 1"),
        ({"SERVER_GPUS": "half", "ROLLOUT": "split"}, "SERVER_GPUS is half; it must be a whole number"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT is http; it must be a whole number from 1 to 65535"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT is 65536; it must be a whole number from 1 to 65535"),
        ({"MAX_RESTARTS": "-1"}, "MAX_RESTARTS is -1; it must be a whole number from 0"),
        ({"NNODES": "eight"}, "NNODES is eight; it must be a whole number from 1"),
        ({"NODE_RANK": "8"}, "NODE_RANK is 8; it must be a whole number from 0 to 7"),
        ({"PYTHON": "/nowhere/python"}, "/nowhere/python not found; run make setup"),
        ({"SLURM_SUBMIT_DIR": "/"}, "submit the job from the repository's root"),
    ],
)
def test_mistakes_are_one_line(doubles: Path, variables: dict[str, str], part: str) -> None:
    good = {"MASTER_ADDR": "host0", "PYTHON": str(doubles / "python")} | files(doubles)
    status, out, err = run("run_bicc_70b.sh", path=doubles, **good | variables)
    assert status == 1 and out == "", "something else ran first"
    (line,) = err.splitlines()
    assert part in line
