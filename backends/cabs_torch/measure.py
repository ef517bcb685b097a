"""What is measured while the gradients flow back.

Guarantees: gradients pass through as they are; every sum is taken where its parts are at hand, and
nothing is kept longer than the last use of its parameter.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from cabs.gradients.terms import Formed, Materialized
from cabs_torch.graph.autograd_nodes import Edge, Node, is_leaf, shape_of
from cabs_torch.graph.reentrant_checkpoints import watched
from cabs_torch.norms import reductions
from cabs_torch.norms.arrays import TorchArrays
from cabs_torch.norms.sums import ElementwiseSums, SquareSums
from cabs_torch.rules.parameter_paths import back
from cabs_torch.rules.uses import Use, coordinate_squares, of_same_square, total_squares
from cabs_torch.rules.uses import gradients as of_uses
from cabs_torch.walk import Meeting, Outputs, Walk


class Measurement:
    """The sums over one backward pass; entering it watches the graph, leaving it ends that.

    Args:
        walk: Where parameters meet the batch.
        examples: Over how many of the batch's examples norms are taken, the first ones.
        arrays: The table, which says how many examples to take at a time.
        summed: Where the parameters are used whose gradients are summed from those of the examples.
        elementwise: Where squares go that are not to be summed over the elements of a parameter.
    """

    def __init__(
        self,
        walk: Walk,
        examples: int,
        arrays: TorchArrays,
        summed: Sequence[Meeting] = (),
        elementwise: ElementwiseSums | None = None,
    ) -> None:
        self.squares = SquareSums()
        """Over examples, of the norms of their shares of a gradient."""
        self.norms = SquareSums()
        """Of the gradient itself."""
        self._elementwise = elementwise
        self._made: list[tuple[Edge, Tensor]] = []
        """Gradients that are sums of the examples', by what the operation took."""
        self._summed = {meeting.source.origin[0] for meeting in summed}
        self._examples = examples
        self._arrays = arrays
        self._checkpoints = walk.checkpoints
        self._hidden = walk.hidden.keys()
        self._leaves = list(walk.leaves.values())
        self._meetings: dict[Node, list[Meeting]] = defaultdict(list)
        for meeting in walk.meetings:
            self._meetings[meeting.node].append(meeting)
        origins = {meeting.source.origin: meeting.source for meeting in walk.meetings}
        self._computed = {
            origin: [leaf for leaf in source.leaves if leaf in set(self._leaves)]
            for origin, source in origins.items()
            if not is_leaf(origin[0])
        }
        self._sources = Counter(leaf for source in origins.values() for leaf in source.leaves)
        self._uses: dict[Edge, list[Use]] = defaultdict(list)
        self._hooks = ExitStack()
        self._is_pushing = False
        self._failure: Exception | None = None

    def __enter__(self) -> Self:
        with ExitStack() as hooks:
            for node, meetings in self._meetings.items():
                self._watch(hooks, node, partial(self._see, meetings))
            for origin, leaves in self._computed.items():
                self._watch(hooks, origin[0], partial(self._push, origin, leaves))
            for leaf in self._leaves:
                self._watch(hooks, leaf, partial(self._settle, leaf))
            for node, outputs in self._checkpoints.items():
                hooks.enter_context(watched(node, partial(self._look_inside, outputs)))
            self._hooks = hooks.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._hooks.close()
        if self._failure is not None and kind is None:
            raise self._failure

    def _look_inside(self, layouts: Outputs, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        """Measure the backward pass that a checkpoint is about to run."""
        starts = [(outputs[number], layout) for number, layout in layouts.items()]
        tensors = [one for one in inputs if isinstance(one, Tensor)]
        walk = Walk(starts, strict=False, inputs=tensors, wanted=self._hidden)
        inside = Measurement(walk, self._examples, self._arrays, (), self._elementwise)
        inside.squares, inside.norms = self.squares, self.norms
        self._hooks.enter_context(inside)

    def _watch(
        self, hooks: ExitStack, node: Node, see: Callable[[Sequence[Tensor | None]], None]
    ) -> None:
        def hook(cotangents: Sequence[Tensor | None]) -> None:
            if self._is_pushing or self._failure is not None:
                return
            try:
                if _is_exact(cotangents):
                    see(cotangents)
                else:
                    with _exact(cotangents):
                        see(cotangents)
            except Exception as error:
                # The pass goes on: half of it would leave the gradients of some parameters.
                state = (
                    "some gradients are missing: set all to None before the next step"
                    if self._summed
                    else "the gradients are complete, as without statistics"
                )
                error.add_note(f"cabs: the statistics failed at {node.name()}; {state}")
                self._failure = error

        hooks.callback(node.register_prehook(hook).remove)

    def _see(self, meetings: Sequence[Meeting], cotangents: Sequence[Tensor | None]) -> None:
        """Note what an operation contributes."""
        for meeting in meetings:
            term: Any = meeting.input.term(cotangents, self._examples)
            if term is None:
                continue
            path, origin = meeting.source.path, meeting.source.origin
            if origin[0] in self._summed:
                formed: Formed = term.formed(self._arrays)
                if self._elementwise is None:
                    squares, total = formed.squares_and_sum(self._arrays)
                    self.squares.add(origin[0], squares)
                else:
                    squares, total = formed.coordinate_squares_and_sum(self._arrays)
                    self._elementwise.add(origin[0], back(squares, path)[0])
                self._made.append((path[0] if path else origin, total[0]))
            else:
                self._uses[origin].append(Use(term, path))

    def hand_over(self) -> None:
        """Give the parameters the gradients that PyTorch did not compute, by passes of their own.

        They start where the operation took the parameter, so that what lies between, and whatever
        waits for a gradient there or at the parameter, sees it as in any backward pass.
        """
        while self._made and self._failure is None:
            # One after the other, since a gradient that is held elsewhere is copied.
            (node, output), gradient = self._made.pop(0)
            given = gradient.to(node._input_metadata[output].dtype)
            del gradient
            torch.autograd.backward([GradientEdge(node, output)], [given])

    def _push(self, origin: Edge, leaves: Sequence[Node], _: Sequence[Tensor | None]) -> None:
        """Push each example's gradient through what was computed from parameters alone."""
        uses = self._uses.pop(origin, [])
        pushed: dict[Node, list[Tensor]] = defaultdict(list)
        dtype = origin[0]._input_metadata[origin[1]].dtype
        self._is_pushing = True
        try:
            for part in self._arrays.parts(self._examples, math.prod(shape_of(origin))):
                for row in of_uses(uses, self._arrays, part).to(dtype) if uses else ():
                    gradients: Sequence[Tensor | None] = torch.autograd.grad(
                        GradientEdge(*origin),
                        [GradientEdge(leaf, 0) for leaf in leaves],
                        row,
                        retain_graph=True,
                        allow_unused=True,
                    )
                    for leaf, gradient in zip(leaves, gradients, strict=True):
                        if gradient is None:
                            continue
                        if self._sources[leaf] > 1:
                            pushed[leaf].append(gradient.to_dense())
                        elif self._elementwise is None:
                            self.squares.square(leaf, gradient)
                        else:
                            self._elementwise.add(leaf, reductions.dense(gradient).square())
        finally:
            self._is_pushing = False
        for leaf, rows in pushed.items():
            stacked = torch.stack(rows)
            term = Materialized(stacked, tuple(stacked.shape[1:]))
            self._uses[leaf, 0].append(Use(term, ()))

    def _settle(self, leaf: Node, gradients: Sequence[Tensor | None]) -> None:
        """Sum what is known of a parameter, whose gradient is complete."""
        (gradient,) = gradients
        uses = self._uses.pop((leaf, 0), [])
        if self._elementwise is not None:
            if uses:
                self._elementwise.add(leaf, coordinate_squares(uses, self._arrays))
            if gradient is not None:
                self._elementwise.see(leaf, gradient)
            return
        if uses:
            rows = of_same_square(uses, self._arrays)
            if rows is None:
                self.squares.add(leaf, total_squares(uses, self._arrays))
            else:
                self.squares.square(leaf, rows)
        if gradient is not None:
            self.norms.square(leaf, gradient)


def _is_exact(tensors: Sequence[Tensor | None]) -> bool:
    """Return whether products are computed in the precision of their operands as it is."""
    if torch.get_float32_matmul_precision() != "highest":
        return False
    kinds = {tensor.device.type for tensor in tensors if tensor is not None}
    return not any(torch.is_autocast_enabled(kind) for kind in kinds)


@contextmanager
def _exact(tensors: Sequence[Tensor | None]) -> Iterator[None]:
    """Compute in the precision of the operands, whatever autocast and TF32 say."""
    precision = torch.get_float32_matmul_precision()
    with ExitStack() as stack:
        for kind in {tensor.device.type for tensor in tensors if tensor is not None}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        torch.set_float32_matmul_precision("highest")
        stack.callback(torch.set_float32_matmul_precision, precision)
        yield
