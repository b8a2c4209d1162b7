"""Projects each group's part of the output layer's gradient on fixed random directions.

A row adds outer(gradient of its logits, its hidden state) to the output layer's gradient M [vocabulary,
hidden], so a group's part is a sum over its rows and needs no separate backward pass. Its sketch is U' M W,
with U [vocabulary, X] and W [hidden, Y] of random signs over sqrt(X) and sqrt(Y): the expectation over U and
W of an inner product of sketches is that of the gradients (Johnson and Lindenstrauss, 1984; Achlioptas, 2003,
for random signs). A dimension that is not larger than its X or Y is not projected.

Shape suffixes: B groups, V this rank's part of the vocabulary, L rows of a chunk, X and Y directions of the
vocabulary and of the hidden states.
"""

import torch
from torch import Tensor

from megatron_bicc.model.log_probs import VocabShard

VOCAB_DIRECTIONS, HIDDEN_DIRECTIONS = 64, 256
SEED = 2603
"""The same directions in every run make runs comparable"""


class GradientSketch:
    """Sketches [B, X, Y] of this rank's rows; their sum over all ranks is the whole step's."""

    def __init__(
        self,
        num_groups: int,
        directions: tuple[Tensor, Tensor],
        shard: VocabShard,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """directions: as `sketch_directions` returns them. dtype: of the hidden states."""
        vocab, hidden = directions
        self.vocab_VX = vocab[shard.first : shard.first + shard.size].to(device, dtype)
        self.hidden_Y = hidden.to(device, dtype)
        self.values_BXY = torch.zeros(num_groups, vocab.shape[1], hidden.shape[1], device=device)

    def add(
        self, group_rows: list[tuple[int, slice]], first: int, grad_logits_LV: Tensor, hidden_L: Tensor
    ) -> None:
        """Adds a chunk of a micro-batch's response rows, which starts at row `first`.

        group_rows: (group, its rows among the micro-batch's response rows).
        """
        left_LX = (grad_logits_LV @ self.vocab_VX).float()
        right_LY = (hidden_L @ self.hidden_Y).float()
        for group, rows in group_rows:
            own = slice(max(rows.start - first, 0), max(rows.stop - first, 0))
            self.values_BXY[group].addmm_(left_LX[own].t(), right_LY[own])


def sketch_directions(vocab_size: int, hidden_size: int, seed: int = SEED) -> tuple[Tensor, Tensor]:
    """Returns (float32 [vocabulary, X], float32 [hidden, Y]) on the host, the same under every layout."""
    random = torch.Generator().manual_seed(seed)
    return (
        _directions(vocab_size, VOCAB_DIRECTIONS, random),
        _directions(hidden_size, HIDDEN_DIRECTIONS, random),
    )


def _directions(size: int, count: int, random: torch.Generator) -> Tensor:
    if size <= count:
        return torch.eye(size)
    return (2.0 * torch.randint(2, (size, count), generator=random) - 1.0) / count**0.5
