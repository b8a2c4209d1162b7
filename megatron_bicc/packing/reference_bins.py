"""The oracle's bin-packing and balance: the same choices as csrc, searched in plain lists."""

PAIR_CANDIDATES = 32
"""First partners tried for a pair, as in csrc/binpack.cpp."""


def make_bins(rows: list[int], budget: int, dp_size: int) -> list[list[int]]:
    """Returns bins of pieces (indices into `rows`), a multiple of `dp_size` of them.

    One rank takes as few bins as the search finds. Several ranks share that number, rounded up, evenly: the
    budget shrinks, by bisection, as long as the bins suffice.
    """
    bins = fill_bins(rows, budget)
    if dp_size == 1 or not bins:
        return bins
    wanted = -(-len(bins) // dp_size) * dp_size
    low, high = max(max(rows), -(-sum(rows) // wanted)), budget
    while low < high:
        middle = (low + high) // 2
        if len(fill_bins(rows, middle)) <= wanted:
            high = middle
        else:
            low = middle + 1
    bins = fill_bins(rows, high)
    return bins + [[] for _ in range(wanted - len(bins))]


def fill_bins(rows: list[int], limit: int) -> list[list[int]]:
    """Returns bins of pieces: each starts with the largest left and takes what fills its gap best."""
    left = sorted(range(len(rows)), key=lambda piece: (-rows[piece], piece))
    bins = []
    while left:
        bin_ = [left.pop(0)]
        while chosen := best_choice(rows, left, limit - sum(rows[piece] for piece in bin_)):
            bin_ += chosen
            left = [piece for piece in left if piece not in chosen]
        bins.append(bin_)
    return bins


def best_choice(rows: list[int], left: list[int], gap: int) -> list[int]:
    """Returns the piece, or the pair with one of the first PAIR_CANDIDATES pieces, that fills `gap` best."""
    fitting = [piece for piece in left if rows[piece] <= gap]
    best = fitting[:1]
    for i, first in enumerate(fitting[:PAIR_CANDIDATES]):
        for second in fitting[i + 1 :]:
            if rows[first] + rows[second] <= gap:
                if rows[first] + rows[second] > sum(rows[piece] for piece in best):
                    best = [first, second]
                break
    return best


def assign_to_ranks(costs: list[int], dp_size: int) -> list[list[int]]:
    """Returns the bins of each rank: costliest first, to the cheapest rank that has a slot left."""
    ranks: list[list[int]] = [[] for _ in range(dp_size)]
    for b in sorted(range(len(costs)), key=lambda b: (-costs[b], b)):
        open_ranks = [rank for rank in ranks if len(rank) < len(costs) // dp_size]
        min(open_ranks, key=lambda rank: sum(costs[other] for other in rank)).append(b)
    return ranks
