"""Makes several plans in one process, which belongs to no other job; writes status, output, figures as JSON.

python plan_worker.py '{"name": [argument, ...], ...}' DIRECTORY
"""

import contextlib
import io
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import plan


def attempt(arguments: list[str], figures: Path) -> dict:
    """What tools/plan.py does on the arguments."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = plan.main([*arguments, "--json", str(figures)])
    found = json.loads(figures.read_text()) if figures.is_file() else None
    return {"status": status, "out": out.getvalue(), "err": err.getvalue(), "figures": found}


if __name__ == "__main__":
    root = Path(sys.argv[2])
    results = {
        name: attempt(arguments, root / f"{number}.json")
        for number, (name, arguments) in enumerate(json.loads(sys.argv[1]).items())
    }
    (root / "out.json").write_text(json.dumps(results))
