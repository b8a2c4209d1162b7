"""Test double of Transformer Engine 2.20: the same names and signatures, plain torch inside, on any device.

It has what megatron-core 0.16 needs for this package's models in fp32, fp16 and bf16: linears with the
collectives of tensor and sequence parallel, norms, grouped linears of experts, Adam. Quantised (fp8, fp4)
layers, CUDA graphs, overlap of communication, and Transformer Engine's attention are not in it.
tests/te_stand_in/check_signatures.py compares it with an installed Transformer Engine.
"""

from . import common, pytorch

__version__ = "2.20.2"
__all__ = ["common", "pytorch"]
