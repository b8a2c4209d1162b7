"""Worker of test_shares.py: shares_worker.py OUT; does the same work in jobs of several sizes.

Every process of a job writes what it collected and evaluated to OUT/JOB/RANK.json; the job's runs are in
OUT/JOB/RUN. All jobs are forked from one process with all modules loaded.
"""

import json
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist
from support import forked

from megatron_bicc import device, evaluate
from megatron_bicc.cli import parse_config
from megatron_bicc.model.policy import start_model_parallel
from megatron_bicc.rollout.collect import GroupSampler
from megatron_bicc.rollout.engines import make_engine
from megatron_bicc.rollout.types import Group, Sampling
from megatron_bicc.startup import Inputs, read_inputs
from megatron_bicc.train import build_trainer

HELD_OUT = "examples/data/heldout.parquet"
COUNTS, GROUP_SIZE = (1, 2, 4), 2
SETTINGS = [
    "--config",
    "examples/configs/tiny.yaml",
    "parallel.tensor=1",
    f"data.train={HELD_OUT}",
    "rollout.max_new_tokens=24",
    f"rollout.group_size={GROUP_SIZE}",
    f"rollout.batch_size={GROUP_SIZE}",
    f"evaluation.samples={GROUP_SIZE}",
    "monitoring.tensorboard=false",
    # a large eps: else Adam's first update is the sign of the gradient, and rounding flips that of a tiny one
    "optimizer.eps=1e-2",
    "train.steps=2",
]
"""Every batch of the local engine is one group, so that its log-probs are the same to the bit in every job"""
RUNS = {
    "bicc": ["rollout.prompts_per_step=2", "rollout.group_size=6", "evaluation.prompts=1"],
    "dapo": [
        "algorithm=dapo+bicc+rcc",
        "rollout.prompts_per_step=2",
        "rollout.group_size=3",
        "rollout.leftover=keep",
        "train.updates_per_step=2",
        "evaluation.prompts=3",
        "evaluation.every=1",
    ],
}
"""Steps, rounds, updates and evaluations of fewer prompts than a job of three or four has processes"""
JOBS = {"one": (1, 1, ("bicc", "dapo")), "three": (3, 1, ("bicc", "dapo")), "pipeline": (4, 2, ("dapo",))}
"""Name: (processes, parallel.pipeline, runs)"""


def data_of(group: Group) -> list:
    samples = [(s.token_ids.tolist(), s.log_probs.tolist(), s.finish_reason) for s in group.samples]
    return [group.prompt.index, samples, group.texts, group.rewards.tolist()]


def collected(inputs: Inputs) -> list[list]:
    """Groups of as many prompts as each of COUNTS says."""
    engine = make_engine(inputs.config, inputs.tokenizer)
    sampler = GroupSampler(engine, inputs.verifier, inputs.tokenizer, Sampling(1.0, 16), GROUP_SIZE)
    return [[data_of(g) for g in sampler.collect(inputs.prompts[:n], (n,))] for n in COUNTS]


def evaluated(out: Path) -> list[list]:
    """Answers to five prompts, as many at once as there are processes, and to two."""
    answers = []
    for prompts in (5, 2):
        settings = [f"evaluation.prompts={prompts}", f"output_dir={out}/evaluation_{prompts}"]
        inputs = evaluate.read_inputs(parse_config([*SETTINGS, *settings]), [HELD_OUT])
        evaluate.evaluate_benchmarks(inputs)
        dist.barrier()  # the first process writes
        lines = Path(f"{out}/evaluation_{prompts}/heldout.jsonl").read_text().splitlines()
        answers.append([json.loads(line) for line in lines[1:]])
    return answers


def run(*settings: str) -> None:
    """A whole run."""
    inputs = read_inputs(parse_config([*SETTINGS, *settings]))
    trainer = build_trainer(inputs)
    trainer.restore()
    trainer.run()


def job(out: Path, pipeline: int, runs: tuple[str, ...]) -> None:
    """One process's part."""
    torch.set_num_threads(1)
    device.start_distributed()
    layout = f"parallel.pipeline={pipeline}"
    inputs = read_inputs(parse_config([*SETTINGS, layout, f"output_dir={out}/unused"]))
    start_model_parallel(inputs.config)
    report = {"collected": collected(inputs), "evaluated": evaluated(out)}
    (out / f"{dist.get_rank()}.json").write_text(json.dumps(report))
    for name in runs:
        run(layout, f"output_dir={out / name}", *RUNS[name])
    device.end_distributed()


if __name__ == "__main__":
    for name, (processes, *what) in JOBS.items():
        directory = Path(sys.argv[1]) / name
        directory.mkdir()
        assert forked.run(partial(job, directory, *what), processes) == 0, name
