#!/usr/bin/env python
"""Checks on this machine what only a GPU can show, and what a CPU can of the same: one table, one JSON file.

tools/gpu_check.py [PART ...] [--out runs/gpu_check]

Each part is a module of tools/gpu_checks and runs in a process of its own: after a crash the others still
run. A check has a figure and a bound, or is skipped with a reason. OUT gets checks.json and a log file for
each part. The exit status is 1 if a check failed, and 2 if OUT cannot be written.
"""

import argparse
import importlib
import json
import subprocess
import sys
import time
from pathlib import Path

TOOLS = Path(__file__).resolve().parent
sys.path[:0] = [str(TOOLS), str(TOOLS.parent), str(TOOLS.parent / "tests")]

from gpu_checks._check import Check, Skip  # noqa: E402 found on the path above

PARTS = (
    "environment",
    "kernels",
    "attention",
    "log_probs",
    "step",
    "backends",
    "layouts",
    "checkpoint",
    "sync",
    "colocate",
    "speed",
)
TIMEOUT_S = 3600.0
"""Of one part"""
TAIL = 5
"""Lines of a failed part's log that the table shows"""


def main(argv: list[str]) -> int:
    """Runs the parts that the command line names, or all; returns the exit status."""
    arguments = _parser().parse_args(argv)
    if arguments.in_this_process:
        run_part(arguments.parts[0], arguments.out)
        return 0
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "checks.json").write_text("[]\n")  # those of an earlier start are not this one's
    except OSError as error:
        why = f"it cannot be written to: {error.strerror}"
        print(f"gpu_check: error: --out is {arguments.out}; {why}: give a directory", file=sys.stderr)
        return 2
    parts = arguments.parts or list(PARTS)
    checks: list[Check] = []
    for number, part in enumerate(parts, 1):
        print(f"[{number}/{len(parts)}] {part}: {_first_line(part)}", flush=True)
        start = time.monotonic()
        found = _checks_of(part, arguments.out)
        print(*(check.line() for check in found), sep="\n", flush=True)
        print(f"    {time.monotonic() - start:.0f} s", flush=True)
        checks += found
    (arguments.out / "checks.json").write_text(json.dumps([vars(c) for c in checks], indent=2) + "\n")
    return _summary(checks, arguments.out)


def run_part(part: str, out: Path) -> None:
    """Runs a part here; appends each check to OUT/PART.jsonl as soon as it is done."""
    module = importlib.import_module(f"gpu_checks.{part}")
    with (out / f"{part}.jsonl").open("a", buffering=1) as file:
        try:
            for check in module.run(out):
                file.write(json.dumps(vars(check) | {"part": part}) + "\n")
        except Skip as skip:
            file.write(json.dumps(vars(Check("all", "skipped", reason=str(skip), part=part))) + "\n")


def _checks_of(part: str, out: Path) -> list[Check]:
    """Runs a part in a process of its own and returns its checks, and one more if the process failed."""
    results, log = out / f"{part}.jsonl", out / f"{part}.log"
    results.write_text("")
    command = [sys.executable, __file__, part, "--out", str(out.absolute()), "--in-this-process"]
    with log.open("w") as file:
        try:
            done = subprocess.run(command, cwd=TOOLS.parent, stdout=file, stderr=file, timeout=TIMEOUT_S)
            status = done.returncode
            reason = f"exit status {status}"
        except subprocess.TimeoutExpired:
            status, reason = 1, f"not ended after {TIMEOUT_S:.0f} s"
    checks = [Check(**json.loads(line)) for line in results.read_text().splitlines()]
    if status:
        last = " | ".join(log.read_text().strip().splitlines()[-TAIL:])
        checks.append(Check("process", "failed", reason=f"{reason}, see {log}: {last}", part=part))
    return checks


def _summary(checks: list[Check], out: Path) -> int:
    counts = {result: sum(c.result == result for c in checks) for result in ("passed", "failed", "skipped")}
    listed = ", ".join(f"{count} {result}" for result, count in counts.items())
    print(f"{listed}; figures in {out / 'checks.json'}")
    for check in checks:
        if check.result == "failed":
            print(f"failed: {check.part}: {check.line().strip()}")
    return 1 if counts["failed"] else 0


def _first_line(part: str) -> str:
    text = (TOOLS / "gpu_checks" / f"{part}.py").read_text()
    return text.removeprefix('"""').partition("\n")[0].removesuffix('"""')


def _parser() -> argparse.ArgumentParser:
    listed = "\n".join(f"  {part:12} {_first_line(part)}" for part in PARTS)
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\nparts:\n{listed}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", choices=PARTS, metavar="PART", help="parts to run (all)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/gpu_check"), help="directory of the results (%(default)s)"
    )
    parser.add_argument("--in-this-process", action="store_true", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
