"""The squared norm of gradients as a tape gives them.

Guarantees: rows that a sparse gradient names more than once are added up before they are squared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from cabs.gradients import lookups
from cabs_tensorflow.norms import reductions
from cabs_tensorflow.norms.arrays import ARRAYS

# More rows than a table has that is worth laying out.
_MANY = 2**31


def square_of(gradients: Sequence[Any]) -> Any:
    """Return the sum of squares of gradients, which may be None or ``tf.IndexedSlices``."""
    given = [gradient for gradient in gradients if gradient is not None]
    if not given:
        raise ValueError(
            "gradients must hold at least one that is not None, or nothing is measured, got "
            f"{len(gradients)} of None; does the loss depend on these variables, and does the tape "
            "watch them?"
        )
    sums = [tf.cast(_square_of_one(one), reductions.sum_type(given)) for one in given]
    return tf.add_n(sums)


def square_in(weights: Sequence[Any], gradients: Sequence[Any], dtype: Any) -> Any:
    """Return the sum of squares of the elements of gradients, each times its weight."""
    pairs = [pair for pair in zip(gradients, weights, strict=True) if pair[0] is not None]
    sums = [reductions.weighted_square(tf.convert_to_tensor(one), weight) for one, weight in pairs]
    return tf.add_n([tf.cast(one, dtype) for one in sums])


def _square_of_one(gradient: Any) -> Any:
    if not isinstance(gradient, tf.IndexedSlices):
        return reductions.square(gradient)
    rows = reductions.wide(gradient.values)
    flat = tf.reshape(rows, [tf.shape(rows)[0], math.prod(rows.shape[1:])])
    # One example, which takes all rows.
    return lookups.squares(ARRAYS, gradient.indices[None], flat[None], _MANY)
