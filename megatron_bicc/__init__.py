"""RL post-training at pretraining scale: megatron-core policies, SGLang rollouts, BICC and RCC."""

import warnings

# Pages about optional packages that are absent, and about torch calls that megatron-core will rename one day.
warnings.filterwarnings("ignore", module=r"megatron\.core")
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
