"""Sums of squares, and the chunks in which examples are taken.

Guarantees: exact up to rounding, summed in float32 or better, and never negative; examples are
taken a few at a time, since large temporaries cost more than the arithmetic on them; every shape
that XLA has to know follows from the shapes of what is given.

Sums are over examples; those of squares are 0-d tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

# Elements of the temporaries that some examples may need at a time: 2 MiB in float32.
_CHUNK = 2**19


def sizes_of(tensor: Any) -> list[Any]:
    """Return the sizes of a tensor, as integers where they are known."""
    known = tensor.shape.as_list()
    dynamic: Any = tf.shape(tensor) if None in known else None
    return [dynamic[axis] if size is None else size for axis, size in enumerate(known)]


def wide(tensor: Any) -> Any:
    """Return a tensor in single precision, or in double if it is."""
    return tensor if tensor.dtype == tf.float64 else tf.cast(tensor, tf.float32)


def square(tensor: Any) -> Any:
    """Return the sum of squares of all elements."""
    # Twice the half of it; the kernel reads the tensor once.
    return 2.0 * tf.nn.l2_loss(wide(tensor))


def weighted_square(tensor: Any, weight: Any) -> Any:
    """Return the sum of squares of all elements, each times its weight."""
    squares = tf.square(wide(tensor))
    return tf.reduce_sum(squares * tf.cast(weight, squares.dtype))


def sum_type(tensors: Sequence[Any]) -> Any:
    """Return the type in which squares of tensors are summed."""
    return tf.float64 if any(one.dtype == tf.float64 for one in tensors) else tf.float32


def in_chunks(function: Callable[..., Any], tensors: Sequence[Any], needed: int) -> Any:
    """Return ``function(*tensors)``, sums over examples, taken some examples at a time.

    Args:
        function: From tensors of some examples, perhaps none, to a nest of sums over them.
        tensors: Tensors with the examples in front.
        needed: How many elements the temporaries of an example have; 0 for all at a time.
    """
    if not needed:
        return function(*tensors)
    most = max(1, _CHUNK // needed)
    examples = tensors[0].shape[0]
    if examples is not None and examples <= most:
        return function(*tensors)
    count = tf.shape(tensors[0])[0]
    size = _dynamic_size(count, most) if examples is None else _size(examples, most)
    whole = count // size

    def add(index: Any, total: Any) -> Any:
        more = function(*(_chunk(one, index, size) for one in tensors))
        return index + 1, tf.nest.map_structure(tf.add, total, more)

    rest = function(*(one[whole * size :] for one in tensors))
    # One chunk after the other, so that no more lies in memory.
    _, total = tf.while_loop(
        lambda index, _: index < whole, add, (tf.constant(0), rest), parallel_iterations=1
    )
    return total


def _size(examples: int, most: int) -> int:
    """Return how many examples are taken at a time: about ``most``, and equal parts if there are.

    What unequal parts leave over is computed by a copy of the function, which XLA compiles too.
    """
    equal = max(size for size in range(1, 3 * most // 2 + 1) if examples % size == 0)
    return equal if 2 * equal > most else -(-examples // -(-examples // most))


def _dynamic_size(examples: Any, most: int) -> Any:
    """Return the same of a tensor; XLA knows it when it compiles."""
    size = tf.clip_by_value(examples, 1, most)
    sizes = tf.range(1, tf.clip_by_value(examples, 1, 3 * most // 2) + 1)
    equal = tf.reduce_max(tf.where(examples % sizes == 0, sizes, 1))
    return tf.where(2 * equal > size, equal, size)


def _chunk(tensor: Any, index: Any, size: Any) -> Any:
    """Return one of the equal parts of a tensor; XLA has to know their size."""
    rank, known = tensor.shape.rank, size if isinstance(size, int) else None
    begin = tf.concat([(index * size)[None], tf.zeros([rank - 1], tf.int32)], 0)
    # XLA pads a tensor to twice its size along each axis whose size is -1 here.
    cut = tf.slice(tensor, begin, tf.stack([size, *sizes_of(tensor)[1:]]))
    return tf.ensure_shape(cut, [known, *tensor.shape[1:]])
