"""Turns what any framework calls a number into a Python float.

Guarantees: a returned value is a built-in ``float`` or a tuple of them; no framework is imported,
and no value is guessed from text, truth values or arrays of several dimensions.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from typing import Any, TypeAlias

import numpy as np

Scalar: TypeAlias = Any
"""A Python or NumPy number, or a 0-d array or tensor of any framework."""

Scalars: TypeAlias = Any
"""One :data:`Scalar`, or a sequence or 1-d array of them: one per parameter group."""


def as_float(value: Scalar, name: str) -> float:
    """Return ``value`` as a float; TypeError or ValueError name the argument."""
    if type(value) is float:
        return value
    rank = _rank(value)
    if rank:
        raise ValueError(
            f"{name} must be one number, got an array of {rank} dimensions; reduce it first"
        )
    # .item() leaves the graph of a tensor that requires gradients, where float() would warn;
    # TensorFlow's tensors have .numpy() instead.
    number = value
    for method in ("item", "numpy"):
        if hasattr(number, method):
            number = getattr(number, method)()
    if isinstance(number, (bool, np.bool_, str, bytes, bytearray)):
        raise TypeError(f"{name} must be a number, got {name} = {value!r}")
    try:
        return float(number)
    except OverflowError as error:
        raise ValueError(f"{name} must be within the range of a float: {error}") from error
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be a number, got {name} = {value!r}") from error


def as_floats(value: Scalars, name: str) -> tuple[float, ...]:
    """Return one number, or a sequence of numbers, as a tuple that is never empty."""
    if type(value) is float:
        return (value,)
    rank = _rank(value)
    if rank == 1 and hasattr(value, "tolist"):
        value = value.tolist()
    elif rank is not None and rank != 1:
        return (as_float(value, name),)
    if not isinstance(value, Iterable):
        return (as_float(value, name),)
    if isinstance(value, (str, bytes, bytearray, dict, set, frozenset)):
        raise TypeError(f"{name} must be a number or a sequence of numbers, got {value!r}")
    numbers = tuple([as_float(element, name) for element in value])
    if not numbers:
        raise ValueError(f"{name} must hold at least one number, got an empty sequence")
    return numbers


def _rank(value: Any) -> int | None:
    """Return how many axes an array has; None for what is no array."""
    rank = getattr(value, "ndim", None)
    if rank is None:
        shape = getattr(value, "shape", None)
        rank = None if shape is None else len(shape)
    return rank


def as_finite(value: Scalar, name: str) -> float:
    """Return one number that is finite; ValueError names the argument."""
    number = as_float(value, name)
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {name} = {number}")
    return number


def as_bool(value: Any, name: str) -> bool:
    """Return ``value`` if it is a bool; TypeError names the argument."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {name} = {value!r}")
    return value


def as_integer(value: Any, name: str, minimum: int) -> int:
    """Return ``value`` as an int of at least ``minimum``; a float or a bool is an error."""
    if type(value) is int and value >= minimum:
        return value
    try:
        integer = operator.index(value)
    except TypeError:
        integer = None
    if integer is None or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {name} = {value!r}")
    if integer < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {name} = {integer}")
    return integer
