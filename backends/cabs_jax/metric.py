"""The metric of an optimizer's step: what each coordinate's square counts.

Guarantees: that of Adam is what its coming step multiplies the averaged gradient with, the current
batch's gradient in the second moment; one that is given fits the gradients, or there is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from cabs_jax.norms import reductions
from cabs_jax.statistics import square_of


def adam_metric(
    state: Any, *, b2: float, eps: float, eps_root: float = 0.0
) -> Callable[[Any], Any]:
    r"""Return a function from gradients to :math:`P = 1 / (\sqrt{\hat v + \epsilon_0} + \epsilon)`.

    For ``metric`` of :func:`cabs_jax.value_and_grad`, and ``cabs.Progress(adaptive=True)``. Kingma,
    Ba: "Adam: a method for stochastic optimization", arXiv 1412.6980, algorithm 1, of whose
    :math:`\hat v` the current gradient is a part.

    Args:
        state: The state of an optimizer of optax before the step, in which there is one of
            ``scale_by_adam`` (Adam, AdamW, NAdam) or of ``scale_by_amsgrad``: what has ``count``
            and ``nu``.
        b2: Decay of the second moment, as the optimizer has it; no state tells. 0.999 unless
            optax was given another.
        eps: :math:`\epsilon`, likewise; 1e-8 unless optax was given another.
        eps_root: :math:`\epsilon_0`, as the optimizer was given it.

    Raises:
        ValueError: If there is no such state, or several.

    Example:
        >>> import jax.numpy as jnp, cabs_jax
        >>> from types import SimpleNamespace
        >>> state = SimpleNamespace(count=jnp.array(0), nu=jnp.zeros(2))
        >>> metric = cabs_jax.adam_metric(state, b2=0.999, eps=1e-8)
        >>> loss_fn = lambda weight, example: weight @ example
        >>> step = cabs_jax.value_and_grad(loss_fn, metric=metric)
        >>> (_, statistics), gradient = step(jnp.zeros(2), jnp.array([[1.0, 4.0], [3.0, 4.0]]))
        >>> # Of the first step, one over the gradient's magnitude.
        >>> metric(gradient).round(3).tolist(), round(float(statistics.variance_trace), 3)
        ([0.5, 0.25], 1.0)
    """
    found = [one for one in jax.tree.leaves(state, is_leaf=_is_adam) if _is_adam(one)]
    if len(found) != 1:
        raise ValueError(
            f"state must hold one state of scale_by_adam or scale_by_amsgrad, got {len(found)}; "
            "give the part that has it, or a function from the gradients to P of your own"
        )
    (moments,) = found
    largest = getattr(moments, "nu_max", moments.nu)

    def metric(gradients: Any) -> Any:
        def of_leaf(gradient: Any, before: Any, most: Any) -> Any:
            second = (1.0 - b2) * jnp.real(gradient * jnp.conj(gradient)) + b2 * before
            step = jnp.asarray(moments.count + 1).astype(second.dtype)
            unbiased = second / (1.0 - b2**step)
            if most is not before:
                unbiased = jnp.maximum(unbiased, most)
            return 1.0 / (jnp.sqrt(unbiased + eps_root) + eps)

        return jax.tree.map(of_leaf, gradients, moments.nu, largest)

    return metric


def _is_adam(node: Any) -> bool:
    return hasattr(node, "nu") and hasattr(node, "count")


def metric_of(metric: Callable[[Any], Any], gradients: Any) -> Any:
    """Return P, which must be like the gradients; TypeError or ValueError if it is not."""
    found = metric(gradients)
    structures: list[Any] = [jax.tree.structure(one) for one in (found, gradients)]
    if structures[0] != structures[1]:
        raise TypeError(
            f"metric must return a pytree like the gradients, got {structures[0]}, expected "
            f"{structures[1]}"
        )

    def like(path: Any, weight: Any, gradient: Any) -> Array:
        array = jnp.asarray(weight)
        is_real = jnp.issubdtype(array.dtype, jnp.floating)
        if array.shape != jnp.shape(gradient) or not is_real:
            name = jax.tree_util.keystr(path)
            raise ValueError(
                "metric must return real numbers in the shapes of the gradients, got "
                f"{array.dtype}{list(array.shape)} for {name} of shape {list(jnp.shape(gradient))}"
            )
        return lax.stop_gradient(array)

    return jax.tree_util.tree_map_with_path(like, found, gradients)


def square_in(metric: Any, gradients: Any) -> Array:
    """Return the squared norm of gradients in a metric."""

    def scaled(gradient: Array, weight: Array) -> Array:
        root = jnp.sqrt(weight.astype(reductions.sum_type(gradient.dtype)))
        return reductions.wide(gradient) * root

    return square_of(jax.tree.map(scaled, gradients, metric))
