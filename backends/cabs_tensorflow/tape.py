"""The tape that training loops of TensorFlow know, with statistics beside the gradients.

Guarantees: gradients are those that ``tf.GradientTape`` gives of the mean loss, to rounding where
they are the sums of the per-example gradients that are squared, to the bit where they come out of
the tape: all others, and all of them with ``bitwise=True``. Nothing of the function that was traced
is changed. Over several replicas gradients are summed, which rounds once more.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

import tensorflow as tf

from cabs.values.scalars import as_integer
from cabs_tensorflow.alike import checked
from cabs_tensorflow.measure import Measurement
from cabs_tensorflow.norms import reductions
from cabs_tensorflow.norms.gradients import square_in, square_of
from cabs_tensorflow.optimizers import metric_of, weights_of
from cabs_tensorflow.replicas import check_seen, mean_of, summed
from cabs_tensorflow.statistics import BatchStatistics, timed

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
        all_reduce: bool = False,
        fingerprint: Any = None,
        seconds: Any = None,
        bitwise: bool = False,
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
            all_reduce: In ``strategy.run`` on several replicas, take the mean over the examples of
                all of them, whatever the sizes of their shares: where they are not known while
                tracing, one may be empty. Every replica has the same gradients and statistics.
                They are reduced: give them to :func:`cabs_tensorflow.apply`. All replicas must
                call it. With one replica it says nothing.
            fingerprint: With ``all_reduce=True``, ``controller.fingerprint`` as the compiled step
                was given it, an integer tensor, shape (), to notice that workers' controllers
                differ: it is compared in the same sum, and ``statistics.read()`` raises on every
                worker where it is not the same on all. Give it on all workers or on none.
            seconds: Beside it, where the rule measures what a step costs, what the step before took
                on this worker's clock, ``controller.own_seconds``, in the same way, a float tensor,
                shape (), ``nan`` for None. The rule then takes the mean of all.
            bitwise: Whether gradients are those of ``tf.GradientTape`` to the bit, and not to
                rounding: it then computes all of them itself, which takes longer.

        Returns:
            ``(gradients, statistics)``: gradients in the structure of ``sources``, as
            ``tf.GradientTape.gradient`` returns them, and a
            :class:`cabs_tensorflow.BatchStatistics`; with ``seconds_before``, the mean of all,
            where several replicas have given seconds.

        Raises:
            TypeError: If the losses are no tensor of real numbers, fingerprint or seconds are no
                tensor, or the optimizer's step is not known.
            ValueError: If the losses have not shape (m,), with m at least 2, belong to another
                function, or depend on none of the sources; if ``sample`` is below 1; on one of
                several replicas of a ``tf.distribute`` strategy without ``all_reduce=True``, or
                with it and an optimizer; if fingerprint or seconds are constant; or if the
                optimizer is not built.
            UncoveredParameterError: If the statistics of a variable cannot be computed exactly;
                it names the variable and the operation.
        """
        flat = tf.nest.flatten(sources)
        is_shared = check_seen(flat, all_reduce=all_reduce)
        _check(losses, sample)
        fingerprint = checked(fingerprint, "fingerprint", "controller.fingerprint", tf.int32)
        seconds = checked(seconds, "seconds", "controller.own_seconds", tf.float32)
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
        measurement.see(cotangents)
        metric = None if optimizer is None else metric_of(optimizer)
        if sample is None and not bitwise:
            # What the tape has for these is used by nothing, and not computed.
            dense = {
                at
                for at, leaf in enumerate(leaves)
                if hasattr(leaf, "handle") and tf.is_tensor(by_leaf[_key(leaf)])
            }
            made = measurement.sum_up(dense, is_elementwise=metric is not None)
            for at, one in made.items():
                by_leaf[_key(leaves[at])] = tf.cast(one, leaves[at].dtype)
            gradients = [by_leaf[_key(leaf)] for leaf in flat]
        given = {key: one for key, one in by_leaf.items() if one is not None}
        if not given:
            raise ValueError(
                "losses must depend on at least one of the sources; were they computed inside of "
                "the tape's with block, from these variables?"
            )
        weights = None
        if metric is not None:
            if is_shared:
                raise ValueError(
                    "optimizer must not be given with all_reduce=True on several replicas, since P "
                    "is made of the gradient that they have together; leave it out"
                )
            own = [given.get(_key(leaf)) for leaf in leaves]
            weights = weights_of(metric, leaves, own, loss_scale)
        squares = measurement.square_sums(weights)
        # What the tape does not watch, such as a variable that is not trainable, has no gradient.
        sums = [
            square
            for square, leaf in zip(squares, leaves, strict=True)
            if square is not None and _key(leaf) in given
        ]
        dtype = reductions.sum_type(list(given.values()))
        total = tf.add_n([tf.cast(one, dtype) for one in sums])
        count, taken = tf.cast(examples, dtype), tf.cast(measurement.taken, dtype)
        # An example's gradient is m times its share of the mean's. Of none there is nothing.
        share = count**2 * (count / tf.maximum(taken, 1))
        scale = 1.0 if loss_scale is None else tf.cast(loss_scale, dtype) ** 2
        total *= share / scale
        mean_loss = tf.reduce_mean(reductions.wide(losses))
        estimated = examples - measurement.taken
        told: Any = None
        clock: list[Any] = []
        if is_shared:
            loss_sum = tf.cast(tf.reduce_sum(reductions.wide(losses)), dtype)
            own = [] if seconds is None else [tf.cast(seconds, dtype)]
            (count, taken, total, loss_sum, *clock), reduced, told = summed(
                [taken, total, loss_sum, *own], list(given.values()), examples, fingerprint
            )
            given = dict(zip(given, reduced, strict=True))
            gradients = [given.get(_key(leaf)) for leaf in flat]
            examples = tf.cast(count, tf.int32)
            mean_loss, estimated = loss_sum / count, examples - tf.cast(taken, tf.int32)
        if weights is None:
            norm = square_of(list(given.values()))
        else:
            there = [weight for weight in weights if weight is not None]
            norm = square_in(there, list(given.values()), dtype)
        norm = tf.cast(norm, dtype) / scale
        # In half precision the gradient can overflow where norms of examples do not.
        total = tf.where(tf.math.is_finite(norm), total, norm)
        statistics = BatchStatistics(
            examples, examples, total, norm, estimated, mean_loss, metric is not None, told
        )
        if clock:
            statistics = timed(statistics, mean_of(clock))
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
        raise ValueError(
            f"losses must be those of at least two examples, got {size}; where that is a replica's "
            "share, leave its size open while tracing, with an input_signature"
        )
    if sample is not None:
        as_integer(sample, "sample", 1)
