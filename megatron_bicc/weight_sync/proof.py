"""The proof that servers hold the policy's weights: their checksums against ours."""

import logging
from collections.abc import Iterable

import torch
from transformers import PretrainedConfig

from megatron_bicc.weight_sync.buckets import Bucket
from megatron_bicc.weight_sync.checksums import Checksums, are_known
from megatron_bicc.weight_sync.errors import WeightSyncError
from megatron_bicc.weight_sync.session import Session

logger = logging.getLogger(__name__)
PATH = "/weights_checker"
Layout = tuple[int, torch.dtype]
"""Tensor-parallel size and type of a server's weights"""


class Proof:
    """Checksums of the newest sync's weights, for each way in which the servers hold them."""

    def __init__(self, hf_config: PretrainedConfig) -> None:
        self.hf_config = hf_config
        self.doubts: dict[str, list[str]] = {}
        """By URL, what differs in servers that checksums do not prove; nothing if they cannot be compared"""
        self._checksums: dict[Layout, Checksums] = {}
        self._agreed: set[Layout] = set()
        """Layouts whose checksums have agreed once: it is known how they are made"""

    def start(self, sessions: list[Session]) -> None:
        """Of the weights that come now, in the layouts of these servers and of those before."""
        layouts = {_layout(session) for session in sessions if _can_check(session)} | set(self._checksums)
        self._checksums = {layout: Checksums(self.hf_config, *layout) for layout in layouts}
        self.doubts = {}

    def add(self, bucket: Bucket) -> None:
        """Some more of the weights."""
        for checksums in self._checksums.values():
            for name, tensor in bucket.tensors:
                checksums.add(name, tensor)

    async def check(self, session: Session) -> None:
        """Compares all parameters of a server; where that does not tell, the doubt is kept.

        Checksums that differ at the first comparison may be of weights in a form that is not known here.
        Raises WeightSyncError naming the parameters that differ, ServerError if the server fails.
        """
        layout = _layout(session)
        if layout not in self._checksums or not _can_check(session):
            self.doubts[session.client.url] = []
            return
        differ: set[str] = set()
        for rank, theirs in enumerate(await served_checksums(session)):
            differ |= unequal(self._checksums[layout].of_rank(rank), theirs)
        if not differ:
            self._agreed.add(layout)
        elif layout in self._agreed:
            raise mismatch(session.client.url, differ)
        else:
            logger.warning(
                "SGLang server %s: checksums differ at the first sync, log-probs are to decide: %s",
                session.client.url,
                _listed(differ),
            )
            self.doubts[session.client.url] = sorted(differ)


async def served_checksums(session: Session) -> list[dict[str, str]]:
    """The server's parameters and their checksums, on each of its ranks. Raises ServerError."""
    return [rank["checksums"] for rank in (await session.post(PATH, {"action": "checksum"}))["ranks"]]


def unequal(ours: dict[str, str], theirs: dict[str, str]) -> set[str]:
    """Names that stand for different checksums, or in one of them only."""
    return {name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)}


def mismatch(url: str, names: Iterable[str]) -> WeightSyncError:
    """The error for a server with these parameters wrong; no names: it is not known which."""
    return WeightSyncError(
        f"after weight sync SGLang server {url} has other weights than the policy: "
        f"{_listed(names) or 'it cannot tell which'}"
    )


def _listed(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:3]) + (f" and {len(ordered) - 3} more" if len(ordered) > 3 else "")


def _layout(session: Session) -> Layout:
    return session.tensor_parallel, session.dtype


def _can_check(session: Session) -> bool:
    return PATH in session.paths and are_known(session.info)
