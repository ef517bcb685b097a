"""Training on two workers whose controllers differ, or do not, each a case that is tried in turn.

A case is what a worker does, from the strategy and the worker's number, 0 or 1; it returns
the sizes of the steps that were taken, and the error, None if there was none.
"""

import itertools
import math

import keras
import numpy as np
import tensorflow as tf

import cabs
import cabs_tensorflow
from tests.tensorflow.reference import draw

# Whose gradients are noise, so that batches grow at a rate that is stable.
INPUTS, LABELS = draw(1, 300, 30, dtype="float32"), np.arange(300) % 3
SIZES = cabs.BatchSizes.range(8, 60)
RATE, RULES = 1.2, (cabs.CABS(), cabs.Progress())


def controller(**options):
    return cabs.Controller(8, sizes=SIZES, **options)


def updated(times):
    made = controller()
    for _ in range(times):
        made.update(learning_rate=1.0, variance_trace=0.1, loss=1.0)
    return made


def watch_of(number):
    """Return the watch of a worker: its k-th lap takes k ms, or three times as long."""
    times = itertools.accumulate((1 + 2 * number) * 1e-3 * lap for lap in itertools.count())
    return cabs.Stopwatch(clock=lambda: next(times))


def in_loop(strategy, made, *, rate=RATE, is_in_parts=False, watch=None, seen=None):
    """Return the sizes of the steps that a loop takes, and the error that ends it."""
    keras.utils.set_random_seed(0)
    with strategy.scope():
        only = tf.VariableAggregation.ONLY_FIRST_REPLICA
        weight = tf.Variable(draw(2, 30, 3, dtype="float32"), aggregation=only)
    batches = cabs_tensorflow.dataset(made, (INPUTS, LABELS), seed=0)

    spec = {"fingerprint": tf.TensorSpec([], tf.int32)}
    if watch is not None:
        spec["seconds"] = tf.TensorSpec([], tf.float32)

    @tf.function(input_signature=[*batches.element_spec, spec])
    def step(x, y, given):
        def measured(x, y, given):
            with cabs_tensorflow.GradientTape() as tape:
                losses = tf.nn.sparse_softmax_cross_entropy_with_logits(y, x @ weight)
            return tape.gradient(losses, [weight], all_reduce=True, **given)

        def replica(x, y, given):
            x, y = cabs_tensorflow.share_of((x, y))
            gradients, statistics = measured(x, y, given)
            if is_in_parts:
                # Each example twice.
                _, again = measured(x, y, given)
                parts = statistics.partial + again.partial
                statistics = parts.complete(gradients, loss=again.loss)
            weight.assign_sub(RATE * gradients[0])
            return statistics

        found = strategy.run(replica, (x, y, given))
        return strategy.experimental_local_results(found)[0]

    sizes = []
    for x, y in batches:
        given = {"fingerprint": made.fingerprint}
        if watch is not None:
            given["seconds"] = math.nan if made.own_seconds is None else made.own_seconds
        statistics = step(x, y, given)
        try:
            decision = made.update(statistics, learning_rate=rate, seconds=watch)
        except RuntimeError as error:
            return sizes, str(error)
        sizes.append(len(x))
        if seen is not None:
            seen.append(decision.observation.seconds)
    return sizes, None


def in_fit(strategy, made, *, rate=RATE, seed=0, position=0, watch=None, seen=None, **options):
    """Return the sizes of the steps that ``fit`` takes, and the error that ends it."""
    keras.utils.set_random_seed(0)
    sizes = []

    class Steps(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):  # noqa: ARG002
            sizes.append(logs["batch_size"])
            if seen is not None:
                seen.append(model.decision.observation.seconds)

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
    if watch is not None:
        model._feed._watch = watch
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
    "fit: other rules": lambda s, n: in_fit(s, controller(rule=RULES[n])),
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


def timed(strategy, number):
    """Return what workers whose clocks differ find: sizes, error, seconds, and the step's cost."""
    found = {}
    for name, train, options in (
        ("loop", in_loop, {}),
        ("fit", in_fit, {}),
        ("fit in groups", in_fit, {"microbatches": 4}),
    ):
        made, seen = controller(rule=cabs.Progress()), []
        ended = train(strategy, made, watch=watch_of(number), seen=seen, **options)
        found[name] = *ended, seen, made.step_cost
    return found
