"""`python -m megatron_bicc.report RUN [RUN ...]`: the page of a run, or of several against each other."""

import argparse
import sys

from megatron_bicc.errors import UserError
from megatron_bicc.report.page import write_report


def main(argv: list[str]) -> None:
    """Prints the path of the page; a mistake is one line on stderr and exit status 2."""
    parser = argparse.ArgumentParser(prog="python -m megatron_bicc.report", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="directory of a run, with its metrics.jsonl")
    parser.add_argument("--output", metavar="FILE", help="the page [report.html in the first RUN]")
    arguments = parser.parse_args(argv)
    try:
        print(write_report(arguments.runs, arguments.output))
    except UserError as error:
        print(f"python -m megatron_bicc.report: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main(sys.argv[1:])
