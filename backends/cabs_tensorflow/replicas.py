"""Which replica of a ``tf.distribute`` strategy a computation belongs to, and what all have.

Guarantees: a computation that sees one replica's share of the batch says so, or is a sum over the
replicas that was asked for. What a replica has measured is known as its own until something else
is computed from it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import tensorflow as tf

from cabs_tensorflow.alike import bits_of, told
from cabs_tensorflow.graph.symbolic_shapes import SHARE
from cabs_tensorflow.norms import reductions

# What of a Keras optimizer sums gradients over replicas. It cannot be told that they are reduced.
_REDUCTION = "_all_reduce_sum_gradients"


def share_of(batch: Any) -> Any:
    """Return this replica's share of a batch, in ``strategy.run``.

    Each replica is given the whole batch, as ``strategy.run(replica, (x, y))`` does with tensors,
    and cuts its own examples out of it on the host. Shares differ by one example at most, and are
    empty where there are fewer examples than replicas. With several workers, each draws the same
    batches: give all the same seed and the same settings, and ``fingerprint`` to
    :meth:`GradientTape.gradient`.

    Args:
        batch: A nest of tensors with the examples along their first axes; None is left as it is.

    Returns:
        The same nest; with one replica, or outside of ``strategy.run``, the batch itself.

    Example:
        >>> import tensorflow as tf, cabs_tensorflow
        >>> cabs_tensorflow.share_of(tf.range(3)).numpy().tolist()
        [0, 1, 2]
    """
    context = tf.distribute.get_replica_context()
    if context is None or context.num_replicas_in_sync == 1:
        return batch
    number, replicas = context.replica_id_in_sync_group, context.num_replicas_in_sync

    def cut(tensor: Any) -> Any:
        if tensor is None:
            return None
        examples = tf.shape(tensor)[0]
        share = tensor[examples * number // replicas : examples * (number + 1) // replicas]
        if tf.executing_eagerly():
            return share
        # That is where the tape begins to count.
        with share.graph._attr_scope({SHARE: tf.compat.v1.AttrValue(b=True)}):
            return tf.identity(share)

    with tf.device("CPU:0"):
        return tf.nest.map_structure(cut, batch)


def summed(
    numbers: Sequence[Any], gradients: Sequence[Any], examples: Any, fingerprint: Any = None
) -> tuple[list[Any], list[Any], Any]:
    """Return numbers summed over the replicas, gradients averaged over all examples, what is told.

    Tensors of one type go in one ``all_reduce``, which packs them: where numbers and gradients are
    of one type, there is no collective beside that of the gradients.

    Args:
        numbers: Tensors of shape () and one type.
        gradients: The mean gradients of this replica's share, which may be ``tf.IndexedSlices``.
        examples: How many examples this replica has, int32.
        fingerprint: That of this worker's controller, int32, to be compared; None for no
            comparison, of which nothing is told.
    """
    context = tf.distribute.get_replica_context()
    together = tf.stack([tf.cast(examples, numbers[0].dtype), *numbers])
    if fingerprint is not None:
        together = tf.concat([together, bits_of(fingerprint, together.dtype)], 0)
    # In half precision a sum over examples could overflow where their mean does not.
    own = [together, *(_times(_wide(one), examples) for one in gradients)]
    sums: list[Any] = [None] * len(own)
    # Some strategies concatenate what they are given.
    for dtype in {one.dtype: None for one in own}:
        places = [place for place, one in enumerate(own) if one.dtype == dtype]
        found = context.all_reduce("SUM", [own[place] for place in places])
        for place, one in zip(places, found, strict=True):
            sums[place] = one
    if fingerprint is not None:
        fingerprint = told(fingerprint, sums[0][1 + len(numbers) :], context.num_replicas_in_sync)
    total, *rest = tf.unstack(sums[0][: 1 + len(numbers)])
    averaged = []
    for one, gradient in zip(sums[1:], gradients, strict=True):
        one = tf.cast(_times(one, 1 / tf.cast(total, one.dtype)), gradient.dtype)
        if isinstance(one, tf.IndexedSlices):
            # Rows of several replicas lie behind each other, and have lost their size.
            one.values.set_shape([None, *gradient.values.shape[1:]])
        averaged.append(one)
    return [total, *rest], averaged, fingerprint


def mean_of(sums: Sequence[Any]) -> Any:
    """Return the mean over replicas of the one number that was summed; None if there is none."""
    return sums[0] / replica_here()[1] if sums else None


def mean_of_all(values: Any) -> Any:
    """Return the mean of a tensor's elements over all replicas; here alone where there is one."""
    if replica_here()[1] == 1:
        return tf.reduce_mean(values)
    own = tf.stack([tf.reduce_sum(values), tf.cast(tf.size(values), values.dtype)])
    total, count = tf.unstack(tf.distribute.get_replica_context().all_reduce("SUM", own))
    return total / count


def apply(optimizer: Any, gradients: Iterable[Any], variables: Iterable[Any]) -> None:
    """Update variables with gradients that are reduced over the replicas already.

    ``optimizer.apply`` of Keras adds gradients up over the replicas, without a way to say that they
    are those of the batch, and clips what each replica has before. Here it takes them as they are.
    With one replica this is ``optimizer.apply``.

    Args:
        optimizer: An optimizer of Keras.
        gradients: One for each variable, as ``gradient(..., all_reduce=True)`` returns them.
        variables: The variables.

    Raises:
        TypeError: On several replicas, if the optimizer is none of Keras on TensorFlow.

    Example:
        >>> import keras, tensorflow as tf, cabs_tensorflow
        >>> weight = keras.Variable([1.0, 2.0])
        >>> cabs_tensorflow.apply(keras.optimizers.SGD(0.5), [tf.constant([2.0, 2.0])], [weight])
        >>> weight.numpy().tolist()
        [0.0, 1.0]
    """
    inner, optimizers = optimizer, []
    while inner is not None and replica_here()[1] > 1:
        if not hasattr(inner, _REDUCTION):
            raise TypeError(
                "optimizer must be one of Keras 3 on TensorFlow, which sums gradients by "
                f"{_REDUCTION}, got {inner!r}; give it gradients that are divided by the number of "
                "replicas where it sums them, or as they are where it does not"
            )
        optimizers.append(inner)
        # What scales the loss holds another one.
        inner = getattr(inner, "inner_optimizer", None)
    # Replicas are traced in turns, and none goes on before all have come to the update.
    for one in optimizers:
        vars(one)[_REDUCTION] = list
    try:
        optimizer.apply(list(gradients), list(variables))
    finally:
        for one in optimizers:
            vars(one).pop(_REDUCTION, None)


def _wide(gradient: Any) -> Any:
    if isinstance(gradient, tf.IndexedSlices):
        return tf.IndexedSlices(
            reductions.wide(gradient.values), gradient.indices, gradient.dense_shape
        )
    return reductions.wide(gradient)


def _times(gradient: Any, factor: Any) -> Any:
    factor = tf.cast(factor, gradient.dtype)
    if isinstance(gradient, tf.IndexedSlices):
        return tf.IndexedSlices(gradient.values * factor, gradient.indices, gradient.dense_shape)
    return gradient * factor


def replica_here() -> tuple[tuple[int, ...], int]:
    """Return the number of the replica that is computed here, and how many there are.

    The number is empty where all of the batch is seen: outside of ``strategy.run``, or in that of a
    strategy with one replica.
    """
    context = tf.distribute.get_replica_context()
    if context is None or context.num_replicas_in_sync == 1:
        return (), 1
    number = tf.get_static_value(context.replica_id_in_sync_group)
    return (-1 if number is None else int(number),), int(context.num_replicas_in_sync)


def mark_own(gradients: Iterable[Any]) -> None:
    """Remember that gradients are those of one replica out of several, if they are."""
    if replica_here()[1] > 1:
        for one in gradients:
            if one is not None:
                one._cabs_own = True


def check_reduced(gradients: Iterable[Any]) -> None:
    """Raise ValueError if one of several replicas gives its own gradients for those of the batch.

    What it has given to :func:`mark_own` is known again; sums over the replicas are other tensors.
    """
    _, replicas = replica_here()
    if replicas > 1 and any(hasattr(one, "_cabs_own") for one in gradients):
        raise ValueError(
            f"gradients must be those of the batch, got those of one of {replicas} replicas; "
            'multiply them by the size of its share, sum them with all_reduce("SUM", ...), and '
            "divide by the size of the batch"
        )


def check_seen(leaves: Iterable[Any], *, all_reduce: bool) -> bool:
    """Return whether gradients are to be summed over several replicas.

    Args:
        leaves: Variables and tensors.
        all_reduce: Whether that was asked for.

    Raises:
        ValueError: Where exact statistics would be those of one replica, or of none.
    """
    _, replicas = replica_here()
    if replicas > 1 and not all_reduce:
        raise ValueError(
            f"this is one of {replicas} replicas, whose gradient and statistics are not those of "
            "the batch; give all_reduce=True, for gradients and statistics of the examples of all "
            "replicas, or measure replicas as groups, with tf.GradientTape and "
            "cabs_tensorflow.PartialStatistics.of_group"
        )
    if tf.distribute.in_cross_replica_context() and any(
        isinstance(leaf, tf.distribute.DistributedValues) for leaf in leaves
    ):
        raise ValueError(
            "sources must be variables of one replica, got those of a tf.distribute strategy "
            "outside of strategy.run; take the gradient in strategy.run, with all_reduce=True, or "
            "create the variables outside of the strategy's scope"
        )
    return replicas > 1
