"""Does several dry runs in one process, which belongs to no other job; writes their output as JSON.

python dry_run_worker.py '[[world_size, [argument, ...], rank], ...]' out.json
"""

import contextlib
import io
import json
import os
import sys
import time

from megatron_bicc.train import main


def attempt(world_size: int, arguments: list[str], rank: int = 0) -> dict:
    """Exit status, what it printed, and seconds."""
    os.environ |= {"WORLD_SIZE": str(world_size), "RANK": str(rank)}
    out, err, status, start = io.StringIO(), io.StringIO(), 0, time.monotonic()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([*arguments, "--dry-run"])
        except SystemExit as ended:
            status = ended.code
    seconds = time.monotonic() - start
    return {"status": status, "out": out.getvalue(), "err": err.getvalue(), "seconds": seconds}


if __name__ == "__main__":
    results = [attempt(*case) for case in json.loads(sys.argv[1])]
    with open(sys.argv[2], "w") as file:
        json.dump(results, file)
