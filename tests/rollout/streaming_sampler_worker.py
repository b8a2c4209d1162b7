"""Worker of test_streaming_sampler_ranks.py: streaming_sampler_worker.py OUT, on three processes."""

import json
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch.distributed as dist
from support import forked
from support.scripted import WANTED, Scripted, drawn, indices, make_collector, some, step

from megatron_bicc import device
from megatron_bicc.rollout.types import RolloutError


def of_three_processes(out: Path, fails: bool, wanted: int) -> None:
    """One process's part; OUT_RANK.json says what it saw."""
    device.start_distributed()
    rank = dist.get_rank()
    # where one fails nobody else finds enough: only it can end the others' search
    engine, collector = Scripted((lambda _: 0) if fails else some), make_collector(prompts_per_step=wanted)
    if rank == 0 and wanted == WANTED:
        engine.next = lambda seconds: None  # nothing finishes here: the others find what is needed
    if fails and rank == 1:
        engine.fails_at = drawn(2)[1]
    report: dict = {}
    try:
        found = step(engine, collector)
        report = {
            "groups": indices(found.groups),
            "sampled": indices(found.sampled),
            "aborted": found.aborted,
        }
    except RolloutError as error:
        report = {"error": str(error)}
    report |= {"asked": engine.asked, "own_aborted": engine.aborted, "next": collector.sampler.peek(1)}
    Path(f"{out}_{rank}.json").write_text(json.dumps(report))
    device.end_distributed()


if __name__ == "__main__":
    for name, wanted in (("well", WANTED), ("fails", WANTED), ("few", 2)):
        task = partial(of_three_processes, Path(sys.argv[1]) / name, name == "fails", wanted)
        assert forked.run(task, 3) == 0
