#!/usr/bin/env python
"""Draws a packed micro-batch: attention mask, positions, labels. Writes docs/packed_microbatch.svg.

The picture shows the packer's output for a small group; the mask follows from the cumulative lengths that
the attention kernels receive.
"""

import argparse
import sys
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("svg")
from matplotlib import pyplot

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from megatron_bicc.packing.pack import pack  # noqa: E402
from megatron_bicc.packing.types import (  # noqa: E402
    MicroBatch,
    PackingSettings,
    RolloutBatch,
    packed_sides,
)

PROMPT = ["q1", "q2"]
RESPONSES = [(1.0, ["a1", "a2", "end"]), (1.0, ["b1", "b2", "b3", "end"]), (0.0, ["c1", "end"])]
WRONG, RIGHT, ANSWER = "wrong:", "right:", "answer:"
PADDING, OWN, PREFIX = 1, 2, 3
COLOURS = ["white", "#d9d9d9", "#4c78a8", "#f2a65a"]


def main() -> None:
    """Packs the group and writes the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=REPOSITORY / "docs" / "packed_microbatch.svg")
    arguments = parser.parse_args()
    micro_batch, names = pack_example()
    matplotlib.rcParams.update({"svg.hashsalt": "packing", "font.size": 8, "font.family": "DejaVu Sans"})
    figure = draw(micro_batch, names)
    figure.savefig(arguments.out, bbox_inches="tight", metadata={"Date": None})
    print(f"wrote {arguments.out}")


def pack_example() -> tuple[MicroBatch, list[str]]:
    """Returns the only micro-batch of a group of two right and one wrong rollout, and the tokens' names."""
    names = ["", WRONG, RIGHT, ANSWER, *PROMPT, *(token for _, response in RESPONSES for token in response)]
    names = list(dict.fromkeys(names))
    ids = [np.array([names.index(token) for token in response], np.int32) for _, response in RESPONSES]
    batch = RolloutBatch(
        prompt_tokens=np.array([names.index(token) for token in PROMPT], np.int32),
        prompt_offsets_B=np.array([0, len(PROMPT)]),
        tokens=np.concatenate(ids),
        offsets_R=np.cumsum([0, *map(len, ids)]),
        group_offsets_B=np.array([0, len(ids)]),
        rewards_R=np.array([reward for reward, _ in RESPONSES], np.float32),
    )
    settings = PackingSettings(
        layout="bilateral",
        max_sequence_tokens=30,
        max_tokens_per_microbatch=64,
        vocab_size=len(names),
        reward_threshold=0.5,
        context_ratio=0.4,
        context_source="partition",
        truncation="equal",
        keep="head",
        token_cost=24576,
        wrong_header=(names.index(WRONG),),
        right_header=(names.index(RIGHT),),
        answer_header=(names.index(ANSWER),),
        end_token_ids=(names.index("end"),),
        alignment=8,
    )
    (micro_batch,) = pack(batch, settings, dp_size=1, rank=0).micro_batches
    return micro_batch, names


def visibility(micro_batch: MicroBatch) -> np.ndarray:
    """Returns int [N, N]: row i attends to row j in its OWN segment, its PREFIX, as PADDING, or not (0)."""
    rows = len(micro_batch.tokens_N)
    seen = np.zeros((rows, rows), int)
    key, query = 0, micro_batch.num_prefix_rows

    def fill(start: int, length: int, value: int) -> int:
        stop = start + length
        seen[start:stop, start:stop] = np.tril(np.full((length, length), value))
        return stop

    for side in packed_sides(micro_batch):
        prefix, key = slice(key, key + side.prefix_rows), fill(key, side.prefix_rows, OWN)
        for length in side.response_rows:
            seen[query : query + length, prefix] = PREFIX
            query = fill(query, length, OWN)
    fill(query, rows - query, PADDING)
    return seen


def draw(micro_batch: MicroBatch, names: list[str]) -> pyplot.Figure:
    """Draws the mask with a token, position and label for every row."""
    rows = len(micro_batch.tokens_N)
    figure, axes = pyplot.subplots(figsize=(9, 9))
    axes.imshow(visibility(micro_batch), cmap=matplotlib.colors.ListedColormap(COLOURS), vmin=0, vmax=3)
    axes.set_xticks(range(rows), [names[token] for token in micro_batch.tokens_N], rotation=90)
    axes.xaxis.tick_top()
    axes.set_yticks(range(rows), [names[token] for token in micro_batch.tokens_N])
    axes.set_xticks(np.arange(rows + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(rows + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="#eeeeee", linewidth=0.5)
    axes.tick_params(which="both", length=0)
    for row in range(rows):
        axes.text(rows + 0.6, row, str(micro_batch.positions_N[row]), ha="center", va="center")
        axes.text(rows + 2.2, row, names[micro_batch.labels_N[row]], ha="left", va="center")
    axes.text(rows + 0.6, -1.2, "position", ha="center", rotation=90)
    axes.text(rows + 2.6, -1.2, "label", ha="center", rotation=90)
    for boundary in micro_batch.cu_seqlens[1:-1]:
        heavy = boundary == micro_batch.num_prefix_rows
        axes.axhline(boundary - 0.5, color="black", linewidth=1.6 if heavy else 0.5)
        axes.axvline(boundary - 0.5, color="black", linewidth=1.6 if heavy else 0.5)
    return annotate(figure, axes, micro_batch)


def annotate(figure: pyplot.Figure, axes: pyplot.Axes, micro_batch: MicroBatch) -> pyplot.Figure:
    """Labels the segments next to the mask and the colours below it."""
    sides = packed_sides(micro_batch)
    texts = [f"prefix {number}" for number in range(1, len(sides) + 1)]
    texts += [f"response {rollout + 1}" for side in sides for rollout in side.rollouts]
    texts += ["padding"] * (len(micro_batch.cu_seqlens) - 1 - len(texts))
    for text, start, stop in zip(texts, micro_batch.cu_seqlens[:-1], micro_batch.cu_seqlens[1:], strict=True):
        axes.text(-4.2, (start + stop - 1) / 2, text, ha="right", va="center", weight="bold")
    handles = [
        matplotlib.patches.Patch(color=COLOURS[OWN], label="own segment, causal"),
        matplotlib.patches.Patch(color=COLOURS[PREFIX], label="prefix of the own side, all of it"),
        matplotlib.patches.Patch(color=COLOURS[PADDING], label="padding"),
    ]
    axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.02), ncol=3, frameon=False)
    return figure


if __name__ == "__main__":
    main()
