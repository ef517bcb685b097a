"""The gradients of a table of which each example takes as many rows as it wants.

Guarantees: rows that an example takes again are added up before they are squared.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cabs.gradients import lookups
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

    def squares(self, arrays: TorchArrays) -> Tensor:
        """Return the squared norms of all examples' gradients, summed."""
        keys, rows = self._as_one()
        found: Tensor = lookups.squares(arrays, keys, rows, self.examples * self.shape[0])
        return found

    def coordinate_squares(self, arrays: TorchArrays) -> Tensor:
        """Return the sum over examples of the gradients' elementwise squares, (1, *shape)."""
        keys, rows = lookups.squared_rows(arrays, *self._as_one())
        table: Tensor = arrays.scatter(keys % self.shape[0], rows, self.shape[0])
        return table

    def _as_one(self) -> tuple[Tensor, Tensor]:
        """Return all rows as those of one example, with a table of its own for each real one.

        Numbers have shape (1, N), and rows (1, N, d); those of examples not wanted are 0.
        """
        is_wanted = self.owners < self.examples
        keys = torch.where(is_wanted, self.owners * self.shape[0] + self.indices, 0)
        rows = reductions.at_least_single(self.rows) * is_wanted.unsqueeze(-1)
        return keys.unsqueeze(0), rows.unsqueeze(0)
