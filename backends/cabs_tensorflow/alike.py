"""Whether workers train alike, told by numbers that are summed with their gradients.

Guarantees: what is told is the same on every worker, so that all of them see a difference in the
same step; nothing is read from a device for it, and nothing is sent that is not sent anyway.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

BITS = 20
"""How many a fingerprint has."""


def checked(value: Any, name: str, said: str, dtype: Any) -> Any:
    """Return what a step is given as a tensor, shape ().

    Args:
        value: The number, None if there is none.
        name: What it is called.
        said: What gives it.
        dtype: tf.int32, or a floating type.

    Raises:
        TypeError: If it is no tensor of such numbers.
        ValueError: If it is not of shape (), or the same in each run of the function.
    """
    if value is None:
        return None
    kind = "integer" if dtype.is_integer else "float"
    is_tensor = tf.is_tensor(value) or isinstance(value, tf.Variable)
    if not is_tensor or value.dtype.is_integer != dtype.is_integer:
        raise TypeError(
            f"{name} must be a tensor, {kind}, that the compiled step takes as an argument, got "
            f"{value!r}; pass {said} to the step, whose input_signature has tf.TensorSpec([], "
            f"{dtype!r}) for it"
        )
    value = tf.convert_to_tensor(value)
    if value.shape.rank != 0 or tf.get_static_value(value) is not None:
        raise ValueError(
            f"{name} must be one number that the compiled step takes as an argument, since a "
            f"constant stays as it was when the step was traced, got {value!r}; pass {said} to "
            "the step"
        )
    return tf.cast(value, dtype)


def bits_of(fingerprint: Any, dtype: Any) -> Any:
    """Return numbers 0 and 1, shape (BITS,), whose sums over 2**24 replicas float32 holds."""
    shifted = tf.bitwise.right_shift(fingerprint, tf.range(BITS))
    return tf.cast(tf.bitwise.bitwise_and(shifted, 1), dtype)


def told(fingerprint: Any, sums: Any, replicas: int) -> Any:
    """Return a fingerprint where all replicas have it, and else -1 - fingerprint, below 0.

    Args:
        fingerprint: That of this one.
        sums: Of the bits, over the replicas.
        replicas: How many there are.
    """
    is_alike = tf.reduce_all((sums == 0) | (sums == replicas))
    return tf.where(is_alike, fingerprint, -1 - fingerprint)


def both(one: Any, other: Any) -> Any:
    """Return what two parts of a batch are told together; None is that of a part that is not."""
    if one is None or other is None:
        return other if one is None else one
    return tf.minimum(one, other)


def check(told: Any) -> None:
    """Raise RuntimeError, on every worker, where they do not train alike; waits for the number."""
    number = 0 if told is None else int(told)
    if number < 0:
        raise RuntimeError(
            "the workers do not train alike: their controllers differ, or the batches that they "
            f"draw; this one's fingerprint is {-1 - number}. Build the controllers with the same "
            "settings, load the same state on all workers, and call update with the same learning "
            "rates and with the statistics that all have; give their datasets the same seed"
        )
