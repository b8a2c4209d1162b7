"""On the PYTHONPATH of a test's SGLang server: its processes are forks instead of new interpreters.

SGLang starts its scheduler and its detokenizer with multiprocessing's "spawn", and each imports what the
server has already imported: 10 CPU seconds each. SGLang forks before it starts a thread.
"""

import multiprocessing


def _keep_fork(method: str | None, force: bool = False) -> None:
    """Stands in for multiprocessing.set_start_method, which SGLang calls with "spawn"."""


multiprocessing.set_start_method("fork")
multiprocessing.set_start_method = _keep_fork
