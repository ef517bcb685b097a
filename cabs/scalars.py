"""Turns what any framework calls a number into a Python float.

Guarantees: a returned value is a built-in ``float`` or a tuple of them; no framework is imported,
and no value is guessed from text, truth values or arrays of several dimensions.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any, TypeAlias

Scalar: TypeAlias = Any
"""A Python or NumPy number, or a 0-d array or tensor of any framework."""

Scalars: TypeAlias = Any
"""One :data:`Scalar`, or a sequence or 1-d array of them: one per parameter group."""


def as_float(value: Scalar, name: str) -> float:
    """Return ``value`` as a float; TypeError or ValueError name the argument."""
    if type(value) is float:
        return value
    if isinstance(value, (bool, str, bytes, bytearray)):
        raise TypeError(f"{name} must be a number, got {name} = {value!r}")
    dimensions = getattr(value, "ndim", 0)
    if dimensions != 0:
        raise ValueError(
            f"{name} must be one number, got an array of {dimensions} dimensions; reduce it first"
        )
    # .item() leaves the graph of a tensor that requires gradients; float() would warn.
    item = getattr(value, "item", None)
    try:
        return float(value if item is None else item())
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be a number, got {name} = {value!r}") from error


def as_floats(value: Scalars, name: str) -> tuple[float, ...]:
    """Return one number, or a sequence of numbers, as a tuple that is never empty."""
    if type(value) is float:
        return (value,)
    if getattr(value, "ndim", 0) == 1:
        value = value.tolist() if hasattr(value, "tolist") else value.numpy().tolist()
    if isinstance(value, Iterable) and getattr(value, "ndim", None) is None:
        if isinstance(value, (str, bytes, bytearray, dict, set, frozenset)):
            raise TypeError(f"{name} must be a number or a sequence of numbers, got {value!r}")
        numbers = tuple([as_float(element, name) for element in value])
        if not numbers:
            raise ValueError(f"{name} must hold at least one number, got an empty sequence")
        return numbers
    return (as_float(value, name),)


def as_integer(value: Any, name: str, minimum: int) -> int:
    """Return ``value`` as an int of at least ``minimum``; a float or a bool is an error."""
    try:
        integer = operator.index(value)
    except TypeError:
        integer = None
    if integer is None or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {name} = {value!r}")
    if integer < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {name} = {integer}")
    return integer
