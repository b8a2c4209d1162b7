"""The process in which answers are compared by computer algebra, and which may be killed.

    python -m megatron_bicc.rewards.worker

Reads requests from stdin and answers each on stdout, a JSON value a line. They are worked on in a fork of
this process, which has imported everything: the kernel kills the fork once a request has used up its
processor time, whatever it is busy with, and a new fork takes the next request. Ends when stdin ends, so with
the process that started it.
"""

import json
import os
import resource
import signal
import sys
from contextlib import suppress

from megatron_bicc.rewards.worker_pool import CPU_SECONDS, KILLED

MEMORY_BYTES = 4 << 30
"""Address space of the process"""


def main() -> None:
    """Serves until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the process that asks
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    import math_verify  # noqa: F401 - before the forks: it takes longer to import than most answers take

    with suppress(BrokenPipeError):  # the process that asks is gone
        _answer("ready")
        while _survived():
            _answer(KILLED)


def _answer(value: str | bool | None) -> None:
    os.write(sys.stdout.fileno(), f"{json.dumps(value)}\n".encode())


def _survived() -> bool:
    """Serves in a fork. False once stdin has ended, True if the fork was killed."""
    child = os.fork()
    if child == 0:
        _serve()
    _, status = os.waitpid(child, 0)
    return not os.WIFEXITED(status)


def _serve() -> None:
    from megatron_bicc.rewards import verdict

    operations = {"same": verdict.same, "reading": verdict.reading}
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(BrokenPipeError):
        for line in sys.stdin:
            name, *arguments = json.loads(line)
            signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)  # its signal kills: nobody handles it
            try:
                answer = operations[name](*arguments)
            except (MemoryError, RecursionError):
                os.kill(os.getpid(), signal.SIGKILL)
            signal.setitimer(signal.ITIMER_PROF, 0)
            _answer(answer)
    os._exit(0)


if __name__ == "__main__":
    main()
