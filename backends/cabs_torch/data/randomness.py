"""Random numbers of a dataset that depend on the example, and not on who reads it when.

Guarantees: with the same seed, epoch and example, the global generators of Python, NumPy and
PyTorch give the same numbers in any process, whatever was read before; training's own generators
are left as they were. Other generators that a dataset may have are not touched.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

# The constants of splitmix64 (Steele, Lea, Flood: "Fast Splittable Pseudorandom Number Generators",
# 2014).
_STEP, _FIRST, _SECOND = (
    np.uint64(number) for number in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


def seeds_of(seed: int, epoch: int, places: npt.ArrayLike) -> list[int]:
    """Return 63 random bits for each place in an epoch, the same on every machine."""
    mixed = np.zeros(1, dtype=np.uint64)
    words = [seed >> shift & (2**64 - 1) for shift in range(0, max(seed.bit_length(), 1), 64)]
    # One after the other: places and epochs that are only added up would meet.
    for word in (*words, len(words), epoch):
        mixed = _mixed(mixed ^ np.uint64(word))
    numbers: list[int] = (_mixed(mixed ^ np.array(places, np.uint64)) >> np.uint64(1)).tolist()
    return numbers


def _mixed(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    words = words + _STEP
    words = (words ^ words >> np.uint64(30)) * _FIRST
    words = (words ^ words >> np.uint64(27)) * _SECOND
    mixed: npt.NDArray[np.uint64] = words ^ words >> np.uint64(31)
    return mixed


def reseed(number: int) -> None:
    """Set the global generators of the CPU."""
    random.seed(number)
    np.random.seed(number & 0xFFFFFFFF)
    torch.default_generator.manual_seed(number)


@contextmanager
def set_aside() -> Iterator[None]:
    """Put the global generators of the CPU back to where they were, when the block ends."""
    states = current()
    try:
        yield
    finally:
        put_back(states)


def current() -> tuple[Any, ...]:
    """Return the states of the global generators of the CPU."""
    return random.getstate(), np.random.get_state(), torch.default_generator.get_state()


def put_back(states: tuple[Any, ...]) -> None:
    """Put the global generators of the CPU into states that they were in."""
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.default_generator.set_state(states[2])
