"""Starts the launch scripts with test doubles for the programs that need GPUs or SLURM."""

import os
import re
import subprocess
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
PRINTER = '#!/bin/sh\nprintf "%s " "$(basename "$0")"; printf "<%s> " "$@"; echo "WORLD_SIZE=$WORLD_SIZE"\n'


def make_doubles(path: Path) -> Path:
    """Puts programs into a directory that print their name, arguments and WORLD_SIZE, and `files`."""
    for name in ("python", "srun"):
        (path / name).write_text(PRINTER)
    (path / "scontrol").write_text("#!/bin/sh\necho host7\necho host8\n")
    for program in path.iterdir():
        program.chmod(0o755)
    files(path)
    return path


def files(path: Path) -> dict[str, str]:
    """Makes what a launch needs to find; the variables that name it."""
    (path / "model").mkdir(exist_ok=True)
    (path / "train.parquet").touch()
    return {"MODEL_PATH": f"{path}/model", "TRAIN_DATA": f"{path}/train.parquet"}


def run(script: str, *arguments: str, path: Path | None = None, **variables: str) -> tuple[int, str, str]:
    """Exit status, stdout, stderr."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    env["PATH"] = f"{path}:{env['PATH']}" if path else env["PATH"]
    done = subprocess.run(
        [str(REPOSITORY / "examples" / script), *arguments],
        env=env | variables,
        capture_output=True,
        text=True,
        timeout=800,
    )
    return done.returncode, done.stdout, done.stderr


def command(path: Path, script: str, *arguments: str, **variables: str) -> list[str]:
    """The arguments of torchrun, those of the training command among them."""
    env = files(path) | {"PYTHON": str(path / "python")} | variables
    status, out, err = run(script, *arguments, path=path, **env)
    assert status == 0, err
    last = re.findall(r"<([^>]*)>", out.splitlines()[-1])
    assert last[:2] == ["-m", "torch.distributed.run"]
    return last
