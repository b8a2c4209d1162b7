"""Tests the CUDA kernels of csrc/cuda against the CPU packer and PyTorch. Skipped without a GPU or the build.

Shape suffixes: T rows.
"""

import numpy as np
import pytest
import torch
from packing.cases import pack_every_rank
from support.token_loss import ESTIMATORS, OBJECTIVES, clip_masks, loss_config, loss_in_torch, loss_inputs

from megatron_bicc.algorithms.policy_loss import clip_bounds, kl_penalty
from megatron_bicc.config import LossConfig
from megatron_bicc.packing.types import PackingSettings, RolloutBatch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
_C_cuda = pytest.importorskip("megatron_bicc._C_cuda", reason="built without nvcc")
DEVICE = torch.device("cuda")


def stream() -> int:
    return torch.cuda.current_stream().cuda_stream


def random_batch(groups: int, longest: int) -> RolloutBatch:
    random = np.random.default_rng(0)
    lengths, prompts = random.integers(1, longest, groups * 4), random.integers(1, 30, groups)
    return RolloutBatch(
        prompt_tokens=random.integers(0, 1000, prompts.sum(), dtype=np.int32),
        prompt_offsets_B=np.concatenate([[0], prompts.cumsum()]),
        tokens=random.integers(0, 1000, lengths.sum(), dtype=np.int32),
        offsets_R=np.concatenate([[0], lengths.cumsum()]),
        group_offsets_B=np.arange(groups + 1) * 4,
        rewards_R=random.integers(0, 2, groups * 4).astype(np.float32),
    )


@pytest.mark.parametrize("keep", ["head", "both_ends"])
@pytest.mark.parametrize("groups, longest", [(1, 3), (50, 700)])
def test_fill_equals_the_cpu_to_the_bit(keep, groups, longest):
    from megatron_bicc.packing.pack_cuda import fill_on_device

    batch = random_batch(groups, longest)
    settings = PackingSettings(
        layout="plain" if groups == 1 else "bilateral",
        max_sequence_tokens=1024,
        max_tokens_per_microbatch=4096,
        vocab_size=1000,
        wrong_header=(1, 2),
        answer_header=(3,),
        end_token_ids=(7,),
        keep=keep,
        alignment=16,
    )
    features_FT = np.random.default_rng(1).random((3, len(batch.tokens)), dtype=np.float32)
    plan = pack_every_rank(batch, settings, dp_size=2, features_FT=features_FT)
    out = fill_on_device(batch, settings, 2, DEVICE, torch.from_numpy(features_FT).to(DEVICE))
    for name, tensor in out.items():
        expected = np.concatenate([getattr(m, name).ravel() for rank in plan.ranks for m in rank])
        assert tensor.cpu().numpy().tobytes() == expected.tobytes(), name


LENGTHS = [1, 300, 7, 1025, 64, 2]


def on_device(inputs: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(values.astype(np.float32)).to(DEVICE) for name, values in inputs.items()}


def run_token_loss(
    tensors: dict[str, torch.Tensor], lengths: list[int], config: LossConfig
) -> tuple[torch.Tensor, dict[str, float]]:
    bounds = clip_bounds(config)
    settings = _C_cuda.LossSettings(
        objective=config.objective,
        low=bounds.low,
        high=bounds.high,
        dual=bounds.dual,
        tis_cap=config.tis_cap,
        kl_coefficient=config.kl_coefficient,
        kl_estimator=config.kl_estimator,
    )
    cu_response = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device=DEVICE)
    gradient_T = torch.empty_like(tensors["logp"])
    partials = torch.empty(len(lengths), len(_C_cuda.LOSS_STATISTICS), dtype=torch.float64, device=DEVICE)
    statistics = torch.empty(len(_C_cuda.LOSS_STATISTICS), dtype=torch.float64, device=DEVICE)
    _C_cuda.token_loss(
        settings,
        segments=len(lengths),
        cu_response=cu_response.data_ptr(),
        gradient=gradient_T.data_ptr(),
        partials=partials.data_ptr(),
        statistics=statistics.data_ptr(),
        stream=stream(),
        **{name: tensor.data_ptr() for name, tensor in tensors.items()},
    )
    return gradient_T, dict(zip(_C_cuda.LOSS_STATISTICS, statistics.tolist(), strict=True))


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_token_loss_equals_pytorch(objective, estimator):
    config = loss_config(objective, estimator)
    tensors = on_device(loss_inputs(np.random.default_rng(0), LENGTHS))
    gradient_T, statistics = run_token_loss(tensors, LENGTHS, config)
    again_T, statistics_again = run_token_loss(tensors, LENGTHS, config)
    exact = {name: tensor.double() for name, tensor in tensors.items()}
    loss, expected_T = loss_in_torch(exact, LENGTHS, config)
    torch.testing.assert_close(gradient_T.double(), expected_T, rtol=1e-4, atol=1e-6)
    assert statistics["loss"] == pytest.approx(loss, rel=1e-5)
    log_ratio_T = exact["logp"] - exact["old_logp"]
    assert statistics["rows"] == sum(LENGTHS)
    assert statistics["kl_old_new"] == pytest.approx(
        (log_ratio_T.expm1() - log_ratio_T).sum().item(), rel=1e-5
    )
    kl_ref = kl_penalty(exact["logp"], exact["ref_logp"], "k3").sum().item()
    assert statistics["kl_new_ref"] == pytest.approx(kl_ref, rel=1e-5)
    assert statistics["ratio_min"] == pytest.approx(log_ratio_T.min().exp().item(), rel=1e-5)
    assert statistics["ratio_max"] == pytest.approx(log_ratio_T.max().exp().item(), rel=1e-5)
    assert torch.equal(gradient_T, again_T)
    assert statistics == statistics_again


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_clip_counts_equal_the_statistics(objective):
    config = loss_config(objective)
    tensors = on_device(loss_inputs(np.random.default_rng(0), LENGTHS))
    _, statistics = run_token_loss(tensors, LENGTHS, config)
    log_ratio_T = (tensors["logp"] - tensors["old_logp"]).double().cpu().numpy()
    offsets_R = np.cumsum([0, *LENGTHS])
    advantage_R = tensors["advantage"].cpu().numpy()[offsets_R[:-1]]
    for edge, mask_T in clip_masks(log_ratio_T, advantage_R, offsets_R, config).items():
        assert statistics[f"clipped_{edge}"] == mask_T.sum()
