"""Run by torchrun for test_convert_command.py: convert_worker.py reshard|memory HF_DIR OUT"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from transformers import AutoConfig

from megatron_bicc import platform
from megatron_bicc.config import Config
from megatron_bicc.policy.architecture import transformer_config
from megatron_bicc.policy.convert import export_hf, import_hf
from megatron_bicc.policy.megatron_files import load_chunks
from megatron_bicc.policy.model import PolicyModel
from megatron_bicc.policy.policy import start_model_parallel


def reshard(source: Path, out: Path) -> None:
    """HF_DIR -> checkpoint -> checkpoint written at TP=2 PP=2 -> at TP=1, each of them exported."""
    start_model_parallel(Config())
    import_hf(source, out / "megatron", allow_pickle=False)
    export_hf(out / "megatron", out / "back", side_files=None)
    previous = out / "megatron"
    for name, tensor, pipeline in (("tp2_pp2", 2, 2), ("tp1", 1, 1)):
        _load_and_save(source, previous, out / name, tensor, pipeline)
        export_hf(out / name, out / f"back_{name}", side_files=previous / "hf" if tensor == 2 else source)
        previous = out / name


def _load_and_save(source: Path, checkpoint: Path, out: Path, tensor: int, pipeline: int) -> None:
    config = Config()
    config.model.dtype = "float32"
    config.parallel.tensor, config.parallel.pipeline = tensor, pipeline
    parallel_state.destroy_model_parallel()
    start_model_parallel(config)
    hf_config = AutoConfig.from_pretrained(source)
    with platform.megatron():
        model = PolicyModel(transformer_config(hf_config, config), hf_config, temperature=1.0)
    load_chunks([model], checkpoint)
    out.mkdir(exist_ok=True)
    dist.barrier()
    with platform.megatron():
        dist_checkpointing.save({"model0": model.sharded_state_dict()}, str(out))
    parallel_state.destroy_model_parallel()
    start_model_parallel(Config())


def memory(source: Path, out: Path) -> None:
    """Prints how far the resident memory of import and of export went above that at their start, in bytes."""
    start_model_parallel(Config())
    tasks = {
        "import": lambda: import_hf(source, out / "megatron", allow_pickle=False),
        "export": lambda: export_hf(out / "megatron", out / "back", side_files=None),
    }
    print(json.dumps({name: _peak(task) for name, task in tasks.items()}))


def _peak(task: Callable[[], None]) -> int:
    Path("/proc/self/clear_refs").write_text("5")
    before = _kilobytes("VmRSS")
    task()
    return (_kilobytes("VmHWM") - before) * 1024


def _kilobytes(name: str) -> int:
    return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


if __name__ == "__main__":
    platform.start_distributed()
    {"reshard": reshard, "memory": memory}[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))
    dist.destroy_process_group()
