"""The proof that a server holds the policy's weights: its checksums against ours."""

import torch
from transformers import PretrainedConfig

from megatron_bicc.weight_sync.buckets import Bucket
from megatron_bicc.weight_sync.checksums import Checksums, are_known
from megatron_bicc.weight_sync.session import Session

PATH = "/weights_checker"


class WeightSyncError(RuntimeError):
    """The servers' weights are not the policy's. One line."""


class Proof:
    """Checksums of the newest sync's weights, for each way in which the servers hold them."""

    def __init__(self, hf_config: PretrainedConfig) -> None:
        self.hf_config = hf_config
        self._checksums: dict[tuple[int, torch.dtype], Checksums] = {}

    def start(self, sessions: list[Session]) -> None:
        """Of the weights that come now, in the layouts of these servers."""
        layouts = {(s.tensor_parallel, s.dtype) for s in sessions if _can_check(s)}
        self._checksums = {layout: Checksums(self.hf_config, *layout) for layout in layouts}

    def add(self, bucket: Bucket) -> None:
        """Some more of the weights."""
        for checksums in self._checksums.values():
            for name, tensor in bucket.tensors:
                checksums.add(name, tensor)

    async def check(self, session: Session) -> None:
        """Raises WeightSyncError naming the parameters that differ, ServerError if the server fails."""
        expected = self._checksums.get((session.tensor_parallel, session.dtype))
        if expected is None or not _can_check(session):
            return
        ranks = (await session.post(PATH, {"action": "checksum"}))["ranks"]
        for rank, found in enumerate(ranks):
            ours, theirs = expected.of_rank(rank), found["checksums"]
            wrong = [name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)]
            if wrong:
                raise WeightSyncError(
                    f"SGLang server {session.client.url}, rank {rank}: after the sync these weights are not "
                    f"the policy's: {', '.join(sorted(wrong))}"
                )


def _can_check(session: Session) -> bool:
    return PATH in session.paths and are_known(session.info)
