"""Stands in for a trainer that owns servers: starts two and lives until it is killed.

python server_holder.py DIRECTORY: prints a line of URLs once they are ready.
"""

import os
import sys
import time
from pathlib import Path

import anyio

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.sglang_server import quick_start

from megatron_bicc.config import Config, ModelConfig, RolloutConfig, SglangConfig
from megatron_bicc.sglang.client import ServerClient
from megatron_bicc.sglang.pool import wait_until_ready
from megatron_bicc.sglang.process import SpawnedServer

REPOSITORY = Path(__file__).parents[2]
# generation slow enough to be interrupted: few sequences at once
ARGUMENTS = "--skip-server-warmup --max-total-tokens 8192 --mem-fraction-static 0.5 --max-running-requests 16"


def main(directory: str) -> None:
    os.environ |= quick_start()
    settings = SglangConfig(python=str(REPOSITORY / ".venv-sglang/bin/python"), server_args=ARGUMENTS)
    model = ModelConfig(str(REPOSITORY / "examples/tiny_policy"), "float32")
    config = Config(output_dir=directory, model=model, rollout=RolloutConfig("sglang", sglang=settings))
    servers = [SpawnedServer(config, index) for index in range(2)]
    for server in servers:
        anyio.run(wait_until_ready, ServerClient(server.url), 600.0, server.check_starting)
        server.ready()
    print(" ".join(server.url for server in servers), flush=True)
    time.sleep(3600)


if __name__ == "__main__":
    main(sys.argv[1])
