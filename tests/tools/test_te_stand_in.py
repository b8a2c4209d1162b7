"""Tests the comparison of tests/te_stand_in with Transformer Engine, on changed copies of the stand-in."""

import importlib.util
import shutil
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
from support.te_stand_in import PATH


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("check_signatures", PATH / "check_signatures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def imported(script: ModuleType) -> set[tuple[str, str]]:
    """What megatron-core imports."""
    return script.imported_names(Path(find_spec("megatron.core").origin).parent)


CHANGES = {
    "a parameter more": (
        "pytorch/module/linear.py",
        "bias: bool = True",
        "bias: bool = True, more: int = 1",
        "pytorch.module.linear.Linear.__init__: lacks [('more', 'positional', '1')]",
    ),
    "another default": (
        "pytorch/module/layernorm_linear.py",
        "eps: float = 1e-5",
        "eps: float = 1e-6",
        "LayerNormLinear.__init__: lacks [('eps', 'positional', '1e-06')]",
    ),
    "another order": (
        "pytorch/module/grouped_linear.py",
        "m_splits: list[int] | Tensor,\n        is_first_microbatch: bool | None = None,",
        "is_first_microbatch: bool | None = None,\n        m_splits: list[int] | Tensor = None,",
        "GroupedLinear.forward: lacks",
    ),
    "a class less": (
        "pytorch/module/rmsnorm.py",
        "class RMSNorm(",
        "class Norm(",
        "pytorch.module.rmsnorm.RMSNorm is not in Transformer Engine",
    ),
    "a name more that megatron-core imports": (
        "pytorch/module/base.py",
        "class _ExtraState",
        "def get_workspace(): ...\nclass _ExtraState",
        "megatron-core imports pytorch.module.base.get_workspace: not in the stand-in",
    ),
}


def test_the_stand_in_is_itself(capsys: pytest.CaptureFixture[str], script: ModuleType) -> None:
    assert script.main([str(PATH / "transformer_engine")]) == 0
    assert "as " in capsys.readouterr().out


@pytest.mark.parametrize("change", CHANGES)
def test_a_difference_is_named(
    change: str, script: ModuleType, imported: set[tuple[str, str]], tmp_path: Path
) -> None:
    file, old, new, said = CHANGES[change]
    copy = tmp_path / "transformer_engine"
    shutil.copytree(PATH / "transformer_engine", copy)
    text = (copy / file).read_text()
    assert old in text
    (copy / file).write_text(text.replace(old, new))
    ours, theirs = script.Package(script.STAND_IN), script.Package(copy)
    lines = [
        *script.signature_differences(ours, theirs),
        *script.import_differences(ours, theirs, imported),
    ]
    assert any(said in line for line in lines), lines
