"""Tests two training steps on a real SGLang server, for the architectures that no other test serves.

Qwen3 is in test_weight_sync_servers.py, Qwen3-MoE in test_weight_sync_layouts.py.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.sglang_server import PYTHON, SglangServer
from support.two_steps import assert_engine_followed, train_on

pytestmark = [
    pytest.mark.timeout(900),  # a busy machine needs minutes to start a server
    pytest.mark.skipif(not PYTHON.exists(), reason="there is no .venv-sglang: make sglang"),
]
FAMILIES = ("qwen2", "llama3", "gemma3")


@pytest.fixture(scope="module")
def servers(model_dirs: dict[str, Path]) -> Iterator[dict[str, SglangServer]]:
    """One of each, started together."""
    made = {
        name: SglangServer(model_dirs[name], model_dirs[name].parent / f"{name}.log") for name in FAMILIES
    }
    try:
        for server in made.values():
            server.start()
        yield made
    finally:
        for server in made.values():
            server.kill()


@pytest.mark.parametrize("family", FAMILIES)
def test_two_steps_of_training(
    family: str,
    servers: dict[str, SglangServer],
    model_dirs: dict[str, Path],
    single_process: None,
    tmp_path: Path,
) -> None:
    servers[family].wait()
    assert_engine_followed(train_on(servers[family].url, model_dirs[family], tmp_path))
