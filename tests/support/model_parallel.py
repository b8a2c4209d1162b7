"""Ends megatron-core's process groups, so that a test's process can make those of another layout."""

import gc

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch import Tensor


def leave_model_parallel() -> None:
    """Ends the process groups of `start_model_parallel`, which megatron-core only forgets.

    Each gloo group has three threads, one of which wakes up every 10 ms: hundreds of groups keep a core busy.
    Its threads end with the last reference, so policies of these groups must have been dropped.
    """
    for x in gc.get_objects():
        # both keep hooks of an autograd graph that refer to the policy; the garbage collector cannot see them
        if type(x) is DistributedDataParallel:
            x.grad_accs.clear()
        elif type(x) is MoEAlltoAllTokenDispatcher:
            kept = [name for name, value in vars(x).items() if isinstance(value, Tensor)]
            vars(x).update(dict.fromkeys(kept))
    gc.collect()
    parallel_state.destroy_model_parallel()
    groups = dist.distributed_c10d._world.pg_map
    for group in list(groups):
        # one that megatron-core made under several names has ended with the first
        if group is not dist.group.WORLD and groups.get(group) is not None:
            dist.destroy_process_group(group)
