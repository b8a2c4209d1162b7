"""Tests `tools/benchmark.py sync` on a real server; its memory figure bounds the trainer's side of a sync."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.sglang_server import PYTHON, quick_start

REPOSITORY = Path(__file__).parents[2]
BUCKET_MB = 2
SLACK = 8 * 2**20
"""What is put together, hashed and sent at a time, and the noise of a process's resident memory"""

pytestmark = [
    pytest.mark.timeout(900),  # a busy machine needs minutes to start a server
    pytest.mark.skipif(not PYTHON.exists(), reason="there is no .venv-sglang: make sglang"),
]


def test_bytes_rates_and_peak_memory(tmp_path: Path) -> None:
    """A model of 16 buckets: a sync that held all of it, or sent what it never cleared, would show. A bucket
    is sent while the next one is gathered."""
    options = f"--hidden 256 --layers 12 --bucket-mb {BUCKET_MB} --repeats 1 --json {tmp_path}/figures.json"
    command = [sys.executable, "-W", "ignore", "tools/benchmark.py", "sync", *options.split()]
    env = os.environ | quick_start()
    done = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "checksums differ" not in done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    bucket = figures["bucket_bytes"]
    assert bucket == BUCKET_MB * 2**20
    assert figures["bytes"] > 16 * bucket
    plain, load = figures["plain"], figures["load_seconds"]
    assert plain.keys() == {"memory", "loopback", "broadcast", "file"}
    for method in ("tensor", "distributed", "disk"):
        found = figures[method]
        assert found["gb_per_s"] == pytest.approx(figures["bytes"] / found["seconds"] / 1e9)
        assert 0 < found["transport"] + found["checksums"] + found["probe"] < found["seconds"]
        # one process: its buckets are views of the parameters
        assert 0 < found["peak_bytes"] < 2 * bucket + SLACK < figures["bytes"] / 2, method
        assert f"{method:12} seconds" in done.stdout
    copies = (figures["tensor"]["transport"] - load) / plain["memory"]
    assert figures["ratios"]["tensor: memory copies beside the load"] == pytest.approx(copies)
