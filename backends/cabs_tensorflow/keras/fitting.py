"""Keras models whose ``fit`` measures each step and asks a controller for the next batch's size.

Guarantees: gradients, metrics, callbacks and saved files are those of the compiled model; what is
measured belongs to the loss that Keras minimizes, or there is an error; an epoch is one pass over
the data, however many steps that takes. Refuses to run several steps, or none, in one compiled
function, since the controller decides between two of them.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import keras
import tensorflow as tf

from cabs import Controller, RunLog
from cabs.control import Decision
from cabs.values.scalars import as_integer
from cabs_tensorflow.data.drawn import drawn_by
from cabs_tensorflow.keras.conditions import check_compiled, has_several_workers, is_overridden
from cabs_tensorflow.keras.epochs import run_epochs, with_class_weights
from cabs_tensorflow.keras.feed import Feed
from cabs_tensorflow.keras.losses import compiled_losses
from cabs_tensorflow.keras.steps import Given, measure, measure_microbatches
from cabs_tensorflow.optimizers import learning_rate
from cabs_tensorflow.replicas import apply, share_of

if TYPE_CHECKING:
    from keras import Model as _Model
else:
    # It goes before the class of a model, whichever that is.
    _Model = object

# Under which a compiled step hands its measurements to Python, beside the logs.
_MEASURED = "cabs"


def adaptive(
    model: Any,
    controller: Controller,
    *,
    log: RunLog | None = None,
    sample: int | None = None,
    microbatches: int | None = None,
) -> Any:
    """Make a model one whose ``fit`` feeds a controller, in place, and return it.

    Layers, weights, names, the compiled state and saved files stay as they are; a file saved from
    it loads as the model that it was.

    Args:
        model: A ``keras.Sequential``, a functional model, or any other whose class has the
            ``train_step`` of Keras.
        controller: As for :meth:`AdaptiveBatchSize.follow`.
        log: As there.
        sample: As there.
        microbatches: As there.

    Returns:
        The model; see :class:`AdaptiveBatchSize` for what it can do now.

    Raises:
        TypeError: If it is no Keras model, or has a ``train_step`` of its own, or
            ``compute_losses``.

    Example:
        >>> import cabs, cabs_tensorflow, keras, numpy as np
        >>> inputs = np.random.default_rng(0).normal(size=(200, 5)).astype("float32")
        >>> labels = inputs[:, :3].argmax(axis=1)
        >>> controller = cabs.Controller(16, sizes=cabs.BatchSizes.range(8, 64))
        >>> model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(3)])
        >>> model = cabs_tensorflow.adaptive(model, controller)
        >>> loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        >>> model.compile(keras.optimizers.SGD(0.5), loss, metrics=["accuracy"])
        >>> batches = cabs_tensorflow.dataset(controller, (inputs, labels))
        >>> history = model.fit(batches, epochs=2, verbose=0)
        >>> sorted(history.history)
        ['accuracy', 'batch_size', 'loss', 'noise_scale']
        >>> controller.step > 6
        True
    """
    if not isinstance(model, keras.Model):
        raise TypeError(f"model must be a keras.Model, got {model!r}")
    plain = type(model)
    if not isinstance(model, AdaptiveBatchSize):
        if hasattr(plain, "compute_losses"):
            raise TypeError(
                f"{plain.__name__} has compute_losses, which this would hide; let the class derive "
                "from cabs_tensorflow.AdaptiveBatchSize before keras.Model, and call follow"
            )
        if plain.train_step is not keras.Model.train_step:
            raise TypeError(
                f"{plain.__name__} has a train_step of its own; let the class derive from "
                "cabs_tensorflow.AdaptiveBatchSize before keras.Model, and override compute_losses "
                "in place of train_step"
            )
        # Named as the class that it stands for, which is what a saved file is to name.
        names = {"__module__": plain.__module__, "__qualname__": plain.__qualname__}
        model.__class__ = type(plain.__name__, (AdaptiveBatchSize, plain), names)
    model.follow(controller, log=log, sample=sample, microbatches=microbatches)
    return model


class AdaptiveBatchSize(_Model):
    """A mixin for Keras models whose ``fit`` feeds a controller.

    Derive from it before ``keras.Model``, call :meth:`follow`, and use ``compile`` and ``fit`` as
    ever, with a ``tf.data.Dataset`` whose batches the controller sizes
    (:func:`cabs_tensorflow.dataset`); others are an error. The controller is fed the loss that
    Keras minimizes, with the weights of examples and the penalties of regularizers, the variance of
    its gradient, and the learning rate that the step used. ``batch_size``, the size of the next
    batch, and ``noise_scale``, from averages over the steps, stand beside the metrics.

    Example:
        >>> import cabs, cabs_tensorflow, keras, numpy as np
        >>> class Net(cabs_tensorflow.AdaptiveBatchSize, keras.Model):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.out = keras.layers.Dense(1)
        ...     def call(self, x):
        ...         return self.out(x)
        >>> controller = cabs.Controller(4, sizes=cabs.BatchSizes.range(2, 8))
        >>> net = Net()
        >>> net.follow(controller)
        >>> net.compile("sgd", "mse")
        >>> x, y = np.ones((12, 3), "float32"), np.arange(12.0, dtype="float32")
        >>> history = net.fit(cabs_tensorflow.dataset(controller, (x, y)), verbose=0)
        >>> net.decision.step + 1 == controller.step
        True
    """

    _feed: Feed | None = None

    def follow(
        self,
        controller: Controller,
        *,
        log: RunLog | None = None,
        sample: int | None = None,
        microbatches: int | None = None,
    ) -> None:
        """Feed a controller from now on.

        Args:
            controller: The controller.
            log: Where to write each decision.
            sample: Take norms over so many examples of a batch only.
            microbatches: Split each batch into so many, and take the variance from their
                mean gradients: less precise, and possible for any model, with batch normalization
                and recurrent layers too. Layers then see microbatches. A batch of fewer than two
                examples for each is split into fewer, at least two. Several replicas take as many
                of them each.

        Raises:
            TypeError: If an argument is of the wrong kind.
            ValueError: If one is out of its range, or the controller measures seldom.
            RuntimeError: If Keras runs on another backend.
        """
        if not isinstance(controller, Controller):
            raise TypeError(f"controller must be a cabs.Controller, got {controller!r}")
        if keras.config.backend() != "tensorflow":
            raise RuntimeError(
                "Keras must run on TensorFlow to be measured by cabs_tensorflow, got the backend "
                f"{keras.config.backend()!r}; set KERAS_BACKEND=tensorflow before it is imported"
            )
        if controller.configuration.every != 1:
            raise ValueError(
                f"fit measures at every step, got every = {controller.configuration.every}; leave "
                "every out of the controller"
            )
        if sample is not None and microbatches is not None:
            raise ValueError("sample is for statistics of single examples; leave out microbatches")
        self._sample = None if sample is None else as_integer(sample, "sample", 1)
        self._microbatches = (
            None if microbatches is None else as_integer(microbatches, "microbatches", 2)
        )
        self._feed = Feed(controller, log)
        # What was traced before measured something else.
        self.train_function: Any = None

    @property
    def decision(self) -> Decision | None:
        """The last decision, None before the first.

        Its ``learning_rate_factor`` is not applied: where it is below 1, a callback may.
        """
        return None if self._feed is None else self._feed.decision

    def compute_losses(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        """Return the loss of each example, shape (m,), whose mean is that of ``compute_loss``.

        It is the mean of the compiled loss over all axes but the first, times the weight of the
        example, summed over outputs, and the penalties of weight regularizers, the same for all
        examples. Where a mask or ``ignore_class`` leaves n positions of the whole batch, it is the
        example's sum over its own of them, times m / n. Override it for a loss of your own, and
        leave ``compute_loss``, which is then its mean, also in ``evaluate``.

        Raises:
            ValueError: If Keras minimizes something else than a mean over examples, as with
                ``add_loss``, an activity regularizer, or a reduction such as ``"sum"``; or if the
                weights or masks of examples would meet the values of others.
        """
        del x
        losses = compiled_losses(self, y, y_pred, sample_weight)
        variables = [one for one in self.trainable_weights if one.regularizer is not None]
        if len(self.losses) > len(variables):
            raise ValueError(
                f"model {self.name!r} has losses of a whole batch, by add_loss or an activity "
                "regularizer; estimate the variance from microbatches=8, or "
                "override compute_losses"
            )
        penalties = [tf.reduce_sum(one.regularizer(one)) for one in variables]
        return sum((tf.cast(one, losses.dtype) for one in penalties), losses)

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Any:
        """Return the loss of a batch: that of Keras, or the mean of ``compute_losses`` of your own.

        Raises:
            ValueError: As Keras, or ``compute_losses``, does.
        """
        if is_overridden(self, "compute_losses"):
            # Keras adds up what replicas return.
            replicas = tf.distribute.get_strategy().num_replicas_in_sync
            return tf.reduce_mean(self.compute_losses(x, y, y_pred, sample_weight)) / replicas
        inner = super().compute_loss
        # Overridden since before Keras had the argument.
        more = {"training": training} if "training" in inspect.signature(inner).parameters else {}
        return inner(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, **more)

    def train_step(self, data: Any) -> dict[str, Any]:
        """Take one step, in a function that is traced for all sizes of batches at once."""
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(share_of(data))
        given: Given = {} if self._feed is None else self._feed.given
        if self._microbatches is None:
            in_metric = self._feed is not None and self._feed.in_metric
            measured = measure(self, x, y, sample_weight, self._sample, in_metric, given)
        else:
            measured = measure_microbatches(self, x, y, sample_weight, self._microbatches, given)
        # Read before the step moves a schedule on.
        rate = learning_rate(self.optimizer)
        apply(self.optimizer, measured.gradients, self.trainable_variables)
        return {**measured.logs, _MEASURED: (measured.statistics, measured.loss, rate)}

    def make_train_function(self, force: bool = False) -> Any:
        """Compile the step, and feed the controller after each.

        Raises:
            ValueError: If there is no controller, or the model is compiled in a way in which none
                could be fed.
        """
        if self.train_function is not None and not force:
            return self.train_function
        if self._feed is None:
            raise ValueError(
                f"model {self.name!r} has no controller; call follow(controller) before fit"
            )
        check_compiled(self, self._microbatches)
        strategy, feed = self.distribute_strategy, self._feed
        is_compared = has_several_workers(self)

        def of_replicas(data: Any, given: Given) -> dict[str, Any]:
            # Under the signature that Keras gives a train_step there is no place for it.
            feed.given = given
            try:
                found = strategy.run(self.train_step, (data,))
            finally:
                feed.given = {}
            first = strategy.experimental_local_results(found)[0]
            with strategy.scope():
                # What each replica has counted, added up.
                return {**first, **self.get_metrics_result()}

        def of_one(data: Any, _: Any) -> dict[str, Any]:
            return self.train_step(data)

        compiled = tf.function(
            of_one if strategy.num_replicas_in_sync == 1 else of_replicas,
            autograph=False,
            reduce_retracing=True,
            jit_compile=self.jit_compile,
        )

        # An optional has the spec of its dataset, from which a step is traced once. If the step
        # drew the batch, as in Keras, the end of the data would move on what needs none of it, such
        # as the count of steps.
        unpacked = tf.function(
            lambda batch, given: compiled(batch.get_value(), given), autograph=False
        )

        def step(iterator: Any) -> dict[str, Any]:
            is_dataset = isinstance(iterator, tf.data.Iterator)
            batch = iterator.get_next_as_optional() if is_dataset else next(iterator)
            if is_dataset and not batch.has_value():
                raise StopIteration
            drawn = feed.drawn if is_dataset else None
            given: Given = {}
            if is_compared or drawn is not None:
                examples = len(tf.nest.flatten(batch.get_value() if is_dataset else batch)[0])
                given = feed.of_step(examples) if is_compared else {}
                if drawn is not None:
                    drawn.give(examples)
            logs = dict((unpacked if is_dataset else compiled)(batch, given))
            logs.update(feed(*logs.pop(_MEASURED)))
            return logs

        self.train_function = step
        return step

    def fit(
        self,
        x: Any = None,
        y: Any = None,
        batch_size: int | None = None,
        epochs: int = 1,
        verbose: Any = "auto",
        callbacks: Any = None,
        validation_split: float = 0.0,
        validation_data: Any = None,
        shuffle: bool = True,
        class_weight: dict[int, float] | None = None,
        sample_weight: Any = None,
        initial_epoch: int = 0,
        steps_per_epoch: int | None = None,
        validation_steps: int | None = None,
        validation_batch_size: int | None = None,
        validation_freq: Any = 1,
    ) -> Any:
        """Train as ``keras.Model.fit`` does, on a dataset whose batches change their size.

        Args:
            x: A ``tf.data.Dataset`` of batches of inputs, of (inputs, targets), or of (inputs,
                targets, weights of examples), from :func:`cabs_tensorflow.dataset`, or made of
                that by what leaves batches whole, such as ``map`` or ``prefetch``.
            y: For arrays: an error, and so are ``batch_size``, ``validation_split`` and
                ``sample_weight``.
            batch_size: An error.
            epochs: As in Keras; an epoch is one pass over ``x``, however many batches that are.
            verbose: As in Keras.
            callbacks: As in Keras.
            validation_split: An error.
            validation_data: As in Keras.
            shuffle: Without a meaning, as for any dataset in Keras.
            class_weight: As in Keras: the weight of an example by its class.
            sample_weight: An error.
            initial_epoch: As in Keras.
            steps_per_epoch: End an epoch after so many batches; the next one goes on from there.
            validation_steps: As in Keras.
            validation_batch_size: As in Keras.
            validation_freq: As in Keras.

        Returns:
            The ``keras.callbacks.History``.

        Raises:
            TypeError: If ``x`` is no dataset.
            ValueError: If an argument is for arrays, the dataset is empty, or its batches are not
                those that were drawn for the controller; if the model is not compiled, or not in a
                way that can be measured.
        """
        del shuffle
        drawn = drawn_by(x)
        if validation_split or any(one is not None for one in (y, batch_size, sample_weight)):
            raise ValueError(
                "y, batch_size, sample_weight and validation_split are for arrays; pass "
                "cabs_tensorflow.dataset(controller, (x, y, sample_weight)), and validation_data"
            )
        if not self.compiled:
            raise ValueError(f"model {self.name!r} is not compiled; call compile() before fit()")
        self.make_train_function()
        assert self._feed is not None
        batches = x if class_weight is None else with_class_weights(x, class_weight)
        if self.distribute_strategy.num_replicas_in_sync > 1:
            # A replica cannot make variables.
            with self.distribute_strategy.scope():
                self._symbolic_build(data_batch=batches.element_spec)
        self._feed.draw(drawn)
        try:
            return run_epochs(
                self,
                batches,
                epochs=range(initial_epoch, epochs),
                steps_per_epoch=steps_per_epoch,
                verbose=verbose,
                callbacks=callbacks,
                validation_data=validation_data,
                validation_freq=validation_freq,
                begin=self._feed.begin,
                validation={"batch_size": validation_batch_size, "steps": validation_steps},
            )
        finally:
            self._feed.draw(None)
