"""Gradients, statistics and metrics of one training step of a Keras model.

Guarantees: gradients are those of the loss that Keras minimizes over the batch, in groups or not;
metrics see each example once.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from cabs.gradients.errors import UncoveredParameterError
from cabs_tensorflow.keras.conditions import check_masks, check_unchanged, is_overridden
from cabs_tensorflow.keras.losses import compiled_losses, may_be_masked, unmasked_shares
from cabs_tensorflow.replicas import mean_of, replica_here, summed
from cabs_tensorflow.statistics import BatchStatistics, PartialStatistics, timed
from cabs_tensorflow.tape import GradientTape

Given = dict[str, Any]
"""What workers compare, and what their clocks say, as ``GradientTape.gradient`` takes it."""


class Measured(NamedTuple):
    """What a step has found before it is taken."""

    gradients: list[Any]
    """For the optimizer: scaled by its ``scale_loss``; None for a variable without one."""
    statistics: BatchStatistics
    loss: Any
    """The mean over examples, of which the gradients are, shape ()."""
    logs: dict[str, Any]


def measure(
    model: Any,
    x: Any,
    y: Any,
    sample_weight: Any,
    sample: int | None,
    in_metric: bool,
    given: Given,
) -> Measured:
    """Return what a step finds with the statistics of single examples."""
    with GradientTape() as tape:
        y_pred = model(x, training=True)
        losses = model.compute_losses(x, y, y_pred, sample_weight)
    if in_metric and not model.optimizer.built:
        # Keras builds it with the first step, which P is needed for already.
        with tf.init_scope():
            model.optimizer.build(model.trainable_variables)
    try:
        gradients, statistics = tape.gradient(
            losses,
            model.trainable_variables,
            sample=sample,
            loss_scale=model.optimizer.scale_loss(1.0),
            all_reduce=True,
            optimizer=model.optimizer if in_metric else None,
            **given,
        )
    except UncoveredParameterError as error:
        error.add_note(
            "In fit, cabs_tensorflow.adaptive(model, controller, microbatches=8) does so."
        )
        raise
    loss = tf.reduce_mean(losses)
    if not is_overridden(model, "compute_losses"):
        # The same number; and the metrics of several outputs, which Keras updates on the way.
        loss = model.compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight)
    if replica_here()[1] > 1:
        loss = tf.cast(statistics.loss, loss.dtype)
    logs = _record(model, loss, x, y, y_pred, sample_weight)
    return Measured(gradients, statistics, loss, logs)


def measure_microbatches(
    model: Any, x: Any, y: Any, sample_weight: Any, microbatches: int, given: Given
) -> Measured:
    """Return what a step finds with ``microbatches`` of them, whose sizes differ by one at most.

    There are fewer for a batch of fewer than two examples for each: as many as have two, and two if
    there are two examples, since one group shows no variance. Several replicas share them.
    """
    replicas = replica_here()[1]
    microbatches //= replicas
    examples = _examples(x)
    used = tf.minimum(tf.maximum(examples // 2, tf.minimum(examples, 2)), microbatches)
    if replicas > 1:
        used = tf.maximum(used, 1)
    scale = model.optimizer.scale_loss(1.0)
    unmasked = _unmasked_shares(model, x, y)

    def share(index: int) -> list[Any]:
        """Return a microbatch's part of the statistics, and its share of loss and gradients."""
        start, stop = examples * index // used, examples * (index + 1) // used
        my_x, my_y, my_weight = keras.tree.map_structure(
            lambda array: None if array is None else array[start:stop], (x, y, sample_weight)
        )
        loss, gradients = _group(model, my_x, my_y, my_weight, unmasked)
        part = PartialStatistics.of_group(stop - start, _times(1 / scale, gradients))
        weight = (stop - start) / (examples if replicas == 1 else tf.maximum(examples, 1))
        return [part, *_times(weight, [loss, *gradients])]

    # The first microbatch shows which gradients there are.
    first = share(0)
    there = [one is not None for one in first]
    total = list(itertools.compress(first, there))
    nothing = tf.nest.map_structure(tf.zeros_like, total, expand_composites=True)
    for index in range(1, microbatches):
        more = tf.cond(
            index < used,
            lambda index=index: list(itertools.compress(share(index), there)),
            lambda: nothing,
        )
        total = tf.nest.map_structure(tf.add, total, more, expand_composites=True)
    part, loss, *gradients = (total.pop(0) if one else None for one in there)
    seconds = None
    if replicas > 1:
        part, loss, gradients, seconds = _of_all(part, loss, gradients, **given)
    statistics = part.complete(_times(1 / scale, gradients), loss=loss)  # type: ignore[union-attr]
    if seconds is not None:
        statistics = timed(statistics, seconds)
    return Measured(gradients, statistics, loss, model.get_metrics_result())


def _of_all(
    part: Any, loss: Any, gradients: list[Any], fingerprint: Any = None, seconds: Any = None
) -> tuple[Any, Any, list[Any], Any]:
    """Return the part of all replicas, the means over all examples, and that of the seconds."""
    # An empty share is no group.
    numbers = [tf.minimum(part.groups, part.examples), part.group_square_sum]
    numbers.append(tf.cast(loss, part.dtype) * tf.cast(part.examples, part.dtype))
    numbers += [] if seconds is None else [seconds]
    there = [one for one in gradients if one is not None]
    (examples, groups, squares, loss_sum, *clock), reduced, told = summed(
        [tf.cast(one, part.dtype) for one in numbers], there, part.examples, fingerprint
    )
    counts = [tf.cast(one, tf.int32) for one in (examples, groups)]
    whole = PartialStatistics(*counts, squares, fingerprint=told)
    means = iter(reduced)
    gradients = [None if one is None else next(means) for one in gradients]
    return whole, loss_sum / examples, gradients, mean_of(clock)


def _unmasked_shares(model: Any, x: Any, y: Any) -> list[Any] | None:
    """Return which share of the positions each loss of the whole batch counts; None if all of all.

    Keras divides by their number in what it is given, which is not that of a microbatch.
    """
    if model.loss is None or any(
        is_overridden(model, name) for name in ("compute_loss", "compute_losses")
    ):
        return None
    is_masked: list[bool] = []

    def shares_in(training: bool) -> Any:
        @tf.function(autograph=False)
        def shares(x: Any, y: Any) -> list[Any]:
            y_pred = model(x, training=training)
            try:
                found = unmasked_shares(model, y, y_pred)
            except ValueError:
                if not may_be_masked(model, y_pred):
                    # A loss of the batch, which is taken as it is.
                    return []
                raise
            is_masked[:] = [one is not None for one in found]
            if training:
                check_masks(one for one in found if one is not None)
            return [tf.ones((), tf.float64) if one is None else one for one in found]

        return shares, shares.get_concrete_function(x, y)

    # Only traced: what is counted must be the same in training, and in each microbatch.
    shares_in(training=True)
    if not any(is_masked):
        return None
    shares, traced = shares_in(training=False)
    check_unchanged(traced.graph)
    found = shares(x, y)
    if replica_here()[1] == 1:
        return list(found)
    count = tf.cast(_examples(x), tf.float64)
    # Nothing is known of an empty share.
    own = [tf.math.multiply_no_nan(one, count) for one in found]
    (total, *sums), *_ = summed(own, [], count)
    return [one / total for one in sums]


def _group(
    model: Any, x: Any, y: Any, sample_weight: Any, unmasked: list[Any] | None
) -> tuple[Any, list[Any]]:
    """Return the mean loss of a microbatch, and its gradients, scaled."""
    with tf.GradientTape() as tape:
        y_pred = model(x, training=True)
        # Keras adds up what replicas return.
        loss = replica_here()[1] * model.compute_loss(
            x=x, y=y, y_pred=y_pred, sample_weight=sample_weight
        )
        if unmasked is not None:
            losses = compiled_losses(model, y, y_pred, sample_weight, unmasked)
            more = [tf.cast(tf.reduce_sum(one), losses.dtype) for one in model.losses]
            loss = tf.add_n([tf.reduce_mean(losses), *more])
        scaled = model.optimizer.scale_loss(loss)
    gradients = tape.gradient(scaled, model.trainable_variables)
    _record(model, loss, x, y, y_pred, sample_weight)
    return loss, [None if one is None else tf.convert_to_tensor(one) for one in gradients]


def _record(
    model: Any, loss: Any, x: Any, y: Any, y_pred: Any, sample_weight: Any
) -> dict[str, Any]:
    """Update the metrics, and return the logs."""
    tracker = next((metric for metric in model.metrics if metric.name == "loss"), None)
    if tracker is not None:
        tracker.update_state(loss, sample_weight=_examples(x))
    logs: dict[str, Any] = model.compute_metrics(x, y, y_pred, sample_weight=sample_weight)
    return logs


def _examples(x: Any) -> Any:
    """Return the size of a batch, a tensor."""
    return tf.shape(next(one for one in keras.tree.flatten(x) if one is not None))[0]


def _times(factor: Any, values: list[Any]) -> list[Any]:
    return [None if one is None else one * tf.cast(factor, one.dtype) for one in values]
