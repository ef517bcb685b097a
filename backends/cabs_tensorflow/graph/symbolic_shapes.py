"""The sizes of all tensors of a traced function, also of those that are not known yet.

Guarantees: where a size is not known, a number stands for it that divides no other size of the
function, and follows it through reshapes and products; nothing is computed but shapes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.python.framework.tensor_util import try_evaluate_constant

from cabs.gradients.layout import MixedError, Shape

SOURCES = frozenset(
    """
    EagerPyFunc IteratorGetNext IteratorGetNextSync OptionalGetValue Placeholder PyFunc
    PyFuncStateless
    """.split()
)
"""Operations that bring data into a function."""
SHARE = "_cabs_share"
"""An attribute of operations whose results are a replica's data, however they were cut out."""


class Sizes:
    """The shapes of a graph's tensors, and the values of its constants.

    Args:
        graph: The function's graph, as far as it is traced.
        losses: One loss an example.
        variables: Variables that the graph uses.

    Raises:
        MixedError: If the number of examples cannot be followed.
    """

    def __init__(self, graph: Any, losses: Any, variables: Iterable[Any]) -> None:
        self._graph = self._traced = graph
        self._shapes: dict[str, Any] = {}
        self._unknown: tuple[int, ...] = ()
        # A handle has the shape of its variable.
        self._handles = {graph.capture(one.handle).name: one for one in variables}
        unknown = _unknown_axes(graph)
        self._has_lengths = bool(unknown - {0})
        if not unknown and losses.shape[0] is not None:
            self.examples = int(losses.shape[0])
            return
        batch, length = _free_numbers(graph)
        self._unknown = (batch, length)
        self.examples = batch if losses.shape[0] is None else int(losses.shape[0])
        # The examples lie in the first axes of the data, or, sequences first, in the second.
        for axis in (0, 1):
            try:
                self._graph, self._shapes = _with_sizes(graph, self._handles, axis, batch, length)
                if self.shape(losses) == (self.examples,):
                    return
            except (MixedError, ValueError):
                continue
        raise MixedError(
            "the number of examples does not follow from the sizes of the function's inputs; give "
            "their batch axis a size, or leave that axis alone unknown"
        )

    def known(self, size: int) -> int | None:
        """Return a size, or None if it stands for one that is not known, or may follow from one."""
        if self._has_lengths and size > 1:
            return None
        return None if any(size % number == 0 for number in self._unknown) and size else size

    def shape(self, tensor: Any) -> Shape:
        """Return a tensor's shape; that of the variable for what stands for one.

        Raises:
            MixedError: If it depends on values.
        """
        if tensor.name in self._handles:
            return tuple(self._handles[tensor.name].shape.as_list())
        shape = self._shapes.get(tensor.name)
        if shape is None:
            shape = self._graph.get_tensor_by_name(tensor.name).shape
        if not shape.is_fully_defined():
            raise MixedError("has a shape that depends on the values of the batch")
        return tuple(shape.as_list())

    def constant(self, tensor: Any) -> Any:
        """Return the value of a constant, such as axes or paddings, as an array of NumPy.

        Raises:
            MixedError: If it is none.
        """
        value = _evaluated(self._graph.get_tensor_by_name(tensor.name))
        if value is None:
            raise MixedError("takes axes or sizes that are computed from the batch")
        return np.asarray(value)

    def is_constant(self, tensor: Any) -> bool:
        """Return whether what comes into a function is the same for all examples.

        That is so for variables, and for what a function closes over, unless it has as many rows as
        there are examples.
        """
        if tensor.dtype in _OPAQUE:
            return True
        outer = {inner.name: outer for outer, inner in self._traced.captures}.get(tensor.name)
        is_known = tf.is_tensor(outer) and hasattr(outer, "numpy")
        return is_known and (tensor.shape.rank == 0 or tensor.shape[0] != self.examples)


def _evaluated(tensor: Any) -> Any:
    """Return the value of a constant, computed if need be; None if it is none."""
    value = tf.get_static_value(tensor)
    return try_evaluate_constant(tensor) if value is None else value


def is_source(operation: Any) -> bool:
    """Return whether an operation brings data into a function."""
    return operation.type in SOURCES or SHARE in operation.node_def.attr


def _unknown_axes(graph: Any) -> set[int]:
    """Return along which axes something comes into a graph whose size is not known."""
    return {
        axis
        for operation in graph.get_operations()
        if is_source(operation)
        for output in operation.outputs
        for axis, size in enumerate(output.shape if output.shape.rank is not None else [None] * 2)
        if size is None
    }


def _free_numbers(graph: Any) -> tuple[int, int]:
    """Return two primes that divide no size in a graph, nor each other's neighbours."""
    sizes = {
        size
        for operation in graph.get_operations()
        for output in operation.outputs
        if output.shape.rank is not None
        for size in output.shape
        if size
    }
    found = (
        number
        for number in range(1009, 20000, 2)
        if all(number % divisor for divisor in range(3, 142, 2))
        and all(size % number for size in sizes)
    )
    return next(found), next(found)


def _with_sizes(
    graph: Any, handles: dict[str, Any], axis: int, batch: int, length: int
) -> tuple[Any, dict[str, Any]]:
    """Return a copy of a graph in which all data has sizes, and the shapes of the data.

    Args:
        graph: The graph.
        handles: The variables, by the names of the tensors that stand for them.
        axis: Where data of two axes and more holds the examples.
        batch: What stands for the number of examples.
        length: What stands for other sizes that are not known.
    """
    copy, given, shapes = tf.Graph(), {}, {}
    with copy.as_default():
        for operation in graph.get_operations():
            if not is_source(operation) and operation.type != "ReadVariableOp":
                continue
            for output in operation.outputs:
                if output.name in handles:
                    variable = handles[output.name]
                    given[output.name] = tf.raw_ops.VarHandleOp(
                        dtype=variable.dtype, shape=variable.shape
                    )
                elif output.shape.rank is not None and output.dtype not in _OPAQUE:
                    # A variable that is read has all of its sizes.
                    place = axis if output.shape.rank > 1 else 0
                    sizes = [
                        size if size is not None else batch if at == place else length
                        for at, size in enumerate(output.shape)
                    ]
                    given[output.name] = tf.compat.v1.placeholder(output.dtype, sizes)
                    shapes[output.name] = tf.TensorShape(sizes)
        tf.graph_util.import_graph_def(graph.as_graph_def(), input_map=given, name="")
    return copy, shapes


_OPAQUE = (tf.resource, tf.variant)
