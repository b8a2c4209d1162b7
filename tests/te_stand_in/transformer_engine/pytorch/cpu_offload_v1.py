"""The module in which megatron-core's own offload of activations sets a flag."""

CPUOffloadEnabled = False
