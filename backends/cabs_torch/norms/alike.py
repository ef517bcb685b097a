"""Gradients that are alike, squared together.

Guarantees: what takes a few calls for one parameter takes them for all whose operations do the same
with tensors of the same shapes, since calls are what small parameters cost. What waits for that has
at most as many elements as the temporaries of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cabs.gradients import outer_products
from cabs.gradients.terms import ElementwiseTerm, Materialized, Product
from cabs_torch.norms import reductions
from cabs_torch.norms.arrays import TorchArrays
from cabs_torch.norms.sums import SquareSums

# Products that take about as long as the calls that fewer products would need, measured.
_FEW = 2**20


class Together(NamedTuple):
    """How gradients follow from tensors whose first axis is the examples', however many."""

    kind: object
    """What two operations have alike that do the same, but for the shapes of the tensors."""
    reads: tuple[str, ...]
    """Which tensors the node saved; the first output's cotangent comes behind them."""
    of_same_squares: Callable[..., Tensor]
    """Computes a tensor with the same sum of squares, per example, as the gradient."""
    examples: int
    copied: int
    """How many elements the tensors have."""
    formed: int = 0
    """How many the result has, if that is more."""


def of_matrix(name: str, examples: int, length: int, width: int, height: int) -> Together | None:
    """Return the same for a matrix that is met at ``length`` positions, if they are few."""
    formed = examples * width * height
    if length * formed > _FEW and length > 1:
        return None
    is_formed = length * formed <= _FEW
    of_sides = outer_products.gradient if is_formed else outer_products.norms

    def of_same_squares(arrays: TorchArrays, inputs: Tensor, cotangents: Tensor) -> Tensor:
        sides = (one.reshape(-1, 1, length, one.shape[1]) for one in (inputs, cotangents))
        found: Tensor = of_sides(arrays, *sides)
        return found

    copied, kind = examples * length * (width + height), ("matrix", length)
    formed = formed if is_formed else 0
    return Together(kind, (name,), of_same_squares, examples, copied, formed)


def add_alone(squares: SquareSums, owner: Any, term: ElementwiseTerm, arrays: TorchArrays) -> None:
    """Add the squares of a term that is the only one of a parameter.

    However that was rearranged, the squares of its elements are the same.
    """
    if isinstance(term, Materialized):
        squares.square(owner, term.gradients)
    elif isinstance(term, Product) and term.left.numel() * term.right.shape[-1] <= _FEW:
        squares.square(owner, outer_products.gradient(arrays, term.left, term.right))
    elif isinstance(term, Product) and term.left.shape[2] == 1:
        squares.square(owner, outer_products.norms(arrays, term.left, term.right))
    else:
        squares.add(owner, term.squares(arrays))


class Alike:
    """What waits, by what it has alike.

    Args:
        squares: Where the sums of squares go.
        arrays: The array operations.
    """

    def __init__(self, squares: SquareSums, arrays: TorchArrays) -> None:
        self._squares, self._arrays = squares, arrays
        self._groups: dict[object, tuple[Together, list[Any], list[Sequence[Tensor]], int]] = {}
        self._held = 0

    def add(self, owner: Any, given: Together, operands: Sequence[Tensor]) -> bool:
        """Square the gradients of a parameter once there are enough, or at the end.

        False if a tensor that the node saved has no axis for each of the output's.
        """
        shapes = [one.shape for one in operands]
        last = shapes[-1]
        for shape in shapes:
            if len(shape) != len(last) or shape[0] != last[0]:
                return False
        key = (given.kind, operands[0].device, *shapes)
        group = self._groups.get(key)
        if group is None:
            most = reductions.most(operands[0].device)
            group = self._groups[key] = given, [], [], most
        _, owners, waiting, most = group
        owners.append(owner)
        waiting.append(operands)
        self._held += given.copied + given.formed
        if self._held >= most:
            self.end()
        return True

    def end(self) -> None:
        """Square whatever waits."""
        groups, self._groups, self._held = self._groups, {}, 0
        for given, owners, operands, _ in groups.values():
            whole = operands[0]
            if len(owners) > 1:
                whole = [torch.cat(one) for one in zip(*operands, strict=True)]
            rows = given.of_same_squares(self._arrays, *whole)
            self._squares.square_rows(owners, rows.reshape(len(owners), -1))
