"""The metric of the step that an optimizer of Keras takes next.

Guarantees: P is what that step multiplies a gradient with, the current batch's gradient in the
second moment, and the rate how far that goes; an optimizer whose step is not known is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

Metric = Callable[[Any, Any], Any]
"""From a gradient, dense, and its variable to P, in the shape of both."""


def learning_rate(optimizer: Any) -> Any:
    r"""Return the learning rate that a rule takes: how far a gradient moves a variable in the end.

    With momentum :math:`\mu` of SGD or RMSprop a gradient is in the steps that follow too,
    together :math:`1 / (1 - \mu)` times (Smith and others, "Don't decay the learning rate, increase
    the batch size", arXiv 1711.00489, section 4). Adam, AdamW, Nadam and Adagrad take the
    rate as it is.

    Args:
        optimizer: One of Keras', perhaps inside of a ``LossScaleOptimizer``.

    Returns:
        A tensor, shape (), that of the step to come where the rate follows a schedule.

    Example:
        >>> import keras, cabs_tensorflow
        >>> optimizer = keras.optimizers.SGD(0.5, momentum=0.75)
        >>> float(cabs_tensorflow.learning_rate(optimizer))
        2.0
    """
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    has_momentum = type(inner).__name__ in ("SGD", "RMSprop")
    momentum = float(inner.momentum or 0.0) if has_momentum else 0.0
    return tf.convert_to_tensor(optimizer.learning_rate) / (1.0 - momentum)


def metric_of(optimizer: Any) -> Metric | None:
    """Return the metric of an optimizer's coming step; None where P is 1.

    Raises:
        TypeError: If the optimizer's step is not known.
        ValueError: If it is not built yet, or steps with the gradients of several batches.
    """
    # What scales the loss holds the one that steps.
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    kind = type(optimizer)
    # By their names, since a loop without Keras does not import it.
    is_known = kind.__module__.startswith("keras.") and kind.__name__ in _ROOTS
    if callable(optimizer) and not hasattr(optimizer, "apply_gradients"):
        made: Metric = optimizer
        return made
    if not is_known:
        raise TypeError(
            f"optimizer must be one of Keras' {', '.join(_ROOTS)}, whose steps are known, got "
            f"{optimizer!r}; for another give a function from a gradient and its variable to P, a "
            "tensor in their shape"
        )
    if optimizer.gradient_accumulation_steps:
        raise ValueError(
            "optimizer must step with each batch's own gradient, got gradient_accumulation_steps="
            f"{optimizer.gradient_accumulation_steps}; leave it out, and cut a batch by cabs.split"
        )
    root = _ROOTS[kind.__name__]
    if root is None:
        return None
    if not optimizer.built:
        raise ValueError(
            "optimizer must be built, so that it holds second moments: call "
            "optimizer.build(model.trainable_variables) before"
        )

    def metric(gradient: Any, variable: Any) -> Any:
        index = optimizer._get_variable_index(variable)
        return 1.0 / root(optimizer, index, gradient)

    return metric


def _of_adam(optimizer: Any, index: int, gradient: Any) -> Any:
    second, rest = _second(optimizer, index, gradient), _rest(optimizer, gradient)
    if getattr(optimizer, "amsgrad", False):
        largest = tf.convert_to_tensor(optimizer._velocity_hats[index])
        second = tf.maximum(largest, second)
    # Its epsilon is beside the root before the bias is corrected.
    return (tf.sqrt(second) + optimizer.epsilon) / tf.sqrt(rest)


def _of_nadam(optimizer: Any, index: int, gradient: Any) -> Any:
    second, rest = _second(optimizer, index, gradient), _rest(optimizer, gradient)
    return tf.sqrt(second / rest) + optimizer.epsilon


def _second(optimizer: Any, index: int, gradient: Any) -> Any:
    held = tf.convert_to_tensor(optimizer._velocities[index])
    return held + (tf.square(gradient) - held) * (1.0 - optimizer.beta_2)


def _rest(optimizer: Any, gradient: Any) -> Any:
    step = tf.cast(optimizer.iterations + 1, gradient.dtype)
    return 1.0 - tf.pow(tf.cast(optimizer.beta_2, gradient.dtype), step)


def _of_rmsprop(optimizer: Any, index: int, gradient: Any) -> Any:
    rho = optimizer.rho
    second = rho * tf.convert_to_tensor(optimizer._velocities[index])
    second += (1.0 - rho) * tf.square(gradient)
    if optimizer.centered:
        mean = rho * tf.convert_to_tensor(optimizer._average_gradients[index])
        second -= tf.square(mean + (1.0 - rho) * gradient)
    return tf.sqrt(second + optimizer.epsilon)


def _of_adagrad(optimizer: Any, index: int, gradient: Any) -> Any:
    held = tf.convert_to_tensor(optimizer._accumulators[index])
    return tf.sqrt(held + tf.square(gradient) + optimizer.epsilon)


_ROOTS: dict[str, Callable[..., Any] | None] = {
    "SGD": None,
    "Adam": _of_adam,
    "AdamW": _of_adam,
    "Nadam": _of_nadam,
    "RMSprop": _of_rmsprop,
    "Adagrad": _of_adagrad,
}
"""By the optimizer, what its step divides by."""


def weights_of(metric: Metric, leaves: list[Any], gradients: list[Any], scale: Any) -> list[Any]:
    """Return P of each leaf, None where there is no gradient; ValueError if it does not fit."""
    found: list[Any] = []
    for leaf, gradient in zip(leaves, gradients, strict=True):
        if gradient is None:
            found.append(None)
            continue
        dense = tf.convert_to_tensor(gradient)
        if scale is not None:
            dense /= tf.cast(scale, dense.dtype)
        weight = tf.convert_to_tensor(metric(dense, leaf))
        if not weight.shape.is_compatible_with(dense.shape) or weight.shape.rank is None:
            raise ValueError(
                f"optimizer must give P in the shape of the gradient, {dense.shape}, got "
                f"{weight.shape}"
            )
        found.append(weight)
    return found
