#!/usr/bin/env python
"""Feeds malformed batches and settings to the packer, which must pack them or raise ValueError.

Packed results must equal the oracle's. A crash ends this process with a signal; --seed determines the inputs.
"""

import argparse
import importlib.util
import sys
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (1, 2)]  # the oracle, the package

INTEGERS = [0, 1, -1, 2, 3, 7, 64, 2**16, 2**31 - 1, 2**31, 2**32, 2**63 - 1, -(2**63), 2**64]
ODD_VALUES = [
    None,
    "",
    "text",
    0.5,
    float("nan"),
    float("inf"),
    (),
    (1, 2),
    (-1,),
    (2**40,),
    b"x",
    True,
    [],
    {},
]
CHOICES = [
    "plain",
    "bilateral",
    "partition",
    "pair",
    "equal",
    "in_order",
    "head",
    "tail",
    "both_ends",
    "drop",
]
# Valid numbers of ranks and threads are kept small: 65,536 ranks are packed well, but not in a millisecond.
RANKS = [1, 2, 3, 4, 0, -1, 2**20, 2**31, 2**64]
THREADS = [0, 1, 2, 5, -1, 1025, 2**31, 2**64]


def main() -> None:
    """Runs --inputs malformed inputs and prints what became of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--inputs", type=int, default=100_000, help="inputs to try (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the inputs (default: %(default)s)")
    parser.add_argument(
        "--extension", type=Path, help="a build of megatron_bicc._C to test, not the usual one"
    )
    arguments = parser.parse_args()
    if arguments.extension:
        load_extension(arguments.extension)
    random = np.random.default_rng(arguments.seed)
    with np.errstate(over="ignore"):
        outcomes = Counter(try_one(random) for _ in range(arguments.inputs))
    packed, refused = outcomes["packed"], outcomes["refused"]
    print(f"{packed + refused} inputs: {packed} packed as the oracle does, {refused} refused")


def load_extension(path: Path) -> None:
    """Makes `import megatron_bicc._C` find the library at `path`."""
    spec = importlib.util.spec_from_file_location("megatron_bicc._C", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["megatron_bicc._C"] = module
    import megatron_bicc

    megatron_bicc._C = module


def try_one(random: np.random.Generator) -> str:
    """Packs one spoilt input; returns "packed" or "refused"."""
    from packing.cases import assert_same_plan, pack_every_rank
    from packing.oracle import pack_reference

    batch, settings, call = valid_input(random)
    for _ in range(random.integers(1, 3)):
        kind = random.integers(4)
        if kind == 0:
            batch = spoil_field(random, batch, spoilt_values)
        elif kind == 1:
            batch = spoil_field(random, batch, spoilt_form)
        elif kind == 2:
            settings = spoil_field(random, settings, spoilt_setting)
        else:
            spoil_call(random, call)
    try:
        plan = pack_every_rank(batch, settings, **call)
    except ValueError as error:
        if len(str(error).splitlines()) != 1:
            raise RuntimeError(f"not one clear line: {error!s}") from error
        return "refused"
    assert_same_plan(plan, pack_reference(batch, settings, call["dp_size"]))
    return "packed"


def pick(random: np.random.Generator, choices: list) -> Any:
    """Returns one of `choices`, unconverted."""
    return choices[random.integers(len(choices))]


def valid_input(random: np.random.Generator) -> tuple[Any, Any, dict[str, Any]]:
    """Returns a batch, settings and the remaining arguments of a call that packs."""
    from packing.cases import ALL_ROLLOUTS, Group, make_batch, make_settings

    groups = []
    for _ in range(random.integers(1, 5)):
        rollouts = [pick(random, ALL_ROLLOUTS) for _ in range(random.integers(2, 6))]
        groups.append(Group(int(random.integers(1, 6)), rollouts))
    batch = make_batch(groups)
    settings = make_settings(
        max_sequence_tokens=60,
        max_tokens_per_microbatch=pick(random, [20, 40, 80]),
        overlong="drop",
        alignment=4,
        context_ranks=int(random.integers(1, 5)),
    )
    return batch, settings, {"dp_size": int(random.integers(1, 4)), "threads": 1}


def spoil_field(random: np.random.Generator, record: Any, spoilt: Any) -> Any:
    """Returns `record` with one field replaced by spoilt(random, its value, its name)."""
    name = pick(random, fields(record)).name
    return replace(record, **{name: spoilt(random, getattr(record, name), name)})


def spoilt_values(random: np.random.Generator, array: Any, _: str) -> Any:
    """Returns a copy of `array` with up to three values overwritten."""
    if (
        not isinstance(array, np.ndarray)
        or array.ndim != 1
        or not array.size
        or array.dtype.str not in ("<i4", "<i8", "<f4")
    ):
        return array
    array = array.copy()
    for _ in range(random.integers(1, 4)):
        place = random.integers(array.size)
        if array.dtype.kind == "f":
            array[place] = pick(random, [np.nan, np.inf, -np.inf, -1.0, 0.5, 3e38])
        elif random.integers(2):
            near = array[random.integers(array.size)] + random.integers(-2, 3)
            array[place] = near.astype(array.dtype)
        else:
            array[place] = np.array(pick(random, INTEGERS) % 2**64, np.uint64).astype(array.dtype)
    return array


def spoilt_form(random: np.random.Generator, array: Any, _: str) -> Any:
    """Returns `array` in a form that the packer may not expect."""
    if not isinstance(array, np.ndarray):
        return pick(random, ODD_VALUES)
    forms = [
        lambda: array.astype(
            pick(random, ["i2", "i4", "i8", "u4", "f4", "f8", ">i4", ">i8", "O", "c8", "U3", "?"])
        ),
        lambda: np.repeat(array, 2)[::2],
        lambda: array[::-1],
        lambda: array[: random.integers(array.size + 1)],
        lambda: array[random.integers(array.size + 1) :],
        lambda: np.concatenate([array, array]),
        lambda: array.reshape(1, -1),
        lambda: array[:0],
        lambda: np.broadcast_to(array[:1], array.shape),
        lambda: np.frombuffer(b"x" + array.tobytes(), np.uint8)[1:].view(array.dtype),
        lambda: array.tolist(),
        lambda: pick(random, ODD_VALUES),
    ]
    return pick(random, forms)() if array.size and array.ndim == 1 else pick(random, ODD_VALUES)


def spoilt_setting(random: np.random.Generator, _: Any, name: str) -> Any:
    """Returns a value that the setting may not expect."""
    if name == "context_ranks":
        return pick(random, [*RANKS, *ODD_VALUES])
    return pick(random, pick(random, [INTEGERS, ODD_VALUES, CHOICES]))


def spoil_call(random: np.random.Generator, call: dict[str, Any]) -> None:
    """Overwrites one of the arguments beside batch and settings."""
    name = pick(random, sorted(call))
    if name == "dp_size":
        call[name] = pick(random, [*RANKS, *ODD_VALUES])
    elif name == "threads":
        call[name] = pick(random, [*THREADS, *ODD_VALUES])
    elif isinstance(call[name], np.ndarray) and call[name].ndim == 2:
        array = call[name]
        spoilt = [
            array.T,
            array[:, 1:],
            array.astype(np.float64),
            array[None],
            array[:, ::-1],
            array.ravel(),
            None,
        ]
        call[name] = pick(random, spoilt)


if __name__ == "__main__":
    main()
