"""The tape that training loops of TensorFlow know, with statistics beside the gradients.

Guarantees: gradients are those that ``tf.GradientTape`` gives of the mean loss, to the bit: they
come out of one, and nothing of the function that was traced is changed.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

import tensorflow as tf

from cabs.values.scalars import as_integer
from cabs_tensorflow.measure import Measurement
from cabs_tensorflow.norms import reductions
from cabs_tensorflow.norms.gradients import square_in, square_of
from cabs_tensorflow.optimizers import metric_of, weights_of
from cabs_tensorflow.replicas import check_alone
from cabs_tensorflow.statistics import BatchStatistics

# AutoGraph would look for loops over tensors here.
_as_it_is = tf.autograph.experimental.do_not_convert


class GradientTape:
    r"""Records operations, and gives gradients of the mean loss with their exact statistics.

    Stands for ``tf.GradientTape`` inside of a ``tf.function``. Trainable variables are watched, as
    they are by that. The traced function shows where each variable meets the batch; there the norms
    of per-example gradients follow from the operation's input and its output's cotangent.

    Raises:
        RuntimeError: In eager mode, where there is no function to look at.

    Source:
        Balles, Romero, Hennig (arXiv 1612.05086), section 4.2, for the variance within a batch.

    Example:
        >>> import tensorflow as tf, cabs_tensorflow
        >>> weight = tf.Variable([[0.0], [0.0]])
        >>> @tf.function
        ... def measured(x, y):
        ...     with cabs_tensorflow.GradientTape() as tape:
        ...         losses = tf.square(tf.squeeze(x @ weight, 1) - y)
        ...     return tape.gradient(losses, [weight])
        >>> gradients, statistics = measured(tf.eye(2), tf.constant([1.0, 3.0]))
        >>> gradients[0].numpy().ravel().tolist(), float(statistics.variance_trace)
        ([-1.0, -3.0], 20.0)
    """

    def __init__(self) -> None:
        self._tape = tf.GradientTape()
        self._graph: Any = None
        self._before = 0
        self._until: int | None = None

    @_as_it_is
    def __enter__(self) -> Self:
        if tf.executing_eagerly():
            raise RuntimeError(
                "cabs_tensorflow.GradientTape looks at a function that is traced, and this is "
                "eager mode; decorate the training step with tf.function, and leave run_eagerly "
                "and tf.config.run_functions_eagerly at False"
            )
        self._graph = tf.compat.v1.get_default_graph()
        self._before, self._until = len(self._graph.get_operations()), None
        self._tape.__enter__()
        return self

    @_as_it_is
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._until = len(self._graph.get_operations())
        self._tape.__exit__(kind, error, traceback)

    def watch(self, tensor: Any) -> None:
        """Watch a tensor, or a variable that is not trainable."""
        self._tape.watch(tensor)

    @_as_it_is
    def gradient(
        self,
        losses: Any,
        sources: Any,
        *,
        sample: int | None = None,
        loss_scale: Any = None,
        optimizer: Any = None,
    ) -> tuple[Any, BatchStatistics]:
        r"""Return the gradients of the mean loss, and their statistics.

        Args:
            losses: One loss an example, shape (m,).
            sources: A nest of variables, for example ``model.trainable_variables``.
            sample: Over how many examples norms are taken, the first ones; all by default, and
                where there are fewer. The estimate stays unbiased, varies more, and can be
                negative.
            loss_scale: A number that the loss is multiplied by for half precision, such as
                ``optimizer.scale_loss(1.0)`` of Keras. Gradients are those of the scaled loss, as
                the optimizer takes them; statistics are those of the loss itself.
            optimizer: For norms in the metric of the step that it takes next,
                :math:`|x|_P^2 = \sum_c P_c x_c^2`. One of Keras' SGD, where P is 1, Adam, AdamW,
                Nadam, RMSprop and Adagrad, built, where P is one over what the step divides by,
                with this gradient in it. Or a function from a gradient and its variable to P, a
                tensor in their shape.

        Returns:
            ``(gradients, statistics)``: gradients in the structure of ``sources``, as
            ``tf.GradientTape.gradient`` returns them, and a
            :class:`cabs_tensorflow.BatchStatistics`.

        Raises:
            TypeError: If the losses are no tensor of real numbers, or the optimizer's step is not
                known.
            ValueError: If the losses have not shape (m,), with m at least 2, belong to another
                function, or depend on none of the sources; if ``sample`` is below 1; or in a
                ``tf.distribute`` strategy of several replicas.
            UncoveredParameterError: If the statistics of a variable cannot be computed exactly;
                it names the variable and the operation.
        """
        _check(losses, sample)
        flat = tf.nest.flatten(sources)
        check_alone(flat)
        leaves = list({_key(leaf): leaf for leaf in flat}.values())
        seen = self._graph.get_operations()[self._before : self._until]
        recorded = frozenset(operation.name for operation in seen)
        measurement = Measurement(losses, leaves, sample, recorded)
        examples = tf.size(losses)
        with tf.GradientTape() as outer:
            # The same operations as in a loop without statistics, so that they round alike.
            outer.watch(losses)
            loss = tf.reduce_mean(losses)
            if loss_scale is not None:
                loss *= tf.cast(loss_scale, losses.dtype)
        seed = outer.gradient(loss, losses)
        found = self._tape.gradient(losses, [*flat, *measurement.targets], output_gradients=seed)
        gradients, cotangents = found[: len(flat)], found[len(flat) :]
        by_leaf = {_key(leaf): one for leaf, one in zip(flat, gradients, strict=True)}
        given = [by_leaf[_key(leaf)] for leaf in leaves]
        if all(one is None for one in given):
            raise ValueError(
                "losses must depend on at least one of the sources; were they computed inside of "
                "the tape's with block, from these variables?"
            )
        metric, weights = None if optimizer is None else metric_of(optimizer), None
        if metric is not None:
            weights = weights_of(metric, leaves, given, loss_scale)
        squares = measurement.square_sums(cotangents, weights)
        # What the tape does not watch, such as a variable that is not trainable, has no gradient.
        sums = [
            square
            for square, gradient in zip(squares, given, strict=True)
            if square is not None and gradient is not None
        ]
        dtype = reductions.sum_type([one for one in given if one is not None])
        total = tf.add_n([tf.cast(one, dtype) for one in sums])
        norm = square_of(given) if weights is None else square_in(weights, given, dtype)
        gradient_norm_squared = tf.cast(norm, dtype)
        count = tf.cast(examples, dtype)
        # An example's gradient is m times its share of the mean's.
        share = count**2 * (count / tf.cast(measurement.taken, dtype))
        if loss_scale is not None:
            scale = tf.cast(loss_scale, dtype) ** 2
            share, gradient_norm_squared = share / scale, gradient_norm_squared / scale
        estimated = examples - measurement.taken
        statistics = BatchStatistics(
            examples,
            examples,
            total * share,
            gradient_norm_squared,
            estimated,
            tf.reduce_mean(reductions.wide(losses)),
        )
        return tf.nest.pack_sequence_as(sources, gradients), statistics


def _key(leaf: Any) -> int:
    """Return what is the same for a variable, and for what Keras makes of it."""
    return id(leaf.handle if hasattr(leaf, "handle") else leaf)


def _check(losses: Any, sample: int | None) -> None:
    if not tf.is_tensor(losses) or not losses.dtype.is_floating:
        raise TypeError(f"losses must be a tensor of real numbers, got {losses!r}")
    if tf.executing_eagerly() or losses.graph is not tf.compat.v1.get_default_graph():
        raise ValueError(
            "losses must be computed in the tf.function that asks for their gradient, in the same "
            f"branch or loop, got {losses!r}"
        )
    if losses.shape.rank != 1:
        raise ValueError(
            f"losses must have shape (m,), one loss an example, got shape {losses.shape}; in Keras "
            "give the loss reduction=None, and take the mean over what is left of an example"
        )
    size = losses.shape[0]
    if size is not None and size < 2:
        raise ValueError(f"losses must be those of at least two examples, got {size}")
    if sample is not None:
        as_integer(sample, "sample", 1)
