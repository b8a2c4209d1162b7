#!/usr/bin/env python
"""Runs a benchmark of megatron_bicc: one sub-command for each module of tools/benchmarks.

A module has `add_arguments` and `run`, which prints tables and returns the figures that --json writes. A
trailing underscore keeps its name from being a keyword, as in async_.
"""

import argparse
import importlib
import json
import sys
from pathlib import Path

TOOLS = Path(__file__).resolve().parent
sys.path[:0] = [str(TOOLS), str(TOOLS.parent)]


def main() -> None:
    """Runs the benchmark that the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="benchmark", required=True)
    modules = {}
    for path in sorted((TOOLS / "benchmarks").glob("[!_]*.py")):
        name = path.stem.rstrip("_")
        modules[name] = importlib.import_module(f"benchmarks.{path.stem}")
        command = commands.add_parser(name, help=modules[name].__doc__.splitlines()[0])
        command.add_argument("--json", type=Path, help="write the figures to this file")
        modules[name].add_arguments(command)
    arguments = parser.parse_args()
    figures = modules[arguments.benchmark].run(arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
