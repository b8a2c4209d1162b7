"""`python -m megatron_bicc.report RUN [--compare RUN]`: draws report.html of a run anew."""

import argparse
import sys

from megatron_bicc.monitoring.report import write_report


def main(argv: list[str]) -> None:
    """Prints the path of the page; a mistake is one line on stderr and exit status 2."""
    parser = argparse.ArgumentParser(prog="python -m megatron_bicc.report", description=__doc__)
    parser.add_argument("run", help="directory of the run, with its metrics.jsonl")
    parser.add_argument("--compare", metavar="RUN", help="another run, whose curves are drawn beside")
    parser.add_argument("--groups", type=int, default=6, help="groups shown rollout by rollout [6]")
    arguments = parser.parse_args(argv)
    try:
        print(write_report(arguments.run, arguments.compare, arguments.groups))
    except ValueError as error:
        print(f"python -m megatron_bicc.report: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main(sys.argv[1:])
