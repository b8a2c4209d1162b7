"""Each group's part of the output layer's gradient, seen along fixed random directions.

A row adds outer(gradient of its logits, its hidden state) to the output layer's gradient M [V, H], so a
group's part is a sum over its rows and needs no backward pass of its own. Kept of it is U' M W with U [V, K]
and W [H, L] of random signs over sqrt(K) and sqrt(L): inner products of sketches are, in the mean over U and
W, those of the gradients (Johnson-Lindenstrauss). A dimension no larger than its K or L is kept whole.

Shape suffixes: G groups, V this rank's part of the vocabulary, H hidden size, C rows of a chunk.
"""

import torch
from torch import Tensor

from megatron_bicc.model.log_probs import VocabShard

VOCAB_DIRECTIONS, HIDDEN_DIRECTIONS = 64, 256
SEED = 2603
"""The same directions in every run, so that runs can be compared."""


class GradientSketch:
    """[G, K, L]: sums over the rows that this rank holds; sums over all ranks are of the whole step."""

    def __init__(
        self,
        num_groups: int,
        directions: tuple[Tensor, Tensor],
        shard: VocabShard,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """`directions` are those of `sketch_directions`; `dtype` that of the hidden states."""
        vocab, hidden = directions
        self.vocab_VK = vocab[shard.first : shard.first + shard.size].to(device, dtype)
        self.hidden_HL = hidden.to(device, dtype)
        self.values_GKL = torch.zeros(num_groups, vocab.shape[1], hidden.shape[1], device=device)

    def add(
        self, group_rows: list[tuple[int, slice]], first: int, grad_logits_CV: Tensor, hidden_CH: Tensor
    ) -> None:
        """Adds a chunk of a micro-batch's response rows, which starts at row `first`.

        `group_rows` says which of the micro-batch's rows are whose.
        """
        left_CK = (grad_logits_CV @ self.vocab_VK).float()
        right_CL = (hidden_CH @ self.hidden_HL).float()
        for group, rows in group_rows:
            own = slice(max(rows.start - first, 0), max(rows.stop - first, 0))
            self.values_GKL[group].addmm_(left_CK[own].t(), right_CL[own])


def sketch_directions(vocab_size: int, hidden_size: int, seed: int = SEED) -> tuple[Tensor, Tensor]:
    """(float32 [vocabulary, K], float32 [hidden, L]), on the host; the same for every layout."""
    random = torch.Generator().manual_seed(seed)
    return (
        _directions(vocab_size, VOCAB_DIRECTIONS, random),
        _directions(hidden_size, HIDDEN_DIRECTIONS, random),
    )


def _directions(size: int, count: int, random: torch.Generator) -> Tensor:
    if size <= count:
        return torch.eye(size)
    return (2.0 * torch.randint(2, (size, count), generator=random) - 1.0) / count**0.5
