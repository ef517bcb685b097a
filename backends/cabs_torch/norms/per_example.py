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

from cabs.gradients.layout import Shape
from cabs_torch.norms import ghost_norms


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
        return ghost_norms.at_least_single(self.gradients[part])

    def square_sum(self, chunk: int | None) -> Tensor:  # noqa: ARG002
        return ghost_norms.square(self.gradients)


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
        left, right = ghost_norms.at_least_single(self.left[part]), self.right[part]
        formed: Tensor = (left.mT @ ghost_norms.at_least_single(right)).reshape(-1, *self.shape)
        return formed

    def square_sum(self, chunk: int | None) -> Tensor:
        blocks = self.left.shape[1]
        chunk = chunk and chunk * blocks
        return ghost_norms.rows_of(self.left.flatten(0, 1), self.right.flatten(0, 1), chunk)

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
        indices, rows = self.indices[part], ghost_norms.at_least_single(self.rows[part])
        table = rows.new_zeros(len(indices), *self.shape)
        return table.scatter_add_(1, indices[..., None].expand_as(rows), rows)

    def square_sum(self, chunk: int | None) -> Tensor:
        total = ghost_norms.zero(self.rows.device)
        for part in ghost_norms.parts(self.examples, 4 * math.prod(self.rows.shape[1:]), chunk):
            order = self.indices[part].sort(dim=1, stable=True)
            taken, rows = order.values, ghost_norms.at_least_single(self.rows[part])
            # Equal rows lie side by side now, and are numbered from 0.
            is_new = pad((taken[:, 1:] != taken[:, :-1]).long(), (1, 0))
            places = is_new.cumsum(dim=1)[..., None].expand_as(rows)
            ordered = rows.gather(1, order.indices[..., None].expand_as(rows))
            total += ghost_norms.square(torch.zeros_like(rows).scatter_add_(1, places, ordered))
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
        rows = ghost_norms.at_least_single(self.rows) * is_wanted.unsqueeze(-1)
        count = part.stop - part.start
        tables: Tensor = rows.new_zeros(count * self.shape[0], self.shape[1])
        tables.index_add_(0, places.clamp_max(len(tables) - 1), rows)
        return tables.reshape(count, *self.shape)

    def square_sum(self, chunk: int | None) -> Tensor:  # noqa: ARG002
        if not len(self.indices):
            return ghost_norms.zero(self.rows.device)
        # Equal rows of one example lie side by side once sorted, and are numbered from 0.
        order = (self.owners * self.shape[0] + self.indices).sort(stable=True)
        places = pad((order.values[1:] != order.values[:-1]).long(), (1, 0)).cumsum(dim=0)
        is_wanted = self.owners < self.examples
        rows = ghost_norms.at_least_single(self.rows) * is_wanted.unsqueeze(-1)
        return ghost_norms.square(torch.zeros_like(rows).index_add_(0, places, rows[order.indices]))


# Share of its terms' size under which a sum in single precision has lost too many digits.
_CANCELLED = 0.01


def together(
    products: Sequence[Product], lookups: Sequence[Lookup], chunk: int | None
) -> Tensor | None:
    """Return the sum for uses of one parameter as a matrix, and as a table.

    None if these cancel each other, where it can be seen, so that rounding errors would show.
    """
    sums = []
    if products:
        left = torch.cat([ghost_norms.at_least_single(product.left) for product in products], dim=2)
        right = torch.cat(
            [ghost_norms.at_least_single(product.right) for product in products], dim=2
        )
        sums.append(Product(left, right, products[0].shape).square_sum(chunk))
    if lookups:
        indices = torch.cat([lookup.indices for lookup in lookups], dim=1)
        rows = torch.cat([ghost_norms.at_least_single(lookup.rows) for lookup in lookups], dim=1)
        sums.append(Lookup(indices, rows, lookups[0].shape).square_sum(chunk))
    if products and lookups:
        # 2 sum over t, s of left_t[index_s] (right_t . row_s).
        left, right = left.flatten(1, 2), right.flatten(1, 2)
        needed = left.shape[1] * (2 * indices.shape[1] + right.shape[2])
        for part in ghost_norms.parts(len(left), needed, chunk):
            taken = indices[part, None].expand(-1, left.shape[1], -1)
            terms = left[part].gather(2, taken) * (right[part] @ rows[part].mT)
            sums.append(2.0 * terms.sum(dtype=torch.float64))
    total = torch.stack(sums).sum()
    is_mixed = products and lookups and ghost_norms.may_look(total.device)
    if is_mixed and not bool(total > _CANCELLED * torch.stack(sums).abs().sum()):
        return None
    return total.clamp_min(0.0)
