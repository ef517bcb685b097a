"""How much of a graph, and of memory, statistics take."""

import pytest
import tensorflow as tf

import cabs_tensorflow
from cabs_tensorflow.norms import reductions
from tests.programs import largest
from tests.tensorflow.reference import assert_exact, draw, variable

EXAMPLES, SIZE, CHANNELS = 12, 6, 4


def layers(count):
    """Return equal convolutions and the losses behind them."""
    shape = (3, 3, CHANNELS, CHANNELS)
    kernels = [variable(at, *shape, name=f"kernel {at}", dtype="float32") for at in range(count)]

    def losses_of(x):
        for kernel in kernels:
            x = tf.tanh(tf.nn.conv2d(x, kernel, 1, "SAME"))
        return tf.reduce_sum(x, axis=(1, 2, 3))

    return kernels, losses_of


def step_of(kernels, losses_of, *, is_measured=True, jit_compile=None):
    """Return a step that is traced for any number of examples, with statistics or without."""

    @tf.function(
        input_signature=[tf.TensorSpec([None, SIZE, SIZE, CHANNELS])], jit_compile=jit_compile
    )
    def step(x):
        with cabs_tensorflow.GradientTape() if is_measured else tf.GradientTape() as tape:
            losses = losses_of(x)
        return tape.gradient(losses, kernels)

    return step


@pytest.fixture
def in_chunks(monkeypatch):
    """Take two or three examples at a time."""
    monkeypatch.setattr(reductions, "_CHUNK", 2**12)


@pytest.mark.usefixtures("in_chunks")
def test_equal_layers_share_the_functions_that_measure_them():
    counts = []
    for count in (2, 6):
        graph = step_of(*layers(count)).get_concrete_function().graph.as_graph_def()
        calls = [node for node in graph.node if node.op == "PartitionedCall"]
        assert len(calls) == count
        counts.append(len(graph.library.function))
    # The function, its loop's body and condition.
    assert counts == [3, 3]


@pytest.mark.usefixtures("in_chunks")
def test_no_layer_answers_for_another_one():
    shapes = {"first": (3, 3, 4, 4), "second": (3, 3, 4, 4), "wide": (1, 3, 4, 4)}
    kernels = [variable(at, *shapes[name], name=name) for at, name in enumerate(shapes)]

    def losses_of(x):
        for kernel, stride in zip(kernels, (1, 2, 1), strict=True):
            x = tf.tanh(tf.nn.conv2d(x, kernel, stride, "SAME"))
        return tf.reduce_sum(x, axis=(1, 2, 3))

    assert_exact(losses_of, kernels, draw(1, 11, SIZE, SIZE, CHANNELS))


@pytest.mark.usefixtures("in_chunks")
@pytest.mark.parametrize("examples", [EXAMPLES, 13])
def test_no_array_that_xla_computes_is_larger_than_those_of_the_plain_step(examples):
    batch = tf.constant(draw(1, examples, SIZE, SIZE, CHANNELS, dtype="float32"))

    def elements(*, is_measured):
        step = step_of(*layers(2), is_measured=is_measured, jit_compile=True)
        return largest(step.experimental_get_compiler_ir(batch)(stage="optimized_hlo"))

    assert elements(is_measured=True) <= max(elements(is_measured=False), 2**12)


@pytest.mark.parametrize("examples", range(40))
@pytest.mark.parametrize("most", [1, 4, 7, 11])
def test_chunks_are_equal_where_a_number_of_them_divides_the_examples(examples, most, monkeypatch):
    monkeypatch.setattr(reductions, "_CHUNK", most)
    sizes = []

    def count(rows):
        sizes.append(len(rows))
        return tf.reduce_sum(rows)

    rows = tf.range(1, examples + 1)
    assert int(reductions.in_chunks(count, [rows[:, None]], 1)) == sum(range(1, examples + 1))
    assert max(sizes) <= max(1, 3 * most // 2)
    divisors = [size for size in range(most // 2 + 1, 3 * most // 2 + 1) if examples % size == 0]
    if examples > most and divisors:
        assert {size for size in sizes if size} == {max(divisors)}
    assert len(sizes) <= 2 * -(-examples // most) + 2
