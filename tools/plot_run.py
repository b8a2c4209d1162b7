"""`tools/plot_run.py RUN [RUN...] OUT.png`: a still picture of the runs' reward and pass@1."""

import argparse
import sys

from megatron_bicc.errors import UserError
from megatron_bicc.report.charts import save_png
from megatron_bicc.report.runs import read_run


def main(argv: list[str]) -> None:
    """Draws the picture; a mistake is one line on stderr and exit status 2."""
    parser = argparse.ArgumentParser(prog="tools/plot_run.py", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="directory of a run, with its metrics.jsonl")
    parser.add_argument("output", metavar="OUT.png")
    arguments = parser.parse_args(argv)
    if not arguments.output.endswith(".png"):
        parser.error(f"{arguments.output} is not named .png; the last argument is the picture")
    try:
        save_png([read_run(run) for run in arguments.runs], arguments.output)
    except (UserError, ValueError, OSError) as error:
        print(f"tools/plot_run.py: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main(sys.argv[1:])
