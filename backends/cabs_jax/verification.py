"""A comparison of what is measured with a plain loop over the examples.

Guarantees: the loop is ``jax.grad`` of the loss of one example, and knows nothing of jaxprs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from cabs.gradients import Checked, Verification
from cabs.gradients.verification import relative_error
from cabs_jax.gradient import measure
from cabs_jax.graph import meshes
from cabs_jax.graph.arguments import positions_of, read_arguments
from cabs_jax.graph.traced import Traced


def verify(
    loss_fn: Callable[..., Any],
    *args: Any,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    in_axes: Any = None,
) -> Verification:
    """Compare the squared norms of per-example gradients with a loop over the examples.

    A few examples are enough. In single precision expect errors around 1e-6, in half precision as
    much as the loop itself rounds.

    Args:
        loss_fn: The loss of one example, as for :func:`cabs_jax.value_and_grad`.
        args: What that function is called with: parameters, and batches.
        argnums: As there.
        has_aux: As there.
        in_axes: As there.

    Returns:
        A :class:`cabs.gradients.Verification`: for each parameter the relative error, and the
        rules that cover it.

    Raises:
        UncoveredParameterError: If a parameter is not covered.

    Example:
        >>> import jax.numpy as jnp, cabs_jax
        >>> def loss_fn(parameters, x):
        ...     return jnp.sum((x @ parameters["weight"] + parameters["bias"]) ** 2)
        >>> parameters = {"weight": jnp.ones((2, 3)), "bias": jnp.zeros(3)}
        >>> found = cabs_jax.verify(loss_fn, parameters, jnp.array([[1.0, 0.0], [3.0, 2.0]]))
        >>> found.error < 1e-6
        True
        >>> [(row.name, row.rule) for row in found.rows]
        [("argument 0['bias']", 'formed at add'), ("argument 0['weight']", 'matrix')]
    """
    positions = positions_of(argnums, len(args))
    arguments = read_arguments(args, positions, in_axes)
    found = measure(Traced.of(loss_fn, arguments, has_aux), positions)
    expected = dict.fromkeys(found.leaves, 0.0)
    gradient = jax.jit(jax.grad(loss_fn, argnums=positions, has_aux=has_aux))
    for index in range(arguments.examples):
        one = jax.tree.unflatten(
            arguments.treedef,
            [
                leaf if axis is None else _one_of(leaf, axis, index)
                for leaf, axis in zip(arguments.leaves, arguments.axes, strict=True)
            ],
        )
        gradients = gradient(*one)
        gradients = gradients[0] if has_aux else gradients
        placed = dict(zip(positions, gradients, strict=True))
        for at in sorted(positions):
            flat, _ = jax.tree_util.tree_flatten_with_path(placed[at])
            for path, array in flat:
                exact = np.abs(np.asarray(array).astype(np.complex128))
                name = f"argument {at}{jax.tree_util.keystr(path)}"
                expected[name] += float(np.sum(exact**2))
    rows = [
        Checked(name, leaf.rules, relative_error(float(square), expected[name]))
        for (name, leaf), square in zip(found.leaves.items(), found.squares, strict=True)
    ]
    return Verification(tuple(rows))


def _one_of(leaf: Any, axis: int, index: int) -> Any:
    """Return an example's part of a leaf."""
    rest = [at for at in range(leaf.ndim) if at != axis]
    like = meshes.resized(jax.typeof(leaf), rest)
    return meshes.automatic(lambda leaf: leaf[(slice(None),) * axis + (index,)], leaf, like=like)
