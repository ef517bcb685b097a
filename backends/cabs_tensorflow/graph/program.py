"""The part of a traced function that leads from variables to losses.

Guarantees: every operation on such a path is listed once, after those that it depends on; functions
that are called on the way are laid open by a copy of their operations, which computes what they
compute. Nothing of the function itself is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import tensorflow as tf
from tensorflow.python.framework import function_def_to_graph

from cabs.gradients.layout import MixedError

CALLS = frozenset({"PartitionedCall", "StatefulPartitionedCall"})
READS = frozenset({"ReadVariableOp", "ResourceGather"})

# No gradient goes through these.
_STOPPING = frozenset(
    """
    ArgMax ArgMin Ceil Equal Floor Greater GreaterEqual Less LessEqual NotEqual OnesLike
    Rank Rint Round Shape ShapeN Sign Size StopGradient ZerosLike
    """.split()
)


class Call(NamedTuple):
    """A function that was called, and the tensors of the copy that its outputs stand for."""

    outputs: tuple[Any, ...]
    copies: tuple[Any, ...]


@dataclass
class Program:
    """Operations between some leaves and the losses.

    Args:
        leaves: Names of the tensors that are differentiated: a variable's handle, or one that is
            watched.
        recorded: Names of the operations that the tape has seen; all of them if None.
    """

    leaves: Mapping[str, int]
    recorded: frozenset[str] | None = None
    operations: list[Any] = field(default_factory=list)
    """In an order in which each comes after those that it depends on."""
    behind: dict[str, frozenset[int]] = field(default_factory=dict)
    """By a tensor's name, the leaves that its gradient goes to."""
    calls: dict[str, Call] = field(default_factory=dict)
    """By the operation's name."""
    tensors: dict[str, Any] = field(default_factory=dict)
    """By their names, the tensors of these operations, and the leaves themselves."""
    owners: dict[str, str] = field(default_factory=dict)
    """By the names of operations that were copied, that of the call."""

    @classmethod
    def read(
        cls, losses: Any, leaves: Mapping[str, int], recorded: frozenset[str] | None
    ) -> Program:
        """Return the program of losses.

        Raises:
            MixedError: If a leaf is made of another one, or a function cannot be laid open.
        """
        program = cls(leaves, recorded)
        program._extend([losses])
        if any(name in program.behind and program.behind[name] for name in leaves):
            raise MixedError("a tensor that is watched is made of another one of the sources")
        return program

    def leaves_of(self, tensor: Any) -> frozenset[int]:
        """Return the leaves that a tensor's gradient goes to."""
        if tensor.name in self.leaves:
            return frozenset({self.leaves[tensor.name]})
        return self.behind.get(tensor.name, frozenset())

    def leaf_read_by(self, operation: Any) -> int | None:
        """Return the leaf that an operation reads, if it does."""
        if operation.type in READS:
            return self.leaves.get(operation.inputs[0].name)
        return None

    def _extend(self, outputs: Sequence[Any], owner: str | None = None) -> None:
        for operation in ancestors(outputs):
            behind: frozenset[int] = frozenset().union(*map(self.leaves_of, operation.inputs))
            if not behind or operation.type in _STOPPING:
                continue
            if owner is None and self.recorded is not None and operation.name not in self.recorded:
                # No gradient flows through what the tape has not seen.
                continue
            if operation.type in CALLS and operation.name not in self.calls:
                copies = tuple(_laid_open(operation))
                self._extend(copies, operation.name)
                # Gradients give the operation more outputs.
                call = Call(tuple(operation.outputs), copies)
                self.calls[operation.name] = call
                for output, copy in zip(*call, strict=True):
                    self.behind[output.name] = self.leaves_of(copy)
            elif operation.outputs and operation.outputs[0].name not in self.behind:
                for output in operation.outputs:
                    is_passed = output.dtype.is_floating or output.dtype.is_complex
                    opaque = output.dtype in (tf.resource, tf.variant)
                    self.behind[output.name] = behind if is_passed or opaque else frozenset()
            else:
                continue
            if owner is not None:
                self.owners[operation.name] = owner
            self.operations.append(operation)
            self.tensors.update({one.name: one for one in (*operation.inputs, *operation.outputs)})


def ancestors(outputs: Iterable[Any], is_end: Callable[[Any], bool] = lambda _: False) -> list[Any]:
    """Return the operations that tensors depend on, each after those that it depends on.

    Args:
        outputs: The tensors.
        is_end: Whether what lies behind a tensor does not matter, nor what made it.
    """
    found: dict[str, Any] = {}
    # A stack of its own, since graphs can be deeper than Python's.
    waiting = [(tensor.op, False) for tensor in outputs if not is_end(tensor)]
    while waiting:
        operation, is_done = waiting.pop()
        if operation.name in found:
            continue
        if is_done:
            found[operation.name] = operation
        else:
            waiting.append((operation, True))
            waiting.extend(
                (one.op, False)
                for one in operation.inputs
                if one.op.name not in found and not is_end(one)
            )
    return list(found.values())


def copied(
    operations: Sequence[Any],
    replaced: Mapping[str, Any],
    wanted: Sequence[str],
    dtype: Any = None,
) -> list[Any]:
    """Return tensors of a copy of some operations, in the graph that is being traced.

    Args:
        operations: What is copied.
        replaced: By their names, tensors that stand for others.
        wanted: Names of the tensors to return.
        dtype: What the operations take in place of their own type, if it is not that.
    """
    made = {operation.name for operation in operations}
    definition, given = tf.compat.v1.GraphDef(), {}
    for operation in operations:
        node = definition.node.add()
        node.CopyFrom(operation.node_def)
        del node.input[:]
        for one in operation.inputs:
            node.input.append(one.name)
            if one.name in replaced or one.op.name not in made:
                given[one.name] = _here(replaced.get(one.name, one))
        if dtype is not None:
            node.attr["T"].type = dtype.as_datatype_enum
        # Colocation with operations that are not copied.
        node.attr.pop("_class", None)
    definition.versions.CopyFrom(operations[0].graph.graph_def_versions)
    found: list[Any] = tf.graph_util.import_graph_def(
        definition, input_map=given, return_elements=list(wanted), name="cabs"
    )
    return found


def _here(tensor: Any) -> Any:
    """Return a tensor in the graph that is being traced."""
    graph = tf.compat.v1.get_default_graph()
    return tensor if tensor.graph is graph else graph.capture(tensor)


def _laid_open(call: Any) -> list[Any]:
    """Return the outputs of a copy of what a called function does, and what it calls.

    Raises:
        MixedError: If a copy would not do the same.
    """
    for one in call.inputs:
        if one.dtype == tf.resource and any(
            _writes(user, one) for user in one.consumers() if user.name != call.name
        ):
            raise MixedError(
                "it calls a function that reads what is written elsewhere; take the decorator off "
                "it"
            )
    library = {one.signature.name: one for one in call.graph.as_graph_def().library.function}
    return _copy_of(call.get_attr("f").name, list(call.inputs), library)


def _writes(operation: Any, handle: Any) -> bool:
    """Return whether an operation may write a variable."""
    if operation.type not in CALLS:
        return operation.type not in READS
    attributes = operation.node_def.attr
    only_read = set(attributes["_read_only_resource_inputs"].list.i)
    return any(
        one.name == handle.name and at not in only_read for at, one in enumerate(operation.inputs)
    )


def _copy_of(name: str, inputs: Sequence[Any], library: Mapping[str, Any]) -> list[Any]:
    body = function_def_to_graph.function_def_to_graph(library[name], [one.shape for one in inputs])
    for operation in body.get_operations():
        _check_copy(operation)
    known = {one.name: two for one, two in zip(body.inputs, inputs, strict=True)}

    def copy(operations: Sequence[Any]) -> None:
        names = [output.name for operation in operations for output in operation.outputs]
        if names:
            known.update(zip(names, copied(operations, known, names), strict=True))

    waiting: list[Any] = []
    for operation in ancestors(body.outputs):
        if operation.type in CALLS:
            copy(waiting)
            waiting = []
            given = [known[one.name] for one in operation.inputs]
            made = _copy_of(operation.get_attr("f").name, given, library)
            known.update(zip([one.name for one in operation.outputs], made, strict=True))
        elif operation.type != "Placeholder":
            waiting.append(operation)
    copy(waiting)
    return [known[one.name] for one in body.outputs]


def _check_copy(operation: Any) -> None:
    """Raise MixedError if a copy of an operation does something else."""
    if "_gradient_op_type" in operation.node_def.attr:
        raise MixedError(
            "it calls a function with a tf.custom_gradient in it (tf.nn.silu has one), which "
            "cannot be taken out of it; take the tf.function decorator off it"
        )
    if operation.op_def.is_stateful and operation.type not in (*READS, *CALLS, "Placeholder"):
        raise MixedError(
            f"it calls a function that contains {operation.type}, which can do something else "
            "when it is computed once more; take the tf.function decorator off it"
        )
