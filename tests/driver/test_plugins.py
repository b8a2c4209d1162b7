"""Tests import paths of users' code: loaded, or an error that names the setting."""

import sys
from pathlib import Path

import pytest

from megatron_bicc import plugins
from megatron_bicc.errors import UserError


def test_a_file_is_loaded_once(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("CALLS = []\ndef score(x):\n    CALLS.append(x)\n    return len(CALLS)\n")
    assert plugins.load("reward.verifier", f"{file}:score")("a") == 1
    assert plugins.load("reward.verifier", f"{file}:score")("b") == 2


def test_a_module_is_imported() -> None:
    assert plugins.load("reward.verifier", "math:sqrt")(4.0) == 2.0


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere.py:score", r"reward.verifier names 'nowhere.py'; there is no such file under"),
        ("no_such_module:score", r"reward.verifier: no module 'no_such_module'"),
        ("math:", r"write package.module:name"),
        (":score", r"write package.module:name"),
        ("math:pi", r"math has no function or class 'pi'; it has: acos"),
    ],
)
def test_what_cannot_be_loaded_is_named(path: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        plugins.load("reward.verifier", path)


@pytest.mark.parametrize(
    ("line", "kind"), [("1 / 0", ZeroDivisionError), ("raise SystemExit(0)", SystemExit)]
)
def test_an_error_of_the_file_is_the_cause_and_in_the_log(
    line: str, kind: type, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "broken.py"
    file.write_text(f"{line}\n")
    with pytest.raises(UserError, match=rf"broken.py fails on import: {kind.__name__}") as found:
        plugins.load("reward.verifier", f"{file}:score")
    assert isinstance(found.value.__cause__, kind)
    assert "Traceback" in caplog.text and 'broken.py", line 1' in caplog.text
    assert not [name for name in sys.modules if name.startswith("megatron_bicc_plugin_") and "broken" in name]
