"""Sums of squares over the tensors of one pass, by the parameters that they belong to.

Guarantees: tensors of few elements are squared together when the sums are read, by few calls for
all, since calls are what they cost; sums are taken in float64; no large tensor is kept, but for
elementwise squares, one in the shape of each parameter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cabs_torch import tracing
from cabs_torch.norms import reductions


class SquareSums:
    """Squares, of which each belongs to an owner, a parameter's node for instance."""

    def __init__(self) -> None:
        self._squares: list[tuple[Any, Tensor]] = []
        self._norms: list[tuple[list[Any], Tensor]] = []
        self._small: list[tuple[Any, Tensor]] = []

    def add(self, owner: Any, square: Tensor) -> None:
        """Add a sum of squares that is known, 0-d."""
        self._squares.append((owner, square))

    def square(self, owner: Any, tensor: Tensor) -> None:
        """Add the squares of a tensor's elements; it can be sparse."""
        if tensor.is_sparse or not reductions.is_small(tensor) or tracing.is_traced():
            norms = reductions.partial_norms(tensor)
            self._norms.extend(([owner] * len(one), one) for one in norms)
        else:
            self._small.append((owner, tensor))

    def square_rows(self, owners: list[Any], rows: Tensor) -> None:
        """Add the squares of a matrix, of which each row has an owner."""
        self._norms.append((owners, torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)))

    def weigh(self, owner: Any, tensor: Tensor, weight: Callable[[slice], Tensor | float]) -> None:
        """Add the squares of a tensor's elements, each times the weight of its part."""
        whole = reductions.rows(tensor)
        for part in reductions.blocks(whole):
            some = reductions.at_least_single(whole[part]).square().mul_(weight(part))
            self.add(owner, some.sum().double())

    def by_group(self, number_of: Callable[[Any], int], count: int, device: torch.device) -> Tensor:
        """Return the sums by the numbers of their owners, shape (count,)."""
        parts: list[Tensor] = []
        if self._small:
            parts.append(_norms([one for _, one in self._small], count > 1, device).square())
        if self._squares:
            parts.append(torch.stack([one.to(device) for _, one in self._squares]))
        if self._norms:
            parts.append(torch.cat([one.to(device) for _, one in self._norms]).double().square())
        if not parts:
            return torch.zeros(count, dtype=torch.float64, device=device)
        whole = torch.cat(parts) if len(parts) > 1 else parts[0]
        if count == 1:
            return whole.sum().reshape(1)
        owners = [owner for owner, _ in (*self._small, *self._squares)]
        owners += [owner for some, _ in self._norms for owner in some]
        numbers = torch.tensor([number_of(owner) for owner in owners], device=device)
        return whole.new_zeros(count).index_add_(0, numbers, whole)


def _norms(tensors: list[Tensor], is_each: bool, device: torch.device) -> Tensor:
    """Return norms in float64, of each tensor, or of a chunk of those of one type together."""
    if is_each:
        found = torch._foreach_norm(tensors, 2, dtype=torch.float64)
        return torch.stack([one.to(device) for one in found])
    alike: dict[object, list[Tensor]] = {}
    total, most = 0, reductions.most(device)
    for one in tensors:
        total += one.numel()
        alike.setdefault((one.device, one.dtype, total // most), []).append(one)
    flat = map(torch._utils._flatten_dense_tensors, alike.values())
    norms = [torch.linalg.vector_norm(one, dtype=torch.float64).to(device) for one in flat]
    return torch.stack(norms) if len(norms) > 1 else norms[0].reshape(1)


Weights = Callable[[Tensor], Callable[[slice], Tensor | float]]
"""From a parameter, the weights of some of its rows; or one number for all."""


class ElementwiseSums:
    """Elementwise squares, in the shape of the parameter that they belong to, by its node."""

    def __init__(self) -> None:
        self._squares: dict[Any, Tensor] = {}
        self._gradients: dict[Any, Tensor | None] = {}

    def add(self, leaf: Any, squares: Tensor) -> None:
        """Add sums over examples of the squares of their gradients' elements."""
        known = self._squares.get(leaf)
        self._squares[leaf] = squares if known is None else known.add_(squares)

    def see(self, leaf: Any, gradient: Tensor) -> None:
        """Note that the gradient itself is there, which the parameter is about to be given."""
        # Where the parameter holds nothing else, it holds this afterwards: holding it here, too,
        # would have it copied.
        distributed = torch.distributed
        is_changed = distributed.is_available() and distributed.is_initialized()
        is_kept = is_changed or leaf.variable.grad is not None
        self._gradients[leaf] = gradient if is_kept else None

    def weighted(self, weights: Weights) -> tuple[SquareSums, SquareSums]:
        """Return sums of the squares, and of those of the gradient itself, times weights."""
        squares, norms = SquareSums(), SquareSums()
        for leaf, gradient in self._gradients.items():
            of_part = weights(leaf.variable)
            held = leaf.variable.grad if gradient is None else gradient
            whole, summed = reductions.rows(held), self._squares.get(leaf)
            for part in reductions.blocks(whole):
                weight = of_part(part)
                some = reductions.at_least_single(whole[part]).square().mul_(weight)
                norms.add(leaf, some.sum().double())
                if summed is not None:
                    some = reductions.rows(summed)[part] * weight
                    squares.add(leaf, some.sum().double())
        return squares, norms
