"""Outcome rewards: is the final answer of a response right?"""

from megatron_bicc.rewards.registry import (
    VERIFIERS,
    Verifier,
    check_threshold,
    compared_as_text,
    get_verifier,
    unscorable,
)

__all__ = ["VERIFIERS", "Verifier", "check_threshold", "compared_as_text", "get_verifier", "unscorable"]
