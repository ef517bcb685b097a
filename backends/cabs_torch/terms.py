"""What one operation contributes to the per-example gradients of a parameter.

Guarantees: ``form`` gives the gradients themselves, and ``square_sum`` the sum of their squared
norms without forming more of them than has to be; where a parameter is used several times, the
gradients of its uses are added before they are squared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from cabs_torch import norms
from cabs_torch.carriers import KEEPING, PERMUTING, permutation
from cabs_torch.layout import Shape
from cabs_torch.nodes import Edge, name_of, shape_of
from cabs_torch.shared import MULTIPLE, back, settings


class Term(Protocol):
    """The gradients of n examples with respect to what an operation took as its parameter."""

    @property
    def examples(self) -> int:
        """How many there are, n."""

    @property
    def shape(self) -> Shape:
        """Shape of one gradient."""

    def form(self, part: slice) -> Tensor:
        """Return the gradients of some examples, shape (examples, *shape)."""

    def square_sum(self, chunk: int | None) -> Tensor:
        """Return the sum over examples of the squared norm of their gradients."""


@dataclass(frozen=True)
class Formed:
    """Gradients that are at hand, shape (n, *shape)."""

    gradients: Tensor

    @property
    def examples(self) -> int:
        return len(self.gradients)

    @property
    def shape(self) -> Shape:
        return tuple(self.gradients.shape[1:])

    def form(self, part: slice) -> Tensor:
        return norms.at_least_single(self.gradients[part])

    def square_sum(self, chunk: int | None) -> Tensor:  # noqa: ARG002
        return norms.square(self.gradients)


@dataclass(frozen=True)
class Product:
    """Gradients g_i = left_i' right_i, of a matrix, or of E matrices side by side.

    ``left`` has shape (n, E, T, k), ``right`` (n, E, T, h), and ``shape`` is that of what the
    operation took as its parameter, (k, h) or (E, k, h).
    """

    left: Tensor
    right: Tensor
    shape: Shape

    @property
    def examples(self) -> int:
        return len(self.left)

    def form(self, part: slice) -> Tensor:
        left, right = norms.at_least_single(self.left[part]), self.right[part]
        formed: Tensor = (left.mT @ norms.at_least_single(right)).reshape(-1, *self.shape)
        return formed

    def square_sum(self, chunk: int | None) -> Tensor:
        blocks = self.left.shape[1]
        chunk = chunk and chunk * blocks
        return norms.rows_of(self.left.flatten(0, 1), self.right.flatten(0, 1), chunk)

    def transposed(self) -> Product:
        """Return the same gradients as those of the transposed matrix."""
        shape = (*self.shape[:-2], self.shape[-1], self.shape[-2])
        return Product(self.right, self.left, shape)


@dataclass(frozen=True)
class Lookup:
    """Gradients of a table of which each example took some rows, some perhaps more than once.

    ``indices`` has shape (n, T), ``rows``, the cotangents of what was taken, (n, T, d), and
    ``shape`` is the table's, (V, d).
    """

    indices: Tensor
    rows: Tensor
    shape: Shape

    @property
    def examples(self) -> int:
        return len(self.indices)

    def form(self, part: slice) -> Tensor:
        indices, rows = self.indices[part], norms.at_least_single(self.rows[part])
        table = rows.new_zeros(len(indices), *self.shape)
        return table.scatter_add_(1, indices[..., None].expand_as(rows), rows)

    def square_sum(self, chunk: int | None) -> Tensor:
        total = norms.zero(self.rows.device)
        for part in norms.parts(self.examples, 4 * math.prod(self.rows.shape[1:]), chunk):
            order = self.indices[part].sort(dim=1, stable=True)
            taken, rows = order.values, norms.at_least_single(self.rows[part])
            # Equal rows lie side by side now, and are numbered from 0.
            is_new = pad((taken[:, 1:] != taken[:, :-1]).long(), (1, 0))
            places = is_new.cumsum(dim=1)[..., None].expand_as(rows)
            ordered = rows.gather(1, order.indices[..., None].expand_as(rows))
            total += norms.square(torch.zeros_like(rows).scatter_add_(1, places, ordered))
        return total


@dataclass(frozen=True)
class Bags:
    """Gradients of a table of which each example took as many rows as it wanted.

    ``indices`` has shape (N,), ``rows``, the cotangents of what was taken, (N, d), ``owners``, the
    example that took it, (N,), and ``shape`` is the table's, (V, d).
    """

    indices: Tensor
    rows: Tensor
    owners: Tensor
    examples: int
    shape: Shape

    def form(self, part: slice) -> Tensor:
        places = ((self.owners - part.start) * self.shape[0] + self.indices).clamp_min(0)
        is_wanted = (self.owners >= part.start) & (self.owners < part.stop)
        rows = norms.at_least_single(self.rows) * is_wanted.unsqueeze(-1)
        count = part.stop - part.start
        tables: Tensor = rows.new_zeros(count * self.shape[0], self.shape[1])
        tables.index_add_(0, places.clamp_max(len(tables) - 1), rows)
        return tables.reshape(count, *self.shape)

    def square_sum(self, chunk: int | None) -> Tensor:  # noqa: ARG002
        if not len(self.indices):
            return norms.zero(self.rows.device)
        # Equal rows of one example lie side by side once sorted, and are numbered from 0.
        order = (self.owners * self.shape[0] + self.indices).sort(stable=True)
        places = pad((order.values[1:] != order.values[:-1]).long(), (1, 0)).cumsum(dim=0)
        is_wanted = self.owners < self.examples
        rows = norms.at_least_single(self.rows) * is_wanted.unsqueeze(-1)
        return norms.square(torch.zeros_like(rows).index_add_(0, places, rows[order.indices]))


@dataclass(frozen=True)
class Use:
    """A term, and the operations between it and the parameter, which rearrange that."""

    term: Term
    path: tuple[Edge, ...]

    @property
    def shape(self) -> Shape:
        """The parameter's shape."""
        return shape_of(self.path[-1][0].next_functions[0]) if self.path else self.term.shape

    def form(self, part: slice) -> Tensor:
        """Return gradients of the parameter, shape (examples, *shape)."""
        return back(self.term.form(part), self.path)

    def straight(self) -> Use:
        """Return the same use without casts and transpositions, where the term can do without."""
        term, path = self.term, self.path
        while path and isinstance(term, (Product, Lookup)):
            node, rank = path[0][0], len(term.shape)
            name = name_of(node)
            if name in PERMUTING and isinstance(term, Product):
                if permutation(node, rank) != [*range(rank - 2), rank - 1, rank - 2]:
                    break
                term = term.transposed()
            elif shape_of(node.next_functions[0]) != term.shape or name not in KEEPING:
                break
            path = path[1:]
        return Use(term, path)

    def signature(self) -> tuple[object, ...]:
        """Return what says that two uses rearrange a parameter in the same way."""
        return tuple(settings(edge) for edge in self.path)

    def cut(self) -> Edge | None:
        """Return the operation that cut the parameter into parts, and which part this is."""
        if self.path and name_of(self.path[-1][0]) in MULTIPLE:
            return self.path[-1]
        return None


# Share of its terms' size under which a sum in single precision has lost too many digits.
_CANCELLED = 0.01


def total_square_sum(uses: Sequence[Use], chunk: int | None) -> Tensor:
    """Return the sum over examples of the squared norm of a parameter's gradient.

    Where there are several uses, the gradients of all are added before they are squared: uses as a
    matrix or a table put one after the other along T are one such use, others are formed.
    """
    uses = [use.straight() for use in uses]
    if len(uses) == 1:
        return uses[0].term.square_sum(chunk)
    cuts = {use.cut() for use in uses}
    if None not in cuts and len(cuts) > 1 and len({cut[0] for cut in cuts if cut}) == 1:
        # What is cut out of a parameter in one go does not overlap.
        by_part = ([use for use in uses if use.cut() == cut] for cut in cuts)
        return torch.stack([total_square_sum(some, chunk) for some in by_part]).sum()
    if len({use.signature() for use in uses}) == 1:
        products = [use.term for use in uses if isinstance(use.term, Product)]
        lookups = [use.term for use in uses if isinstance(use.term, Lookup)]
        if len(products) + len(lookups) == len(uses):
            together = _together(products, lookups, chunk)
            if together is not None:
                return together
    examples, shape = uses[0].term.examples, uses[0].shape
    chunks = norms.parts(examples, 2 * math.prod(shape), chunk)
    return torch.stack([norms.square(form(uses, part)) for part in chunks]).sum()


def form(uses: Sequence[Use], part: slice) -> Tensor:
    """Return some examples' gradients of a parameter, the sum over its uses."""
    formed = [use.form(part) for use in uses]
    return formed[0] if len(formed) == 1 else torch.stack(formed).sum(dim=0)


def _together(
    products: Sequence[Product], lookups: Sequence[Lookup], chunk: int | None
) -> Tensor | None:
    """Return the sum for uses of one parameter as a matrix, and as a table.

    None if these cancel each other, where it can be seen, so that rounding errors would show.
    """
    sums = []
    if products:
        left = torch.cat([norms.at_least_single(product.left) for product in products], dim=2)
        right = torch.cat([norms.at_least_single(product.right) for product in products], dim=2)
        sums.append(Product(left, right, products[0].shape).square_sum(chunk))
    if lookups:
        indices = torch.cat([lookup.indices for lookup in lookups], dim=1)
        rows = torch.cat([norms.at_least_single(lookup.rows) for lookup in lookups], dim=1)
        sums.append(Lookup(indices, rows, lookups[0].shape).square_sum(chunk))
    if products and lookups:
        # 2 sum over t, s of left_t[index_s] (right_t . row_s).
        left, right = left.flatten(1, 2), right.flatten(1, 2)
        needed = left.shape[1] * (2 * indices.shape[1] + right.shape[2])
        for part in norms.parts(len(left), needed, chunk):
            taken = indices[part, None].expand(-1, left.shape[1], -1)
            terms = left[part].gather(2, taken) * (right[part] @ rows[part].mT)
            sums.append(2.0 * terms.sum(dtype=torch.float64))
    total = torch.stack(sums).sum()
    is_mixed = products and lookups and norms.may_look(total.device)
    if is_mixed and not bool(total > _CANCELLED * torch.stack(sums).abs().sum()):
        return None
    return total.clamp_min(0.0)
