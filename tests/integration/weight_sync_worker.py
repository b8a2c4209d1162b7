"""Run by torchrun: two processes that sync to one server from several layouts; then the first is killed.

torchrun --nproc-per-node 2 weight_sync_worker.py MODEL OUT URL
"""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from anyio.from_thread import BlockingPortal, start_blocking_portal
from megatron.core import parallel_state

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.steps import TOKENIZER, make_config

from megatron_bicc import platform
from megatron_bicc.policy.hf_weights import hf_tensors
from megatron_bicc.policy.policy import Policy, start_model_parallel
from megatron_bicc.rollout.sglang.client import ServerClient
from megatron_bicc.training.learner import Learner
from megatron_bicc.weight_sync import proof
from megatron_bicc.weight_sync.errors import WeightSyncError
from megatron_bicc.weight_sync.servers import WeightSync

LAYOUTS = {"tp2": {"tensor": 2}, "pp2": {"pipeline": 2}}


def stream(learner: Learner) -> Iterator[tuple[str, torch.Tensor]]:
    """The policy's tensors. Collective."""
    with platform.megatron():
        yield from hf_tensors(learner.policy.modules, learner.policy.hf_config)


def refused(sync: WeightSync, clients: list[ServerClient], learner: Learner) -> str:
    """What every process says when the first one cannot write its files."""
    root = sync.files.root
    root.parent.mkdir(parents=True, exist_ok=True)
    sync.files.remove()
    root.write_text("no directory")
    try:
        sync.push(clients, stream(learner), 3)
    except WeightSyncError as error:
        return str(error)
    finally:
        root.unlink()
    return ""


def run(layout: dict[str, int], method: str, arguments: list[str], portal: BlockingPortal) -> None:
    """Proven by checksums, by log-probs; and an error of one process is every process's."""
    model, out, url = arguments
    config = make_config(Path(model), "grpo")
    config.output_dir = out
    config.weight_sync.method, config.weight_sync.bucket_mb = method, 0.03
    for name, size in layout.items():
        setattr(config.parallel, name, size)
    parallel_state.destroy_model_parallel()
    start_model_parallel(config)
    learner = Learner(config, Policy(config), TOKENIZER)
    for module in learner.policy.modules:
        for parameter in module.parameters():
            parameter.data *= 1.25
    clients = [ServerClient(url)] if dist.get_rank() == 0 else []
    sync = WeightSync(config, learner, portal.call)
    assert sync.push(clients, stream(learner), 1) == {}
    assert not sync.proof.doubts
    known, proof.are_known = proof.are_known, lambda info: False
    assert sync.push(clients, stream(learner), 2) == {}
    assert bool(sync.proof.doubts) == bool(clients)
    proof.are_known = known
    assert "rank_0" in refused(sync, clients, learner)
    assert sync.push(clients, stream(learner), 4) == {}
    sync.close()
    for client in clients:
        portal.call(client.aclose)


def die(arguments: list[str], portal: BlockingPortal) -> None:
    """kill -9 of the first process in the middle of a sync."""
    model, out, url = arguments
    config = make_config(Path(model), "grpo")
    config.output_dir, config.parallel.pipeline, config.weight_sync.bucket_mb = out, 2, 0.03
    learner = Learner(config, Policy(config), TOKENIZER)
    clients = [ServerClient(url)] if dist.get_rank() == 0 else []

    def dying() -> Iterator[tuple[str, torch.Tensor]]:
        for i, item in enumerate(stream(learner)):
            if i == 8 and clients:
                os.kill(os.getpid(), signal.SIGKILL)
            yield item

    WeightSync(config, learner, portal.call).push(clients, dying(), 5)


if __name__ == "__main__":
    platform.start_distributed()
    with start_blocking_portal() as loop:
        for method, layout in zip(("tensor", "distributed"), LAYOUTS.values(), strict=True):
            run(layout, method, sys.argv[1:], loop)
        if dist.get_rank() == 0:
            Path(sys.argv[2], "finished").write_text(" ".join(LAYOUTS))
        die(sys.argv[1:], loop)
