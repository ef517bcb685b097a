"""A small network in NumPy and float64, trained by one process: what devices are held to."""

import dataclasses

import numpy as np
import pytest
from hypothesis import strategies as st

import cabs

RATE = 0.5
# Controllers are told a larger rate, so that sizes move.
SPED_UP = 12.0
STEPS = 3
FEATURES, CLASSES = 3, 4
# Examples that a microbatch of a device has at most.
MOST = 5


@dataclasses.dataclass(frozen=True)
class Case:
    """A network of matrices, and how its batches are dealt out to devices and microbatches."""

    widths: tuple[int, ...]
    positions: int
    is_double: bool
    engine: str
    way: str
    devices: int
    microbatches: int
    seed: int

    @property
    def dtype(self):
        return "float64" if self.is_double else "float32"

    @property
    def pieces(self):
        return self.devices * self.microbatches

    def parameters(self):
        """Return matrices and biases in turns, and the last matrix."""
        rng, found = np.random.default_rng(self.seed), []
        for before, after in zip((FEATURES, *self.widths), (*self.widths, CLASSES), strict=True):
            found += [rng.normal(size=(before, after)), 0.1 * rng.normal(size=after)]
        return [one.astype(self.dtype) for one in found[:-1]]

    def controller(self):
        """Return one whose sizes give each microbatch of each device an example at least."""
        least = max(2, self.pieces)
        sizes = cabs.BatchSizes.range(least, max(least, self.pieces * (MOST - 1)))
        return cabs.Controller(least, sizes=sizes)

    def data(self, step, count):
        """Return the examples of a step, in the type of the network, and their labels."""
        rng = np.random.default_rng((self.seed, step))
        inputs = rng.normal(size=(count, self.positions, FEATURES)).astype(self.dtype)
        return inputs, rng.integers(CLASSES, size=count)

    def dealt(self, step, count):
        """Return which examples each microbatch of each device has: at least one, MOST at most."""
        rng = np.random.default_rng((self.seed, step, 1))
        places = [piece for piece in range(self.pieces) for _ in range(MOST - 1)]
        chosen = [*range(self.pieces), *rng.permutation(places)[: count - self.pieces]]
        owners = rng.permutation(chosen)
        found = [np.flatnonzero(owners == piece) for piece in range(self.pieces)]
        return [found[k :: self.microbatches] for k in range(self.microbatches)]


def cases(devices, engine, ways):
    """Draw cases of an engine, which spreads examples, and of ways in which they are measured."""

    def case(way, microbatches, **drawn):
        count = 1 if way == "exact" else microbatches
        return Case(engine=engine, way=way, devices=devices, microbatches=count, **drawn)

    return st.builds(
        case,
        way=st.sampled_from(ways),
        microbatches=st.integers(1, 2),
        widths=st.lists(st.integers(1, 6), min_size=1, max_size=2).map(tuple),
        positions=st.integers(1, 3),
        is_double=st.booleans(),
        seed=st.integers(0, 1000),
    )


def gradients(parameters, inputs, labels):
    """Return each example's loss, and its gradients, shape (m, ...) each."""
    *layers, last = parameters
    layers = list(zip(layers[::2], layers[1::2], strict=True))
    hidden = [inputs]
    for weight, bias in layers:
        hidden.append(np.tanh(hidden[-1] @ weight + bias))
    mean = hidden[-1].mean(axis=1)
    scores = mean @ last
    scores -= scores.max(axis=1, keepdims=True)
    scores -= np.log(np.exp(scores).sum(axis=1, keepdims=True))
    delta = np.exp(scores)
    delta[np.arange(len(labels)), labels] -= 1.0
    found = [np.einsum("mi,mj->mij", mean, delta)]
    cotangent = np.repeat((delta @ last.T)[:, None], inputs.shape[1], axis=1) / inputs.shape[1]
    for (weight, _), before, after in reversed([*zip(layers, hidden, hidden[1:], strict=False)]):
        cotangent = cotangent * (1.0 - after**2)
        found[:0] = [np.einsum("mti,mtj->mij", before, cotangent), cotangent.sum(axis=1)]
        cotangent = cotangent @ weight.T
    return -scores[np.arange(len(labels)), labels], found


def assert_as_one_process(case, found, weights):
    """Assert that steps are those of a loop in float64 on the same examples.

    Args:
        case: What was trained.
        found: Of each step, the statistics, and the size that was decided.
        weights: After the last step.
    """
    parameters = [one.astype("float64") for one in case.parameters()]
    controller, rtol = case.controller(), 1e-10 if case.is_double else 1e-5
    count = controller.batch_size
    for step, (statistics, decided) in enumerate(found):
        inputs, labels = case.data(step, count)
        losses, rows = gradients(parameters, inputs.astype("float64"), labels)
        flat = np.concatenate([one.reshape(count, -1) for one in rows], axis=1)
        sizes, means = np.ones(count), flat
        if case.way == "groups":
            pieces = [piece for pieces in case.dealt(step, count) for piece in pieces]
            sizes = np.array([len(piece) for piece in pieces])
            means = np.stack([flat[piece].mean(axis=0) for piece in pieces])
        squares, norm = sizes @ (means**2).sum(axis=1), (flat.mean(axis=0) ** 2).sum()
        trace = (squares - count * norm) / (len(means) - 1)
        # Where gradients nearly cancel or agree, the small differences carry rounding errors.
        slack = 2 * rtol * squares / (len(means) - 1)
        assert (statistics.examples, statistics.groups) == (count, len(means))
        assert statistics.group_square_sum == pytest.approx(squares, rel=rtol)
        assert statistics.gradient_norm_squared == pytest.approx(norm, rel=rtol, abs=slack)
        assert statistics.variance_trace == pytest.approx(trace, rel=rtol, abs=slack)
        assert statistics.loss == pytest.approx(losses.mean(), rel=rtol)
        expected = controller.update(
            learning_rate=SPED_UP * RATE, variance_trace=trace, loss=losses.mean()
        )
        # In single precision a size may be rounded to its neighbour.
        assert abs(decided - expected.batch_size) <= (0 if case.is_double else 1)
        parameters = [
            one - RATE * row.mean(axis=0) for one, row in zip(parameters, rows, strict=True)
        ]
        count = decided
    for one, expected in zip(weights, parameters, strict=True):
        np.testing.assert_allclose(one, expected, rtol=rtol, atol=rtol)
