"""Worker of test_convert_command.py: convert_worker.py OUT; converts OUT/small, experts and large*."""

import importlib.util
import json
import re
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch.distributed as dist
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from megatron_bicc import device
from megatron_bicc.checkpoint.checkpoint import collect_tensors, write_tensors
from megatron_bicc.checkpoint.convert import export_hf, import_hf
from megatron_bicc.checkpoint.megatron_files import load_chunks
from megatron_bicc.config import Config, ParallelConfig
from megatron_bicc.model.build import PolicyModel, transformer_config
from megatron_bicc.model.policy import start_model_parallel

sys.path.insert(0, str(Path(__file__).parents[1]))

from support import forked
from support.model_parallel import leave_model_parallel


def command(*arguments: object) -> None:
    """tools/convert_hf_checkpoint.py as one process of a job."""
    path = Path(__file__).parents[2] / "tools/convert_hf_checkpoint.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    raise SystemExit(module.main([str(argument) for argument in arguments]))


def reshard(source: Path, imported: Path, layouts: dict[str, ParallelConfig]) -> None:
    """A checkpoint loaded and saved under each layout in turn, and an export of each: SOURCE_LAYOUT_back."""
    device.start_distributed()
    previous, side_files = imported, imported / "hf"
    for name, layout in layouts.items():
        saved = source.with_name(f"{source.name}_{name}")
        _load_and_save(source, previous, saved, layout)
        export_hf(saved, saved.with_name(f"{saved.name}_back"), side_files)
        leave_model_parallel()
        previous = saved


def _load_and_save(source: Path, checkpoint: Path, out: Path, layout: ParallelConfig) -> None:
    config = Config(parallel=layout)
    config.model.dtype = "float32"
    start_model_parallel(config)
    hf_config = AutoConfig.from_pretrained(source)
    with device.megatron():
        model = PolicyModel(transformer_config(hf_config, config), hf_config, temperature=1.0)
    load_chunks([model], checkpoint)
    out.mkdir(exist_ok=True)
    dist.barrier()
    with device.megatron():
        tensors = collect_tensors(out, {"model0": model.sharded_state_dict()})
    write_tensors(out, tensors, dist.group.WORLD)
    leave_model_parallel()
    start_model_parallel(Config())


def memory(source: Path) -> dict[str, int]:
    """How far the resident memory of import and of export goes above that at their start, in bytes."""
    imported, back = (source.with_name(f"{source.name}_{suffix}") for suffix in ("megatron", "back"))
    tasks = {
        "import": lambda: import_hf(source, imported, allow_pickle=False),
        "export": lambda: export_hf(imported, back, side_files=None),
    }
    return {name: _peak(task) for name, task in tasks.items()}


def _peak(task: Callable[[], None]) -> int:
    Path("/proc/self/clear_refs").write_text("5")
    before = _kilobytes("VmRSS")
    task()
    return (_kilobytes("VmHWM") - before) * 1024


def _kilobytes(name: str) -> int:
    return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def with_another_tensor(source: Path, target: Path) -> Path:
    """A copy of a Hugging Face directory in which one tensor is another one."""
    shutil.copytree(source, target)
    shard = sorted(target.glob("*.safetensors"))[0]
    tensors = load_file(shard)
    tensors[min(tensors)] += 0.1
    save_file(tensors, shard, metadata={"format": "pt"})
    return target


def main(out: Path) -> None:
    source, imported = out / "small", out / "small_megatron"
    other = with_another_tensor(source, out / "other")
    commands = {
        "import": ("import", source, imported, "--tp", 2, "--pp", 2),
        "export": ("export", imported, out / "back"),
        "verify": ("verify", source, imported, "--prompts", 3),
        "other": ("verify", other, imported),
        "taken": ("export", imported, out / "back"),
    }
    report: dict[str, object] = {
        name: forked.run(partial(command, *arguments), processes=4 if name == "import" else 2)
        for name, arguments in commands.items()
    }
    dense = {"tp2_pp2": ParallelConfig(tensor=2, pipeline=2), "tp1": ParallelConfig()}
    report["reshard"] = forked.run(partial(reshard, source, imported, dense), processes=4)
    moe = {"ep2": ParallelConfig(expert=2), "tp2_ep2": ParallelConfig(tensor=2, sequence=True, expert=2)}
    experts, imported = out / "experts", out / "experts_megatron"
    report["import experts"] = forked.run(
        partial(command, "import", experts, imported, "--ep", 2), processes=2
    )
    report["reshard experts"] = forked.run(partial(reshard, experts, imported, moe), processes=2)
    # after this the process can fork no more jobs
    device.start_distributed()
    start_model_parallel(Config())
    report["memory"] = {name: memory(out / name) for name in ("large", "large_experts")}
    (out / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
