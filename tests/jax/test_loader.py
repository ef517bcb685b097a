"""Feeding JAX: arrays and plain iterators, padded and put on the device while a step runs."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cabs
import cabs_jax

GRID = cabs.BatchSizes.geometric(4, 32)
RATE = 0.2


def data():
    random = np.random.default_rng(0)
    inputs = random.normal(size=(150, 5)).astype(np.float32)
    return inputs, (inputs @ np.arange(5.0) + random.normal(size=150)).astype(np.float32)


def loss_fn(params, example):
    inputs, output = example
    return 0.5 * (inputs @ params["w"] + params["b"] - output) ** 2


step = jax.jit(
    lambda params, batch, mask: cabs_jax.value_and_grad(loss_fn)(params, batch, mask=mask)
)


def ready(batch):
    """Fill a batch up and put it on the device, which the loader's thread does meanwhile."""
    return jax.device_put(cabs_jax.pad(batch, GRID))


def over_arrays(controller):
    inputs, outputs = data()
    sampler = cabs.BatchSampler(150, controller, seed=1)
    return lambda indices: ready((inputs[indices], outputs[indices])), sampler


def over_an_iterator(controller):
    inputs, outputs = data()

    def examples(epoch):
        for index in np.random.default_rng(epoch).permutation(150):
            yield inputs[index], outputs[index]

    def stacked(drawn):
        return ready(tuple(map(np.stack, zip(*drawn, strict=True))))

    return stacked, cabs.StreamSampler(examples, controller)


class Run:
    """A training run, with all that it has to save."""

    def __init__(self, source, lag):
        self.controller = cabs.Controller(4, sizes=GRID, smoothing=0.5, rule=cabs.CABS(0.4))
        self.loader = cabs.data.Loader(*source(self.controller), lag=lag)
        self.params = {"w": jnp.zeros(5), "b": jnp.zeros(())}

    def train(self, steps):
        """Take so many steps; return what each saw and decided."""
        seen = []
        while len(seen) < steps:
            for batch, mask in self.loader:
                (loss, statistics), gradients = step(self.params, batch, mask)
                self.params = jax.tree.map(lambda p, g: p - RATE * g, self.params, gradients)
                decision = self.controller.update(
                    learning_rate=RATE, variance_trace=statistics.variance_trace, loss=loss
                )
                seen.append((self.loader.batch.examples, self.loader.batch.lag, decision))
                if len(seen) == steps:
                    break
        return seen

    def state(self):
        return {"params": self.params, "loader": self.loader.state_dict()}

    def restore(self, state):
        self.params = state["params"]
        self.loader.load_state_dict(state["loader"])


def same(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert np.array_equal(a, b)


SOURCES = pytest.mark.parametrize("source", [over_arrays, over_an_iterator])


@SOURCES
@pytest.mark.parametrize("lag", [0, 1, 2])
def test_a_resumed_run_is_the_uninterrupted_one(source, lag):
    whole = Run(source, lag)
    expected = whole.train(30)
    assert len({examples for examples, _, _ in expected}) > 2
    assert {lag for _, lag, _ in expected} == set(range(lag + 1))
    first, rest = Run(source, lag), Run(source, lag)
    seen = first.train(11)
    state = first.state()
    state["loader"] = json.loads(json.dumps(state["loader"]))
    rest.restore(state)
    assert seen + rest.train(19) == expected
    same(rest.params, whole.params)


def test_a_step_is_compiled_for_the_sizes_of_the_grid_alone():
    step.clear_cache()
    Run(over_arrays, 1).train(40)
    assert step._cache_size() <= len(GRID)
