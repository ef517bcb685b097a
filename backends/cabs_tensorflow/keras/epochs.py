"""The loop over epochs of a Keras model, where an epoch is one pass over a dataset.

Guarantees: callbacks, validation and metrics see what they see in ``keras.Model.fit``; a batch is
drawn after everything that follows the step before. Refuses to guess how many batches an epoch has:
Keras holds every epoch to the number that the first one had, which fits no sizes that change, and
has no way out of it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf


def run_epochs(
    model: Any,
    data: Any,
    *,
    epochs: range,
    steps_per_epoch: int | None,
    verbose: Any,
    callbacks: Any,
    validation_data: Any,
    validation_freq: Any,
    begin: Callable[[], None],
    validation: dict[str, Any],
) -> Any:
    """Train a compiled model, whose ``train_function`` is made, and return the history.

    Args:
        model: The model.
        data: A ``tf.data.Dataset`` of batches.
        epochs: Their numbers, from 0.
        steps_per_epoch: End an epoch after so many batches, and begin the next one with the batch
            that follows; None ends it with the data.
        verbose: As in ``keras.Model.fit``, and so are the callbacks and those for validation.
        callbacks: A list, or a ``keras.callbacks.CallbackList``.
        validation_data: What ``evaluate`` takes, as a tuple, or a dataset.
        validation_freq: After every so many epochs, or after which, counted from 1.
        begin: Called where the steps of an epoch begin.
        validation: More arguments for ``evaluate``.

    Raises:
        ValueError: If an epoch has no batch.
    """
    if not isinstance(callbacks, keras.callbacks.CallbackList):
        callbacks = keras.callbacks.CallbackList(
            callbacks,
            add_history=True,
            add_progbar=verbose != 0,
            verbose=verbose,
            epochs=epochs.stop,
            steps=steps_per_epoch,
            model=model,
        )
    model.stop_training = False
    callbacks.on_train_begin()
    # Set by a callback that goes on with a run which was cut off.
    first = getattr(model, "_initial_epoch", None) or epochs.start
    batches: Any = None
    logs: dict[str, Any] = {}
    for epoch in range(first, epochs.stop):
        if batches is None or steps_per_epoch is None:
            batches = iter(data)
        model.reset_metrics()
        # Or the progress bar takes the number of steps of the epoch before for that of this one.
        callbacks.set_params(callbacks.params)
        callbacks.on_epoch_begin(epoch)
        begin()
        logs = {}
        for step in itertools.count() if steps_per_epoch is None else range(steps_per_epoch):
            callbacks.on_train_batch_begin(step)
            try:
                logs = model.train_function(batches)
            except StopIteration:
                batches = None
                break
            callbacks.on_train_batch_end(step, logs)
            if model.stop_training:
                break
        if not logs:
            raise ValueError(
                f"there is no batch in epoch {epoch + 1}; x is empty, or was at its end: call "
                "repeat() on its source, or leave out steps_per_epoch"
            )
        if validation_data is not None and _is_due(validation_freq, epoch + 1):
            x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(validation_data)
            found = model.evaluate(
                x,
                y,
                sample_weight=sample_weight,
                callbacks=callbacks,
                return_dict=True,
                **validation,
            )
            logs = {**logs, **{f"val_{name}": value for name, value in found.items()}}
        callbacks.on_epoch_end(epoch, logs)
        if model.stop_training:
            break
    model.optimizer.finalize_variable_values(model.trainable_variables)
    callbacks.on_train_end(logs)
    return model.history


def with_class_weights(data: Any, class_weight: dict[int, float]) -> Any:
    """Return batches of (inputs, targets, weights of examples) from batches of (inputs, targets).

    Args:
        data: A dataset; targets are classes, of shape (m,) or (m, 1), or one-hot, of shape (m, n).
        class_weight: Weights by class; 1 for those that are left out.

    Raises:
        ValueError: If the batches hold weights already, or several outputs.
    """
    spec = data.element_spec
    if not (isinstance(spec, tuple) and len(spec) == 2 and isinstance(spec[1], tf.TensorSpec)):
        raise ValueError(
            "class_weight needs batches of (inputs, targets) with one output, got "
            f"{spec}; leave it out, and give weights of examples as a third part"
        )
    largest = max(class_weight)
    table = tf.constant([float(class_weight.get(at, 1.0)) for at in range(largest + 2)])

    def weigh(x: Any, y: Any) -> Any:
        if y.shape.rank > 1 and y.shape[-1] != 1:
            classes = tf.argmax(y, axis=-1)
        else:
            classes = tf.round(tf.reshape(y, [-1]))
        # Beyond the largest class that has a weight of its own, it is 1.
        return x, y, tf.gather(table, tf.minimum(tf.cast(classes, tf.int32), largest + 1))

    # Not in parallel, which would draw batches before their size is known.
    return data.map(tf.autograph.experimental.do_not_convert(weigh))


def _is_due(frequency: Any, epoch: int) -> bool:
    return epoch % frequency == 0 if isinstance(frequency, int) else epoch in frequency
