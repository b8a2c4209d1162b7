"""Real SGLang servers for tests, on a CPU and without the product's own launcher."""

import contextlib
import functools
import json
import os
import signal
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

from megatron_bicc.sglang.process import CHANGES_LOADER, IN_SERVER

PYTHON = Path(__file__).parents[2] / ".venv-sglang/bin/python"
FORKED = Path(__file__).with_name("forked_sglang")
# The share of memory is a bound, not what is taken; a small one fails when others take memory meanwhile.
ARGUMENTS = (
    "--device cpu --attention-backend torch_native "
    "--sampling-backend pytorch --grammar-backend none --disable-overlap-schedule --sleep-on-idle "
    "--skip-server-warmup --max-total-tokens 4096 --mem-fraction-static 0.5 "
    "--host 127.0.0.1"
)

SERVED = ("gemma3_causal", "llama", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "registry", "utils")
"""Modules of sglang.srt.models that the tests' models need"""


def quick_start() -> dict[str, str]:
    """Returns environment variables that save a server imports: of 200 models, and all that it forks."""
    modules = PYTHON.parents[1].glob("lib/python3*/site-packages/sglang/srt/models/*.py")
    skipped = sorted(module.stem for module in modules if module.stem not in SERVED)
    path = os.pathsep.join(filter(None, [str(FORKED), os.environ.get("PYTHONPATH")]))
    return {"SGLANG_DISABLED_MODEL_ARCHS": ",".join(skipped), "PYTHONPATH": path}


class Forks:
    """The process that servers are forked from."""

    def __init__(self) -> None:
        env = os.environ | {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1"} | quick_start()
        env["PYTHONPATH"] += f"{os.pathsep}{IN_SERVER}"
        # where setup.sh has missed a module, compiling it at every start takes longer than the tests
        env.pop("PYTHONDONTWRITEBYTECODE", None)
        self._process = subprocess.Popen(
            [str(PYTHON), "-W", "ignore", str(FORKED / "servers.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=env,
            text=True,
            start_new_session=True,
        )

        self._started = 0
        self._pids: list[int] = []

    def start(self, arguments: list[str], variables: dict[str, str], log: Path) -> int:
        """Starts a server with these arguments of sglang.launch_server; returns its number, at once."""
        self._process.stdin.write(json.dumps([arguments, variables, str(log)]) + "\n")
        self._process.stdin.flush()
        self._started += 1
        return self._started - 1

    def pid(self, number: int) -> int:
        """Returns a server's process id, once it has one."""
        while len(self._pids) <= number:
            self._pids.append(int(self._process.stdout.readline()))
        return self._pids[number]


@functools.cache
def forks() -> Forks:
    """Returns this test process's, started at the first call. It ends with the test process."""
    return Forks()


class SglangServer:
    """A server of one model. Its port stays when it is started again."""

    def __init__(
        self,
        model: Path,
        log: Path,
        dtype: str = "float32",
        tensor_parallel: int = 1,
        tokenizer: bool = False,
        routing: bool = False,
        changes: bool = False,
    ) -> None:
        """tokenizer: whether it reads the model's, to be asked in text, too. routing: whether it returns its
        routing. changes: whether it can apply changes of weights."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self._log = log
        model_arguments = ["--model-path", str(model), "--dtype", dtype, "--port", str(port)]
        self._arguments = [*ARGUMENTS.split(), *model_arguments, "--tp-size", str(tensor_parallel)]
        self._arguments += [] if tokenizer else ["--skip-tokenizer-init"]
        self._arguments += ["--enable-return-routed-experts"] if routing else []
        self._arguments += ["--custom-weight-loader", CHANGES_LOADER] if changes else []
        # without it SGLang wants a NUMA node for each rank
        cores = "|".join(map(str, range(tensor_parallel)))
        self._env = {"SGLANG_CPU_OMP_THREADS_BIND": cores} if tensor_parallel > 1 else {}
        self._number: int | None = None

    def start(self) -> None:
        """Starts it; `wait` until it can serve."""
        self._number = forks().start(self._arguments, self._env, self._log)

    def wait(self, timeout_s: float = 600) -> None:
        """Until it can serve."""
        end = time.monotonic() + timeout_s
        while time.monotonic() < end and self._is_alive():
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=5):
                return
            time.sleep(0.2)
        raise AssertionError(f"the server did not start:\n{self._log.read_text()[-3000:]}")

    def kill(self) -> None:
        """kill -9 of all its processes."""
        if self._number is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(forks().pid(self._number), signal.SIGKILL)
        while self._is_alive():
            time.sleep(0.02)
        self._number = None

    def _is_alive(self) -> bool:
        try:
            os.kill(forks().pid(self._number), 0)
        except ProcessLookupError:
            return False
        return True
