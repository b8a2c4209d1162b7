"""Worker of test_checkpoint_resume.py: checkpoint_worker.py OUT KILLS; writes OUT/report.json."""

import itertools
import json
import os
import random
import resource
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import pyarrow.parquet as pq
import torch
from transformers import AutoModelForCausalLM

from megatron_bicc import device
from megatron_bicc.checkpoint.checkpoint import CheckpointWriter
from megatron_bicc.checkpoint.convert import export_hf
from megatron_bicc.cli import parse_config
from megatron_bicc.config import Config
from megatron_bicc.metrics import Stopwatch
from megatron_bicc.model.policy import Policy, start_model_parallel
from megatron_bicc.startup import read_inputs
from megatron_bicc.train import Trainer, main

sys.path.insert(0, str(Path(__file__).parents[1]))

from support import forked

SETTINGS = [
    "--config",
    "examples/configs/tiny.yaml",
    "parallel.tensor=1",
    "train.steps=6",
    "rollout.prompts_per_step=4",
    "evaluation.prompts=2",
    "evaluation.every=2",
    "evaluation.samples=1",
    "checkpoint.every=1",
    "export.every=2",
    "export.keep=1",
    "monitoring.tensorboard=false",
]
RESUME = "checkpoint.resume=true"
PHASES = ("rollout", "pack", "logprob", "train", "sync", "eval", "export", "save", "write")


def settings_of(out: Path, *settings: str) -> list[str]:
    """The command line of a run in `out`, which learns from a few prompts beside it."""
    prompts = out.with_name("prompts.parquet")
    data = [f"data.train={prompts}", f"evaluation.data={prompts}"]
    return [*SETTINGS, *data, f"output_dir={out}", *settings]


def warm_up(out: Path) -> None:
    """Writes the training prompts, and loads here what every run would load anew."""
    pq.write_table(pq.read_table("examples/data/train.parquet")[:64], out.with_name("prompts.parquet"))
    inputs = read_inputs(parse_config(settings_of(out)))
    model = AutoModelForCausalLM.from_pretrained(inputs.config.model.path)
    model.generate(torch.tensor([inputs.prompts[0].token_ids.tolist()]), max_new_tokens=2)


def start(
    out: Path, settings: tuple[str, ...], prepare: Callable[[], object], variables: dict[str, str]
) -> int:
    """Forks a run's process, prepared, with these environment variables; its id. Its stderr: OUT.err."""

    def task() -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(f"{out}.err", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        prepare()
        main(settings_of(out, *settings))

    return forked.fork(task, variables)


def run(out: Path, *settings: str, prepare: Callable[[], object] = lambda: None, processes: int = 1) -> dict:
    """A run to its end: its exit status and what it wrote to stderr."""
    Path(f"{out}.err").unlink(missing_ok=True)
    variables = [{}] if processes == 1 else forked.torchrun_variables(processes)
    status = forked.wait([start(out, settings, prepare, more) for more in variables])
    return {"status": status, "err": Path(f"{out}.err").read_text()}


class Killer:
    """Kills this process inside a phase: a stage that Stopwatch times, or the writing of a checkpoint."""

    def __init__(self, phase: str, visit: int, delay: float, report: Path) -> None:
        """At its visit-th time, so many seconds after its beginning, or at its end if that is sooner."""
        self.phase, self.visits, self.delay, self.report = phase, visit, delay, report
        self.once = threading.Lock()

    def arm(self) -> None:
        """Watches every phase of the run that this process is about to start."""
        stage, write = Stopwatch.__call__, CheckpointWriter._write
        Stopwatch.__call__ = lambda clock, name: self.watch(name, stage(clock, name))
        CheckpointWriter._write = lambda *args: self.write(write, *args)

    def write(self, write: Callable[..., None], *args: object) -> None:
        with self.watch("write", nullcontext()):
            write(*args)

    @contextmanager
    def watch(self, name: str, inner: AbstractContextManager) -> Iterator[None]:
        self.visits -= name == self.phase
        deadly = name == self.phase and self.visits == 0
        if deadly:
            threading.Timer(self.delay, self.kill).start()
        with inner:
            yield
            if deadly:
                self.kill()

    def kill(self) -> None:
        self.once.acquire()  # never released: the timer and the phase's end may come together
        with self.report.open("a") as report:
            report.write(self.phase + "\n")
        os.kill(os.getpid(), signal.SIGKILL)


def kill_and_resume(out: Path, kills: int, times: dict[str, float]) -> dict:
    """Kills at random moments of every phase in turn, each followed by a resume.

    times: seconds that the phases take. A run that ends before its kill is kept as OUT_0, OUT_1, ..., and
    another one is started.
    """
    rng, ended, bad_latest, report = random.Random(1), 0, [], Path(f"{out}.phases")
    report.touch()
    while (done := len(report.read_text().split())) < kills:
        phase = PHASES[done % len(PHASES)]
        killer = Killer(phase, rng.choice((1, 1, 2)), rng.random() * times[phase], report)
        if forked.wait([start(out, (RESUME,), killer.arm, {})]) == 0:
            out.rename(out.with_name(f"{out.name}_{ended}"))
            ended += 1
        latest = out / "checkpoints/latest"
        if latest.is_symlink() and not (latest / "manifest.json").is_file():
            bad_latest.append(done)
    return run(out, RESUME) | {"phases": report.read_text().split(), "bad_latest": bad_latest}


def phase_times(out: Path) -> dict[str, float]:
    """Median seconds of a run's phases; writing is taken to be as long as the copying before it."""
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()][1:]
    times = {p: median(s[f"time/{p}_s"] for s in steps if f"time/{p}_s" in s) for p in PHASES[:-1]}
    return times | {"write": times["save"]}


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


def small_disk(file_size: int) -> None:
    """Makes writes fail beyond so many bytes of a file."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))


def poison_gradient() -> None:
    """From the third step on the gradient has a NaN."""
    update, count = Policy.update, itertools.count(1)

    def poisoned(policy: Policy) -> float:
        if next(count) >= 3:
            policy.modules[0].decoder.final_layernorm.weight.main_grad[0] = torch.nan
        return update(policy)

    Policy.update = poisoned


def poison_weight() -> None:
    """In the third step nothing is learned, and a weight becomes NaN."""
    learn = Trainer.learn

    def poisoned(trainer: Trainer, rollouts: Any, clock: Any) -> list:
        if trainer.step < 3:
            return learn(trainer, rollouts, clock)
        trainer.policy.modules[0].decoder.final_layernorm.weight.data[0] = torch.nan
        return []

    Trainer.learn = poisoned


def scenarios(out: Path, kills: int) -> dict:
    """Every scenario, by name."""
    found, whole = {}, out / "whole"
    warm_up(whole)
    found["whole"] = run(whole)
    found["killed"] = kill_and_resume(out / "killed", kills, phase_times(whole))

    damaged = copy(whole, "copy")
    file = flip(damaged / "checkpoints/step_00000006")
    found["flipped"] = run(damaged, RESUME) | {"file": file}
    shutil.rmtree(damaged / "checkpoints/step_00000006")
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
    shutil.copy(out / "prompts.parquet", moved)
    for name, poison in (("poisoned_gradient", poison_gradient), ("poisoned_weight", poison_weight)):
        found[name] = run(out / name, prepare=poison)
    found["healed"] = run(copy(out / "poisoned_gradient", "healed"), RESUME)

    found["harmless"] = run(copy(whole, "harmless"), RESUME, "train.steps=7", f"data.train={moved}")
    found["tp2"] = run(out / "tp2", "train.steps=3", "checkpoint.keep=3", "parallel.tensor=2", processes=2)
    dp2 = copy(out / "tp2", "dp2")
    shutil.rmtree(dp2 / "checkpoints/step_00000003")
    cp2 = copy(dp2, "cp2")
    found["dp2"] = run(dp2, "train.steps=3", RESUME, processes=2)
    found["cp2"] = run(cp2, "train.steps=3", RESUME, "parallel.context=2", processes=2)
    found["full"] = run(out / "full", "export.every=0", prepare=partial(small_disk, 1_000_000))
    (out / "unwritable").mkdir()
    (out / "unwritable/checkpoints").write_text("")
    found["unwritable"] = run(out / "unwritable")
    return found


def export(run_directory: Path, target: Path) -> None:
    """A training checkpoint as a Hugging Face directory. After it this process can fork no more runs."""
    device.start_distributed()
    start_model_parallel(Config())
    export_hf(run_directory / "checkpoints/latest", target, side_files=Path("examples/tiny_policy"))


if __name__ == "__main__":
    directory = Path(sys.argv[1])
    (directory / "report.json").write_text(json.dumps(scenarios(directory, int(sys.argv[2]))))
    export(directory / "whole", directory / "exported")
