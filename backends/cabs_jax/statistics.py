"""Gradient statistics as JAX sees them: pytrees of arrays, which may be traced.

Guarantees: nothing waits for a device until :meth:`BatchStatistics.read`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from cabs import GradientStatistics
from cabs_jax import norms
from cabs_jax.errors import listed

# Typed, so that it adds in strict promotion mode and is carried through a loop.
_NONE = np.int32(0)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PartialStatistics:
    r"""What can be added over microbatches and devices: m, K and :math:`\sum_k m_k |g_k|^2`.

    A pytree: add two with ``+``, carry it through ``jax.lax.scan``, sum it with ``jax.lax.psum``.
    See :class:`cabs.PartialStatistics`.

    Args:
        examples: :math:`m`, integer, shape ().
        groups: :math:`K`, integer, shape ().
        group_square_sum: :math:`\sum_k m_k |g_k|^2`, shape ().
        estimated: How many of the groups were not measured themselves but estimated from a sample,
            integer, shape ().

    Example:
        Two microbatches of 2 and 4 examples, whose mean gradients are (3, 0) and (0, 3):

        >>> import jax.numpy as jnp, cabs_jax
        >>> parts = cabs_jax.PartialStatistics.of_group(2, {"weight": jnp.array([3.0, 0.0])})
        >>> parts += cabs_jax.PartialStatistics.of_group(4, {"weight": jnp.array([0.0, 3.0])})
        >>> statistics = parts.complete({"weight": jnp.array([1.0, 2.0])})
        >>> float(statistics.variance_trace)
        24.0
    """

    examples: Any
    groups: Any
    group_square_sum: Any
    estimated: Any = _NONE

    @classmethod
    def zero(cls, dtype: Any = jnp.float32) -> PartialStatistics:
        """Return the part of no examples, to start a ``scan`` with.

        ``dtype`` is that of squared norms: float64 for gradients in float64, and float32 otherwise.
        """
        zero = jnp.zeros((), jnp.int32)
        return cls(zero, zero, jnp.zeros((), dtype), zero)

    @classmethod
    def of_group(cls, examples: Any, gradients: Any) -> PartialStatistics:
        """Return the part of one group, from its size and its mean gradient, a pytree."""
        examples = jnp.asarray(examples, jnp.int32)
        square = square_of(gradients)
        one, zero = jnp.ones((), jnp.int32), jnp.zeros((), jnp.int32)
        return cls(examples, one, examples.astype(square.dtype) * square, zero)

    def __add__(self, other: PartialStatistics) -> PartialStatistics:
        if not isinstance(other, PartialStatistics):
            return NotImplemented
        total: PartialStatistics = jax.tree.map(jnp.add, self, other)
        return total

    def complete(self, gradients: Any) -> BatchStatistics:
        """Return the statistics of all examples together, from their mean gradient, a pytree.

        The gradient is the mean over all examples, never a mean of means of groups that differ in
        size.
        """
        return BatchStatistics(
            self.examples,
            self.groups,
            self.group_square_sum,
            square_of(gradients),
            self.estimated,
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BatchStatistics:
    r"""Gradient statistics of a batch, whose numbers are arrays of shape ().

    Args:
        examples: :math:`m`.
        groups: :math:`K`.
        group_square_sum: :math:`\sum_k m_k |g_k|^2`, with :math:`g_k` the mean gradient of a
            group.
        mean_square: :math:`|g|^2`, of the mean gradient over all examples.
        estimated: How many of the groups were not measured themselves but estimated from a sample.

    See :class:`cabs.GradientStatistics` for what they tell.

    Example:
        >>> import jax.numpy as jnp, cabs_jax
        >>> loss_fn = lambda weight, example: weight @ example
        >>> batch = jnp.array([[1.0], [2.0], [3.0], [6.0]])
        >>> (loss, statistics), gradient = cabs_jax.value_and_grad(loss_fn)(jnp.ones(1), batch)
        >>> numbers = statistics.read()
        >>> numbers.group_square_sum, numbers.mean_square
        (50.0, 9.0)
    """

    examples: Any
    groups: Any
    group_square_sum: Any
    mean_square: Any
    estimated: Any = _NONE

    @property
    def partial(self) -> PartialStatistics:
        """The part that can be added to that of other batches."""
        return PartialStatistics(self.examples, self.groups, self.group_square_sum, self.estimated)

    @property
    def variance_trace(self) -> Array:
        r"""Unbiased estimate of :math:`\mathrm{tr}(\Sigma)`; ``nan`` for a single group."""
        dtype = jnp.asarray(self.group_square_sum).dtype
        examples, groups = (jnp.asarray(n).astype(dtype) for n in (self.examples, self.groups))
        spread = self.group_square_sum - examples * self.mean_square
        trace: Array = jnp.where(groups > 1, spread / jnp.maximum(groups - 1, 1), jnp.nan)
        return trace

    @property
    def gradient_square(self) -> Array:
        """Unbiased estimate of the squared norm of the expected gradient; can be negative."""
        trace = self.variance_trace
        square: Array = self.mean_square - trace / jnp.asarray(self.examples).astype(trace.dtype)
        return square

    def read(self) -> GradientStatistics:
        """Return the same as Python numbers, once they are there.

        Raises:
            ValueError: If they are numbers that no gradients can have; see
                :class:`cabs.GradientStatistics`.
        """
        numbers = jax.device_get((self.group_square_sum, self.mean_square))
        examples, groups, estimated = map(
            int, jax.device_get((self.examples, self.groups, self.estimated))
        )
        return GradientStatistics(examples, groups, *map(_plain, numbers), estimated)


def _plain(array: Any) -> Any:
    return float(array) if np.ndim(array) == 0 else np.asarray(array)


def square_of(tree: Any) -> Array:
    """Return the sum of squares of all elements of a pytree of arrays, shape ()."""
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    squares = [norms.square(leaf[None])[0] for leaf in leaves if _is_real(leaf)]
    if not squares:
        held = listed([f"{leaf.dtype}{list(leaf.shape)}" for leaf in leaves]) or "no array"
        raise ValueError(
            f"gradients must hold arrays of real numbers, got {held}; give the mean gradient "
            "of the examples, a pytree"
        )
    total: Array = sum(squares[1:], start=squares[0])
    return total


def _is_real(leaf: Array) -> bool:
    # The gradient of an integer has a type of its own.
    return bool(jnp.issubdtype(leaf.dtype, jnp.inexact))
