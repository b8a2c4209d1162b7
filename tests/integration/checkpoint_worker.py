"""Run by test_checkpoint_resume.py: checkpoint_worker.py OUT KILLS; writes OUT/report.json."""

import json
import os
import random
import resource
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

from megatron_bicc import platform
from megatron_bicc.config import Config
from megatron_bicc.policy.convert import export_hf
from megatron_bicc.policy.policy import start_model_parallel
from megatron_bicc.train import main

SETTINGS = [
    "--config",
    "examples/configs/tiny.yaml",
    "parallel.tensor=1",
    "train.steps=4",
    "rollout.prompts_per_step=4",
    "evaluation.prompts=2",
    "evaluation.every=2",
    "evaluation.samples=1",
    "checkpoint.every=1",
    "monitoring.tensorboard=false",
]
RESUME = "checkpoint.resume=true"


def start(out: Path, settings: tuple[str, ...], file_size: int | None = None, **variables: str) -> int:
    """Forks a run's process under these environment variables; its id. Its stderr is added to OUT.err."""
    child = os.fork()
    if child:
        return child
    status: object = 1
    try:
        os.environ |= variables
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(f"{out}.err", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        if file_size:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
        main([*SETTINGS, f"output_dir={out}", *settings])
        status = 0
    except SystemExit as ended:
        status = ended.code
    finally:
        sys.stderr.flush()
        os._exit(status)


def run(out: Path, *settings: str, file_size: int | None = None, processes: int = 1) -> dict:
    """A run to its end: its exit status and what it wrote to stderr."""
    Path(f"{out}.err").unlink(missing_ok=True)
    variables = [{}] if processes == 1 else torchrun_variables(processes)
    children = [start(out, settings, file_size, **more) for more in variables]
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return {"status": max(statuses, key=abs), "err": Path(f"{out}.err").read_text()}


def torchrun_variables(processes: int) -> list[dict[str, str]]:
    """What torchrun would tell each of the processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    return [common | {"RANK": str(i), "LOCAL_RANK": str(i)} for i in range(processes)]


def kill_and_resume(out: Path, kills: int, seconds: float) -> dict:
    """Kills at random moments of a run that takes so many seconds, each followed by a resume.

    A run that ends before its kill is kept as OUT_0, OUT_1, ..., and another one is started, killed sooner.
    """
    rng, done, ended, bad_latest = random.Random(1), 0, 0, []
    while done < kills:
        child = start(out, (RESUME,))
        time.sleep(rng.uniform(0.1, 0.7) * seconds)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.waitstatus_to_exitcode(status) == 0:
            out.rename(out.with_name(f"{out.name}_{ended}"))
            ended, seconds = ended + 1, 0.7 * seconds
            continue
        done += 1
        latest = out / "checkpoints/latest"
        if latest.is_symlink() and not (latest / "manifest.json").is_file():
            bad_latest.append(done)
    return run(out, RESUME) | {"kills": done, "bad_latest": bad_latest}


def flip(directory: Path) -> str:
    """Flips one bit in the middle of a shard."""
    shard = sorted(directory.glob("*.distcp"))[0]
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 4
    shard.write_bytes(data)
    return str(shard)


def copy(source: Path, name: str) -> Path:
    """Another copy of a run."""
    target = source.with_name(name)
    shutil.copytree(source, target, symlinks=True)
    return target


def scenarios(out: Path, kills: int) -> dict:
    """Every scenario, by name."""
    found, whole = {}, out / "whole"
    start_time = time.monotonic()
    found["whole"] = run(whole)
    seconds = time.monotonic() - start_time
    found["killed"] = kill_and_resume(out / "killed", kills, seconds)

    damaged = copy(whole, "copy")
    file = flip(damaged / "checkpoints/step_00000004")
    found["flipped"] = run(damaged, RESUME) | {"file": file}
    shutil.rmtree(damaged / "checkpoints/step_00000004")
    changed = (
        "bicc.context_ratio=0.3",
        "rollout.temperature=0.9",
        "data.train=examples/data/heldout.parquet",
    )
    found["dangerous"] = run(damaged, RESUME, "train.steps=9", *changed)
    forced = copy(damaged, "forced")
    found["forced"] = run(forced, RESUME, "bicc.context_ratio=0.3", "checkpoint.force=true")
    found["previous"] = run(damaged, RESUME)

    moved = out / "moved.parquet"
    shutil.copy("examples/data/train.parquet", moved)
    found["harmless"] = run(copy(whole, "harmless"), RESUME, "train.steps=5", f"data.train={moved}")
    found["tp2"] = run(out / "tp2", "train.steps=3", "checkpoint.keep=3", "parallel.tensor=2", processes=2)
    dp2 = copy(out / "tp2", "dp2")
    shutil.rmtree(dp2 / "checkpoints/step_00000003")
    found["dp2"] = run(dp2, "train.steps=3", RESUME, processes=2)
    found["full"] = run(out / "full", file_size=1_000_000)
    (out / "unwritable").mkdir()
    (out / "unwritable/checkpoints").write_text("")
    found["unwritable"] = run(out / "unwritable")
    return found


def export(run_directory: Path, target: Path) -> None:
    """A training checkpoint as a Hugging Face directory. After it this process can fork no more runs."""
    platform.start_distributed()
    start_model_parallel(Config())
    export_hf(run_directory / "checkpoints/latest", target, side_files=Path("examples/tiny_policy"))


if __name__ == "__main__":
    directory = Path(sys.argv[1])
    (directory / "report.json").write_text(json.dumps(scenarios(directory, int(sys.argv[2]))))
    export(directory / "whole", directory / "exported")
