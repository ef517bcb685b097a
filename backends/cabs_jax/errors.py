"""The error for what cannot be measured exactly, in words that a user can act upon.

Guarantees: the reason comes first; then the operation, the parameters by their paths, three of them
at most and how many more there are, and the way out.
"""

from __future__ import annotations

from collections.abc import Sequence

from cabs.gradients.errors import UncoveredParameterError, listed


def uncovered(names: Sequence[str], operation: str, error: Exception) -> UncoveredParameterError:
    """Return the error for parameters that meet the example in some operation."""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return UncoveredParameterError(
        f"{reason.rstrip('.')}. So there is no derivative for one example where {listed(names)} "
        f"{'meet' if len(names) > 1 else 'meets'} the example, in {operation}. Take statistics "
        "from groups of examples instead, with cabs_jax.PartialStatistics, or hold fixed what "
        "cannot be measured, with jax.lax.stop_gradient"
    )
