"""The gradients of a table of which each example takes as many rows as it wants.

Guarantees: rows that an example takes again are added up before they are squared.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from cabs.gradients.layout import Shape
from cabs_torch.norms import reductions
from cabs_torch.norms.arrays import TorchArrays


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

    @property
    def operands(self) -> tuple[Tensor, ...]:
        """The examples, by their numbers: rows are not in their order."""
        return (torch.arange(self.examples, device=self.rows.device),)

    def gradient(self, arrays: TorchArrays, *operands: Tensor) -> Tensor:  # noqa: ARG002
        """Return the gradients of some examples, shape (n, *shape)."""
        (numbers,) = operands
        first, count = numbers[:1], len(numbers)
        places = ((self.owners - first) * self.shape[0] + self.indices).clamp_min(0)
        is_wanted = (self.owners >= first) & (self.owners < first + count)
        rows = reductions.at_least_single(self.rows) * is_wanted.unsqueeze(-1)
        tables: Tensor = rows.new_zeros(count * self.shape[0], self.shape[1])
        tables.index_add_(0, places.clamp_max(len(tables) - 1), rows)
        return tables.reshape(count, *self.shape)

    def squares(self, arrays: TorchArrays) -> Tensor:  # noqa: ARG002
        """Return the squared norms of all examples' gradients, summed."""
        if not len(self.indices):
            return reductions.zero(self.rows.device)
        return reductions.square(self._added_up()[1])

    def coordinate_squares(self, arrays: TorchArrays) -> Tensor:  # noqa: ARG002
        """Return the sum over examples of the gradients' elementwise squares, (1, *shape)."""
        table = self.rows.new_zeros(self.shape, dtype=reductions.single_or_double(self.rows))
        if len(self.indices):
            order, sums, places, rows = self._added_up()
            # The square of a sum is its terms' sum, each times the sum.
            table.index_add_(0, self.indices[order], rows * sums[places])
        return table.unsqueeze(0)

    def _added_up(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return an order of the rows, the sums of those that are one, their places, and the rows.

        Rows of examples that are not wanted are 0.
        """
        # Equal rows of one example lie side by side once sorted, and are numbered from 0.
        order = (self.owners * self.shape[0] + self.indices).sort(stable=True)
        places = pad((order.values[1:] != order.values[:-1]).long(), (1, 0)).cumsum(dim=0)
        is_wanted = self.owners < self.examples
        rows = reductions.at_least_single(self.rows) * is_wanted.unsqueeze(-1)
        rows = rows[order.indices]
        return order.indices, torch.zeros_like(rows).index_add_(0, places, rows), places, rows
