"""The tests of the model's kernels, on a GPU."""

import pytest
import torch
from kernels.test_attention_parts import *  # noqa: F403
from kernels.test_log_probs_kernels import *  # noqa: F403
from kernels.test_policy_with_kernels import *  # noqa: F403

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
