"""Draws reward and pass@1 of one or several runs as a PNG.

python tools/plot_run.py RUN [RUN ...] OUT.png
"""

import argparse
import sys

from megatron_bicc.errors import UserError
from megatron_bicc.report.charts import save_png
from megatron_bicc.report.runs import read_run


def main(argv: list[str]) -> None:
    """Draws the picture. Prints an error as one line and exits with status 2."""
    parser = argparse.ArgumentParser(prog="tools/plot_run.py", description=__doc__.splitlines()[0])
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="output directory of a run, with its metrics.jsonl"
    )
    parser.add_argument("output", metavar="OUT.png", help="the picture to write")
    arguments = parser.parse_args(argv)
    if not arguments.output.endswith(".png"):
        parser.error(f"{arguments.output} does not end in .png; the last argument is the picture to write")
    try:
        save_png([read_run(run) for run in arguments.runs], arguments.output)
    except (UserError, OSError) as error:
        print(f"tools/plot_run.py: error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main(sys.argv[1:])
