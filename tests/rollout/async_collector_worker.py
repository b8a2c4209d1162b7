"""Worker of test_async_collector_ranks.py: async_collector_worker.py OUT, on two processes."""

import json
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch.distributed as dist
from support import forked
from support.scripted import Scripted, indices, make_collector, some, step

from megatron_bicc import device
from megatron_bicc.rollout.types import RolloutError

STEPS = 4


def of_two_processes(out: Path, fails: bool) -> None:
    """One process's part: four steps, the last two after a resume. OUT_RANK.json says what it saw."""
    device.start_distributed()
    rank = dist.get_rank()

    def make() -> tuple:
        # the second process's engine is slower: its groups finish later, and some become too old
        engine = Scripted(some, lambda p: (1 + p % 5) * (0.01, 0.5)[rank])
        collector = make_collector(STEPS, max_staleness=1)
        return engine, collector

    engine, collector = make()
    report: dict = {"steps": [], "states": [], "asked": []}
    try:
        for number in range(1, STEPS + 1):
            if number == 3:
                state = collector.state_dict()
                asked, (engine, collector) = engine.asked, make()
                collector.load_state_dict(state)
                report |= {"asked_before": asked, "again": [row for _, row in state["in_flight"]]}
            if fails and rank == 1:
                engine.fails_at = engine.asked[-1] if engine.asked else None
            found = step(engine, collector, number)
            groups = [[g.rewards.tolist(), g.texts, len(g.samples)] for g in found.groups]
            report["steps"].append([indices(found.groups), indices(found.sampled), groups, vars(found.queue)])
            report["states"].append(collector.state_dict())
            report["asked"].append(list(engine.asked))
            engine.now += 0.02
        collector.close()
    except RolloutError as error:
        report["error"] = str(error)
    report |= {"left": len(engine.running), "aborted": engine.aborted}
    Path(f"{out}_{rank}.json").write_text(json.dumps(report))
    device.end_distributed()


if __name__ == "__main__":
    for name in ("well", "fails"):
        assert forked.run(partial(of_two_processes, Path(sys.argv[1]) / name, name == "fails"), 2) == 0
