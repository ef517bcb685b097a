"""Gradients and statistics of split batches, against a float64 loop over the examples."""

import numpy as np
import pytest
import tensorflow as tf

import cabs
import cabs_tensorflow
from tests.tensorflow.reference import draw, flat, gradients_one_by_one, variable


class Network:
    """Two layers, and functions of them that are traced once for all sizes."""

    def __init__(self, dtype="float64"):
        self.variables = [
            variable(0, 4, 6, name="in", dtype=dtype),
            variable(1, 6, name="bias", dtype=dtype),
            variable(2, 6, 3, name="out", dtype=dtype),
        ]
        signature = [
            {"x": tf.TensorSpec([None, 4], dtype), "y": tf.TensorSpec([None], tf.int64)},
        ]
        self.exact = tf.function(self._exact, input_signature=signature)
        self.plain = tf.function(self._plain, input_signature=signature)

    def losses_of(self, batch):
        first, bias, out = self.variables
        scores = tf.tanh(batch["x"] @ first + bias) @ out
        return tf.nn.sparse_softmax_cross_entropy_with_logits(batch["y"], scores)

    def _exact(self, batch):
        with cabs_tensorflow.GradientTape() as tape:
            losses = self.losses_of(batch)
        return tape.gradient(losses, self.variables)

    def _plain(self, batch):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(self.losses_of(batch))
        return tape.gradient(loss, self.variables)

    def rows_of(self, batch):
        """Return each example's gradient, shape (m, parameters), from a float64 copy."""
        double = Network() if self is not DOUBLE else self
        for one, other in zip(double.variables, self.variables, strict=True):
            one.assign(tf.cast(other, tf.float64))
        wide = {"x": tf.cast(batch["x"], tf.float64), "y": batch["y"]}
        return gradients_one_by_one(double.losses_of, double.variables, wide)


DOUBLE, SINGLE = Network(), Network("float32")


def batch_of(seed, examples, dtype="float64"):
    labels = np.random.default_rng(seed).integers(0, 3, examples)
    return {"x": tf.constant(draw(seed, examples, 4, dtype=dtype)), "y": tf.constant(labels)}


def assert_near(found, expected, rtol):
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=rtol * np.max(np.abs(expected)))


def size_of(piece):
    return int(piece["y"].shape[0])


def exact(network, pieces, examples):
    """Return gradients and exact statistics of a batch from its pieces."""
    dtype = network.variables[0].dtype
    parts, total = cabs_tensorflow.PartialStatistics.zero(dtype), [0.0] * 3
    for piece in pieces:
        gradients, statistics = network.exact(piece)
        parts += statistics.partial
        weight = size_of(piece) / examples
        total = [one + weight * other for one, other in zip(total, gradients, strict=True)]
    return total, parts.complete(total).read()


def test_replicas_have_the_gradient_and_the_statistics_of_the_batch_together():
    batch = batch_of(1, 14)
    shares = cabs.split(batch, max_microbatch=4, replicas=2)
    assert [[size_of(piece) for piece in share] for share in shares] == [[3, 4], [3, 4]]
    gradients, found = exact(DOUBLE, [piece for share in shares for piece in share], 14)
    rows = DOUBLE.rows_of(batch)
    assert_near(flat(gradients), rows.mean(axis=0), 1e-10)
    assert found.variance_trace == pytest.approx(rows.var(axis=0, ddof=1).sum(), rel=1e-9)


def test_a_run_that_is_out_of_memory_goes_on_with_the_same_gradient():
    batch, cap, tried = batch_of(2, 16), cabs.MemoryCap(64), []

    def step(pieces):
        tried.append([size_of(piece) for piece in pieces])
        if max(tried[-1]) > 4:
            raise tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor")
        return exact(DOUBLE, pieces, 16)

    with pytest.warns(RuntimeWarning, match="the cap is lowered from"):
        gradients, found = cap.run(step, batch, out_of_memory=tf.errors.ResourceExhaustedError)
    assert tried == [[16], [8, 8], [4, 4, 4, 4]]
    rows = DOUBLE.rows_of(batch)
    assert_near(flat(gradients), rows.mean(axis=0), 1e-10)
    assert found.variance_trace == pytest.approx(rows.var(axis=0, ddof=1).sum(), rel=1e-9)


def test_another_error_of_the_framework_passes_through():
    cap = cabs.MemoryCap(4)
    with pytest.raises(tf.errors.InvalidArgumentError):
        cap.run(
            lambda pieces: pieces[0] @ tf.ones([7, 2]),
            tf.ones([4, 3]),
            out_of_memory=tf.errors.ResourceExhaustedError,
        )
    assert cap.examples == 4


def test_ragged_tensors_are_split_by_rows():
    ragged = tf.ragged.constant([[1, 2], [], [3], [4, 5, 6], [7]])
    pieces = cabs.split({"ids": ragged}, max_microbatch=2)
    assert [piece["ids"].to_list() for piece in pieces] == [[[1, 2]], [[], [3]], [[4, 5, 6], [7]]]


@pytest.mark.parametrize("shape", [[None, 2], None])
def test_a_size_that_is_not_known_while_tracing_is_refused(shape):
    @tf.function(input_signature=[tf.TensorSpec(shape, tf.float32)])
    def step(x):
        return cabs.split(x, max_microbatch=2)[0]

    with pytest.raises(ValueError, match="split outside of functions that are traced for any size"):
        step(tf.ones([4, 2]))


def test_what_cannot_be_sliced_is_named():
    sparse = tf.sparse.from_dense(tf.eye(3))
    with pytest.raises(TypeError, match=r"batch\['s'\] must be an array.* got SparseTensor"):
        cabs.split({"s": sparse}, max_microbatch=2)
