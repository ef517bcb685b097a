"""The array operations of PyTorch, in which the core computes squared norms.

Guarantees: sums are taken in float32 or better and added up in float64, whatever autocast says;
examples are taken a few at a time, since the page faults of large temporaries cost more than the
arithmetic; on a GPU nothing waits for the device. Squares are 0-d float64 tensors, sums over the
examples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from cabs_torch import tracing
from cabs_torch.norms import reductions


class TorchArrays:
    """Those of PyTorch; ``chunk`` is how many examples are taken at a time."""

    # Measured.
    pair_cost = 0.85
    symmetric: int | None = 64

    def __init__(self, chunk: int | None = None) -> None:
        self._chunk = chunk

    def shape(self, array: Tensor) -> tuple[int, ...]:
        return tuple(array.shape)

    def wide(self, array: Tensor) -> Tensor:
        return reductions.at_least_single(array)

    def double(self, array: Tensor) -> Tensor:
        return array.double()

    def contract(self, left: Tensor, right: Tensor, axis: int) -> Tensor:
        left, right = self.wide(left), self.wide(right)
        left, right = (left.mT, right) if axis == 2 else (left, right.mT)
        if left.shape[1] == right.shape[1] == 1:
            # Faster than a batch of batches, and one matrix faster than a batch of one.
            if len(left) == len(right) == 1:
                return (left[0, 0] @ right[0, 0])[None, None]
            return torch.bmm(left.squeeze(1), right.squeeze(1)).unsqueeze(1)
        return left @ right

    def squares(self, array: Tensor) -> Tensor:
        # In double precision, a root would only round.
        is_double = array.dtype == torch.float64
        return array.square().sum() if is_double else reductions.square(array)

    def inner(self, left: Tensor, right: Tensor) -> Tensor:
        # An example's sum in single precision, and those of all in double.
        product = left.mul_(right) if left.dtype == right.dtype else left * right
        return product.flatten(1).sum(dim=1).double().sum()

    def row_norms(self, array: Tensor) -> Tensor:
        dtype = reductions.single_or_double(array)
        norms: Tensor = torch.linalg.vector_norm(array, dim=(2, 3), dtype=dtype)
        return norms.double()

    def root_sums(self, left: Tensor, right: Tensor) -> Tensor:
        terms = left.diagonal(dim1=2, dim2=3) * right.diagonal(dim1=2, dim2=3)
        return terms.clamp_min(0.0).sqrt().sum(dim=2)

    def reshape(self, array: Tensor, sizes: Sequence[int]) -> Tensor:
        return array.reshape(len(array), *sizes)

    def transpose(self, array: Tensor, order: Sequence[int]) -> Tensor:
        return array.permute(0, *(1 + axis for axis in order))

    def part(self, array: Tensor, axis: int, start: int, stop: int) -> Tensor:
        return array.narrow(axis, start, stop - start)

    def concatenate(self, arrays: Sequence[Tensor], axis: int) -> Tensor:
        return torch.cat([*arrays], dim=axis)

    def argsort(self, ids: Tensor) -> Tensor:
        return ids.argsort(dim=1, stable=True)

    def take(self, array: Tensor, places: Tensor) -> Tensor:
        if array.dim() == 2:
            return array.gather(1, places)
        return array.gather(1, places[..., None].expand(-1, -1, array.shape[2]))

    def number(self, ids: Tensor) -> Tensor:
        return (ids.diff(dim=1, prepend=ids[:, :1]) != 0).cumsum(dim=1)

    def columns(self, array: Tensor, ids: Tensor) -> Tensor:
        return array.gather(2, ids[:, None].expand(-1, array.shape[1], -1))

    def scatter(self, places: Tensor, rows: Tensor, count: int) -> Tensor:
        table = rows.new_zeros(len(rows), count, rows.shape[2])
        return table.scatter_add_(1, places[..., None].expand_as(rows), rows)

    def in_chunks(
        self, function: Callable[..., Any], operands: Sequence[Tensor], needed: int
    ) -> Any:
        parts = self.parts(len(operands[0]), needed, operands[0].device)
        found = [function(*(one[part] for one in operands)) for part in parts]
        if isinstance(found[0], tuple):
            return tuple(map(reductions.added, zip(*found, strict=True)))
        return reductions.added(found)

    def squares_and_sum(
        self, rows: Callable[..., Tensor], operands: Sequence[Tensor], needed: int
    ) -> tuple[Tensor, Tensor]:
        squares, total = [], None
        for part in self.parts(len(operands[0]), needed, operands[0].device):
            # Squared and added up while they are in the processor's cache.
            found = rows(*(one[part] for one in operands))
            squares.append(reductions.square(found))
            # Of one example too: what was found can be the cotangent itself.
            summed = found.sum(dim=0, keepdim=True)
            total = summed if total is None else total.add_(summed)
        assert total is not None
        return reductions.added(squares), total

    def coordinate_squares(
        self,
        rows: Callable[..., Tensor],
        operands: Sequence[Tensor],
        needed: int,
        *,
        is_summed: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        squares, total = None, None
        for part in self.parts(len(operands[0]), needed, operands[0].device):
            found = self.wide(rows(*(one[part] for one in operands)))
            squares = reductions.with_squares(squares, found)
            if is_summed:
                summed = found.sum(dim=0, keepdim=True)
                total = summed if total is None else total.add_(summed)
        assert squares is not None
        return squares, total

    def merged(self, array: Tensor, axis: int) -> Tensor:
        return array.movedim(0, axis - 1).flatten(axis - 1, axis).unsqueeze(0)

    def parts(self, examples: int, needed: int, device: torch.device) -> Iterator[slice]:
        """Yield slices of examples whose temporaries fit into a chunk."""
        return reductions.parts(examples, needed, self._chunk, device)

    def unless_cancelled(
        self, total: Tensor, bound: Tensor, limit: float, otherwise: Callable[[], Tensor]
    ) -> Tensor:
        if not tracing.may_look(total.device):
            return total.clamp_min(0.0)
        # Not a number compares false, and has.
        return total if bool(bound <= limit * total) else otherwise()

    def prefer(
        self,
        in_pairs: Callable[..., Tensor],
        materialized: Callable[..., Tensor],
        operands: Sequence[Tensor],
    ) -> Tensor:
        # In pairs single precision is enough only if terms do not cancel, which has to be looked
        # at; on a GPU that would wait for the device.
        return (in_pairs if tracing.may_look(operands[0].device) else materialized)(*operands)


class Elementwise(TorchArrays):
    """The same for elementwise squares, of which products of pairs of positions tell nothing."""

    pair_cost = math.inf
