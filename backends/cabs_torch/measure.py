"""What is measured while the gradients flow back.

Guarantees: gradients pass through as they are; every sum is taken where its parts are at hand, and
nothing is kept longer than the last use of its parameter, but for small tensors, as many as fit
into a chunk, which wait for others of their shapes. A small gradient of a parameter that held none
is read where the pass has left it.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from typing import Any, Self

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from cabs.gradients import uses
from cabs.gradients.terms import Formed, Materialized, Term
from cabs_torch import tracing
from cabs_torch.graph.autograd_nodes import Edge, Node, is_leaf, saved, shape_of
from cabs_torch.graph.reentrant_checkpoints import watched
from cabs_torch.norms import reductions
from cabs_torch.norms.alike import Alike, add_alone
from cabs_torch.norms.arrays import TorchArrays
from cabs_torch.norms.sums import ElementwiseSums, SquareSums
from cabs_torch.rules.parameter_gradients import looked_up
from cabs_torch.rules.parameter_paths import back
from cabs_torch.rules.uses import of_parameter
from cabs_torch.summed import is_reduced_over_ranks
from cabs_torch.walk import Found, Meeting, Outputs, Walk


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
        walk: Found,
        examples: int,
        arrays: TorchArrays,
        summed: Sequence[Meeting] = (),
        elementwise: ElementwiseSums | None = None,
    ) -> None:
        self.squares = SquareSums()
        """Over examples, of the norms of their shares of a gradient."""
        self.norms = SquareSums()
        """Of the gradient itself."""
        self._alike = Alike(self.squares, arrays)
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
        origins = {meeting.source.origin: meeting.source for meeting in walk.meetings}
        measured = set(self._leaves)
        self._computed = {
            origin: [leaf for leaf in source.leaves if leaf in measured]
            for origin, source in origins.items()
            if not is_leaf(origin[0])
        }
        met = Counter(leaf for one in walk.meetings for leaf in one.source.leaves)
        behind = {leaf for leaves in self._computed.values() for leaf in leaves}
        self._alone = {leaf for leaf, times in met.items() if times == 1} - behind
        """Parameters of one use, which is all there is to know of them."""
        self._waiting: dict[Node, list[Meeting]] = defaultdict(list)
        waiting = cache(reductions.waiting)
        for meeting in walk.meetings:
            leaf, together = meeting.source.origin[0], meeting.input.together
            if (
                together is not None
                and elementwise is None
                and leaf in self._alone
                and leaf not in self._summed
                and together.examples == examples
                and together.copied <= waiting(leaf.variable.device)
            ):
                self._waiting[meeting.node].append(meeting)
            else:
                self._meetings[meeting.node].append(meeting)
        self._unseen: list[Node] = []
        """Those whose gradients are read where they are left, once the pass is over."""
        self._sources = Counter(leaf for source in origins.values() for leaf in source.leaves)
        self._uses: dict[Edge, list[Term]] = defaultdict(list)
        self._handles: list[Any] = []
        self._hooks = ExitStack()
        self._is_pushing, self._is_exact = False, True
        self._kinds: set[str] = set()
        self._failure: Exception | None = None

    def __enter__(self) -> Self:
        self._kinds = {leaf.variable.device.type for leaf in self._leaves}
        is_wide = torch.get_float32_matmul_precision() == "highest"
        self._is_exact = is_wide and not any(map(torch.is_autocast_enabled, self._kinds))
        is_seen = self._elementwise is not None or tracing.is_traced()
        is_seen = is_seen or is_reduced_over_ranks()
        with ExitStack() as hooks:
            hooks.callback(self._forget)
            for node, meetings in self._meetings.items():
                self._watch(node, partial(self._see, meetings))
            for node, meetings in self._waiting.items():
                self._watch(node, partial(self._keep, node, meetings))
            for origin, leaves in self._computed.items():
                self._watch(origin[0], partial(self._push, origin, leaves))
            for leaf in self._leaves:
                if not is_seen and leaf in self._alone and _is_left(leaf.variable):
                    self._unseen.append(leaf)
                else:
                    self._watch(leaf, partial(self._settle, leaf))
            for node, outputs in self._checkpoints.items():
                hooks.enter_context(watched(node, partial(self._look_inside, outputs)))
            self._hooks = hooks.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._hooks.close()
        if kind is None:
            with torch.no_grad():
                self._guarded(self._finish, "the end", ())
        if self._failure is not None and kind is None:
            raise self._failure

    def _forget(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _look_inside(self, layouts: Outputs, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        """Measure the backward pass that a checkpoint is about to run."""
        starts = [(outputs[number], layout) for number, layout in layouts.items()]
        tensors = [one for one in inputs if isinstance(one, Tensor)]
        walk = Walk(starts, strict=False, inputs=tensors, wanted=self._hidden)
        inside = Measurement(walk, self._examples, self._arrays, (), self._elementwise)
        inside.squares, inside.norms, inside._alike = self.squares, self.norms, self._alike
        self._hooks.enter_context(inside)

    def _watch(self, node: Node, see: Callable[[Sequence[Tensor | None]], None]) -> None:
        hook = partial(self._guarded, see, node.name())
        self._handles.append(node.register_prehook(hook))

    def _guarded(
        self,
        see: Callable[[Sequence[Tensor | None]], None],
        name: str,
        cotangents: Sequence[Tensor | None],
    ) -> None:
        if self._is_pushing or self._failure is not None:
            return
        try:
            if self._is_exact:
                see(cotangents)
            else:
                with _exact(self._kinds):
                    see(cotangents)
        except Exception as error:
            # The pass goes on: half of it would leave the gradients of some parameters.
            state = (
                "some gradients are missing: set all to None before the next step"
                if self._summed
                else "the gradients are complete, as without statistics"
            )
            error.add_note(f"cabs: the statistics failed at {name}; {state}")
            self._failure = error

    def _finish(self, _: Sequence[Tensor | None] = ()) -> None:
        """Measure what has waited for the end of the pass."""
        self._alike.end()
        for leaf in self._unseen:
            if leaf.variable.grad is not None:
                self.norms.square(leaf, leaf.variable.grad)

    def _see(self, meetings: Sequence[Meeting], cotangents: Sequence[Tensor | None]) -> None:
        """Note what an operation contributes."""
        for meeting in meetings:
            term: Any = meeting.input.term(meeting.node, cotangents, self._examples)
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
            elif origin[0] in self._alone and self._elementwise is None:
                add_alone(self.squares, origin[0], term, self._arrays)
            else:
                self._uses[origin].append(of_parameter(term, path))

    def _keep(
        self,
        node: Node,
        meetings: Sequence[Meeting],
        cotangents: Sequence[Tensor | None],
    ) -> None:
        """Note what an operation contributes, to be measured with others."""
        cotangent = cotangents[0]
        if cotangent is None:
            return
        for meeting in meetings:
            given: Any = meeting.input.together
            operands = [saved(node, name) for name in given.reads]
            operands.append(cotangent)
            if not self._alike.add(meeting.source.origin[0], given, operands):
                self._see([meeting], cotangents)

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
        terms = self._uses.pop(origin, [])
        if not terms:
            return
        operands = uses.operands_of(terms)
        if origin[0].next_functions[0][0] in leaves:
            table = looked_up(origin[0], uses.gradient(self._arrays, terms, *operands))
            if table is not None:
                self._uses[leaves[0], 0].append(table)
                return
        pushed: dict[Node, list[Tensor]] = defaultdict(list)
        dtype = origin[0]._input_metadata[origin[1]].dtype
        self._is_pushing = True
        try:
            whole = self._examples, math.prod(shape_of(origin)), operands[0].device
            for part in self._arrays.parts(*whole):
                some = (one[part] for one in operands)
                for row in uses.gradient(self._arrays, terms, *some).to(dtype):
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
            self._uses[leaf, 0].append(Materialized(stacked, tuple(stacked.shape[1:])))

    def _settle(self, leaf: Node, gradients: Sequence[Tensor | None]) -> None:
        """Sum what is known of a parameter, whose gradient is complete."""
        (gradient,) = gradients
        terms = self._uses.pop((leaf, 0), [])
        if self._elementwise is not None:
            if terms:
                self._elementwise.add(leaf, uses.coordinate_squares(self._arrays, terms)[0])
            if gradient is not None:
                self._elementwise.see(leaf, gradient)
            return
        if terms:
            self.squares.add(leaf, uses.total_squares(self._arrays, terms))
        if gradient is not None:
            self.norms.square(leaf, gradient)


def _is_left(parameter: Tensor) -> bool:
    """Return whether a small gradient will be found in a parameter after the pass, and alone.

    A large one is squared while it is in the processor's cache.
    """
    return (
        parameter.grad is None
        and parameter.requires_grad
        and not parameter._post_accumulate_grad_hooks
        and reductions.is_small(parameter)
    )


@contextmanager
def _exact(kinds: Iterable[str]) -> Iterator[None]:
    """Compute in the precision of the operands, whatever autocast and TF32 say."""
    precision = torch.get_float32_matmul_precision()
    with ExitStack() as stack:
        for kind in kinds:
            stack.enter_context(torch.autocast(kind, enabled=False))
        torch.set_float32_matmul_precision("highest")
        stack.callback(torch.set_float32_matmul_precision, precision)
        yield
