"""The squared norm of a gradient that several uses of a parameter add up to, from their factors.

Guarantees: cross terms between uses are included, as between the iterations of a loop.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array

from cabs.gradients import shared_weights, terms
from cabs.gradients import uses as core
from cabs_jax.norms.arrays import ARRAYS
from cabs_jax.rules.parameter_gradients import Lookup
from cabs_jax.rules.plan import Factors, known


def square(uses: Sequence[Factors], factors: Sequence[tuple[Array, Array]]) -> Array:
    """Return |g_i|^2, shape (n,), of the sum over uses of sum over t of left_t right_t'.

    Args:
        uses: What the factors mean.
        factors: Left and right, with n examples in front, then the loops', then the rule's axes.
    """
    # Lookups decide which side is left.
    first = min(uses, key=lambda use: not isinstance(use.rule, Lookup))
    side = known(first.axes.left)
    taken: list[tuple[Array, Array]] = []
    products: list[tuple[Array, Array]] = []
    for use, (left, right) in zip(uses, factors, strict=True):
        if isinstance(use.rule, Lookup):
            ids = _arranged(use, left, ())[:, 0, :, 0].astype(jnp.int32)
            taken.append((ids, _arranged(use, right, use.axes.right)[:, 0]))
            continue
        pair = _arranged(use, left, use.axes.left), _arranged(use, right, use.axes.right)
        products.append(pair if known(use.axes.left) == side else pair[::-1])
    rows = max((use.rule.length for use in uses if isinstance(use.rule, Lookup)), default=0)
    squares: Array = shared_weights.squares(ARRAYS, products, taken, rows)
    return squares


def coordinate_squares(
    uses: Sequence[Factors], factors: Sequence[tuple[Array, Array]], shape: Sequence[int]
) -> Array:
    """Return the sum over examples of the gradient's elementwise squares, in a parameter's shape.

    Of uses of one kind, all of them of the whole parameter; arguments are those of :func:`square`.
    """
    found: list[terms.Term] = []
    for use, (left, right) in zip(uses, factors, strict=True):
        if isinstance(use.rule, Lookup):
            rows = right.reshape(*left.shape, -1)
            found.append(terms.Lookup(left.astype(jnp.int32), rows, tuple(shape)))
        else:
            sides = (_arranged(use, left, use.axes.left), _arranged(use, right, use.axes.right))
            axes = (tuple(sorted(known(some))) for some in use.axes)
            found.append(terms.Product(*sides, tuple(shape), *axes))
    squares: Array = core.coordinate_squares(ARRAYS, found)[0]
    return squares


def _arranged(use: Factors, factor: Array, axes: Sequence[int | None]) -> Array:
    """Return a factor in shape (n, batch, T, axes), both in the order of the parameter's axes."""
    loops = len(use.loops)
    batched: list[tuple[int | None, int]] = [
        (loop.axis, 1 + at) for at, loop in enumerate(use.loops) if loop.axis is not None
    ]
    rows = [1 + at for at, loop in enumerate(use.loops) if loop.axis is None]
    first = 1 + loops
    batched += [(axis, first + at) for at, axis in enumerate(use.axes.batch)]
    rows.append(first + len(use.axes.batch))
    columns = [(axis, rows[-1] + 1 + at) for at, axis in enumerate(axes)]
    groups = [_in_order(batched), rows, _in_order(columns)]
    sizes = [math.prod(factor.shape[at] for at in group) for group in groups]
    return factor.transpose(0, *(at for group in groups for at in group)).reshape(-1, *sizes)


def _in_order(axes: Sequence[tuple[int | None, int]]) -> list[int]:
    # Axes that are not the parameter's have length one, and may be anywhere.
    return [at for _, at in sorted((-1 if axis is None else axis, at) for axis, at in axes)]
