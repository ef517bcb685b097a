"""Operations between variables and losses, those that keep examples apart and those that do not."""

import numpy as np
import pytest
import tensorflow as tf

import cabs_tensorflow
from tests.tensorflow.reference import assert_exact, draw, measured, variable

M, T, K = 4, 4, 6  # As many positions as examples: shapes alone do not tell them apart.

# From (m, T, K) to the same shape, or to another one with the examples in front.
KEEPING = {
    "concat": lambda h: tf.concat([h, tf.ones_like(h), 2.0 * h], axis=1),
    "cumsum": lambda h: tf.cumsum(h, axis=1),
    "gather": lambda h: tf.gather(h, [3, 0, 0], axis=1),
    "gather in batches": lambda h: tf.gather(h, tf.argmax(h, axis=1), axis=1, batch_dims=1),
    "log softmax": lambda h: tf.nn.log_softmax(h, axis=1),
    "new axes": lambda h: tf.squeeze(h[:, tf.newaxis, :, tf.newaxis], axis=3),
    "pad": lambda h: tf.pad(h, [[0, 0], [1, 2], [0, 1]]),
    "reduce": lambda h: tf.reduce_max(h, axis=1) + tf.reduce_logsumexp(h, axis=1),
    "reverse": lambda h: tf.reverse(h, axis=[1]),
    "roll": lambda h: tf.roll(h, 1, axis=1),
    "rows": lambda h: tf.reshape(tf.tanh(tf.reshape(h, [-1, K])), tf.shape(h)),
    "select": lambda h: tf.where(h > 0.0, h, tf.exp(h)),
    "sequence first": lambda h: tf.transpose(tf.cumsum(tf.transpose(h, [1, 0, 2]), axis=0)),
    "slice": lambda h: h[:, 1:, ::-2] + h[..., 1:, 5:0:-2],
    "sort": lambda h: tf.sort(h, axis=2),
    "split and stack": lambda h: tf.stack(tf.split(h, 2, axis=1), axis=1),
    "strided": lambda h: h[:, ::2, 3],
    "tile": lambda h: tf.tile(h, [1, 2, 1]),
    "time major rows": lambda h: tf.transpose(
        tf.reshape(tf.reshape(tf.transpose(h, [1, 0, 2]), [-1, K]) * 2.0, [T, -1, K]), [1, 0, 2]
    ),
    "unstack": lambda h: tf.add_n(tf.unstack(h, axis=1)),
    "windows": lambda h: tf.image.extract_patches(
        h[..., None], [1, 2, 2, 1], [1, 1, 1, 1], [1, 1, 1, 1], "VALID"
    ),
}


def summed(h):
    return tf.reduce_sum(tf.reshape(tf.sin(h), [tf.shape(h)[0], -1]), axis=1)


@pytest.mark.parametrize("name", KEEPING)
def test_an_operation_keeps_examples_apart(name):
    weight = variable(0, K, K)

    def losses_of(x):
        h = KEEPING[name](x @ weight)
        if name == "sequence first":
            h = tf.transpose(h, [1, 0, 2])
        return summed(h)

    assert_exact(losses_of, [weight], draw(1, M, T, K), ulps=8)


MIXING = {
    "cumsum": (lambda h: tf.cumsum(h, axis=0), "runs along the axis that holds the examples"),
    "reverse": (lambda h: h[::-1], "runs along"),
    "roll": (lambda h: tf.roll(h, 1, axis=0), "runs along"),
    "softmax": (lambda h: tf.nn.softmax(h, axis=0), "Softmax|Max|same way for all examples"),
    "mean of the batch": (lambda h: h - tf.reduce_mean(h, axis=0), "same way for all examples"),
    "mean of all": (lambda h: h * tf.reduce_mean(h), "same way for all examples"),
    "similarities": (
        lambda h: tf.matmul(h[:, 0], h[:, 0], transpose_b=True),
        "two different batch layouts|and a shared parameter in another|same way",
    ),
    "half of the batch": (lambda h: tf.concat([h[:2], h[2:]], axis=0), "runs along"),
    "reordered": (lambda h: tf.gather(h, [1, 0, 2, 3]), "same way for all examples"),
    "selected": (lambda h: tf.boolean_mask(h, [True] * M), "number of examples does not follow"),
    "sorted": (lambda h: tf.sort(h, axis=0), ""),
    "a loop": (
        lambda h: tf.while_loop(lambda i, _: i < 3, lambda i, h: (i + 1, tf.tanh(h)), (0, h))[1],
        "is a loop or a branch",
    ),
    "a branch": (
        lambda h: tf.cond(tf.reduce_sum(h) > 0, lambda: tf.tanh(h), lambda: h),
        "is a loop or a branch",
    ),
    "complex numbers": (
        lambda h: tf.abs(tf.signal.fft(tf.cast(h, tf.complex128))),
        "computes complex numbers|not known to keep",
    ),
    "segments": (
        lambda h: tf.math.segment_sum(h, tf.range(M)),
        "number of examples does not follow",
    ),
}


@pytest.mark.parametrize("name", MIXING)
def test_an_operation_that_mixes_examples_is_refused_by_name(name):
    weight = variable(0, K, K, name="mixed_up")
    change, message = MIXING[name]
    with pytest.raises(cabs_tensorflow.UncoveredParameterError, match="'mixed_up'") as caught:
        measured(lambda x: summed(change(x @ weight)), [weight], tf.constant(draw(1, M, T, K)))
    assert "PartialStatistics" in str(caught.value)
    assert not message or any(part in str(caught.value) for part in message.split("|"))


PARAMETERS = {
    "broadcast over examples": (lambda x, p: x + p[None, :, :], (T, K)),
    "one number": (lambda x, p: x * p, ()),
    "as many as examples, broadcast": (lambda x, p: x * p, (M, 1)),
    "divided": (lambda x, p: x / (2.0 + p**2), (K,)),
    "subtracted": (lambda x, p: p - x, (T, 1)),
    "exponent": (lambda x, p: tf.exp(x) ** p, (K,)),
    "squared difference": (lambda x, p: tf.math.squared_difference(x, p), (K,)),
    "tiled": (lambda x, p: x * tf.tile(p[None, None], [tf.shape(x)[0], 1, 1]), (K,)),
    "broadcast by hand": (lambda x, p: x * tf.broadcast_to(p, tf.shape(x)), (K,)),
    "left factor": (lambda x, p: p @ x, (3, T)),
    "a matrix a position": (lambda x, p: tf.einsum("btk,tkh->bth", x, p), (T, K, 3)),
    "einsum with an ellipsis": (lambda x, p: tf.einsum("...k,kh->...h", x, p), (K, 3)),
    "einsum that sums over data": (lambda x, p: tf.einsum("btk,h->bh", x, p), (3,)),
    "outer product": (lambda x, p: tf.einsum("btk,h->btkh", x, p), (2,)),
    "tensordot": (lambda x, p: tf.tensordot(x, p, [[1, 2], [0, 1]]), (T, K, 2)),
    "stacks of matrices": (lambda x, p: x[:, None] @ p, (2, K, 3)),
    "rows and positions swapped": (lambda x, p: tf.transpose(x, [1, 0, 2]) @ p, (K, 3)),
    "cast": (lambda x, p: x @ tf.cast(tf.cast(p, tf.float32), tf.float64), (K, 3)),
    "rearranged": (lambda x, p: x @ tf.transpose(tf.reshape(p, [3, K])), (K, 3)),
    "cut": (lambda x, p: x @ p[1:, ::2], (K + 1, 5)),
    "cut in parts that overlap": (lambda x, p: x @ p[:K] + x @ p[1:], (K + 1, 3)),
    "split": (lambda x, p: tf.add_n([x @ one for one in tf.split(p, 2, axis=1)]), (K, 6)),
    "negative": (lambda x, p: x @ -p, (K, 3)),
    "scaled": (lambda x, p: x @ (0.5 * p), (K, 3)),
    "low rank": (lambda x, p: x @ (p @ tf.transpose(p)), (K, 2)),
    "softmax of a parameter": (lambda x, p: x * tf.nn.softmax(p), (K,)),
    "rows that all examples take": (lambda x, p: x + tf.gather(p, [2, 0, 2, 1]), (3, K)),
    "table along another axis": (lambda x, p: x @ tf.gather(p, [2, 0, 2], axis=1), (K, 3)),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_parameter_is_exact_however_it_meets_the_batch(name):
    change, shape = PARAMETERS[name]
    parameter = variable(0, *shape)

    def losses_of(x):
        h = change(x, parameter)
        return summed(tf.transpose(h, [1, 0, 2]) if name == "rows and positions swapped" else h)

    x = draw(1, M, T, K)
    if name == "as many as examples, broadcast":
        # The positions' axis is as long as that of the examples.
        assert T == M
    rtol = 1e-6 if name == "cast" else None
    assert_exact(losses_of, [parameter], x, rtol=rtol)


def test_a_parameter_can_hold_a_part_for_each_example():
    parameter = variable(0, M, 1, K)
    x = tf.constant(draw(1, M, T, K))
    gradients, statistics = measured(lambda x: summed(x * parameter), [parameter], x)
    # Each example's gradient is zero but for its own part.
    share = M * gradients[0].numpy()
    np.testing.assert_allclose(statistics.group_square_sum, (share**2).sum(), rtol=1e-12)


@pytest.mark.parametrize("is_dynamic", [False, True])
def test_lengths_that_are_not_known_are_followed(is_dynamic):
    weight, kernel, table = variable(0, K, K), variable(1, 3, K, K), variable(2, 9, K)

    @tf.function(input_signature=[tf.TensorSpec([None if is_dynamic else 3, None], tf.int32)])
    def step(ids):
        with cabs_tensorflow.GradientTape() as tape:
            h = tf.gather(table, ids)
            turned = tf.transpose(h, [1, 0, 2])
            rows = tf.tanh(tf.reshape(turned, [-1, K]) @ weight)
            h = tf.transpose(tf.reshape(rows, tf.shape(turned)), [1, 0, 2])
            h = tf.nn.conv1d(h, kernel, 2, "SAME")
            losses = tf.reduce_sum(tf.sin(h), axis=(1, 2))
        return tape.gradient(losses, [weight, kernel, table])[1]

    ids = np.random.default_rng(0).integers(0, 9, (3, 5))
    rows = []
    for one in ids:
        with tf.GradientTape() as tape:
            h = tf.tanh(tf.gather(table, one[None]) @ weight)
            loss = tf.reduce_sum(tf.sin(tf.nn.conv1d(h, kernel, 2, "SAME")))
        found = tape.gradient(loss, [weight, kernel, table])
        rows.append(sum(np.sum(tf.convert_to_tensor(g).numpy() ** 2) for g in found))
    np.testing.assert_allclose(step(ids).group_square_sum, sum(rows), rtol=1e-10)


def test_functions_that_are_called_are_laid_open():
    weight, bias = variable(0, K, K), variable(1, K)

    @tf.function
    def inner(h):
        return tf.tanh(h @ weight)

    @tf.function
    def outer(h):
        return inner(inner(h) + bias)

    assert_exact(lambda x: summed(outer(x) @ weight), [weight, bias], draw(2, M, T, K), ulps=8)


def test_a_called_function_that_draws_or_writes_is_refused():
    weight, count = variable(0, K, K, name="inside"), tf.Variable(0)

    @tf.function
    def drawing(h):
        return tf.nn.dropout(h @ weight, 0.5)

    @tf.function
    def writing(h):
        count.assign_add(1)
        return h @ weight

    for function in (drawing, writing):
        with pytest.raises(cabs_tensorflow.UncoveredParameterError, match=r"off it;.*'inside'"):
            measured(lambda x, f=function: summed(f(x)), [weight], tf.constant(draw(1, M, T, K)))


def test_a_custom_gradient_is_that_of_the_loop_too():
    weight = variable(0, K, K)

    @tf.custom_gradient
    def doubled(h):
        return tf.tanh(h), lambda cotangent: 2.0 * cotangent

    @tf.custom_gradient
    def straight_through(w):
        return tf.round(w), lambda cotangent: cotangent

    assert_exact(lambda x: summed(doubled(x @ weight)), [weight], draw(1, M, T, K))
    assert_exact(lambda x: summed(x @ straight_through(weight)), [weight], draw(1, M, T, K))


def test_a_custom_gradient_with_a_parameter_in_it_is_refused():
    weight = variable(0, K, K, name="given")

    @tf.custom_gradient
    def product(x, w):
        return x @ w, lambda c: (tf.matmul(c, w, transpose_b=True), tf.zeros_like(w))

    with pytest.raises(cabs_tensorflow.UncoveredParameterError, match=r"custom_gradient.*'given'"):
        measured(lambda x: summed(product(x, weight)), [weight], tf.constant(draw(1, M, T, K)))


def test_a_tensor_in_two_places_of_one_operation_is_refused():
    weight = variable(0, K, name="in_two")

    def losses_of(x):
        read = tf.convert_to_tensor(weight)
        return summed(x + tf.where(x > 0, read, read))

    with pytest.raises(cabs_tensorflow.UncoveredParameterError, match=r"twice.*'in_two'"):
        measured(losses_of, [weight], tf.constant(draw(1, M, T, K)))


def test_a_function_whose_variable_another_function_writes_is_refused():
    weight = variable(0, K, K, name="moved")

    @tf.function
    def inner(x):
        return tf.tanh(x @ weight)

    @tf.function
    def move():
        weight.assign(3.0 * weight)

    def losses_of(x):
        h = inner(x)
        move()
        return summed(h)

    with pytest.raises(cabs_tensorflow.UncoveredParameterError, match=r"written.*'moved'"):
        measured(losses_of, [weight], tf.constant(draw(1, M, T, K)))


def test_parameters_that_a_called_function_computes_are_refused():
    weight = variable(0, K, 3, name="normed")
    computed = tf.function(lambda: weight / tf.norm(weight))
    with pytest.raises(cabs_tensorflow.UncoveredParameterError, match=r"decorator off.*'normed'"):
        measured(lambda x: summed(x @ computed()), [weight], tf.constant(draw(1, M, T, K)))


@pytest.mark.parametrize(
    "cut", [lambda h: h[:, :-1], lambda h: h[:, ::2], lambda h: h[:, :3], lambda h: h[:, 1:]]
)
def test_lengths_that_follow_from_unknown_ones_are_followed(cut):
    first, second = variable(0, K, K), variable(1, K, 3)

    @tf.function(input_signature=[tf.TensorSpec([None, None, K], tf.float64)])
    def step(x):
        with cabs_tensorflow.GradientTape() as tape:
            h = tf.tensordot(cut(x), first, 1)
            losses = tf.reduce_sum(tf.sin(tf.tensordot(cut(tf.tanh(h)), second, 1)), axis=(1, 2))
        return tape.gradient(losses, [first, second])[1]

    x = draw(2, 4, 7, K)
    rows = []
    for one in x:
        with tf.GradientTape() as tape:
            h = tf.tensordot(cut(tf.constant(one[None])), first, 1)
            loss = tf.reduce_sum(tf.sin(tf.tensordot(cut(tf.tanh(h)), second, 1)))
        rows += [np.sum(g.numpy() ** 2) for g in tape.gradient(loss, [first, second])]
    np.testing.assert_allclose(step(x).group_square_sum, sum(rows), rtol=1e-10)


def test_as_many_losses_as_there_are_by_chance_are_refused():
    weight = variable(0, K, 2, name="chance")

    @tf.function(input_signature=[tf.TensorSpec([None, None, K], tf.float64)])
    def step(x):
        with cabs_tensorflow.GradientTape() as tape:
            losses = tf.reduce_sum(tf.sin(x @ weight), axis=(1, 2))[:1500]
        return tape.gradient(losses, [weight])

    with pytest.raises(cabs_tensorflow.UncoveredParameterError, match="'chance'"):
        step(draw(0, 3, 2, K))


def test_frames_folded_into_the_batch_are_exact_where_pairs_would_be_cheaper():
    kernel = variable(0, 3, 3, 64, 70)

    def losses_of(x):
        h = tf.nn.conv2d(tf.reshape(x, [-1, 4, 4, 64]), kernel, 1, "SAME")
        return tf.reduce_sum(tf.reshape(tf.sin(h), [-1, 2 * 4 * 4 * 70]), axis=1)

    assert_exact(losses_of, [kernel], draw(1, 3, 2, 4, 4, 64))
