"""The sums of squares over one backward pass.

Guarantees: a variable's gradients are added over its uses before they are squared.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Container, Sequence
from typing import Any

import tensorflow as tf

from cabs.gradients import uses
from cabs.gradients.layout import MixedError
from cabs.gradients.terms import Term
from cabs_tensorflow.errors import uncovered
from cabs_tensorflow.graph.program import Call, Program
from cabs_tensorflow.graph.symbolic_shapes import Sizes
from cabs_tensorflow.norms import reductions
from cabs_tensorflow.norms.arrays import ARRAYS
from cabs_tensorflow.rules.batch_axis import check_inside
from cabs_tensorflow.rules.layout import Batch
from cabs_tensorflow.rules.parameter_gradients import ParameterInput
from cabs_tensorflow.rules.shared_functions import SharedFunctions
from cabs_tensorflow.rules.uses import squares_and_sum, total_squares
from cabs_tensorflow.walk import Walk


class Measurement:
    """What has to be known of a traced function to measure its gradients.

    Args:
        losses: One loss an example, shape (m,).
        leaves: Variables, and tensors that are watched.
        sample: Over how many examples norms are taken; all of them if None.
        recorded: Names of the operations that the tape has seen; all of them if None.

    Raises:
        UncoveredParameterError: If the squared norms of a leaf cannot be computed exactly.
    """

    def __init__(
        self,
        losses: Any,
        leaves: Sequence[Any],
        sample: int | None,
        recorded: frozenset[str] | None = None,
    ) -> None:
        graph = losses.graph
        variables = [leaf for leaf in leaves if hasattr(leaf, "handle")]
        handles: dict[str, int] = {}
        for index, leaf in enumerate(leaves):
            tensor = graph.capture(leaf.handle if hasattr(leaf, "handle") else leaf)
            handles[tensor.name] = index
        self.names = [_describe(leaf) for leaf in leaves]
        try:
            self._program = Program.read(losses, handles, recorded)
            for operation in self._program.operations:
                # Behind a loop no sizes are known, which would be a worse thing to say.
                check_inside(operation)
            self._sizes = Sizes(graph, losses, variables)
        except MixedError as problem:
            reason = f"the function cannot be measured by examples: {problem}; its sources are"
            raise uncovered(reason, self.names) from None
        self._walk = Walk(losses, self._program, self._sizes, self.names)
        examples = losses.shape[0]
        self._batch = Batch(
            tf.shape(losses)[0] if examples is None else examples, sample, self._sizes.known
        )
        self._targets = self._find_targets()
        self._known: dict[str, Any] = {}
        self._uses: dict[int, list[tuple[Term, ParameterInput]]] = defaultdict(list)
        self._functions = SharedFunctions()
        self._squares: dict[int, Any] = {}
        """Of leaves whose gradients were summed up, of all elements or of each."""

    @property
    def taken(self) -> Any:
        """Over how many examples norms are taken, an integer or a tensor."""
        return self._batch.taken

    @property
    def targets(self) -> list[Any]:
        """Tensors of the function whose cotangents are needed."""
        return list(self._targets[None].values())

    @property
    def rules(self) -> list[str]:
        """Which rules measure each leaf, in words."""
        found: list[list[str]] = [[] for _ in self.names]
        for entered, source in self._walk.meetings:
            through = ", by its VJP" if self._walk.shared.leaf_of(source.origin) is None else ""
            for leaf in source.leaves:
                found[leaf].append(entered.rule + through)
        for own in self._walk.own:
            found[self._own_leaf(own)].append("an example's own")
        return [
            " + ".join(f"{rule} x{n}" if n > 1 else rule for rule, n in Counter(used).items())
            or "no gradient"
            for used in found
        ]

    def see(self, cotangents: Sequence[Any]) -> None:
        """Note the cotangents of the targets, None where they are zero."""
        known = self._known = dict(zip(self._targets[None], cotangents, strict=True))
        for name, call in self._program.calls.items():
            self._look_inside(name, call, known)
        for entered, source in self._walk.meetings:
            cotangent = known.get(entered.target.name)
            if cotangent is None:
                continue
            try:
                term = entered.term(self._sizes, self._batch, cotangent)
                found = self._walk.shared.terms(self._batch, source, term)
            except MixedError as problem:
                raise self._walk.error(entered.tensor, entered.operation, str(problem)) from None
            for leaf, one in found.items():
                self._uses[leaf].append((one, entered))

    def sum_up(self, leaves: Container[int], *, is_elementwise: bool) -> dict[int, Any]:
        """Return gradients that are the sums of the examples', which are squared on the way.

        They are those of variables whose gradients are materialized for each example, and which are
        used once, not in a function that is called: that computes its gradients in any case.

        Args:
            leaves: Of which leaves gradients are wanted.
            is_elementwise: Whether weights will be given for the squares.
        """
        made = {}
        for leaf, some in self._uses.items():
            ((term, entered), *more) = some
            if more or leaf not in leaves or entered.operation.name in self._program.owners:
                continue
            positions = math.prod(entered.layout.one)
            found = squares_and_sum(self._functions, term, positions, is_elementwise=is_elementwise)
            if found is None:
                continue
            self._squares[leaf], total = found
            # As the operation took the variable, in half precision perhaps.
            made[leaf] = tf.cast(total, entered.tensor.dtype)
        return made

    def square_sums(self, weights: Sequence[Any] | None = None) -> list[Any]:
        """Return for each leaf the sum over examples of the squared norms, None where it is zero.

        Args:
            weights: What each element's square counts, for each leaf in its shape; None for one.
        """
        sums = {}
        for leaf, some in self._uses.items():
            weight = None if weights is None else weights[leaf]
            squares = self._squares.get(leaf)
            if squares is not None:
                if weight is not None:
                    squares = tf.reduce_sum(squares * tf.cast(weight, squares.dtype))
                sums[leaf] = squares
                continue
            terms = [term for term, _ in some]
            if weight is None:
                sums[leaf] = total_squares(self._functions, terms)
            else:
                squares = uses.coordinate_squares(ARRAYS, terms)[0]
                sums[leaf] = tf.reduce_sum(squares * tf.cast(weight, squares.dtype))
        for own, layout in self._walk.own.items():
            leaf = self._own_leaf(own)
            cotangent = self._known.get(own)
            if cotangent is None:
                continue
            if leaf in sums:
                raise uncovered(
                    "a source holds a part for each example, and is shared too:", [self.names[leaf]]
                )
            taken = self._batch.take(cotangent, layout)
            if weights is None or weights[leaf] is None:
                sums[leaf] = reductions.square(taken)
            else:
                weight = self._batch.take(weights[leaf], layout)
                sums[leaf] = reductions.weighted_square(taken, weight)
        return [sums.get(leaf) for leaf in range(len(self.names))]

    def _find_targets(self) -> dict[str | None, dict[str, Any]]:
        """Return the tensors whose cotangents are needed, by the call that they are copied from."""
        tensors = [entered.target for entered, _ in self._walk.meetings]
        tensors += [self._program.tensors[name] for name in self._walk.own]
        for call in self._program.calls.values():
            tensors += [one for one in call.outputs if self._program.leaves_of(one)]
        found: dict[str | None, dict[str, Any]] = defaultdict(dict)
        for tensor in tensors:
            found[self._program.owners.get(tensor.op.name)][tensor.name] = tensor
        return found

    def _look_inside(self, name: str, call: Call, known: dict[str, Any]) -> None:
        """Note the cotangents inside of a copy of what was called."""
        inside = self._targets.get(name, {})
        ends = {
            copy.name: (copy, known[output.name])
            for output, copy in zip(call.outputs, call.copies, strict=True)
            if known.get(output.name) is not None
        }
        if not ends or not inside:
            return
        copies, cotangents = zip(*ends.values(), strict=True)
        found = tf.gradients(list(copies), list(inside.values()), grad_ys=list(cotangents))
        known.update(zip(inside, found, strict=True))

    def _own_leaf(self, name: str) -> int:
        leaf = self._walk.shared.leaf_of(self._program.tensors[name])
        assert leaf is not None
        return leaf


def name_of(leaf: Any) -> str:
    """Return what a variable is called."""
    # Keras has names that say in which layer a variable is.
    name = getattr(leaf, "path", None) or getattr(leaf, "name", "")
    return str(name).removesuffix(":0")


def _describe(leaf: Any) -> str:
    kind = "variable" if hasattr(leaf, "handle") else "tensor"
    return f"{kind} {name_of(leaf)!r} of shape {tuple(leaf.shape)}"
