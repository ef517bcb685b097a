"""The error for what cannot be measured exactly, in words that a user can act upon.

Guarantees: it names the parameter by its path, the operation and the way out.
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
        cabs_jax.errors.UncoveredParameterError: argument 0 meets the example in while, whose ...
    """


def uncovered(names: Sequence[str], operation: str, error: Exception) -> UncoveredParameterError:
    """Return the error for parameters that meet the example in some operation."""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return UncoveredParameterError(
        f"{', '.join(names)} {'meet' if len(names) > 1 else 'meets'} the example in {operation}, "
        f"whose derivative for one example cannot be taken: {reason}. Take statistics from groups "
        "of examples instead, with cabs_jax.PartialStatistics, or hold the parameter fixed with "
        "jax.lax.stop_gradient"
    )
