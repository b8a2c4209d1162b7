"""Logits under tensor parallel; tests/integration/test_logits_match_hf.py has those of one process."""

import subprocess
import sys
from pathlib import Path

WORKER = Path(__file__).with_name("logits_worker.py")
TINY_POLICY = Path(__file__).parents[2] / "examples/tiny_policy"


def test_two_processes_give_the_logits_of_transformers(model_dirs: dict[str, Path]) -> None:
    """The tiny policy, and untied embeddings with head_dim != hidden / heads and a vocabulary that is odd."""
    directories = [str(TINY_POLICY), str(model_dirs["qwen3_untied"])]
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(WORKER), *directories]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
