"""The error for what cannot be measured exactly, in words that a user can act upon.

Guarantees: it says first what is the matter, and names the operation, variables and the way out; it
is short however many variables there are.
"""

from __future__ import annotations

from collections.abc import Sequence


class UncoveredParameterError(RuntimeError):
    """A variable whose per-example gradient norms this adapter cannot give exactly.

    It is raised while the function is traced, before anything was computed.

    Example:
        >>> import tensorflow as tf, cabs_tensorflow
        >>> scale = tf.Variable(tf.ones(3), name="scale")
        >>> @tf.function
        ... def measured(x):
        ...     with cabs_tensorflow.GradientTape() as tape:
        ...         losses = tf.reduce_sum(tf.cumsum(x * scale, axis=0), axis=1)
        ...     return tape.gradient(losses, [scale])
        >>> measured(tf.eye(3))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        cabs_tensorflow.errors.UncoveredParameterError: ...Cumsum (operation 'Cumsum') runs along
        the axis that holds the examples; behind it lies variable 'scale' of shape (3,). ...
    """

    # AutoGraph hands on as they are the errors that it knows how to make.
    __init__ = Exception.__init__


_NAMED = 3
"""How many variables are named."""


def uncovered(problem: str, names: Sequence[str]) -> UncoveredParameterError:
    """Return the error for variables and what is the matter with them.

    Args:
        problem: What is the matter, up to where the variables are named.
        names: What they are called.
    """
    named = ", ".join(names[:_NAMED])
    if len(names) > _NAMED:
        named += f" and {len(names) - _NAMED} more"
    error: UncoveredParameterError = UncoveredParameterError(
        f"{problem} {named}. Estimate the variance from groups of examples instead, with "
        "cabs_tensorflow.PartialStatistics, or leave out such sources"
    )
    return error
