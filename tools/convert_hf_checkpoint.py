"""Converts between a Hugging Face directory and megatron-core's distributed checkpoint.

python tools/convert_hf_checkpoint.py import HF_DIR OUT [--tp 2 --pp 2]
python tools/convert_hf_checkpoint.py export MEGATRON_DIR OUT [--hf HF_DIR]
python tools/convert_hf_checkpoint.py verify HF_DIR MEGATRON_DIR [--tolerance 1e-4]

All commands also run under torchrun, and then split the work between the processes. A checkpoint loads under
every layout; --tp, --pp and --ep only check that the model fits that layout. MEGATRON_DIR may be the
checkpoint of a training run.
"""

import argparse
import sys
from pathlib import Path

import torch.distributed as dist

from megatron_bicc import device
from megatron_bicc.checkpoint.compare_logits import largest_difference
from megatron_bicc.checkpoint.convert import export_hf, import_hf
from megatron_bicc.config import Config, ParallelConfig
from megatron_bicc.errors import UserError
from megatron_bicc.model.families import check_layout, supported_config
from megatron_bicc.model.policy import start_model_parallel


def main(argv: list[str]) -> int:
    """Calls `run` with megatron-core's process groups. Returns the exit status."""
    try:
        device.start_distributed()
    except UserError as error:
        return _failed(error)
    start_model_parallel(Config())
    try:
        return run(argv)
    finally:
        dist.destroy_process_group()


def run(argv: list[str]) -> int:
    """Returns the exit status: 0; 1 if logits differ too much; 2 for bad input, with one line on stderr."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except UserError as error:
        return _failed(error)


def _failed(error: UserError) -> int:
    print(f"convert_hf_checkpoint: error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


def _import(arguments: argparse.Namespace) -> int:
    layout = ParallelConfig(
        tensor=arguments.tp, sequence=arguments.tp > 1, pipeline=arguments.pp, expert=arguments.ep
    )
    check_layout(supported_config(arguments.source), layout)
    import_hf(arguments.source, arguments.target, arguments.allow_pickle)
    return 0


def _export(arguments: argparse.Namespace) -> int:
    export_hf(arguments.source, arguments.target, arguments.hf)
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    difference, largest = largest_difference(
        arguments.hf, arguments.source, arguments.prompts, arguments.length
    )
    within = difference <= arguments.tolerance * max(1.0, largest)
    if dist.get_rank() == 0:
        print(f"largest difference of a logit {difference:.3e}, of logits up to {largest:.3e}, in float32")
        if not within:
            print(f"over the tolerance {arguments.tolerance:.1e} of the largest logit", file=sys.stderr)
    return 0 if within else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="import|export|verify")

    command = commands.add_parser("import", help="Hugging Face directory -> distributed checkpoint")
    command.set_defaults(run=_import)
    command.add_argument("source", type=Path, metavar="HF_DIR")
    command.add_argument("target", type=Path, metavar="OUT")
    for layout, name in (("tp", "tensor"), ("pp", "pipeline"), ("ep", "expert")):
        text = f"check that the model fits this {name}-parallel size [1]"
        command.add_argument(f"--{layout}", type=_positive, default=1, metavar="N", help=text)
    text = "read pytorch_model.bin if there are no safetensors; only from a source that you trust"
    command.add_argument("--allow-pickle", action="store_true", help=text)

    command = commands.add_parser("export", help="distributed checkpoint -> Hugging Face directory")
    command.set_defaults(run=_export)
    command.add_argument("source", type=Path, metavar="MEGATRON_DIR")
    command.add_argument("target", type=Path, metavar="OUT")
    text = "directory of config.json and tokenizer [MEGATRON_DIR/hf]"
    command.add_argument("--hf", type=Path, metavar="HF_DIR", help=text)

    command = commands.add_parser("verify", help="compare logits with transformers on random prompts")
    command.set_defaults(run=_verify)
    command.add_argument("hf", type=Path, metavar="HF_DIR")
    command.add_argument("source", type=Path, metavar="MEGATRON_DIR")
    command.add_argument("--prompts", type=_positive, default=4, metavar="N", help="random prompts [4]")
    text = "tokens of the longest prompt; others are 1/2, 1/4 and 1/8 of it [4608, or the model's maximum]"
    command.add_argument("--length", type=_positive, default=None, metavar="N", help=text)
    text = "largest difference allowed, as a share of the largest logit [1e-4]"
    command.add_argument("--tolerance", type=float, default=1e-4, metavar="X", help=text)
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
