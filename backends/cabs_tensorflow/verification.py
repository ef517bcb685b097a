"""A comparison of what is measured with a plain loop over the examples.

Guarantees: the loop is a ``tf.GradientTape`` in eager mode, and knows nothing of graphs and rules.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from cabs.gradients import Checked, Verification
from cabs_tensorflow.measure import Measurement, name_of


def verify(losses_of: Callable[[Any], Any], batch: Any, variables: Any = None) -> Verification:
    """Compare the squared norms of per-example gradients with a loop over the examples.

    The loop calls ``losses_of`` with one example after the other, so a few examples are enough,
    and a model that mixes examples in any way shows. In single precision expect errors around
    1e-6, in half precision as much as the loop itself rounds.

    Args:
        losses_of: From a batch, one loss an example, shape (m,). It must not draw random numbers,
            so call models with ``training=False``.
        batch: A nest of tensors with the examples along their first axes, at least two.
        variables: A nest of trainable variables; by default all that ``losses_of`` uses.

    Returns:
        A :class:`cabs.gradients.Verification`: for each variable the error, relative to its own
        sum of squares or to 1e-7 of that of all, whichever is larger, and the rules that cover
        it.

    Raises:
        ValueError: If ``batch`` has less than two examples, or tensors of different lengths.
        UncoveredParameterError: If a variable is not covered; it says why.

    Example:
        >>> import tensorflow as tf, cabs_tensorflow
        >>> weight = tf.Variable(tf.ones([2, 3]), name="weight")
        >>> inputs = tf.constant([[1.0, 0.0], [3.0, 2.0]])
        >>> found = cabs_tensorflow.verify(
        ...     lambda x: tf.reduce_sum(tf.square(x @ weight), axis=1), inputs
        ... )
        >>> found.error < 1e-6
        True
        >>> [(row.name, row.rule) for row in found.rows]
        [('weight', 'matrix')]
    """
    batch = tf.nest.map_structure(tf.convert_to_tensor, batch)
    lengths = {one.shape[0] if one.shape.rank else 0 for one in tf.nest.flatten(batch)}
    if len(lengths) != 1 or min(lengths) < 2:
        raise ValueError(
            "batch must hold tensors with at least two examples along their first axes, and the "
            f"same number in all, got {lengths}"
        )
    (examples,) = lengths
    if variables is None:
        with tf.GradientTape() as tape:
            losses_of(batch)
        variables = tape.watched_variables()
    leaves = tf.nest.flatten(variables)
    rules: list[str] = []

    @tf.function(autograph=False)
    def measured() -> list[Any]:
        with tf.GradientTape() as tape:
            losses = losses_of(batch)
        measurement = Measurement(losses, leaves, None)
        cotangents = tape.gradient(losses, measurement.targets)
        rules[:] = measurement.rules
        measurement.see(cotangents)
        measurement.sum_up(range(len(leaves)), is_elementwise=False)
        return [0.0 if one is None else one for one in measurement.square_sums()]

    squares = [float(one) for one in measured()]
    expected = [0.0] * len(leaves)
    for index in range(examples):
        one = tf.nest.map_structure(lambda tensor, at=index: tensor[at : at + 1], batch)
        with tf.GradientTape() as tape:
            loss = losses_of(one)
        for at, gradient in enumerate(tape.gradient(loss, leaves)):
            if gradient is not None:
                dense = tf.convert_to_tensor(gradient).numpy().astype(np.float64)
                expected[at] += float(np.sum(np.square(dense)))
    # Of a gradient that is zero but for rounding, as that of a bias of keys in attention, there is
    # no relative error.
    floor = 1e-7 * max(sum(expected), sum(squares))
    names = [name_of(leaf) for leaf in leaves]
    return Verification(
        tuple(
            Checked(name, rule, abs(square - exact) / max(exact, floor) if square or exact else 0.0)
            for name, rule, square, exact in zip(names, rules, squares, expected, strict=True)
        )
    )
