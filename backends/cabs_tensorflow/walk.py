"""Where the variables of a model meet its batch, found by walking the traced function.

Guarantees: every use of every variable that the losses depend on is met by a rule, or an error
names the variable and the operation; nothing is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from cabs.gradients.errors import UncoveredParameterError
from cabs.gradients.layout import Layout, MixedError
from cabs_tensorflow.errors import uncovered
from cabs_tensorflow.graph.program import Program
from cabs_tensorflow.graph.symbolic_shapes import Sizes
from cabs_tensorflow.rules.parameter_gradients import ParameterInput, enter
from cabs_tensorflow.rules.parameter_paths import Shared, Source


class Meeting(NamedTuple):
    """An operation in which something made of variables meets the batch."""

    entered: ParameterInput
    source: Source


_HAS_A_GRADIENT = (
    "belongs to a tf.custom_gradient, or a tf.recompute_grad, that takes it for all examples, so "
    "that its gradient is not seen by examples"
)


class Walk:
    """One walk from the losses to the variables.

    Args:
        losses: One loss an example, shape (m,).
        program: What leads to them.
        sizes: The sizes of its tensors.
        names: What the leaves are called.

    Raises:
        UncoveredParameterError: If the squared norms of a leaf cannot be computed exactly.
    """

    def __init__(self, losses: Any, program: Program, sizes: Sizes, names: Sequence[str]) -> None:
        self.meetings: list[Meeting] = []
        self.own: dict[str, Layout] = {}
        """By the name of what reads it, where a leaf holds a part for each example."""
        self.shared = Shared(program, sizes)
        self._program, self._sizes, self._names = program, sizes, names
        self._layouts: dict[str, Layout] = {}
        """By a tensor's name, where the examples lie in it."""
        self._arrive(losses, Layout((sizes.examples,), 1, sizes.examples), losses.op)
        for operation in reversed(program.operations):
            self._visit(operation)
        self._close()

    def _visit(self, operation: Any) -> None:
        call = self._program.calls.get(operation.name)
        reached = [
            (output, self._layouts[tensor.name])
            for output, tensor in enumerate(operation.outputs)
            if tensor.name in self._layouts
        ]
        if self._program.leaf_read_by(operation) is not None and operation.type != "ResourceGather":
            for output, layout in reached:
                self.own[operation.outputs[output].name] = layout
            return
        for output, layout in reached:
            if call is not None:
                self._arrive(call.copies[output], layout, operation)
            elif operation.type == "IdentityN":
                self._through_custom(operation, output, layout)
            else:
                for index, tensor in enumerate(operation.inputs):
                    if self._program.leaves_of(tensor):
                        self._enter(operation, output, layout, index)

    def _enter(self, operation: Any, output: int, layout: Layout, index: int) -> None:
        tensor = operation.inputs[index]
        found = self._found(operation, output, layout, index)
        if isinstance(found, Layout):
            self._arrive(tensor, found, operation)
            return
        try:
            self.meetings.append(Meeting(found, self.shared.source_of(tensor)))
        except MixedError as problem:
            raise self.error(tensor, operation, str(problem)) from None

    def _found(
        self, operation: Any, output: int, layout: Layout, index: int
    ) -> Layout | ParameterInput:
        """Return the layout of an input, or the ParameterInput that all examples share."""
        try:
            if operation.inputs[index].dtype.is_complex:
                raise MixedError("computes complex numbers")
            return enter(operation, self._sizes, output, layout, index)
        except MixedError as problem:
            raise self.error(operation.inputs[index], operation, str(problem)) from None

    def _through_custom(self, operation: Any, output: int, layout: Layout) -> None:
        """Walk through an identity, which may have a gradient of its own.

        With one, the function's results come first, then its arguments, which have the gradients.
        """
        if "_gradient_op_type" not in operation.node_def.attr:
            self._arrive(operation.inputs[output], layout, operation)
            return
        arguments = {one.name: one for one in operation.inputs[output + 1 :]}
        reached: set[str] = set()
        waiting = [(operation.inputs[output], layout)]
        while waiting:
            tensor, inner = waiting.pop()
            if tensor.name in arguments:
                reached.add(tensor.name)
                self._arrive(tensor, inner, operation)
                continue
            for index, one in enumerate(tensor.op.inputs):
                if self._program.leaves_of(one):
                    found = self._found(tensor.op, tensor.value_index, inner, index)
                    if isinstance(found, ParameterInput):
                        raise self.error(one, operation, _HAS_A_GRADIENT)
                    waiting.append((one, found))
        for name, tensor in arguments.items():
            if self._program.leaves_of(tensor) and name not in reached:
                raise self.error(tensor, operation, _HAS_A_GRADIENT)

    def _arrive(self, tensor: Any, layout: Layout, operation: Any) -> None:
        """Note where the examples lie in a tensor."""
        if self._layouts.setdefault(tensor.name, layout) != layout:
            raise self.error(tensor, operation, "is reached with two different batch layouts")

    def _close(self) -> None:
        for name in self._program.leaves:
            if name in self._layouts:
                self.own[name] = self._layouts[name]
        for entered, source in self.meetings:
            for tensor in (*source.path, *(one.outputs[0] for one in source.operations)):
                if tensor.name in self._layouts:
                    problem = "is data of examples in one use and a shared parameter in another"
                    raise self.error(tensor, entered.operation, problem)

    def error(self, tensor: Any, operation: Any, problem: str) -> UncoveredParameterError:
        """Return the error for what lies behind an operation."""
        leaves = sorted(self._program.leaves_of(tensor))
        verb = "lies" if len(leaves) == 1 else "lie"
        return uncovered(
            f"{operation.type} (operation {operation.name!r}) {problem}; behind it {verb}",
            [self._names[leaf] for leaf in leaves],
        )
