"""The gradients of a convolution's weight.

Guarantees: they are those of a matrix that meets what the kernel sees, by groups of channels, in
any number of dimensions; no more is laid out at a time than what the whole kernel sees, where that
is little, or a row of it. Where it is faster, nothing is laid out: the gradients are those of one
convolution with a group of channels for each example, or, where products of pairs of positions are
fewer, are not formed at all.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from cabs.gradients.layout import Shape
from cabs.gradients.outer_products import CANCELLING
from cabs.gradients.terms import Formed
from cabs_torch import tracing
from cabs_torch.norms import reductions
from cabs_torch.norms.arrays import TorchArrays

# What it costs to add a matrix moved along its diagonals, in products.
_MOVED = 4

# How much faster a convolution forms gradients than products of matrices do, measured.
_CONVOLVED = 1.6

# Channels that a convolution needs to be that fast.
_WIDE = 8

# Elements of a kernel's row times channels below which its rows are taken all at once.
_NARROW = 32


@dataclass(frozen=True)
class Convolution:
    """Gradients of a convolution's weight.

    ``inputs`` has shape (n, F, channels in, *spatial) and ``cotangents`` (n, F, channels out,
    *positions), with F frames an example; ``shape`` is the weight's, (channels out, channels in /
    groups, *kernel). Stride, padding and dilation are one number per spatial axis.
    """

    inputs: Tensor
    cotangents: Tensor
    shape: Shape
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int

    @property
    def operands(self) -> tuple[Tensor, ...]:
        return (self.inputs, self.cotangents)

    def gradient(self, arrays: TorchArrays, *operands: Tensor) -> Tensor:  # noqa: ARG002
        return self._of(*operands)._gradients().movedim(0, 3).reshape(-1, *self.shape)

    def squares(self, arrays: TorchArrays) -> Tensor:
        if self._is_cheaper_in_pairs(arrays):
            return self._squares_in_pairs(arrays)
        needed = self.inputs[0].numel() + self.cotangents[0].numel()
        if self._can_be_convolved():
            needed, gradients = needed + math.prod(self.shape), Convolution._convolved
        else:
            needed, gradients = needed * self.shape[-1], Convolution._gradients

        def some(*operands: Tensor) -> Tensor:
            return reductions.square(gradients(self._of(*operands)))

        found: Tensor = arrays.in_chunks(some, self.operands, needed)
        return found

    def formed(self, arrays: TorchArrays) -> Formed:  # noqa: ARG002
        """Return how the gradients are formed, to be squared and summed."""
        needed = self.inputs[0].numel() + self.cotangents[0].numel()
        if self._can_be_convolved():

            def convolved(*operands: Tensor) -> Tensor:
                return self._of(*operands)._convolved().view(-1, *self.shape)

            return Formed(convolved, self.operands, needed + math.prod(self.shape), lambda it: it)

        def parts(*operands: Tensor) -> Tensor:
            return self._of(*operands)._gradients().movedim(1, 0)

        def arranged(total: Tensor) -> Tensor:
            return total.movedim(1, 3).reshape(-1, *self.shape)

        return Formed(parts, self.operands, needed * self.shape[-1], arranged)

    def coordinate_squares(self, arrays: TorchArrays) -> Tensor:
        """Return the sum over examples of the gradients' elementwise squares, (1, *shape)."""
        found: Tensor = self.formed(arrays).coordinate_squares(arrays)
        return found

    def spared(self, arrays: TorchArrays) -> int:
        """Return how many products an example spares if its gradient is summed, too."""
        if self._is_cheaper_in_pairs(arrays):
            return 0
        return (
            math.prod(self.shape) * self.cotangents.shape[1] * math.prod(self.cotangents.shape[3:])
        )

    def _of(self, inputs: Tensor, cotangents: Tensor) -> Convolution:
        """Return the gradients of other examples, or of some."""
        return replace(self, inputs=inputs, cotangents=cotangents)

    def _is_cheaper_in_pairs(self, arrays: TorchArrays) -> bool:
        frames, channels = self.inputs.shape[1:3]
        is_plain = self.groups == 1 and frames == 1 and set(self.stride) == {1}
        is_plain = is_plain and arrays.pair_cost < math.inf
        in_pairs = channels + self.shape[0] + _MOVED * sum(self.shape[2:])
        formed = math.prod(self.shape) * math.prod(self.cotangents.shape[3:])
        speed = _CONVOLVED if self._can_be_convolved() else 1.0
        is_cheaper = speed * math.prod(self._grid()) ** 2 * in_pairs < formed
        return is_plain and is_cheaper and tracing.may_look(self.inputs.device)

    def _can_be_convolved(self) -> bool:
        """Return whether there is a fast convolution of single precision for it."""
        kernel = self.shape[2:]
        is_wide = self.shape[1] >= _WIDE or self.groups > 1
        return (
            is_wide
            and len(kernel) == 2
            and min(kernel) > 1
            and self.inputs.shape[1] == 1
            and tracing.may_look(self.inputs.device)
            and self.inputs.dtype != torch.float64
            and torch.backends.mkldnn.is_available()
            and torch._C._get_mkldnn_enabled()
            and self._positions() == tuple(self.cotangents.shape[3:])
        )

    def _positions(self) -> Shape:
        """Return how many positions a convolution of the inputs has along each axis.

        One that was transposed, with output padding, can have had fewer.
        """
        axes = zip(self._grid(), self.shape[2:], self.dilation, self.stride, strict=True)
        return tuple((g - (k - 1) * d - 1) // s + 1 for g, k, d, s in axes)

    def _convolved(self) -> Tensor:
        """Return the gradients of the weight, (n x out, in / groups, *kernel).

        They are the gradient of the weight of one convolution, in which the channels of an example
        are groups of their own.
        """
        inputs, cotangents = (
            reductions.at_least_single(one).flatten(0, 2).unsqueeze(0)
            for one in (self.inputs, self.cotangents)
        )
        weight = inputs.new_empty(cotangents.shape[1], *self.shape[1:])
        rank, groups = len(self.stride), len(self.inputs) * self.groups
        found: list[Tensor] = torch.ops.aten.convolution_backward(
            *(cotangents, inputs, weight, None, self.stride, self.padding, self.dilation),
            *(False, [0] * rank, groups, [False, True, False]),
        )
        return found[1]

    def _squares_in_pairs(self, arrays: TorchArrays) -> Tensor:
        """Sum over pairs of positions p, q: (b_p . b_q) sum over offsets d of x_{p+d} . x_{q+d}.

        The products of all pairs of padded inputs are a matrix, and an offset moves along its
        diagonals, whose elements lie equally far apart.
        """
        kernel, positions = self.shape[2:], self.cotangents.shape[3:]
        grid = self._grid()
        count = math.prod(grid)
        steps = [math.prod(grid[axis + 1 :]) for axis in range(len(grid))]
        last = sum((size - 1) * step for size, step in zip(positions, steps, strict=True)) + 1
        # Positions as places on the grid, up to the last one.
        beside = [g - size for g, size in zip(grid, positions, strict=True)]
        wider = [side for width in reversed(beside[1:]) for side in (0, width)]

        def some(inputs: Tensor, cotangents: Tensor) -> tuple[Tensor, Tensor]:
            x = self._padded(inputs[:, 0]).flatten(2)
            b = reductions.at_least_single(cotangents[:, 0])
            b = pad(b, wider).flatten(2)[..., :last]
            moved = torch.bmm(x.mT, x).flatten(1)
            for size, dilation, step in zip(kernel, self.dilation, steps, strict=True):
                jump = dilation * step * (count + 1)
                length = moved.shape[1] - (size - 1) * jump
                summed = moved[:, :length].clone()
                for offset in range(1, size):
                    summed += moved[:, offset * jump : offset * jump + length]
                moved = summed
            left = moved.as_strided((len(b), 1, last, last), (moved.stride(0), 0, count, 1))
            right = torch.bmm(b.mT, b)[:, None]
            bound = arrays.squares(arrays.root_sums(left, right))
            # The first is read in overlapping places, and must stay.
            return arrays.inner(right, left), bound

        def in_double(*operands: Tensor) -> Tensor:
            return reductions.square(self._of(*(one.double() for one in operands))._gradients())

        total, bound = arrays.in_chunks(some, self.operands, 3 * count**2)
        return arrays.unless_cancelled(
            total,
            bound,
            CANCELLING * last,
            lambda: arrays.in_chunks(in_double, self.operands, 3 * count**2),
        )

    def _grid(self) -> list[int]:
        """Return the shape of the padded input."""
        sides = zip(self.inputs.shape[3:], self.padding, strict=True)
        return [size + 2 * width for size, width in sides]

    def _padded(self, inputs: Tensor) -> Tensor:
        inputs = reductions.at_least_single(inputs)
        if not any(self.padding):
            return inputs
        return pad(inputs, [side for width in reversed(self.padding) for side in (width,) * 2])

    def _gradients(self) -> Tensor:
        """Return the gradients of the weight's parts, (parts, n, out, in / groups, elements).

        A part is one row of the kernel along its last axis, or, where that would be too little for
        a product of matrices, the whole kernel.
        """
        kernel, positions = self.shape[2:], self.cotangents.shape[3:]
        rank = len(kernel)
        at_once = rank if self.shape[1] * kernel[-1] < _NARROW else 1
        inputs = self._padded(self.inputs)
        for axis in range(rank - at_once, rank):
            reach = (kernel[axis] - 1) * self.dilation[axis] + 1
            windows = inputs.unfold(3 + axis, reach, self.stride[axis])
            inputs = windows.narrow(3 + axis, 0, positions[axis])[..., :: self.dilation[axis]]
        # (n, channels, elements of the kernel, frames, positions): the last two lie together.
        elements = range(3 + rank, 3 + rank + at_once)
        inputs = inputs.permute(0, 2, *elements, 1, *range(3, 3 + rank)).contiguous()
        cotangents = reductions.at_least_single(self.cotangents).transpose(1, 2)
        columns = math.prod(positions) * self.inputs.shape[1]
        width = math.prod(inputs.shape[2 : 2 + at_once]) * self.shape[1]
        offsets = list(itertools.product(*map(range, kernel[: rank - at_once])))
        batch = len(self.inputs) * self.groups
        cotangents = cotangents.reshape(batch, -1, columns)
        gradients = inputs.new_empty(len(offsets), batch, cotangents.shape[1], width)
        for offset, gradient in zip(offsets, gradients, strict=True):
            seen = inputs
            for axis, start in enumerate(offset):
                place, stride = axis + 3 + at_once, self.stride[axis]
                seen = seen.narrow(
                    place, start * self.dilation[axis], (positions[axis] - 1) * stride + 1
                )
                if stride > 1:
                    seen = seen[(slice(None),) * place + (slice(None, None, stride),)]
            torch.bmm(cotangents, seen.reshape(batch, width, columns).mT, out=gradient)
        return gradients.reshape(len(offsets), len(self.inputs), *self.shape[:2], -1)
