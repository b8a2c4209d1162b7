"""Tests the local engine: samples determined by their seed, log-probs equal to a forward pass."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_bicc.config import Config
from megatron_bicc.errors import UserError
from megatron_bicc.rollout import local
from megatron_bicc.rollout.local import LocalEngine, SeededSampler, check_names, make_local_engine
from megatron_bicc.rollout.types import Request, Sampling

EOS, PAD = 1, 0
TOKENIZER = SimpleNamespace(eos_token_id=EOS, pad_token_id=PAD, get_added_vocab=dict)
"""Test double: the engine asks a tokenizer for these only."""


def make_engine(path: Path, batch_size: int) -> LocalEngine:
    return LocalEngine(str(path), TOKENIZER, torch.float32, torch.device("cpu"), batch_size)


def make_requests(count: int) -> list[Request]:
    rng = np.random.default_rng(0)
    return [Request(rng.integers(2, 100, size=rng.integers(2, 9)).astype(np.int32), i) for i in range(count)]


def test_log_probs_are_those_of_a_forward_pass(model_dirs: dict[str, Path]) -> None:
    requests, temperature = make_requests(9), 1.7
    samples = make_engine(model_dirs["qwen3_tied"], 4).generate(requests, Sampling(temperature, 12))
    model = AutoModelForCausalLM.from_pretrained(model_dirs["qwen3_tied"], dtype=torch.float32)
    for request, sample in zip(requests, samples, strict=True):
        row = torch.tensor([*request.token_ids, *sample.token_ids])
        with torch.no_grad():
            logits = model(row[None]).logits[0, len(request.token_ids) - 1 : -1]
        log_p = (logits / temperature).log_softmax(-1)
        expected = log_p.gather(-1, torch.tensor(sample.token_ids, dtype=torch.long)[:, None])[:, 0]
        np.testing.assert_allclose(sample.log_probs, expected.numpy(), atol=1e-4)
        stopped = sample.token_ids[-1] == EOS
        assert sample.finish_reason == ("stop" if stopped else "length")
        assert len(sample.token_ids) == 12 or stopped
        assert EOS not in sample.token_ids[:-1]


def test_every_end_token_ends_a_sample(model_dirs: dict[str, Path], tmp_path: Path) -> None:
    """Up to its end a sample is what it is without the further ends."""
    path = shutil.copytree(model_dirs["qwen3_tied"], tmp_path / "model")
    others = list(range(40, 60))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [EOS, *others]}))
    requests = make_requests(9)
    samples = make_engine(path, 4).generate(requests, Sampling(1.7, 12))
    whole = make_engine(model_dirs["qwen3_tied"], 4).generate(requests, Sampling(1.7, 12))
    for sample, long in zip(samples, whole, strict=True):
        tokens = long.token_ids.tolist()
        end = next((i for i, token in enumerate(tokens) if token in (EOS, *others)), None)
        assert sample.token_ids.tolist() == (tokens if end is None else tokens[: end + 1])
        assert sample.finish_reason == ("length" if end is None else "stop")
    assert sum(sample.token_ids[-1] in others for sample in samples) > 4


def test_a_sample_depends_on_its_seed_not_on_its_batch(model_dirs: dict[str, Path]) -> None:
    requests = make_requests(7)
    together = make_engine(model_dirs["qwen3_tied"], 7).generate(requests, Sampling(1.0, 8))
    engine = make_engine(model_dirs["qwen3_tied"], 1)
    for request, sample in zip(requests, together, strict=True):
        alone = engine.generate([request], Sampling(1.0, 8))[0]
        np.testing.assert_array_equal(alone.token_ids, sample.token_ids)
    other = engine.generate([Request(requests[0].token_ids, 99)], Sampling(1.0, 8))[0]
    assert not np.array_equal(other.token_ids, together[0].token_ids)


def test_samples_follow_the_distribution() -> None:
    scores = torch.tensor([[1.0, 0.0, -1.0, 0.5]])
    sampler = SeededSampler(list(range(20_000)), 0.5, torch.device("cpu"))
    chosen = sampler(torch.zeros(20_000, 1), scores.expand(20_000, 4)).argmax(-1)
    frequency = torch.bincount(chosen, minlength=4) / 20_000
    torch.testing.assert_close(frequency, (scores[0] / 0.5).softmax(-1), atol=0.012, rtol=0)


def test_noise_is_drawn_where_the_scores_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU each row's are the numbers of a generator of its own; nothing is drawn there for a GPU."""
    scores = torch.randn(3, 50)
    sampler = SeededSampler([4, 5, 6], 1.0, scores.device)
    streams = [torch.Generator().manual_seed(seed) for seed in (4, 5, 6)]
    for _ in range(2):
        noise = torch.stack([torch.empty(50).exponential_(generator=stream) for stream in streams])
        expected = (scores.log_softmax(-1) - noise.log()).argmax(-1)
        assert torch.equal(sampler(torch.zeros(3, 1), scores).argmax(-1), expected)
    asked: list[torch.device] = []
    monkeypatch.setattr(torch, "Generator", lambda device: asked.append(device) or torch._C.Generator())
    on_gpu = SeededSampler([4], 1.0, torch.device("cuda", 0))
    assert asked == [torch.device("cuda", 0)]
    on_gpu.streams = [None]
    drawn: list[torch.device] = []
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda row, generator: drawn.append(row.device) or row)
    on_gpu(torch.zeros(1, 1), scores[:1].to("meta"))
    assert drawn == [torch.device("meta")]


@pytest.mark.parametrize(
    ("cuda", "parameters", "warned"), [(True, 100_000_001, 1), (True, 10**8, 0), (False, 10**9, 0)]
)
def test_a_large_policy_on_a_gpu_is_warned_of(
    cuda: bool,
    parameters: int,
    warned: int,
    model_dirs: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine = make_engine(model_dirs["qwen3_tied"], 4)
    engine.model.num_parameters = lambda: parameters
    monkeypatch.setattr(local, "LocalEngine", lambda *arguments: engine)
    monkeypatch.setattr("megatron_bicc.device.has_cuda", lambda: cuda)
    config = Config()
    config.model.path = str(model_dirs["qwen3_tied"])
    assert make_local_engine(config, TOKENIZER) is engine
    assert len(caplog.messages) == warned
    assert all(
        "rollout.engine is local" in message and "0.1 billion" in message for message in caplog.messages
    )


def test_weights_that_are_not_finite_are_refused_by_name(model_dirs: dict[str, Path], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_dirs["qwen3_tied"])
    model.model.norm.weight.data[3] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"model.norm.weight: contains NaN or infinite values"):
        make_engine(tmp_path, 1)


@pytest.mark.parametrize(
    ("names", "message"),
    [((), "missing tensors: lm_head.weight"), (("surplus",), "no parameter surplus")],
)
def test_weights_must_all_be_known_and_all_come(
    names: tuple[str, ...], message: str, model_dirs: dict[str, Path]
) -> None:
    engine = make_engine(model_dirs["qwen3_untied"], 1)
    weights = {n: p for n, p in engine.model.named_parameters() if n != "lm_head.weight"}
    with pytest.raises(UserError, match=message):
        engine.load_weights([*weights.items(), *((n, torch.zeros(1)) for n in names)], 1)


def test_a_model_that_could_not_take_the_policys_weights_is_refused(model_dirs: dict[str, Path]) -> None:
    """Without reading any weight: a dry run does the same."""
    own, other = (AutoConfig.from_pretrained(model_dirs[name]) for name in ("qwen3_moe", "qwen2"))
    wide = AutoConfig.from_pretrained(model_dirs["qwen3_moe"])
    wide.moe_intermediate_size = 44
    with torch.device("meta"):
        model, wider = (AutoModelForCausalLM.from_config(x) for x in (own, wide))
    check_names(model, own)
    with pytest.raises(UserError, match=r"local.*experts.0.gate_proj.weight has shape \(44, 48\).*choose"):
        check_names(wider, own)
    with pytest.raises(UserError, match=r"tensor model.layers.0.\S+ has shape"):
        check_names(model, other)
