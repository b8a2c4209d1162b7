"""RL post-training at pretraining scale: megatron-core policies, SGLang rollouts, BICC and RCC."""
