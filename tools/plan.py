#!/usr/bin/env python
"""Estimates memory, traffic and step time of a run on any number of GPUs, and lists layouts that fit.

tools/plan.py --config examples/configs/llama_70b.yaml --gpu H100 --world-size 64 [section.name=value ...]
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_bicc.algorithms.presets import resolve
from megatron_bicc.cli import parse_config
from megatron_bicc.errors import UserError
from megatron_bicc.model.families import supported_config
from megatron_bicc.planning.cost import GPUS, Cluster
from megatron_bicc.planning.dry_run import tokenizer_or_estimate
from megatron_bicc.planning.layouts import (
    Plan,
    as_json,
    as_text,
    by_context,
    draw,
    make_plan,
    proposals,
    propose,
)
from megatron_bicc.planning.shards import data_parallel_size
from megatron_bicc.planning.synthetic import synthetic_step
from megatron_bicc.startup import check_lengths, validate

BYTES_PER_GBIT = 1e9 / 8


def main(argv: list[str]) -> int:
    """Prints the plan; returns the exit status: 0; 1 if it does not fit; 2 for bad input, with one line."""
    arguments = _parser().parse_intermixed_args(argv)
    try:
        plan, others = _plans(arguments)
    except UserError as error:
        print(f"plan: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(as_text(plan))
    if arguments.propose:
        best = others[: arguments.propose]
        print(f"\nlayouts that fit, the {len(best)} best of {len(others)}:\n{proposals(best)}")
        print(f"\nthe best by context-parallel ranks:\n{by_context(others)}")
    try:
        _write(arguments, plan, others[: arguments.propose])
    except OSError as error:
        print(f"plan: error: cannot be written: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0 if plan.fits else 1


def _write(arguments: argparse.Namespace, plan: Plan, others: list[Plan]) -> None:
    if arguments.json:
        figures = {"plan": as_json(plan), "proposals": [as_json(other) for other in others]}
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    if arguments.picture:
        draw([plan, *others], arguments.picture)


def _count(text: str) -> int:
    """Parses a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return int(text)


def _picture(text: str) -> Path:
    """Parses the file name of a picture; its suffix selects the format."""
    if Path(text).suffix not in (".png", ".pdf", ".svg"):
        raise argparse.ArgumentTypeError(f"{text} must end in .png, .pdf or .svg")
    return Path(text)


def _positive(text: str) -> float:
    """Parses a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value


def _plans(arguments: argparse.Namespace) -> tuple[Plan, list[Plan]]:
    """Returns the plan of the configuration, and with --propose all layouts that fit, the fastest first."""
    # a dry run does not require prompts
    config = parse_config(["--config", arguments.config, *arguments.settings, "dry_run=true"], "plan")
    validate(config, arguments.world_size)
    config = resolve(config)
    hf_config = supported_config(config.model.path)
    check_lengths(config, hf_config)
    tokenizer = tokenizer_or_estimate(config.model.path)
    cluster = Cluster(
        GPUS[arguments.gpu],
        arguments.gpus_per_host,
        arguments.network_gbits * BYTES_PER_GBIT,
        arguments.sync_gbits * BYTES_PER_GBIT,
        arguments.efficiency,
    )
    data_parallel = data_parallel_size(config.parallel, arguments.world_size)
    step = synthetic_step(config, hf_config, tokenizer, data_parallel)
    common = (hf_config, arguments.world_size)
    plan = make_plan(config, *common, step, cluster, arguments.server_gpus)
    if not arguments.propose:
        return plan, []
    return plan, propose(config, *common, cluster, arguments.server_gpus, tokenizer)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="YAML file of settings")
    parser.add_argument("--gpu", choices=GPUS, default="H100")
    parser.add_argument("--world-size", type=_count, required=True, help="GPUs that train")
    parser.add_argument("--gpus-per-host", type=_count, default=8)
    parser.add_argument("--server-gpus", type=_count, default=8, help="GPUs of one rollout server")
    parser.add_argument("--network-gbits", type=_positive, default=400, help="per GPU, to another host")
    parser.add_argument(
        "--sync-gbits",
        type=_positive,
        default=160,
        help="all training GPUs to the servers, for weight_sync.method=distributed",
    )
    parser.add_argument(
        "--efficiency", type=_positive, default=0.40, help="share of peak that matrix products reach"
    )
    parser.add_argument("--propose", type=_count, default=0, metavar="N", help="show the N best layouts")
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    parser.add_argument("--picture", type=_picture, help="draw memory and step time to this file")
    parser.add_argument("settings", nargs="*", help="section.name=value")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
