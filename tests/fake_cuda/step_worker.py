"""Takes steps on a fake cuda:0, every one in a forked process.

step_worker.py ORDERS: a JSON file {"cases": [fields of Case, ...], "models": directory, "reports": directory,
"paths": entries of sys.path}. Case i writes REPORTS/i.json: what Watch counted, types of the state, buckets;
or {"error": traceback}.
"""

import functools
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from fake_cuda import device_guard
from fake_cuda.cases import Case
from support import forked


def main(orders: dict) -> None:
    """Takes the steps, one after another."""
    sys.path[:0] = orders["paths"]
    device_guard.load()
    from fake_cuda.step import report  # torch, which must find the device

    for i, fields in enumerate(orders["cases"]):
        path = Path(orders["reports"], f"{i}.json")
        forked.wait(
            [forked.fork(functools.partial(report, Case(**fields), Path(orders["models"]), path), {})]
        )


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
