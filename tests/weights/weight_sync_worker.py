"""Run by torchrun: two processes sync to one server from several layouts; then the first one is killed.

torchrun --nproc-per-node 2 weight_sync_worker.py MODEL OUT URL

OUT/finished then holds the names of the layouts whose sync was verified.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.model_parallel import leave_model_parallel
from support.steps import TOKENIZER, make_config
from support.weight_sync import make_sync, stream

from megatron_bicc import device
from megatron_bicc.config import SglangConfig
from megatron_bicc.model.policy import start_model_parallel
from megatron_bicc.sglang.pool import ServerPool, wait_until_ready
from megatron_bicc.training.learner import Learner
from megatron_bicc.weights import sync as weight_sync
from megatron_bicc.weights.hf_weights import load_policy
from megatron_bicc.weights.sync import ServerWeightSync
from megatron_bicc.weights.transport import WeightSyncError

LAYOUTS = {
    "dp2": ("disk", {}),
    "pp2": ("distributed", {"pipeline": 2}),
    "ep2": ("distributed", {"expert": 2}),
    "tp2": ("tensor", {"tensor": 2, "sequence": True}),
    "cp2 ep2": ("tensor", {"context": 2, "expert": 2}),
    "tp2 ep2": ("tensor", {"tensor": 2, "sequence": True, "expert": 2}),
}
"""Name: (weight_sync.method, settings of parallel)"""


def refused(sync: ServerWeightSync, learner: Learner) -> str:
    """What every process says when the first one cannot write its files."""
    root = sync.files.root
    root.parent.mkdir(parents=True, exist_ok=True)
    sync.files.remove()
    root.write_text("no directory")
    try:
        sync.push(stream(learner), 3)
    except WeightSyncError as error:
        return str(error)
    finally:
        root.unlink()
    return ""


def start(layout: dict[str, int], method: str, arguments: list[str]) -> Learner:
    """The policy, cut by a layout."""
    model, out, _ = arguments
    config = make_config(Path(model), "grpo")
    config.output_dir = out
    config.weight_sync.method, config.weight_sync.bucket_mb = method, 0.03
    config.weight_sync.keep_files = True
    for name, size in layout.items():
        setattr(config.parallel, name, size)
    leave_model_parallel()
    start_model_parallel(config)
    return Learner(config, load_policy(config), TOKENIZER)


def check(name: str, number: int, arguments: list[str], pool: ServerPool) -> None:
    """Verified by log-probs, with checksums and without; and an error of one process is every process's."""
    method, layout = LAYOUTS[name]
    learner = start(layout, method, arguments)
    for module in learner.policy.modules:
        for parameter in module.parameters():
            parameter.data *= 1 + number / 10
    sync = make_sync(learner.config, learner, pool)
    assert sync.push(stream(learner), 1) == {}
    assert bool(sync._confirmed) == bool(pool.own)
    comparable, weight_sync.comparable = weight_sync.comparable, lambda receiver: False
    assert sync.push(stream(learner), 2) == {}
    weight_sync.comparable = comparable
    assert "rank_0" in refused(sync, learner)
    sync.close()


def die(arguments: list[str], pool: ServerPool) -> None:
    """kill -9 of the first process in the middle of a sync, once the server has loaded the first bucket.

    While it opens the memory of one, it would end with this process (docs/weight_sync.md).
    """
    learner = start({"pipeline": 2}, "tensor", arguments)
    sync = make_sync(learner.config, learner, pool)
    send = sync._send

    def die_after(*sent: Any) -> None:
        send(*sent)
        os.kill(os.getpid(), signal.SIGKILL)

    sync._send = die_after
    sync.push(stream(learner), 5)


def main(arguments: list[str]) -> None:
    """All layouts, then the end."""
    device.start_distributed()
    url = arguments[2]
    pool = ServerPool([url], [url] if dist.get_rank() == 0 else [], SglangConfig())
    for client in pool.own:
        pool.portal.call(wait_until_ready, client, 600)
    for number, name in enumerate(LAYOUTS, 1):
        check(name, number, arguments, pool)
    if pool.own:
        Path(arguments[1], "finished").write_text(", ".join(LAYOUTS))
    die(arguments, pool)


if __name__ == "__main__":
    main(sys.argv[1:])
