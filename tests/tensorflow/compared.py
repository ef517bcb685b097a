"""Training on two workers whose controllers differ, or do not, each a case that is tried in turn.

A case is what a worker does, from the strategy and the worker's number, 0 or 1; it returns
the sizes of the steps that were taken, and the error, None if there was none.
"""

import keras
import numpy as np
import tensorflow as tf

import cabs
import cabs_tensorflow
from tests.tensorflow.reference import draw

# Whose gradients are noise, so that batches grow at a rate that is stable.
INPUTS, LABELS = draw(1, 300, 30, dtype="float32"), np.arange(300) % 3
SIZES = cabs.BatchSizes.range(8, 60)
RATE = 1.2


def controller(**options):
    return cabs.Controller(8, sizes=SIZES, **options)


def updated(times):
    made = controller()
    for _ in range(times):
        made.update(learning_rate=1.0, variance_trace=0.1, loss=1.0)
    return made


def in_loop(strategy, made, *, rate=RATE, is_in_parts=False):
    """Return the sizes of the steps that a loop takes, and the error that ends it."""
    keras.utils.set_random_seed(0)
    with strategy.scope():
        only = tf.VariableAggregation.ONLY_FIRST_REPLICA
        weight = tf.Variable(draw(2, 30, 3, dtype="float32"), aggregation=only)
    batches = cabs_tensorflow.dataset(made, (INPUTS, LABELS), seed=0)

    @tf.function(input_signature=[*batches.element_spec, tf.TensorSpec([], tf.int32)])
    def step(x, y, fingerprint):
        def measured(x, y, fingerprint):
            with cabs_tensorflow.GradientTape() as tape:
                losses = tf.nn.sparse_softmax_cross_entropy_with_logits(y, x @ weight)
            return tape.gradient(losses, [weight], all_reduce=True, fingerprint=fingerprint)

        def replica(x, y, fingerprint):
            x, y = cabs_tensorflow.share_of((x, y))
            gradients, statistics = measured(x, y, fingerprint)
            if is_in_parts:
                # Each example twice.
                _, again = measured(x, y, fingerprint)
                parts = statistics.partial + again.partial
                statistics = parts.complete(gradients, loss=again.loss)
            weight.assign_sub(RATE * gradients[0])
            return statistics

        found = strategy.run(replica, (x, y, fingerprint))
        return strategy.experimental_local_results(found)[0]

    sizes = []
    for x, y in batches:
        statistics = step(x, y, made.fingerprint)
        try:
            made.update(statistics, learning_rate=rate)
        except RuntimeError as error:
            return sizes, str(error)
        sizes.append(len(x))
    return sizes, None


def in_fit(strategy, made, *, rate=RATE, seed=0, position=0, **options):
    """Return the sizes of the steps that ``fit`` takes, and the error that ends it."""
    keras.utils.set_random_seed(0)
    sizes = []

    class Steps(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):  # noqa: ARG002
            sizes.append(logs["batch_size"])

    with strategy.scope():
        model = keras.Sequential([keras.Input((30,)), keras.layers.Dense(3)])
        model = cabs_tensorflow.adaptive(model, made, **options)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        # A number would be that of the first worker on both.
        schedule = keras.optimizers.schedules.ExponentialDecay(rate, 1000, 0.9)
        model.compile(keras.optimizers.SGD(schedule), loss)
    sampler = cabs.BatchSampler(len(INPUTS), made, seed=seed)
    sampler.load_state_dict({**sampler.state_dict(), "position": position})
    batches = cabs_tensorflow.dataset(sampler, (INPUTS, LABELS))
    try:
        model.fit(batches, verbose=0, callbacks=[Steps()])
    except RuntimeError as error:
        return sizes, str(error)
    return sizes, None


CASES = {
    "loop: alike": lambda s, _: in_loop(s, controller()),
    "loop: other settings": lambda s, n: in_loop(s, controller(smoothing=0.9 + 0.01 * n)),
    "loop: other state": lambda s, n: in_loop(s, updated(1 + n)),
    "loop: other rates": lambda s, n: in_loop(s, controller(), rate=RATE + n),
    "loop in parts: alike": lambda s, _: in_loop(s, controller(), is_in_parts=True),
    "loop in parts: other state": lambda s, n: in_loop(s, updated(1 + n), is_in_parts=True),
    "fit: alike": lambda s, _: in_fit(s, controller()),
    "fit: other settings": lambda s, n: in_fit(s, controller(smoothing=0.9 + 0.01 * n)),
    "fit: other state": lambda s, n: in_fit(s, updated(1 + n)),
    "fit: other rates": lambda s, n: in_fit(s, controller(), rate=RATE + n),
    "fit: other seed": lambda s, n: in_fit(s, controller(), seed=n),
    "fit: other place in the data": lambda s, n: in_fit(s, controller(), position=16 * n),
    "fit in groups: alike": lambda s, _: in_fit(s, controller(), microbatches=4),
    "fit in groups: other state": lambda s, n: in_fit(s, updated(1 + n), microbatches=4),
}


def compared(strategy, number):
    """Return what each case gives, in turn."""
    return {name: case(strategy, number) for name, case in CASES.items()}
