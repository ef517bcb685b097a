"""Gradient statistics as TensorFlow sees them: composite tensors, inside a function or out of it.

Guarantees: nothing is read from a device until :meth:`BatchStatistics.read`; the statistics of one
replica out of several are never taken for those of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Optional

import tensorflow as tf

from cabs import GradientStatistics
from cabs_tensorflow.alike import both, check
from cabs_tensorflow.norms.gradients import square_of
from cabs_tensorflow.replicas import check_reduced, mark_own, replica_here


class PartialStatistics(tf.experimental.ExtensionType):
    r"""What can be added over microbatches and replicas: m, K and :math:`\sum_k m_k |g_k|^2`.

    Add two with ``+``, or carry it through a loop. See :class:`cabs.gradients.PartialStatistics`.

    Args:
        examples: :math:`m`, int32, shape ().
        groups: :math:`K`, int32, shape ().
        group_square_sum: :math:`\sum_k m_k |g_k|^2`, float, shape ().
        estimated: How many of the groups were not measured themselves but estimated from a sample
            of them, int32, shape ().
        shares: Of which replicas it holds groups, as :meth:`of_group` notes under a
            ``tf.distribute`` strategy of several; empty for numbers that are summed over them.
        replicas: How many replicas there are.
        fingerprint: As :class:`BatchStatistics` has it.

    Example:
        Two microbatches of 2 and 4 examples, whose mean gradients are (3, 0) and (0, 3):

        >>> import tensorflow as tf, cabs_tensorflow
        >>> parts = cabs_tensorflow.PartialStatistics.of_group(2, [tf.constant([3.0, 0.0])])
        >>> parts += cabs_tensorflow.PartialStatistics.of_group(4, [tf.constant([0.0, 3.0])])
        >>> statistics = parts.complete([tf.constant([1.0, 2.0])])
        >>> float(statistics.variance_trace)
        24.0
    """

    examples: tf.Tensor
    groups: tf.Tensor
    group_square_sum: tf.Tensor
    estimated: tf.Tensor = 0
    shares: tuple[int, ...] = ()
    replicas: int = 1
    fingerprint: Optional[tf.Tensor] = None  # noqa: UP045  (TensorFlow reads it)

    @classmethod
    def zero(cls, dtype: Any = tf.float32) -> PartialStatistics:
        """Return the part of no examples, to start a loop with.

        ``dtype`` is that of squared norms: float64 for gradients in float64, and float32 otherwise.
        """
        shares, replicas = replica_here()
        return cls(tf.constant(0), tf.constant(0), tf.zeros((), dtype), 0, shares, replicas)

    @classmethod
    def of_group(cls, examples: Any, gradients: Any) -> PartialStatistics:
        """Return the part of one group, from its size and its mean gradient.

        Gradients are a nest of tensors, ``tf.IndexedSlices`` or None, as a tape gives them.

        Raises:
            ValueError: If no gradient is given, or all are None: nothing was measured, which is not
                a variance of 0; or if one holds the values of several replicas.
        """
        examples = tf.cast(examples, tf.int32)
        flat = _flat(gradients)
        square = square_of(flat)
        mark_own(flat)
        shares, replicas = replica_here()
        square_sum = tf.cast(examples, square.dtype) * square
        return cls(examples, tf.constant(1), square_sum, 0, shares, replicas)

    def __add__(self, other: Any) -> PartialStatistics:
        if not isinstance(other, PartialStatistics):
            return NotImplemented
        return PartialStatistics(
            self.examples + other.examples,
            self.groups + other.groups,
            self.group_square_sum + other.group_square_sum,
            self.estimated + other.estimated,
            tuple(sorted({*self.shares, *other.shares})),
            max(self.replicas, other.replicas),
            both(self.fingerprint, other.fingerprint),
        )

    def complete(self, gradients: Any, *, loss: Any = None) -> BatchStatistics:
        """Return the statistics of all examples together, from their mean gradient.

        The gradient is the mean over all examples, never a mean of means of groups that differ in
        size, nor that of one replica out of several. ``loss``, their mean loss, is kept with the
        statistics.

        Raises:
            ValueError: If it holds the groups of some replicas only, or the gradients are a
                replica's own; if no gradient is given, all are None, or one holds the values of
                several replicas.
        """
        if len(self.shares) < self.replicas > 1:
            raise ValueError(
                f"these are the groups of {len(self.shares)} of {self.replicas} replicas, whose "
                "statistics are not those of the batch; sum examples, groups, group_square_sum and "
                'estimated over the replicas with one all_reduce("SUM", ...), complete a '
                "cabs_tensorflow.PartialStatistics of the sums, and give it the gradient that is "
                "averaged over all examples in the same way"
            )
        flat = _flat(gradients)
        check_reduced(flat)
        square = square_of(flat)
        return BatchStatistics(
            self.examples,
            self.groups,
            self.group_square_sum,
            tf.cast(square, self.dtype),
            self.estimated,
            loss,
            fingerprint=self.fingerprint,
        )

    @property
    def dtype(self) -> Any:
        """The type of squared norms."""
        return self.group_square_sum.dtype


class BatchStatistics(tf.experimental.ExtensionType):
    r"""Gradient statistics of a batch, whose numbers are tensors of shape ().

    Args:
        examples: :math:`m`, int32.
        groups: :math:`K`, int32.
        group_square_sum: :math:`\sum_k m_k |g_k|^2`, with :math:`g_k` the mean gradient of a
            group.
        gradient_norm_squared: :math:`|g|^2`, of the mean gradient over all examples.
        estimated: How many of the groups were not measured themselves but estimated from a sample
            of them, int32.
        loss: Mean loss of the examples, None if it is not known.
        in_metric: Whether they are in the metric of an optimizer's step; None if nobody has said.
        fingerprint: That of the controller, if all workers gave the same one to ``gradient``;
            -1 less it, which is below 0, if they did not; None if there was none.

    See :class:`cabs.GradientStatistics` for what they tell.

    Example:
        >>> import tensorflow as tf, cabs_tensorflow
        >>> weight = tf.Variable([1.0])
        >>> @tf.function
        ... def measured(x):
        ...     with cabs_tensorflow.GradientTape() as tape:
        ...         losses = weight[0] * x
        ...     return tape.gradient(losses, [weight])
        >>> gradients, statistics = measured(tf.constant([1.0, 2.0, 3.0, 6.0]))
        >>> numbers = statistics.read()
        >>> numbers.group_square_sum, numbers.gradient_norm_squared
        (50.0, 9.0)
    """

    examples: tf.Tensor
    groups: tf.Tensor
    group_square_sum: tf.Tensor
    gradient_norm_squared: tf.Tensor
    estimated: tf.Tensor = 0
    loss: Optional[tf.Tensor] = None  # noqa: UP045  (TensorFlow reads it)
    in_metric: Optional[bool] = None  # noqa: UP045
    fingerprint: Optional[tf.Tensor] = None  # noqa: UP045

    @property
    def partial(self) -> PartialStatistics:
        """The part that can be added to that of other batches."""
        return PartialStatistics(
            self.examples,
            self.groups,
            self.group_square_sum,
            self.estimated,
            fingerprint=self.fingerprint,
        )

    @property
    def variance_trace(self) -> Any:
        r"""Unbiased estimate of :math:`\mathrm{tr}(\Sigma)`; ``nan`` for a single group."""
        dtype = self.group_square_sum.dtype
        examples, groups = tf.cast(self.examples, dtype), tf.cast(self.groups, dtype)
        spread = self.group_square_sum - examples * self.gradient_norm_squared
        # One group shows no variance, whatever rounding leaves of it.
        nan = tf.constant(float("nan"), dtype)
        return tf.where(self.groups > 1, spread / tf.maximum(groups - 1, 1), nan)

    @property
    def expected_gradient_norm_squared(self) -> Any:
        r"""Unbiased estimate of the squared norm of the expected gradient; can be negative."""
        return self.gradient_norm_squared - self.variance_trace / tf.cast(
            self.examples, self.gradient_norm_squared.dtype
        )

    @property
    def noise_scale(self) -> Any:
        """Gradient noise scale, in examples; see :attr:`cabs.GradientStatistics.noise_scale`."""
        square = self.expected_gradient_norm_squared
        infinite = tf.constant(float("inf"), square.dtype)
        return tf.where(square <= 0.0, infinite, self.variance_trace / square)

    def read(self) -> GradientStatistics:
        """Return the same statistics as Python numbers; outside of a function, waits for them.

        Raises:
            TypeError: Inside of a ``tf.function``, where there are no numbers yet.
            RuntimeError: On every worker, if their fingerprints differ.
            ValueError: If no gradients can have them, as :class:`cabs.GradientStatistics` says.
        """
        if not tf.executing_eagerly():
            raise TypeError(
                "statistics can be read once the tf.function that computes them has returned; "
                "return them from it"
            )
        check(self.fingerprint)
        return GradientStatistics(
            int(self.examples),
            int(self.groups),
            float(self.group_square_sum),
            float(self.gradient_norm_squared),
            int(self.estimated),
            None if self.loss is None else float(self.loss),
            self.in_metric,
        )

    def __add__(self, other: Any) -> Any:
        raise TypeError(
            "statistics of batches cannot be added: the squared norm of a mean gradient is not a "
            "mean of squared norms. Write (a.partial + b.partial).complete(gradients) with the "
            "gradient averaged over all examples"
        )


class TotalStatistics(BatchStatistics):
    """Statistics of all workers' examples, with what their clocks say, from which all decide alike.

    Args:
        seconds: What the step before took, the mean over replicas, float; ``nan`` where one of them
            did not know.
    """

    seconds: tf.Tensor = float("nan")

    @property
    def seconds_before(self) -> float | None:
        """The same as a Python number, None where it is not known; waits for it.

        Raises:
            RuntimeError: On every worker, if their fingerprints differ.
        """
        check(self.fingerprint)
        seconds = float(self.seconds)
        return None if math.isnan(seconds) else seconds


def timed(statistics: BatchStatistics, seconds: Any) -> TotalStatistics:
    """Return statistics with the mean of what the replicas' clocks say."""
    return TotalStatistics(
        statistics.examples,
        statistics.groups,
        statistics.group_square_sum,
        statistics.gradient_norm_squared,
        statistics.estimated,
        statistics.loss,
        statistics.in_metric,
        statistics.fingerprint,
        seconds,
    )


def _flat(gradients: Any) -> Sequence[Any]:
    """Return the gradients of a nest; slices are whole."""
    flat: Sequence[Any] = tf.nest.flatten(gradients, expand_composites=False)
    if any(isinstance(one, tf.distribute.DistributedValues) for one in flat):
        raise ValueError(
            "gradients must be tensors, got values of several replicas; take those of each from "
            "strategy.experimental_local_results, or reduce them first"
        )
    return flat
