"""Trains every arm of tools/experiment/arms.py, then writes docs/results.md, its pictures and raw figures.

Runs that are finished in --out are not repeated: after a kill, the same command resumes.
"""

import argparse
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiment.arms import jobs
from experiment.page import collect_figures, write_page
from experiment.runner import REPOSITORY, RunError, Runner

from megatron_bicc.errors import UserError


def main(argv: list[str]) -> None:
    """Runs, collects and reports. Prints an error as one line and exits with status 2."""
    parser = argparse.ArgumentParser(prog="tools/run_experiment.py", description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=REPOSITORY / "runs/experiment", help="directory of the runs"
    )
    parser.add_argument("--docs", type=Path, default=REPOSITORY / "docs", help="directory of results.md")
    parser.add_argument("--workers", type=int, default=2, help="concurrent runs, one core each [2]")
    parser.add_argument("--only-runs", action="store_true", help="run, but write no page")
    parser.add_argument("--so-far", action="store_true", help="write the page from the finished runs")
    parser.add_argument("--only-report", action="store_true", help="write the page from docs/results only")
    options = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("interrupted; the same command resumes"))
    try:
        if not options.only_report and not options.so_far:
            Runner(options.out.resolve(), options.workers).run(jobs())
        if not options.only_report and not options.only_runs:
            collect_figures(options.out.resolve(), options.docs / "results")
        if not options.only_runs:
            print(write_page(options.docs))
    except (UserError, RunError) as error:
        print(f"tools/run_experiment.py: error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main(sys.argv[1:])
