"""The error for what cannot be measured exactly, the same in each adapter.

Guarantees: a message is short, however many parameters it concerns.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import TYPE_CHECKING

# How many names a message holds.
_NAMED = 3


class UncoveredParameterError(RuntimeError):
    """A parameter whose per-example gradient norms an adapter cannot give exactly.

    Adapters raise it before any gradient is written. The message says the reason first, then the
    operation and parameters, and the way out.

    Example:
        >>> raise UncoveredParameterError("Softmax runs along the axis that holds the examples")
        Traceback (most recent call last):
        ...
        cabs.gradients.errors.UncoveredParameterError: Softmax runs along the axis that holds the
        examples
    """

    if not TYPE_CHECKING:
        # AutoGraph hands on as they are the errors that it knows how to make.
        __init__ = Exception.__init__


def listed(names: Iterable[str], count: int | None = None, separator: str = ", ") -> str:
    """Return the first names, and how many more there are.

    Args:
        names: A list, or, with their ``count``, what makes them as far as they are named.
        count: How many there are.
        separator: What stands between them.

    Example:
        >>> listed(["a", "b", "c", "d", "e"])
        'a, b, c and 2 more'
    """
    if count is None:
        names = [*names]
        count = len(names)
    before = " " if separator == ", " else separator
    more = f"{before}and {count - _NAMED} more" if count > _NAMED else ""
    return separator.join(islice(names, _NAMED)) + more
