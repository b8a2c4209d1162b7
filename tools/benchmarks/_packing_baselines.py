"""Baselines of the packing benchmark: an equivalent torch.cat loop, and one padded row for every pair."""

import bisect

import numpy as np
import torch

from megatron_bicc.packing.types import PackingSettings, RolloutBatch

Tensors = list[torch.Tensor]


def torch_cat_loop(batch: RolloutBatch, settings: PackingSettings) -> list[dict[str, torch.Tensor]]:
    """Packs bilateral micro-batches (partition source, equal shares, heads) with torch.cat, side by side."""
    tokens, prompts = torch.from_numpy(batch.tokens), torch.from_numpy(batch.prompt_tokens)
    sides = []
    for group in range(len(batch.group_offsets_B) - 1):
        start, stop = batch.prompt_offsets_B[group : group + 2].tolist()
        rollouts = range(*batch.group_offsets_B[group : group + 2].tolist())
        right = [r for r in rollouts if batch.rewards_R[r] > settings.reward_threshold]
        wrong = [r for r in rollouts if batch.rewards_R[r] <= settings.reward_threshold]
        if right and wrong:
            for trained, shown, header in (
                (right, wrong, settings.wrong_header),
                (wrong, right, settings.right_header),
            ):
                responses = [slice(*batch.offsets_R[r : r + 2].tolist()) for r in trained]
                attempts = [tokens[slice(*batch.offsets_R[r : r + 2].tolist())] for r in shown]
                prefix = prefix_of(prompts[start:stop], attempts, responses, header, settings)
                sides.append((prefix, responses, trained))
    return [cat_micro_batch([sides[s] for s in bin_], tokens) for bin_ in best_fit(sides, settings)]


def prefix_of(
    prompt: torch.Tensor,
    attempts: Tensors,
    responses: list[slice],
    header: tuple[int, ...],
    settings: PackingSettings,
) -> torch.Tensor:
    """Returns prompt, equal shares of the attempts after their headers, and the answer header."""
    limit = settings.max_sequence_tokens
    room = min(
        int(settings.context_ratio * limit), limit - len(prompt) - max(r.stop - r.start for r in responses)
    )
    room -= len(settings.answer_header) + len(header) * len(attempts)
    if room < len(attempts):
        return prompt
    kept = [0] * len(attempts)
    for done, i in enumerate(sorted(range(len(attempts)), key=lambda i: len(attempts[i]))):
        kept[i] = min(len(attempts[i]), (room - sum(kept)) // (len(attempts) - done))
    pieces = [prompt]
    for attempt, length in zip(attempts, kept, strict=True):
        pieces += [torch.tensor(header, dtype=torch.int32), attempt[:length]]
    return torch.cat([*pieces, torch.tensor(settings.answer_header, dtype=torch.int32)])


def best_fit(sides: list, settings: PackingSettings) -> list[list[int]]:
    """Returns bins of sides, largest side first, each into the fullest bin that takes it."""
    rows = [len(prefix) - 1 + sum(r.stop - r.start for r in responses) for prefix, responses, _ in sides]
    bins: list[list[int]] = []
    gaps: list[tuple[int, int]] = []
    for side in sorted(range(len(sides)), key=lambda s: -rows[s]):
        place = bisect.bisect_left(gaps, (rows[side], -1))
        gap, bin_ = gaps.pop(place) if place < len(gaps) else (settings.max_tokens_per_microbatch, len(bins))
        if bin_ == len(bins):
            bins.append([])
        bins[bin_].append(side)
        bisect.insort(gaps, (gap - rows[side], bin_))
    return bins


def cat_micro_batch(sides: list, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns the arrays of one micro-batch, by their names in megatron_bicc.packing.types.MicroBatch."""
    inputs = [prefix[:-1] for prefix, _, _ in sides]
    labels = [prefix[1:] for prefix, _, _ in sides]
    positions = [torch.arange(len(prefix) - 1, dtype=torch.int32) for prefix, _, _ in sides]
    gather, rollouts, side_rows = [], [], []
    for prefix, responses, trained in sides:
        for place in responses:
            inputs += [prefix[-1:], tokens[place.start : place.stop - 1]]
            labels.append(tokens[place])
            length = place.stop - place.start
            positions.append(torch.arange(len(prefix) - 1, len(prefix) - 1 + length, dtype=torch.int32))
            gather.append(torch.arange(place.start, place.stop))
        rollouts += trained
        side_rows.append(sum(place.stop - place.start for place in responses))
    prefix_rows = [len(prefix) - 1 for prefix, _, _ in sides]
    response_rows = [len(rows) for rows in gather]
    return {
        "tokens": torch.cat(inputs),
        "labels": torch.cat(labels),
        "positions": torch.cat(positions),
        "gather": torch.cat(gather),
        "cu_seqlens": cumulative(prefix_rows + response_rows),
        "cu_prefix": cumulative(prefix_rows),
        "cu_response": cumulative(response_rows),
        "cu_response_side": cumulative(side_rows),
        "rollout": torch.tensor(rollouts, dtype=torch.int32),
    }


def cumulative(lengths: list[int]) -> torch.Tensor:
    """Returns the int32 offsets of segments of those lengths."""
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def pair_rows(batch: RolloutBatch, settings: PackingSettings) -> tuple[list[torch.Tensor], int]:
    """Makes one padded row for every (right, wrong) pair and direction: prompt, opposite attempt, response.

    The attempt is cut to the context budget and the row to max_sequence_tokens, from Python lists.

    Returns:
        the rows of each group, int32 [pairs, longest row of the step], and the tokens they take.
    """
    budget = int(settings.context_ratio * settings.max_sequence_tokens)
    groups: list[list[list[int]]] = []
    for group in range(len(batch.group_offsets_B) - 1):
        prompt = batch.prompt_tokens[slice(*batch.prompt_offsets_B[group : group + 2])].tolist()
        rollouts = range(*batch.group_offsets_B[group : group + 2].tolist())
        responses = {r: batch.tokens[slice(*batch.offsets_R[r : r + 2])].tolist() for r in rollouts}
        right = {r for r in rollouts if batch.rewards_R[r] > settings.reward_threshold}
        pairs = [(r, other) for r in rollouts for other in rollouts if (r in right) != (other in right)]
        groups.append([])
        for r, other in pairs:
            header = settings.right_header if other in right else settings.wrong_header
            row = [*prompt, *header, *responses[other][:budget], *settings.answer_header, *responses[r]]
            groups[-1].append(row[: settings.max_sequence_tokens])
    width = max((len(row) for rows in groups for row in rows), default=0)
    padded = [
        torch.tensor([row + [0] * (width - len(row)) for row in rows], dtype=torch.int32).reshape(-1, width)
        for rows in groups
    ]
    return padded, sum(rows.numel() for rows in padded)


def memcpy(source: np.ndarray) -> np.ndarray:
    """Returns a copy of `source` in fresh memory, made by one thread."""
    target = np.empty_like(source)
    np.copyto(target, source)
    return target
