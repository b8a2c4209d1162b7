"""Logits under tensor parallel; tests/integration/test_logits_match_hf.py has those of one process."""

from pathlib import Path

from support.torchrun import torchrun

WORKER = Path(__file__).with_name("logits_worker.py")
TINY_POLICY = Path(__file__).parents[2] / "examples/tiny_policy"


def test_two_processes_give_the_logits_of_transformers(model_dirs: dict[str, Path]) -> None:
    """The tiny policy, and untied embeddings with head_dim != hidden / heads and a vocabulary that is odd."""
    torchrun(2, WORKER, TINY_POLICY, model_dirs["qwen3_untied"])
