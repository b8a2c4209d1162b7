"""Forks SGLang servers from one process that has imported all that a server imports: 10 CPU seconds each.

Runs under .venv-sglang/bin/python with this directory on PYTHONPATH. Takes [arguments of
sglang.launch_server, environment variables, log file] as a line of JSON on stdin; answers with the server's
process id. Kills its servers when stdin ends, however that happens.
"""

import contextlib
import json
import os
import signal
import sys

import sglang.srt.managers.scheduler
import sglang.srt.models.registry  # noqa: F401 imported by every server
from sglang.launch_server import run_server
from sglang.srt.entrypoints import http_server  # noqa: F401 imported by every server
from sglang.srt.plugins import load_plugins
from sglang.srt.server_args import prepare_server_args


def main() -> None:
    """Forks a server for each line of stdin."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps the servers
    servers = []
    for line in iter(sys.stdin.readline, ""):
        arguments, variables, log = json.loads(line)
        server = os.fork()
        if not server:
            serve(arguments, variables, log)
        servers.append(server)
        print(server, flush=True)
    for server in servers:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server, signal.SIGKILL)


def serve(arguments: list[str], variables: dict[str, str], log: str) -> None:
    """Does what `python -m sglang.launch_server` does, in a session of its own. Does not return."""
    status = 1
    try:
        os.setsid()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ |= variables
        load_plugins()
        run_server(prepare_server_args(arguments))
        status = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    main()
