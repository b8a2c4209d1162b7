"""Writes the HTML report of one run, or a comparison of several.

python -m megatron_bicc.report RUN [RUN ...] [--output FILE]
"""

import argparse
import sys

from megatron_bicc.errors import UserError
from megatron_bicc.report.page import write_report


def main(argv: list[str]) -> None:
    """Writes the page and prints its path. Prints a UserError as one line and exits with status 2."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_bicc.report",
        description="Writes the HTML report of a run, or a comparison of several.",
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="output directory of a run, with its metrics.jsonl"
    )
    parser.add_argument(
        "--output", metavar="FILE", help="where to write the page [report.html in the first RUN]"
    )
    arguments = parser.parse_args(argv)
    try:
        print(write_report(arguments.runs, arguments.output))
    except UserError as error:
        print(f"python -m megatron_bicc.report: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main(sys.argv[1:])
