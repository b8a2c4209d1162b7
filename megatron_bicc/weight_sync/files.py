"""The weights of a sync as a Hugging Face directory that a server can load."""

import shutil
import subprocess
import sys
from pathlib import Path

from torch import Tensor

from megatron_bicc.policy.hf_files import copy_side_files, write_file, write_index
from megatron_bicc.weight_sync.buckets import Bucket

REMOVER = "import shutil, sys; sys.stdin.read(); shutil.rmtree(sys.argv[1], ignore_errors=True)"
"""A program whose standard input ends when its parent does, even if that is killed"""


class WeightFiles:
    """One version's directory at a time under `root`, a shard a bucket, beside the policy's configuration.

    Nothing stays under `root` when this process ends, however it does: it may be memory.
    """

    def __init__(self, root: Path, source: Path) -> None:
        """root: emptied and used by this process alone. source: the policy's Hugging Face directory."""
        self.root = root
        self.source = source
        self.complete: Path | None = None
        """The directory of the newest complete version"""
        self._tensors: dict[str, Tensor] = {}
        self._file_of: dict[str, str] = {}
        self._remover: subprocess.Popen | None = None

    def start(self) -> None:
        """Removes the version before and whatever a killed run left. Raises OSError."""
        self.remove()
        if self._remover is None:
            command = [sys.executable, "-S", "-c", REMOVER, str(self.root.absolute())]
            self._remover = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        self._partial.mkdir(parents=True)
        copy_side_files(self.source, self._partial)

    def write(self, bucket: Bucket) -> None:
        """One more shard. Raises OSError."""
        file = f"model-{len(set(self._file_of.values())) + 1:05}.safetensors"
        described = {name: tensor.to("meta") for name, tensor in bucket.tensors}
        write_file(self._partial / file, described, ((name, tensor.cpu()) for name, tensor in bucket.tensors))
        self._tensors |= described
        self._file_of |= dict.fromkeys(described, file)

    def finish(self, version: int) -> Path:
        """The directory, complete. Raises OSError."""
        write_index(self._partial, self._file_of, self._tensors)
        complete = self.root / f"version_{version}"
        self._partial.rename(complete)
        self.complete = complete
        return complete

    def remove(self) -> None:
        """Takes every file away."""
        shutil.rmtree(self.root, ignore_errors=True)
        self.complete, self._tensors, self._file_of = None, {}, {}

    @property
    def _partial(self) -> Path:
        return self.root / "partial"
