"""Which batch sizes are allowed, and which of them is nearest to what a rule asks for.

Guarantees: a set of sizes is never empty, holds positive integers only, does not change, and is
equal to another one exactly when both allow the same sizes, however they were written.
"""

from __future__ import annotations

import math
import operator
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any

from cabs.values.scalars import as_float, as_integer

# Beyond it floats skip integers, and with them the rule's value.
_LARGEST = 2**53


class BatchSizes:
    """The admissible batch sizes, in increasing order.

    ``BatchSizes(sizes)`` takes them one by one; :meth:`range` and :meth:`geometric` build the
    usual sets. A geometric grid keeps the number of compiled programs small where a framework
    compiles one per shape.

    Args:
        sizes: The sizes allowed, in examples; any order, repetitions are dropped.

    Raises:
        TypeError: If a size is not an integer.
        ValueError: If there is no size, or one is smaller than 1.

    Example:
        >>> BatchSizes([64, 16, 32]).nearest(50.0)
        64
        >>> BatchSizes([16, 17, 18]) == BatchSizes.range(16, 18)
        True
    """

    __slots__ = ("_admissible", "_maximum", "_minimum")
    _admissible: range | tuple[int, ...]

    def __init__(self, sizes: Iterable[int]) -> None:
        if isinstance(sizes, (str, bytes)) or not hasattr(sizes, "__iter__"):
            raise TypeError(f"sizes must be integers, one by one, got sizes = {sizes!r}")
        # One set of sizes has one representation, so that equality is equality of sets.
        if isinstance(sizes, range) and len(sizes) > 1 and sizes[0] > 0 and sizes.step > 0:
            self._admissible = range(sizes[0], sizes[-1] + 1, sizes.step)
        else:
            listed = sorted({as_integer(size, "a batch size", 1) for size in sizes})
            if not listed:
                raise ValueError("sizes must hold at least one batch size, got none")
            steps = {high - low for low, high in pairwise(listed)} or {1}
            self._admissible = (
                range(listed[0], listed[-1] + 1, steps.pop()) if len(steps) == 1 else tuple(listed)
            )
        self._minimum, self._maximum = self._admissible[0], self._admissible[-1]
        if self.maximum > _LARGEST:
            raise ValueError(f"a batch size must be at most 2**53, got {self.maximum}")

    @classmethod
    def range(cls, minimum: int, maximum: int, *, multiple_of: int = 1) -> BatchSizes:
        """Allow every multiple of ``multiple_of`` from ``minimum`` to ``maximum``, both included.

        Raises:
            ValueError: If no multiple lies between the two.

        Example:
            >>> BatchSizes.range(16, 2048, multiple_of=32)
            BatchSizes(32 to 2048 in steps of 32)
        """
        minimum = as_integer(minimum, "minimum", 1)
        maximum = as_integer(maximum, "maximum", 1)
        multiple_of = as_integer(multiple_of, "multiple_of", 1)
        if maximum > _LARGEST:
            raise ValueError(f"maximum must be at most 2**53, got maximum = {maximum}")
        first = -(-minimum // multiple_of) * multiple_of
        if first > maximum:
            what = "batch size" if multiple_of == 1 else f"multiple of {multiple_of}"
            raise ValueError(
                f"no {what} lies between minimum = {minimum} and maximum = {maximum}; "
                "widen the range or lower multiple_of"
            )
        return cls(range(first, maximum + 1, multiple_of))

    @classmethod
    def geometric(cls, minimum: int, maximum: int, *, factor: float = 2.0) -> BatchSizes:
        """Allow ``minimum * factor**k``, rounded, for k = 0, 1, ... up to ``maximum``.

        Raises:
            ValueError: If ``factor`` is not above 1, or ``minimum`` is above ``maximum``.

        Example:
            >>> list(BatchSizes.geometric(16, 256))
            [16, 32, 64, 128, 256]
        """
        minimum = as_integer(minimum, "minimum", 1)
        maximum = as_integer(maximum, "maximum", 1)
        factor = as_float(factor, "factor")
        if not (factor > 1.0 and math.isfinite(factor)):
            raise ValueError(f"factor must be finite and above 1, got factor = {factor}")
        if not minimum <= maximum <= _LARGEST:
            raise ValueError(
                f"minimum must not exceed maximum, nor maximum 2**53, got minimum = {minimum}, "
                f"maximum = {maximum}"
            )
        grid, power = [minimum], 1.0
        while (size := round(min(minimum * factor**power, maximum + 1.0))) <= maximum:
            grid.append(size)
            # On to the next power that rounds to a new size, however small the factor is.
            beyond = math.log((grid[-1] + 0.5) / minimum) / math.log(factor)
            power = max(power + 1.0, math.floor(beyond))
        return cls(grid)

    @property
    def minimum(self) -> int:
        """The smallest size allowed."""
        return self._minimum

    @property
    def maximum(self) -> int:
        """The largest size allowed."""
        return self._maximum

    def nearest(self, value: float) -> int:
        """Return the allowed size nearest to ``value``; of two as near, the even one.

        Where both or neither are even, the smaller. Between consecutive integers this is IEEE
        rounding, half to even.

        Example:
            >>> [BatchSizes.range(16, 2048).nearest(value) for value in (3.0, 16.5, 17.5, 9e9)]
            [16, 16, 18, 2048]
        """
        sizes = self._admissible
        if value <= self._minimum:
            return self._minimum
        if value >= self._maximum:
            return self._maximum
        if value != value:
            raise ValueError("value must be a number, got value = nan")
        if isinstance(sizes, range):
            below = int((value - sizes.start) // sizes.step)
        else:
            below = bisect_right(sizes, value) - 1
        low, high = sizes[below], sizes[below + 1]
        if value - low != high - value:
            return low if value - low < high - value else high
        return high if low % 2 == 1 and high % 2 == 0 else low

    def limit_growth(self, current: int, factor: float) -> int:
        """Return the largest size reachable from ``current`` by growing at most ``factor`` times.

        The next larger size is always within reach, so that no grid can hold a run for ever.
        """
        sizes = self._admissible
        within = bisect_right(sizes, current * factor)
        beyond_current = bisect_right(sizes, current) + 1
        return sizes[min(max(within, beyond_current), len(sizes)) - 1]

    def to_json(self) -> dict[str, int] | list[int]:
        """Return plain values from which :meth:`from_json` builds an equal set."""
        sizes = self._admissible
        if isinstance(sizes, tuple):
            return list(sizes)
        return {"minimum": sizes[0], "maximum": sizes[-1], "step": sizes.step}

    @classmethod
    def from_json(cls, value: Any) -> BatchSizes:
        """Return the set that :meth:`to_json` described; ValueError if it is no such value."""
        try:
            if isinstance(value, list):
                return cls(value)
            if set(value) == {"minimum", "maximum", "step"}:
                ends = (as_integer(value[name], name, 1) for name in ("minimum", "maximum", "step"))
                minimum, maximum, step = ends
                return cls(range(minimum, maximum + 1, step))
        except (OverflowError, TypeError, ValueError) as error:
            raise ValueError(f"{value!r} describes no batch sizes: {error}") from error
        raise ValueError(f"{value!r} describes no batch sizes")

    def __contains__(self, size: object) -> bool:
        if isinstance(size, bool) or not hasattr(size, "__index__"):
            return False
        return operator.index(size) in self._admissible

    def __iter__(self) -> Iterator[int]:
        return iter(self._admissible)

    def __len__(self) -> int:
        return len(self._admissible)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BatchSizes) and self._admissible == other._admissible

    def __hash__(self) -> int:
        return hash(self._admissible)

    def __repr__(self) -> str:
        if isinstance(self._admissible, tuple):
            return f"BatchSizes({list(self._admissible)})"
        steps = "" if self._admissible.step == 1 else f" in steps of {self._admissible.step}"
        return f"BatchSizes({self.minimum} to {self.maximum}{steps})"
