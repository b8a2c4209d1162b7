"""Real SGLang servers for tests, on a CPU and without the product's own launcher."""

import contextlib
import os
import signal
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

PYTHON = Path(__file__).parents[2] / ".venv-sglang/bin/python"
# The share of memory is a bound, not what is taken; a small one fails when others take memory meanwhile.
ARGUMENTS = (
    "-W ignore -m sglang.launch_server --device cpu --attention-backend torch_native "
    "--sampling-backend pytorch --grammar-backend none --disable-overlap-schedule --sleep-on-idle "
    "--skip-server-warmup --max-total-tokens 4096 --mem-fraction-static 0.5 "
    "--host 127.0.0.1"
)


SERVED = ("llama", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "registry", "utils")
"""Modules of sglang.srt.models that the tests' models need"""


def quick_start() -> dict[str, str]:
    """Environment that saves a server the import of some 200 models' modules."""
    modules = PYTHON.parents[1].glob("lib/python3*/site-packages/sglang/srt/models/*.py")
    skipped = sorted(module.stem for module in modules if module.stem not in SERVED)
    return {"SGLANG_DISABLED_MODEL_ARCHS": ",".join(skipped)}


class SglangServer:
    """A server of one model. Its port stays when it is started again."""

    def __init__(
        self,
        model: Path,
        log: Path,
        dtype: str = "float32",
        tensor_parallel: int = 1,
        tokenizer: bool = False,
    ) -> None:
        """tokenizer: whether it reads the model's, to be asked in text, too."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self._log = log
        model_arguments = ["--model-path", str(model), "--dtype", dtype, "--port", str(port)]
        self._command = [str(PYTHON), *ARGUMENTS.split(), *model_arguments]
        self._command += ["--tp-size", str(tensor_parallel)]
        self._command += [] if tokenizer else ["--skip-tokenizer-init"]
        # without it SGLang wants a NUMA node for each rank
        cores = "|".join(map(str, range(tensor_parallel)))
        self._env = {"SGLANG_CPU_OMP_THREADS_BIND": cores} if tensor_parallel > 1 else {}
        self._process: subprocess.Popen | None = None

    def start(self) -> None:
        """Starts it; `wait` until it can serve."""
        env = os.environ | {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1"} | quick_start() | self._env
        # compiling SGLang and torch at every start takes longer than the tests
        env.pop("PYTHONDONTWRITEBYTECODE", None)
        with self._log.open("a") as log:
            self._process = subprocess.Popen(
                self._command, env=env, stdout=log, stderr=log, start_new_session=True
            )

    def wait(self, timeout_s: float = 600) -> None:
        """Until it can serve."""
        end = time.monotonic() + timeout_s
        while time.monotonic() < end and self._process.poll() is None:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=5):
                return
            time.sleep(0.2)
        raise AssertionError(f"the server did not start:\n{self._log.read_text()[-3000:]}")

    def kill(self) -> None:
        """kill -9 of all its processes."""
        if self._process:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None
