"""The compiled loss of a Keras model, one number for each example.

Guarantees: it is taken from the values that the compiled losses have before Keras reduces them,
weighted as Keras weights them. Refuses losses that Keras does not reduce to their mean.
"""

from __future__ import annotations

import warnings
from typing import Any

import keras
import tensorflow as tf


def compiled_losses(model: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> Any:
    """Return the compiled losses of each example, weighted and summed over outputs, shape (m,).

    Args:
        model: A compiled Keras model.
        y: Targets: one tensor, or one for each output, in their order or by their names.
        y_pred: What the model returned: one tensor, or a list, tuple or dictionary of them.
        sample_weight: Weights of the examples, or None; or one for each output.

    Raises:
        ValueError: If a loss is missing, is not reduced to its mean, or does not fit the outputs.
    """
    if model.loss is None:
        raise ValueError(
            f"model {model.name!r} is compiled without a loss; give one to compile, override "
            "compute_losses, or estimate the variance from groups of examples, with groups=8"
        )
    if isinstance(y_pred, dict):
        names, outputs = list(y_pred), list(y_pred.values())
    else:
        names, outputs = list(getattr(model, "output_names", [])), _listed(y_pred)

    def each(value: Any, argument: str) -> list[Any]:
        """Return what is meant for each output."""
        if not isinstance(value, (dict, list, tuple)):
            return [value] * len(outputs)
        known = not isinstance(value, dict) or set(value) == set(names)
        if not known or len(value) != len(outputs):
            raise ValueError(
                f"{argument} must be one, or one for each output of model {model.name!r} "
                f"({', '.join(names) or len(outputs)}), got {value!r}"
            )
        return [value[name] for name in names] if isinstance(value, dict) else list(value)

    # Keras tells the weights of losses as part of what it would save: outside of the function that
    # is traced, and with a warning where something, such as a lambda, could not be saved.
    with tf.init_scope(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss_weights = model.get_compile_config()["loss_weights"]
    terms = zip(
        each(model.loss, "loss"),
        each(y, "y"),
        outputs,
        each(sample_weight, "sample_weight"),
        each(loss_weights, "loss_weights"),
        strict=True,
    )
    total: Any = sum(
        _of_examples(loss, *values) * (1.0 if weight is None else weight)
        for loss, *values, weight in terms
        if loss is not None
    )
    return total


def _of_examples(loss: Any, y: Any, y_pred: Any, sample_weight: Any) -> Any:
    """Return one loss of each example, shape (m,)."""
    loss = keras.losses.get(loss)
    dtype = keras.config.floatx()
    if isinstance(loss, keras.losses.Loss):
        if loss.reduction not in ("sum_over_batch_size", "mean"):
            raise ValueError(
                f"loss {loss.name!r} must have reduction='sum_over_batch_size', got "
                f"reduction={loss.reduction!r}; the gradient that is measured is that of a mean"
            )
        loss, dtype = loss.call, loss.dtype
    y, y_pred = (tf.cast(tf.convert_to_tensor(one), dtype) for one in (y, y_pred))
    values = tf.convert_to_tensor(loss(*_of_same_rank(y, y_pred)))
    if not values.shape.rank:
        raise ValueError(
            "a loss must return a value for each example, with the examples along the first axis, "
            f"got shape {values.shape}; leave the mean to Keras"
        )
    if sample_weight is not None:
        values, weights = _of_same_rank(values, tf.cast(sample_weight, values.dtype))
        values *= weights
    return tf.reduce_mean(values, axis=list(range(1, values.shape.rank)))


def _of_same_rank(first: Any, second: Any) -> tuple[Any, Any]:
    """Return two tensors of which Keras would drop, or repeat, a last axis of length one."""
    ranks = first.shape.rank, second.shape.rank
    if None in ranks or abs(ranks[0] - ranks[1]) != 1:
        return first, second
    low, high = sorted((first, second), key=lambda one: one.shape.rank)
    if high.shape[-1] != 1:
        return first, second
    if low.shape.rank == 1:
        low = low[:, None]
    else:
        high = tf.squeeze(high, axis=-1)
    return (low, high) if ranks[0] < ranks[1] else (high, low)


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]
