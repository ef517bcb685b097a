"""Batches filled up to a size for which the step is compiled already.

Guarantees: nothing is computed on the device, so that nothing is compiled for a size; what is
filled in are copies of an example, so that no loss is infinite that was not.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from cabs import BatchSizes


def pad(batch: Any, sizes: BatchSizes | int) -> tuple[Any, Any]:
    """Fill a batch up to the next allowed size, with copies of its first example.

    With ``cabs.BatchSizes.geometric`` a step is compiled for as many sizes as the grid has, at
    most, and a last batch that is short costs none of its own.

    Args:
        batch: A pytree of NumPy arrays, the examples along their first axes. Arrays of JAX are
            copied to the host, so pad before they go to the device. Split random keys after
            padding.
        sizes: The allowed sizes, or the one to fill up to.

    Returns:
        The batch, and the mask for :func:`cabs_jax.value_and_grad`: booleans, true for what was
        there before.

    Raises:
        ValueError: If no allowed size is large enough, or leaves differ in the number of examples.

    Example:
        >>> import numpy as np, cabs, cabs_jax
        >>> grid = cabs.BatchSizes.geometric(4, 64)
        >>> batch, mask = cabs_jax.pad({"x": np.array([7, 8, 9])}, grid)
        >>> batch["x"].tolist(), mask.tolist()
        ([7, 8, 9, 7], [True, True, True, False])
    """
    arrays = jax.tree.map(np.asarray, batch)
    lengths = {array.shape[:1] for array in jax.tree.leaves(arrays)}
    if len(lengths) != 1 or not next(iter(lengths)):
        raise ValueError(
            "batch must hold arrays with as many examples along their first axes, got "
            f"{sorted(lengths)}"
        )
    ((examples,),) = lengths
    allowed = (sizes,) if isinstance(sizes, int) else sizes
    size = min((one for one in allowed if one >= examples), default=None)
    if size is None or examples == 0:
        raise ValueError(
            f"a batch of {examples} examples cannot be filled up to any of {sizes}; give it at "
            "least one example and no more than the largest size"
        )
    mask = np.arange(size) < examples
    places = np.where(mask, np.arange(size), 0)
    return jax.tree.map(lambda array: array[places], arrays), mask
