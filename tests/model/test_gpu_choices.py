"""Tests what a run chooses on a GPU, with doubles of one: attention kernels, the reference's memory."""

import sys
from pathlib import Path

import pytest
import torch
from support.steps import make_config

from megatron_bicc import device
from megatron_bicc.cli import parse_config
from megatron_bicc.errors import UserError
from megatron_bicc.model import attention_cuda
from megatron_bicc.model.attention_cuda import PACKAGES, choose_kernels
from megatron_bicc.startup import check_settings
from megatron_bicc.weights.hf_weights import load_policy

POLICY = Path(__file__).parents[2] / "examples/tiny_policy"


@pytest.fixture
def activated(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names that torch is asked to activate, on the double of an H100."""
    names: list[str] = []
    monkeypatch.setattr(attention_cuda, "activate_flash_attention_impl", names.append)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    return names


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Returns a function that installs a package's module, with this source."""

    def make(name: str, source: str = "") -> None:
        path = tmp_path.joinpath(*PACKAGES[name].module.split("."))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
        for module in [m for m in sys.modules if m.partition(".")[0] == path.relative_to(tmp_path).parts[0]]:
            monkeypatch.delitem(sys.modules, module)

    yield make
    for package in PACKAGES.values():
        root = package.module.partition(".")[0]
        for module in [m for m in sys.modules if m.partition(".")[0] == root]:
            del sys.modules[module]


def test_kernels_of_an_installed_package_are_chosen(activated: list[str], install) -> None:
    assert choose_kernels("auto", 128) == "flash attention 2 of torch"
    with pytest.raises(UserError, match="model.attention is fa4; the package flash-attn-4 is not installed"):
        choose_kernels("fa4", 128)
    install("fa3")
    assert choose_kernels("auto", 128) == "flash-attn-3"
    install("fa4")
    assert choose_kernels("auto", 128) == "flash-attn-4"
    assert choose_kernels("auto", 256) == "flash attention 2 of torch"
    assert choose_kernels("fa2", 128) == "flash attention 2 of torch"
    assert choose_kernels("fa3", 256) == "flash-attn-3"
    assert activated == ["FA3", "FA4", "FA3"]


def test_a_package_that_does_not_fit_is_named_or_passed_over(
    activated: list[str], install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("fa4", "raise OSError('libcudart.so.12: cannot open')")
    with pytest.raises(
        UserError, match=r"flash-attn-4 cannot be imported: libcudart.so.12.*set model.attention"
    ):
        choose_kernels("fa4", 64)
    install("fa3")
    assert choose_kernels("auto", 64) == "flash-attn-3"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert choose_kernels("auto", 64) == "flash attention 2 of torch"
    with pytest.raises(UserError, match=r"flash-attn-3 does not support compute capability 8.0"):
        choose_kernels("fa3", 64)


def test_torch_registers_both_packages_under_these_names() -> None:
    from torch.nn.attention import list_flash_attention_impls

    assert {package.registered for package in PACKAGES.values()} <= set(list_flash_attention_impls())


def test_kernels_that_the_device_or_the_type_does_not_have_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = [f"model.path={POLICY}", f"data.train={POLICY}/config.json", f"output_dir={tmp_path}"]
    config = parse_config([*settings, "model.attention=fa3"])
    with pytest.raises(UserError, match="model.attention is fa3; this run is on the CPU"):
        check_settings(config)
    monkeypatch.setattr(device, "has_cuda", lambda: True)
    check_settings(config)
    config.model.dtype = "float32"
    with pytest.raises(UserError, match="model.attention is fa3 and model.dtype is float32"):
        check_settings(config)


def test_where_the_reference_lies(
    model_dirs: dict[str, Path], single_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(model_dirs["qwen3_tied"], "grpo")
    policy = load_policy(config)
    size = sum(parameter.nbytes for parameter in policy.modules[0].parameters())
    on_host: list[bool] = []
    host_copy = policy.host_copy
    monkeypatch.setattr(policy, "host_copy", lambda: on_host.append(True) or host_copy())

    def is_on_host(free: float, choice: str, colocate: bool = False) -> bool:
        on_host.clear()
        monkeypatch.setattr(device, "unused_bytes", lambda: int(free))
        config.model.reference, config.rollout.colocate = choice, colocate
        policy.reference_copy(config)
        return bool(on_host)

    assert not is_on_host(4 * size, "auto")
    assert is_on_host(4 * size - 4, "auto")
    assert is_on_host(40 * size, "auto", colocate=True)
    assert is_on_host(40 * size, "host")
    assert not is_on_host(0, "device") and not is_on_host(0, "device", colocate=True)


@pytest.mark.parametrize("other_device", [False, True])
def test_other_weights_are_the_policys_in_the_block_only(
    other_device: bool, model_dirs: dict[str, Path], single_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exchanged in place on the same device; copied, from one host copy that is reused, from another."""
    policy = load_policy(make_config(model_dirs["qwen3_tied"], "grpo"))
    parameters = list(policy.modules[0].parameters())
    own, places = [p.detach().clone() for p in parameters], [p.data_ptr() for p in parameters]
    others = [torch.randn_like(p) for p in own]
    kept = [x.clone() for x in others]
    copies: list[bool] = []
    if other_device:
        others = [OnHost(x) for x in others]
    host_copy = policy.host_copy
    monkeypatch.setattr(policy, "host_copy", lambda: copies.append(True) or host_copy())
    for _ in range(2):
        with pytest.raises(KeyError), policy.weights(others):
            assert all(map(torch.equal, parameters, kept))
            assert (places == [p.data_ptr() for p in parameters]) == other_device
            raise KeyError
        assert all(map(torch.equal, parameters, own)) and all(map(torch.equal, others, kept))
        assert places == [p.data_ptr() for p in parameters]
    assert copies == [True] * other_device


class OnHost(torch.Tensor):
    """Test double of a tensor in another memory than the policy's."""

    @staticmethod
    def __new__(cls, data: torch.Tensor) -> "OnHost":
        return torch.Tensor._make_subclass(cls, data)

    @property
    def device(self) -> torch.device:
        return torch.device("meta")
