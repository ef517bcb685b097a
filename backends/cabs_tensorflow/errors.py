"""The error for what cannot be measured exactly, in words that a user can act upon.

Guarantees: it names the variable, the operation and the way out.
"""

from __future__ import annotations


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
        cabs_tensorflow.errors.UncoveredParameterError: ...variable 'scale' of shape (3,) lies
        behind Cumsum (operation 'Cumsum'), which runs along the axis that holds the examples. ...
    """

    # AutoGraph hands on as they are the errors that it knows how to make.
    __init__ = Exception.__init__


class MixedError(Exception):
    """An operation whose gradient does not belong to one example at a time; says how."""


def uncovered(names: str, problem: str) -> UncoveredParameterError:
    """Return the error for variables and what is the matter with them."""
    error: UncoveredParameterError = UncoveredParameterError(
        f"{names} {problem}. Estimate the variance from groups of examples instead, with "
        "cabs_tensorflow.PartialStatistics, or leave the variable out of the sources"
    )
    return error
