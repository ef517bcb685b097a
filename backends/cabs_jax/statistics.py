"""Gradient statistics as JAX sees them: pytrees of arrays, which may be traced.

Guarantees: nothing waits for a device until :meth:`BatchStatistics.read`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from cabs import GradientStatistics
from cabs.gradients.errors import listed
from cabs_jax.alike import check, told
from cabs_jax.graph import meshes
from cabs_jax.norms import reductions

# How a device gets a gradient of its own.
_OWN = (
    "let parameters differ before the gradient is taken, with jax.lax.pcast(parameters, axis_name, "
    'to="varying") (jax.lax.pvary in older releases), or give shard_map check_vma=False; then '
    "take jax.lax.pmean of the gradients"
)

# Typed, so that it adds in strict promotion mode and is carried through a loop.
_NONE = np.int32(0)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PartialStatistics:
    r"""What can be added over microbatches and devices: m, K and :math:`\sum_k m_k |g_k|^2`.

    A pytree: add two with ``+``, carry it through ``jax.lax.scan``, sum it with ``jax.lax.psum``.
    See :class:`cabs.gradients.PartialStatistics`.

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
    def of_group(
        cls, examples: Any, gradients: Any, axis_name: str | Sequence[str] | None = None
    ) -> PartialStatistics:
        """Return the part of one group, from its size and its mean gradient, a pytree.

        Args:
            examples: The size of the group.
            gradients: The mean over its examples.
            axis_name: Inside ``shard_map``, over which axes of the mesh devices have groups of
                their own; ``()`` if they all have this one. By default, all that it is manual over.

        Raises:
            ValueError: If there is no gradient, or one that is the same all along such an axis,
                where JAX has added up what devices have.
        """
        _check_own(gradients, axis_name)
        examples = jnp.asarray(examples, jnp.int32)
        square = square_of(gradients)
        one, zero = jnp.ones((), jnp.int32), jnp.zeros((), jnp.int32)
        return cls(examples, one, examples.astype(square.dtype) * square, zero)

    def __add__(self, other: PartialStatistics) -> PartialStatistics:
        if not isinstance(other, PartialStatistics):
            return NotImplemented
        total: PartialStatistics = jax.tree.map(jnp.add, self, other)
        return total

    def complete(
        self,
        gradients: Any,
        *,
        loss: Any = None,
        fingerprint: Any = None,
        axis_name: str | Sequence[str] | None = None,
    ) -> BatchStatistics:
        """Return the statistics of all examples together, from their mean gradient, a pytree.

        Args:
            gradients: The mean over all examples, never a mean of means of groups that differ in
                size.
            loss: Their mean loss, which is kept with the statistics.
            fingerprint: What :func:`cabs_jax.fingerprint` gives, to be compared over devices; see
                :func:`cabs_jax.value_and_grad`. Sizes of batches are not compared here.
            axis_name: Inside ``shard_map``, along which axes of the mesh to compare it.

        Raises:
            TypeError: If the fingerprint holds no integer for each device.
            ValueError: If there is no gradient; inside ``shard_map`` that checks it, if one of
                the two is this device's own and the other is not; or, inside of any, if a
                fingerprint comes without ``axis_name``.
        """
        _check_together(self.group_square_sum, gradients)
        square = square_of(gradients)
        axes = meshes.names_of(axis_name)
        return BatchStatistics(
            self.examples,
            self.groups,
            self.group_square_sum,
            square,
            self.estimated,
            loss,
            fingerprint=None if fingerprint is None else told(fingerprint, axes, square.dtype),
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
        gradient_norm_squared: :math:`|g|^2`, of the mean gradient over all examples.
        estimated: How many of the groups were not measured themselves but estimated from a sample.
        loss: Mean loss of the examples, None if it is not known.
        summed: Over which axes of a mesh the gradients that came with the statistics are added up
            already, because ``shard_map`` knows that parameters are the same all along them. The
            statistics are those of this device's own examples, and of the gradient before that.
        in_metric: Whether they are in the metric of an optimizer's step; None if nobody has said.
        fingerprint: That of the controller, if all devices were given the same one, and -1 if they
            were not; None if there was none, or one device.

    See :class:`cabs.GradientStatistics` for what they tell.

    Example:
        >>> import jax.numpy as jnp, cabs_jax
        >>> loss_fn = lambda weight, example: weight @ example
        >>> batch = jnp.array([[1.0], [2.0], [3.0], [6.0]])
        >>> (loss, statistics), gradient = cabs_jax.value_and_grad(loss_fn)(jnp.ones(1), batch)
        >>> numbers = statistics.read()
        >>> numbers.group_square_sum, numbers.gradient_norm_squared
        (50.0, 9.0)
    """

    examples: Any
    groups: Any
    group_square_sum: Any
    gradient_norm_squared: Any
    estimated: Any = _NONE
    loss: Any = None
    summed: tuple[str, ...] = field(default=(), metadata={"static": True})
    in_metric: bool | None = field(default=None, metadata={"static": True})
    fingerprint: Any = None

    @property
    def partial(self) -> PartialStatistics:
        """The part that can be added to that of other batches.

        Raises:
            ValueError: If the gradients that belong to it are added up over devices already, or
                if a fingerprint was compared, which cannot be added.
        """
        if self.fingerprint is not None:
            raise ValueError(
                "a part of the statistics holds no fingerprint, got statistics with one; give "
                "fingerprint= to complete(), once for the whole batch, and not to value_and_grad"
            )
        if self.summed:
            raise ValueError(
                "gradients must be a device's own for its part of the statistics, but those of "
                "parameters that are the same all along axes of the mesh were added up over "
                f"{listed([*map(repr, self.summed)])} by JAX, and are no mean. Name these axes in "
                f"axis_name= of value_and_grad, which puts together what devices have. Or: {_OWN}"
            )
        return PartialStatistics(self.examples, self.groups, self.group_square_sum, self.estimated)

    @property
    def variance_trace(self) -> Array:
        r"""Unbiased estimate of :math:`\mathrm{tr}(\Sigma)`; ``nan`` for a single group."""
        dtype = jnp.asarray(self.group_square_sum).dtype
        examples, groups = (jnp.asarray(n).astype(dtype) for n in (self.examples, self.groups))
        spread = self.group_square_sum - examples * self.gradient_norm_squared
        trace: Array = jnp.where(groups > 1, spread / jnp.maximum(groups - 1, 1), jnp.nan)
        return trace

    @property
    def expected_gradient_norm_squared(self) -> Array:
        """Unbiased estimate of the squared norm of the expected gradient; can be negative."""
        trace = self.variance_trace
        square: Array = self.gradient_norm_squared - trace / jnp.asarray(self.examples).astype(
            trace.dtype
        )
        return square

    @property
    def noise_scale(self) -> Array:
        """Gradient noise scale, in examples; see :attr:`cabs.GradientStatistics.noise_scale`."""
        square = self.expected_gradient_norm_squared
        scale: Array = jnp.where(square <= 0.0, jnp.inf, self.variance_trace / square)
        return scale

    def read(self) -> GradientStatistics:
        """Return the same as Python numbers, once they are there.

        Raises:
            RuntimeError: On every process, if their fingerprints or the sizes of their batches
                differ.
            ValueError: If they are numbers that no gradients can have; see
                :class:`cabs.GradientStatistics`.
        """
        found = jax.device_get(self)
        check(found.fingerprint)
        examples, groups, estimated = map(int, (found.examples, found.groups, found.estimated))
        square_sum, gradient_norm_squared = map(
            _plain, (found.group_square_sum, found.gradient_norm_squared)
        )
        loss = None if found.loss is None else float(found.loss)
        return GradientStatistics(
            examples, groups, square_sum, gradient_norm_squared, estimated, loss, self.in_metric
        )


def _check_own(gradients: Any, axis_name: str | Sequence[str] | None) -> None:
    """Raise an error for gradients that are not a device's own."""
    axes = meshes.checked_axes()
    if axis_name is not None:
        axes &= {axis_name} if isinstance(axis_name, str) else {*axis_name}
    found, _ = jax.tree_util.tree_flatten_with_path(gradients)
    missing = {
        jax.tree_util.keystr(path) or "the gradient": axes - meshes.varying_of(jax.typeof(leaf))
        for path, leaf in found
        if _is_real(jnp.asarray(leaf))
    }
    names = [name for name, some in missing.items() if some]
    if names:
        over = listed([*map(repr, sorted(frozenset().union(*missing.values())))])
        raise ValueError(
            f"gradients must be the mean over this device's own group, got some that are the same "
            f"on all devices along {over}: where parameters are, JAX has added up what the devices "
            f"have. That is so for {listed(names)}; {_OWN}; where devices along an axis "
            "share the group, name in axis_name= the axes along which groups differ, () for none"
        )


def _check_together(square: Any, gradients: Any) -> None:
    """Raise ValueError for a part and a gradient that are not over the same devices."""
    axes = meshes.checked_axes()
    part = meshes.varying_of(jax.typeof(square)) & axes
    leaves = [leaf for leaf in jax.tree.leaves(gradients) if _is_real(jnp.asarray(leaf))]
    mean = frozenset().union(*(meshes.varying_of(jax.typeof(leaf)) for leaf in leaves)) & axes
    if part != mean:
        over = listed([*map(repr, sorted(part ^ mean))])
        raise ValueError(
            "a part and its gradient must be over the same devices, got one of the two that is "
            f"this device's own and one that is the same all along {over}; sum the part with "
            "jax.lax.psum, and take jax.lax.pmean of the gradients"
        )


def _plain(array: Any) -> Any:
    return float(array) if np.ndim(array) == 0 else np.asarray(array)


def square_of(tree: Any) -> Array:
    """Return the sum of squares of all elements of a pytree of arrays, shape ()."""
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    real = [leaf for leaf in leaves if _is_real(leaf)]
    if not real:
        held = listed([f"{leaf.dtype}{list(leaf.shape)}" for leaf in leaves]) or "no array"
        raise ValueError(
            f"gradients must hold arrays of real numbers, got {held}; give the mean gradient "
            "of the examples, a pytree"
        )
    total: Array = meshes.automatic(_square_sum, real)
    return total


def _square_sum(leaves: Sequence[Array]) -> Array:
    first, *others = map(reductions.whole_square, leaves)
    return sum(others, start=first)


def _is_real(leaf: Array) -> bool:
    # The gradient of an integer has a type of its own.
    return bool(jnp.issubdtype(leaf.dtype, jnp.inexact))
