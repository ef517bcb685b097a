"""Which replica of a ``tf.distribute`` strategy a computation belongs to.

Guarantees: a computation that sees one replica's share of the batch says so; nothing is sent from
one replica to another. What a replica has measured is known as its own until something else is
computed from it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import tensorflow as tf


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


def check_alone(leaves: Iterable[Any]) -> None:
    """Raise ValueError where exact statistics would be those of one replica, or of none.

    Args:
        leaves: Variables and tensors.
    """
    _, replicas = replica_here()
    if replicas > 1:
        raise ValueError(
            f"this is one of {replicas} replicas, whose gradient and statistics are not those of "
            "the batch; take the gradient of its share with tf.GradientTape, and the variance from "
            "the replicas as groups, with cabs_tensorflow.PartialStatistics.of_group, as the page "
            "on TensorFlow shows"
        )
    if tf.distribute.in_cross_replica_context() and any(
        isinstance(leaf, tf.distribute.DistributedValues) for leaf in leaves
    ):
        raise ValueError(
            "sources must be variables of one replica, got those of a tf.distribute strategy "
            "outside of strategy.run; create them outside of the strategy's scope, or take "
            "gradients in strategy.run, with tf.GradientTape and "
            "cabs_tensorflow.PartialStatistics.of_group"
        )
