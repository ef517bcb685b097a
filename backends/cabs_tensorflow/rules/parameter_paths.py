"""The side of a function that is the same for all examples: what is made of variables alone.

Guarantees: what is found here depends on variables and constants only; anything that could be the
batch's, such as a mean over the examples, is refused. A path that only rearranges a variable keeps
the norms of its gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import tensorflow as tf

from cabs.gradients.layout import MixedError, Shape
from cabs.gradients.terms import Materialized, Product, Term
from cabs.gradients.uses import Pulled
from cabs_tensorflow.graph.program import CALLS, Program, ancestors, copied
from cabs_tensorflow.graph.symbolic_shapes import Sizes, is_source
from cabs_tensorflow.norms.reductions import sizes_of
from cabs_tensorflow.rules import batch_axis
from cabs_tensorflow.rules.layout import Batch
from cabs_tensorflow.rules.parameter_gradients import lookup

_CUTTING = frozenset("Slice Split SplitV StridedSlice Unpack".split())
_REARRANGING = frozenset({*batch_axis.KEEPING, *_CUTTING, "Neg", "Transpose"})
_ASKING = frozenset("Rank Shape ShapeN Size".split())


class Source(NamedTuple):
    """What a tensor, the same for all examples, is made of."""

    path: tuple[Any, ...]
    """The tensors that hold nothing but elements of the next one, the tensor itself first."""
    origin: Any
    """What the last one holds elements of: a variable that was read, or something computed."""
    operations: tuple[Any, ...]
    """What makes the origin of variables, in order."""
    leaves: frozenset[int]
    """The variables behind it."""


class Shared:
    """Finds out what tensors are made of.

    Args:
        program: The function.
        sizes: Its sizes.
    """

    def __init__(self, program: Program, sizes: Sizes) -> None:
        self._program, self._sizes = program, sizes
        self._is_data: dict[str, bool] = {}

    def source_of(self, tensor: Any) -> Source:
        """Return what a tensor is made of.

        Raises:
            MixedError: If it could depend on the batch.
        """
        start, path = tensor, []
        while tensor.name not in self._program.leaves and self._is_step(tensor):
            self._check(tensor.op)
            path.append(tensor)
            tensor = _value(tensor)
        operations = self._behind(tensor)
        for operation in operations:
            self._check(operation)
        return Source(tuple(path), tensor, tuple(operations), self._program.leaves_of(start))

    def _is_step(self, tensor: Any) -> bool:
        """Return whether a tensor holds nothing but elements of another one."""
        if tensor.op.type in _REARRANGING:
            return True
        return tensor.op.type == "GatherV2" and not self._program.leaves_of(tensor.op.inputs[1])

    def _behind(self, tensor: Any) -> list[Any]:
        """Return the operations that make a tensor of leaves, in order."""

        def is_end(one: Any) -> bool:
            return one.name in self._program.leaves or not self._program.leaves_of(one)

        return ancestors([tensor], is_end)

    def _check(self, operation: Any) -> None:
        """Raise MixedError if an operation brings the batch in, or is not seen through."""
        if operation.type in CALLS:
            raise MixedError(
                f"takes what a function computes from variables (operation {operation.name!r}), "
                "which is not looked into; take the tf.function decorator off it"
            )
        for one in operation.inputs:
            is_of_leaves = bool(self._program.leaves_of(one))
            if not is_of_leaves and self._depends_on_data(one):
                raise MixedError(
                    "takes an input the same way for all examples, although that is combined with "
                    f"data in {operation.type} (operation {operation.name!r}), as batch "
                    "normalization in training mode does"
                )

    def _depends_on_data(self, tensor: Any) -> bool:
        """Return whether data goes into a tensor, other than by its sizes."""
        known = self._is_data.get(tensor.name)
        if known is None:
            behind = ancestors([tensor], lambda one: one.op.type in _ASKING)
            known = self._is_data[tensor.name] = any(
                is_source(operation) and not self._sizes.is_constant(output)
                for operation in behind
                for output in operation.outputs
            )
        return known

    def terms(self, batch: Batch, source: Source, term: Term) -> dict[int, Term]:
        """Return the gradients of the variables behind a tensor, from those of the tensor."""
        for tensor in source.path:
            term = self._back(batch, tensor, term)
        leaf = self.leaf_of(source.origin)
        if leaf is not None:
            if source.origin.op.type == "ResourceGather":
                shape = self._sizes.shape(source.origin.op.inputs[0])
                term = self._looked_up(batch, source.origin, term, shape)
            return {leaf: term}
        between = [one for one in source.operations if self._program.leaf_read_by(one) is None]
        if any(one.type == "ResourceGather" for one in source.operations):
            raise MixedError("is computed from rows that are looked up")
        inputs = {
            one.name: one
            for operation in between
            for one in operation.inputs
            if self.leaf_of(one) is not None
        }
        found: dict[int, Term] = {}
        for leaf in source.leaves:
            mine = [one for one in inputs.values() if self.leaf_of(one) == leaf]
            shape = self._sizes.shape(mine[0])
            found[leaf] = Pulled(term, _pull(between, source.origin, mine, shape), shape)
        return found

    def leaf_of(self, tensor: Any) -> int | None:
        """Return which leaf a tensor is, or is read from."""
        leaf = self._program.leaves.get(tensor.name)
        return self._program.leaf_read_by(tensor.op) if leaf is None else leaf

    def _back(self, batch: Batch, tensor: Any, term: Term) -> Term:
        """Return gradients as those of what a tensor holds elements of."""
        operation, value = tensor.op, _value(tensor)
        name, shape = operation.type, self._sizes.shape(value)
        if name == "GatherV2":
            axis = self._sizes.constant(operation.inputs[2]).item()
            if operation.get_attr("batch_dims") or axis % len(shape):
                return Pulled(term, _pull([operation], tensor, [value], shape), shape)
            return self._looked_up(batch, tensor, term, shape)
        if name == "Transpose":
            order = self._sizes.constant(operation.inputs[1]).tolist()
            order = [axis % len(shape) for axis in order]
            if isinstance(term, Product):
                return term.placed(shape, order)
            back = [0, *(1 + order.index(axis) for axis in range(len(shape)))]
            pull = partial(tf.transpose, perm=back)
            return Pulled(term, pull, shape, True, ("Transpose", tuple(order)))
        if name in batch_axis.KEEPING:
            if shape == term.shape:
                return term
            pull = partial(_reshaped, sizes=sizes_of(value))
            return Pulled(term, pull, shape, True, ("Reshape", shape, term.shape))
        if name == "Neg":
            return Pulled(term, tf.negative, shape)
        # Equal slices that are written twice count as different: right, and dearer.
        how = (tensor.name, term.shape)
        # Slices can overlap.
        part = None if name in ("Slice", "StridedSlice") else (operation.name, tensor.value_index)
        return Pulled(term, _pull([operation], tensor, [value], shape), shape, True, how, part)

    def _looked_up(self, batch: Batch, tensor: Any, term: Term, shape: Shape) -> Term:
        """Return the gradients of a table from which all examples take the same rows."""
        ids = tf.reshape(tensor.op.inputs[1], [-1])
        if not isinstance(term, Materialized):
            # The gradients of the rows, then those of the table.
            return Pulled(term, partial(_table, ids=ids, shape=shape), shape)
        return lookup(batch, tf.tile(ids[None], [batch.taken, 1]), term.gradients, shape)


def _value(tensor: Any) -> Any:
    """Return what an operation takes elements of."""
    return tensor.op.inputs[1 if tensor.op.type == "Split" else 0]


def _reshaped(gradients: Any, sizes: list[Any]) -> Any:
    return tf.reshape(gradients, [tf.shape(gradients)[0], *sizes])


def _table(gradients: Any, ids: Any, shape: Shape) -> Any:
    n = tf.shape(gradients)[0]
    rows = tf.reshape(gradients, [n, tf.size(ids), math.prod(shape[1:])])
    summed = tf.math.unsorted_segment_sum(tf.transpose(rows, [1, 0, 2]), ids, shape[0])
    return tf.reshape(tf.transpose(summed, [1, 0, 2]), [n, *shape])


def _pull(
    operations: list[Any], tensor: Any, inputs: list[Any], shape: Shape
) -> Callable[[Any], Any]:
    """Return the function from gradients of a tensor to those of what it was computed from."""

    def pull(gradients: Any) -> Any:
        # What only cuts a tensor keeps the precision, since squares pass through it too.
        is_cut = all(operation.type in _CUTTING for operation in operations)
        dtype = gradients.dtype if is_cut else tensor.dtype

        def one(row: Any) -> Any:
            given = {
                single.name: tf.cast(single, dtype) if is_cut else tf.identity(single)
                for single in inputs
            }
            (output,) = copied(operations, given, [tensor.name], dtype if is_cut else None)
            found = tf.gradients(output, list(given.values()), grad_ys=[tf.cast(row, dtype)])
            parts = [part for part in found if part is not None]
            total = tf.add_n(parts) if parts else tf.zeros(shape, dtype)
            return tf.cast(tf.ensure_shape(total, shape), gradients.dtype)

        spec = tf.TensorSpec(shape, gradients.dtype)
        return tf.map_fn(one, gradients, fn_output_signature=spec)

    return pull
