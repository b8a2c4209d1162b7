"""Quantisation recipes: only the name that megatron-core derives a class from when it is imported."""


class DelayedScaling:
    """Per-tensor scaling with a history of maxima; not in this stand-in."""
