"""Tests the names of algorithms and the settings that they resolve to."""

from dataclasses import fields, replace

import pytest

from megatron_bicc.algorithms.presets import PRESETS, kl_warning, parse_algorithm, resolve
from megatron_bicc.config import (
    BiccConfig,
    Config,
    LossConfig,
    RccConfig,
    RewardConfig,
    RolloutConfig,
    check,
)
from megatron_bicc.errors import UserError


@pytest.mark.parametrize("base", PRESETS)
@pytest.mark.parametrize("bicc", [False, True])
@pytest.mark.parametrize("rcc", [False, True])
def test_every_preset_with_and_without_bicc_and_rcc(base: str, bicc: bool, rcc: bool) -> None:
    name = base + "+bicc" * bicc + "+rcc" * rcc
    assert parse_algorithm(name) == (base, bicc, rcc)
    config = resolve(Config(algorithm=name))
    assert (config.bicc.enabled, config.rcc.enabled) == (bicc, rcc)
    found = vars(config.reward) | vars(config.rollout) | vars(config.loss)
    for field in fields(PRESETS[base]):
        if not (field.name == "dual_clip" and bicc):
            assert found[field.name] == getattr(PRESETS[base], field.name)
    # only with a correction are there bounds of its ratio
    assert [name for name in found if found[name] is None] == ["correction_low", "correction_high"]


def test_only_dapo_samples_dynamically_and_shapes() -> None:
    for base in PRESETS:
        config = resolve(Config(algorithm=base))
        assert config.rollout.dynamic_sampling == (base == "dapo")
        assert config.reward.overlong_penalty == float(base == "dapo")


def test_the_parts_of_a_name_come_in_any_order() -> None:
    assert parse_algorithm("dapo+rcc+bicc") == ("dapo", True, True)


def test_bicc_is_short_for_grpo_bicc_rcc() -> None:
    assert parse_algorithm("bicc") == ("grpo", True, True)
    assert replace(resolve(Config(algorithm="bicc")), algorithm="") == replace(
        resolve(Config(algorithm="grpo+bicc+rcc")), algorithm=""
    )


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("gpro", "grpo"),
        ("drgrpo", "dr_grpo"),
        ("dapo+bic", "dapo+bicc"),
        ("bicc+rcc", "grpo+bicc+rcc"),
        ("grpo+rcc+rcc", "grpo+bicc+rcc"),
        ("", ""),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(UserError, match="algorithm is ") as error:
        parse_algorithm(name)
    assert f"{name!r}; did you mean {nearest}" in str(error.value)
    assert "\n" not in str(error.value)


def test_explicit_values_win_and_the_given_config_stays_as_it_was() -> None:
    config = Config(
        algorithm="dapo+bicc+rcc",
        loss=LossConfig(clip_high=0.5, dual_clip=10.0, aggregation="constant"),
        rollout=RolloutConfig(dynamic_sampling=False),
        reward=RewardConfig(overlong_penalty=0.5),
        rcc=RccConfig(enabled=False),
    )
    resolved = resolve(config)
    assert resolved.loss == LossConfig(
        advantage="normalized",
        objective="token",
        clip_low=0.2,
        clip_high=0.5,
        dual_clip=10.0,
        aggregation="constant",
        kl_estimator="k2",
    )
    assert (resolved.bicc.enabled, resolved.rcc.enabled) == (True, False)
    assert (resolved.rollout.dynamic_sampling, resolved.reward.overlong_penalty) == (False, 0.5)
    assert config.loss.clip_low is None and config.bicc.enabled is None


@pytest.mark.parametrize(("kl_in", "estimator"), [("loss", "k2"), ("reward", "k1")])
def test_the_default_estimator_is_the_one_whose_gradient_is_the_kls(kl_in: str, estimator: str) -> None:
    given = LossConfig(kl_coefficient=0.1, kl_in=kl_in)
    loss = resolve(Config(algorithm="grpo", loss=given)).loss
    assert loss.kl_estimator == estimator
    assert kl_warning(loss) is None
    assert resolve(Config(algorithm="grpo", loss=replace(given, kl_estimator="k3"))).loss.kl_estimator == "k3"


@pytest.mark.parametrize(
    ("kl_in", "estimator", "words"),
    [
        ("loss", "k3", ["k3", "kl_in=loss", "KL(ref || policy)", "k2 has"]),
        ("reward", "k2", ["k2", "kl_in=reward", "no KL", "k1 has"]),
        ("reward", "k3", ["k3", "kl_in=reward", "no KL", "k1 has"]),
    ],
)
def test_an_estimator_of_another_gradient_is_named(kl_in: str, estimator: str, words: list[str]) -> None:
    loss = LossConfig(kl_coefficient=0.1, kl_in=kl_in, kl_estimator=estimator)
    warning = kl_warning(resolve(Config(algorithm="grpo", loss=loss)).loss)
    assert warning is not None and "\n" not in warning
    assert all(word in warning for word in words)
    assert kl_warning(replace(loss, kl_coefficient=0.0)) is None


def test_an_estimator_without_an_expected_gradient_is_refused() -> None:
    noise = LossConfig(kl_coefficient=0.1, kl_estimator="k1")
    with pytest.raises(UserError, match=r"loss.kl_estimator is k1 with loss.kl_in=loss; .* use k2"):
        check(resolve(Config(algorithm="grpo", loss=noise)), world_size=1)
    assert (
        resolve(Config(algorithm="grpo", loss=replace(noise, kl_coefficient=0.0))).loss.kl_estimator == "k1"
    )


def test_zero_is_an_explicit_dual_clip() -> None:
    assert resolve(Config(algorithm="bicc", loss=LossConfig(dual_clip=0.0))).loss.dual_clip == 0.0


def test_the_dual_clip_follows_bicc_however_it_was_enabled() -> None:
    assert resolve(Config(algorithm="bicc")).loss.dual_clip == 3.0
    assert resolve(Config(algorithm="grpo", bicc=BiccConfig(enabled=True))).loss.dual_clip == 3.0
    assert resolve(Config(algorithm="bicc", bicc=BiccConfig(enabled=False))).loss.dual_clip == 0.0
    assert resolve(Config(algorithm="grpo")).loss.dual_clip == 0.0


@pytest.mark.parametrize(
    ("setting", "value"),
    [("clip_low", -0.1), ("clip_high", float("nan")), ("dual_clip", 0.5), ("correction_high", 0)],
)
def test_a_setting_out_of_range_is_named(setting: str, value: float) -> None:
    with pytest.raises(UserError, match=f"loss.{setting} is "):
        check(resolve(Config(algorithm="grpo", loss=LossConfig(**{setting: value}))), world_size=1)
