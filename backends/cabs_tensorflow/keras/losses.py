"""The compiled loss of a Keras model, one number for each example.

Guarantees: the mean over the examples is the loss that Keras reduces them to, with the weights of
examples, the masks of outputs and the classes that are ignored, because it is made of the same
values in the same way. Refuses losses that are reduced to anything but a mean.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from cabs_tensorflow.keras.conditions import MEANS
from cabs_tensorflow.replicas import mean_of_all


class _Term(NamedTuple):
    """The loss of an output, and what Keras gives to it."""

    loss: Any
    y: Any
    y_pred: Any
    sample_weight: Any
    weight: Any


def compiled_losses(
    model: Any,
    y: Any,
    y_pred: Any,
    sample_weight: Any = None,
    shares: Sequence[Any] | None = None,
) -> Any:
    """Return the compiled losses of each example, weighted and summed over outputs, shape (m,).

    Where positions are masked out, Keras divides their sum by how many are left in the whole batch.
    The loss of an example is then its own sum, times m over that number.

    Args:
        model: A compiled Keras model.
        y: Targets: one tensor, or one for each output, in their order or by their names.
        y_pred: What the model returned: one tensor, or a list, tuple or dictionary of them.
        sample_weight: Weights of the examples, or None; or one for each output.
        shares: For a part of a batch: what :func:`unmasked_shares` says of the whole.

    Raises:
        ValueError: If a loss is missing, is not reduced to its mean, or does not fit the outputs.
    """
    terms = list(_terms(model, y, y_pred, sample_weight))
    of_terms: Sequence[Any] = [None] * len(terms) if shares is None else shares
    total: Any = sum(
        _of_examples(term, share) * (1.0 if term.weight is None else term.weight)
        for term, share in zip(terms, of_terms, strict=True)
    )
    return total


def unmasked_shares(model: Any, y: Any, y_pred: Any) -> list[Any]:
    """Return for each loss which share of the positions of a batch is left by masks.

    Each is a tensor of shape (), or None for a loss without a mask.

    Raises:
        ValueError: As for :func:`compiled_losses`.
    """
    return [_unmasked(_values(term)[1]) for term in _terms(model, y, y_pred, None)]


def may_be_masked(model: Any, y_pred: Any) -> bool:
    """Return whether a model's outputs have masks, or a loss of Keras ignores a class."""
    losses = [one for one in keras.tree.flatten(model.loss) if isinstance(one, keras.losses.Loss)]
    return any(_mask_of(one) is not None for one in keras.tree.flatten(y_pred)) or any(
        one.get_config().get("ignore_class") is not None for one in losses
    )


def _terms(model: Any, y: Any, y_pred: Any, sample_weight: Any) -> Iterator[_Term]:
    if model.loss is None:
        raise ValueError(
            f"model {model.name!r} is compiled without a loss; give one to compile, override "
            "compute_losses, or estimate the variance from groups of examples, with microbatches=8"
        )
    if isinstance(y_pred, dict):
        names, outputs = list(y_pred), list(y_pred.values())
    else:
        names, outputs = list(getattr(model, "output_names", [])), _listed(y_pred)

    def each(value: Any, argument: str) -> list[Any]:
        """Return what is meant for each output."""
        if not isinstance(value, (dict, list, tuple)):
            return [value] * len(outputs)
        if isinstance(value, dict):
            known = set(value) == set(names)
        else:
            # In which order a dictionary would be taken, nobody has said.
            known = not isinstance(y_pred, dict) or len(outputs) == 1
        if not known or len(value) != len(outputs):
            raise ValueError(
                f"{argument} must be one, or one for each output of model {model.name!r} "
                f"({', '.join(names) or len(outputs)}), by name where outputs have names in a "
                f"dictionary, got {value!r}"
            )
        return [value[name] for name in names] if isinstance(value, dict) else list(value)

    # Keras tells the weights of losses as part of what it would save: outside of the function that
    # is traced, and with a warning where something, such as a lambda, could not be saved.
    with tf.init_scope(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss_weights = model.get_compile_config()["loss_weights"]
    parts = (
        each(model.loss, "loss"),
        each(y, "y"),
        outputs,
        each(sample_weight, "sample_weight"),
        each(loss_weights, "loss_weights"),
    )
    for loss, *values in zip(*parts, strict=True):
        if loss is not None:
            yield _Term(keras.losses.get(loss), *values)


def _of_examples(term: _Term, share: Any) -> Any:
    """Return one loss of each example, shape (m,)."""
    values, mask = _values(term)
    weights = None
    if mask is not None:
        weights = tf.cast(mask, values.dtype)
        share = mean_of_all(tf.cast(mask, tf.float64)) if share is None else share
    if term.sample_weight is not None:
        given = tf.cast(term.sample_weight, values.dtype)
        weights = given if weights is None else _product(weights, given, "mask")
    if weights is not None:
        values = _product(values, weights, "loss")
    losses = tf.reduce_mean(values, axis=list(range(1, values.shape.rank)))
    if mask is not None:
        losses *= tf.math.divide_no_nan(tf.ones((), losses.dtype), tf.cast(share, losses.dtype))
    # What Keras adds up over outputs.
    return tf.cast(losses, keras.config.floatx())


def _values(term: _Term) -> tuple[Any, Any]:
    """Return the values of a loss before they are weighted, and what of them counts, or None."""
    loss, dtype, call = term.loss, keras.config.floatx(), _squeezed(term.loss)
    if isinstance(loss, keras.losses.Loss):
        if loss.reduction not in MEANS:
            raise ValueError(
                f"loss {loss.name!r} must have reduction='sum_over_batch_size', got "
                f"reduction={loss.reduction!r}; the gradient that is measured is that of a mean"
            )
        if type(loss).__call__ is not keras.losses.Loss.__call__:
            raise ValueError(
                f"loss {loss.name!r} has a __call__ of its own, so that its values for each "
                "example are not known; override call in its place, or compute_losses in the model"
            )
        call, dtype = loss.call, loss.dtype
    masks = [_mask_of(term.y_pred)]
    values = call(*(tf.cast(tf.convert_to_tensor(one), dtype) for one in (term.y, term.y_pred)))
    masks.append(_mask_of(values))
    values = tf.cast(tf.convert_to_tensor(values), dtype)
    if not values.shape.rank:
        raise ValueError(
            "a loss must return a value for each example, with the examples along the first axis, "
            f"got shape {values.shape}; leave the mean to Keras"
        )
    given = [tf.cast(one, tf.bool) for one in masks if one is not None]
    if not given:
        return values, None
    return values, tf.logical_and(*given) if len(given) == 2 else given[0]


def _mask_of(tensor: Any) -> Any:
    """Return the mask that Keras keeps with a tensor, or None."""
    return getattr(tensor, "_keras_mask", None)


def _unmasked(mask: Any) -> Any:
    """Return which share of a mask is true, shape (), or None for none."""
    return None if mask is None else tf.reduce_mean(tf.cast(mask, tf.float64))


def _squeezed(loss: Any) -> Any:
    """Return a loss function as Keras calls it."""
    return lambda y, y_pred: loss(*_of_same_rank(y, y_pred))


def _product(values: Any, weights: Any, name: str) -> Any:
    """Return values of examples times their weights, aligned as Keras aligns them."""
    values, weights = _of_same_rank(values, weights)
    if weights.shape.rank not in (0, values.shape.rank):
        raise ValueError(
            f"weights and masks must be one for each value of the {name}, got shapes "
            f"{weights.shape} and {values.shape}, of which Keras would align the last axes, so "
            "that those of one example meet another; give them the same number of axes"
        )
    return values * weights


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
