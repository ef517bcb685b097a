"""The error for what cannot be measured exactly, in words that a user can act upon.

Guarantees: the reason comes first; then the operation, the parameters by their paths, three of them
at most and how many more there are, and the way out.
"""

from __future__ import annotations

from collections.abc import Sequence


class UncoveredParameterError(RuntimeError):
    """A parameter whose per-example gradient norms this adapter cannot give exactly.

    Example:
        >>> import jax, jax.numpy as jnp, cabs_jax
        >>> def loss_fn(weight, x):
        ...     return jax.lax.while_loop(lambda y: y < 9.0, lambda y: y * weight, x)
        >>> cabs_jax.value_and_grad(loss_fn)(2.0, jnp.ones(3))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        cabs_jax.errors.UncoveredParameterError: Reverse-mode differentiation does not work for ...
    """


# How many names of leaves a message holds.
_SHOWN = 3


def listed(names: Sequence[str]) -> str:
    """Return the first names, and how many more there are.

    Example:
        >>> listed(["a", "b", "c", "d", "e"])
        'a, b, c and 2 more'
    """
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def uncovered(names: Sequence[str], operation: str, error: Exception) -> UncoveredParameterError:
    """Return the error for parameters that meet the example in some operation."""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return UncoveredParameterError(
        f"{reason.rstrip('.')}. So there is no derivative for one example where {listed(names)} "
        f"{'meet' if len(names) > 1 else 'meets'} the example, in {operation}. Take statistics "
        "from groups of examples instead, with cabs_jax.PartialStatistics, or hold fixed what "
        "cannot be measured, with jax.lax.stop_gradient"
    )
