"""What a comparison with a plain loop over the examples found, for any framework.

Guarantees: a parameter that is not covered shows, in the table and in the error.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Checked:
    """What was found about one parameter.

    Example:
        >>> Checked("out.weight", rule="matrix", error=2e-7).rule
        'matrix'
    """

    name: str
    """What the adapter calls it: its name in a module, or its path in a pytree."""
    rule: str
    """How its gradients are computed; what is the matter if they are not."""
    error: float
    """Relative error of the sum of squared norms; ``nan`` if it is not covered."""


@dataclass(frozen=True)
class Verification:
    """A table, one row a parameter; ``str`` and ``print`` show it.

    Example:
        >>> print(Verification((Checked("weight", "matrix", 2e-7), Checked("bias", "added", 0.0))))
        parameter    error  rule
        weight     2.0e-07  matrix
        bias       0.0e+00  added
    """

    rows: tuple[Checked, ...]

    @property
    def error(self) -> float:
        """The largest relative error; ``nan`` if a parameter is not covered."""
        errors = [row.error for row in self.rows]
        return math.nan if any(map(math.isnan, errors)) else max(errors, default=0.0)

    def __str__(self) -> str:
        width = max(len("parameter"), *(len(row.name) for row in self.rows))
        lines = [f"{'parameter':<{width}}  {'error':>7}  rule"]
        lines += [f"{row.name:<{width}}  {row.error:>7.1e}  {row.rule}" for row in self.rows]
        return "\n".join(lines)


def relative_error(found: float, expected: float) -> float:
    """Return the error of a sum of squares, relative to what it should be.

    Example:
        >>> relative_error(1.5, 1.0), relative_error(0.0, 0.0), relative_error(1.0, 0.0)
        (0.5, 0.0, inf)
    """
    return abs(found - expected) / expected if expected else math.inf if found else 0.0
