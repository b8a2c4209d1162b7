"""Runs the jobs, several at a time; skips finished ones and restarts interrupted ones from step 0."""

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from tqdm import tqdm

from experiment.arms import Job
from megatron_bicc.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[2]
DONE = "finished.json"
PROGRAM = (sys.executable, "-W", "ignore", "-m", "megatron_bicc.train")


class RunError(Exception):
    """A run of the experiment failed. One line: its command, and where its output is."""


class Runner:
    """Runs training processes, and terminates them before it exits."""

    def __init__(self, out: Path, workers: int, program: Sequence[str] = PROGRAM) -> None:
        """program: the command that is started with a job's settings and output_dir."""
        self.out, self.workers, self.program = out, workers, program
        self._commit = commit()
        self._running: set[subprocess.Popen] = set()
        self._stopped = threading.Event()

    def run(self, jobs: list[Job]) -> None:
        """Runs every unfinished job.

        Raises RunError for a job that fails, UserError for a finished one with other settings.
        """
        self._stopped.clear()
        waiting = [job for job in jobs if not self._finished(job)]
        bar = tqdm(total=len(jobs), initial=len(jobs) - len(waiting), desc="experiment", unit="run")
        with ThreadPoolExecutor(self.workers) as pool, bar:
            try:
                for done in as_completed([pool.submit(self._run, job) for job in waiting]):
                    done.result()
                    bar.update()
            finally:
                self._stop()

    def _finished(self, job: Job) -> bool:
        path = self.out / job.folder / DONE
        if not is_finished(self.out, job):
            return False
        if json.loads(path.read_text())["settings"] != list(job.settings()):
            raise UserError(f"{path.parent}: made with other settings; delete it, or choose another --out")
        return True

    def _run(self, job: Job) -> None:
        if self._stopped.is_set():
            return
        folder = self.out / job.folder
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        command = [*self.program, *job.settings(), f"output_dir={folder}"]
        with (folder / "output.txt").open("w") as output:
            process = subprocess.Popen(
                command,
                cwd=REPOSITORY,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                stdout=output,
                stderr=output,
            )
            self._running.add(process)
            status = process.wait()
            self._running.discard(process)
        if status:
            raise RunError(f"{' '.join(command)} ended with status {status}; see {folder}/output.txt")
        record = {"settings": list(job.settings()), "commit": self._commit}
        (folder / DONE).write_text(json.dumps(record) + "\n")

    def _stop(self) -> None:
        self._stopped.set()
        for process in list(self._running):
            process.terminate()


def is_finished(out: Path, job: Job) -> bool:
    """Returns whether a job in the experiment's directory is finished."""
    return (out / job.folder / DONE).exists()


def commit() -> str:
    """Returns the commit of the working tree, with "-modified" appended if tracked files differ from it."""
    git = ["git", "-C", str(REPOSITORY)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD"], check=False)
    return head.stdout.strip() + ("-modified" if changed.returncode else "")
