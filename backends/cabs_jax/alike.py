"""Whether processes train alike, told by numbers that are summed with their gradients.

Guarantees: what is told is the same on every process, so that all of them see a difference in the
same step; nothing is read from a device for it.
"""

from __future__ import annotations

import math
import zlib
from functools import lru_cache
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec

from cabs_jax.graph import meshes

_BITS = 20


class _HasFingerprint(Protocol):
    @property
    def fingerprint(self) -> int: ...


def fingerprint(controller: _HasFingerprint, sharding: NamedSharding) -> Array:
    """Return the fingerprint of this process's controller, on each device that has examples.

    Every process gives its own to the same compiled step, as ``fingerprint`` of
    :func:`cabs_jax.value_and_grad` or of :meth:`cabs_jax.PartialStatistics.complete`. Make it anew
    for each step: it is that of the settings and the state.

    Args:
        controller: The :class:`cabs.Controller` of this process.
        sharding: That of the batch, examples first. Inside ``shard_map``, the same specification
            serves both.

    Returns:
        An array with a number for each share of the batch, int32, shape (shares,).

    Raises:
        TypeError: If the sharding is none of a mesh.
        ValueError: If several processes have the same share, which would not be compared.

    Example:
        >>> import jax, cabs, cabs_jax
        >>> from jax.sharding import PartitionSpec as P
        >>> mesh = jax.make_mesh((jax.device_count(),), ("data",))
        >>> sharding = jax.NamedSharding(mesh, P("data"))
        >>> cabs_jax.fingerprint(cabs.Controller(16), sharding).tolist()[0]
        216469
    """
    shares, rows = _rows(sharding)
    own = np.full(1, controller.fingerprint, np.int32)
    return jax.make_array_from_callback((shares,), rows, lambda _: own)


@lru_cache(maxsize=64)
def _rows(sharding: NamedSharding) -> tuple[int, NamedSharding]:
    """Return how many shares of a batch there are, and the sharding of a number for each."""
    if not isinstance(sharding, NamedSharding):
        raise TypeError(
            "sharding must be the jax.NamedSharding of the batch, as "
            f'jax.NamedSharding(mesh, P("data")), got {sharding!r}'
        )
    names = next(iter(sharding.spec), None)
    shares = math.prod(sharding.mesh.shape[name] for name in meshes.names_of(names))
    rows = NamedSharding(sharding.mesh, PartitionSpec(names))
    holders: dict[int, set[int]] = {}
    where: Any = rows.devices_indices_map((shares,))
    for device, (index,) in where.items():
        holders.setdefault(index.start or 0, set()).add(device.process_index)
    if any(len(processes) > 1 for processes in holders.values()):
        every = ", ".join(map(repr, sharding.mesh.axis_names))
        raise ValueError(
            f"sharding must give each process shares of its own, got {sharding.spec}, by which "
            "several processes have the same, and are not compared; name all axes of the mesh "
            f"along which processes differ, as P(({every},))"
        )
    return shares, rows


def told(given: Any, axes: tuple[str, ...], dtype: Any, examples: int | None = None) -> Any:
    """Return the fingerprint that all devices have, or -1 if there are several; int32, shape ().

    None on one device, where nothing is compared.

    Args:
        given: The fingerprints, of which this program has some.
        axes: Inside ``shard_map``, along which axes of the mesh there are others.
        dtype: Of the sums, in which float32 holds those over 2**24 devices: the type of others,
            for XLA to join them.
        examples: How many this program has, to be compared too.
    """
    given = jnp.asarray(given)
    if not jnp.issubdtype(given.dtype, jnp.integer) or given.ndim != 1:
        raise TypeError(
            f"fingerprint must hold an integer for each device, got {given.dtype}"
            f"{list(given.shape)}; make it with cabs_jax.fingerprint(controller, sharding), and "
            "give it to the compiled step as an argument"
        )
    if not axes and (manual := jax.sharding.get_abstract_mesh().manual_axes):
        raise ValueError(
            "fingerprint inside shard_map must come with axis_name, the axes of the mesh along "
            f"which devices have examples of their own, got none; shard_map is over {manual}"
        )
    devices = given.size * (lax.psum(1, axes) if axes else 1)
    if devices == 1:
        return None
    salt = 0 if examples is None else zlib.crc32(str(examples).encode()) >> (32 - _BITS)

    def summed(rows: Array) -> Array:
        marks = rows.astype(jnp.int32)[:, None] ^ jnp.int32(salt)
        bits = marks >> jnp.arange(_BITS, dtype=jnp.int32) & jnp.int32(1)
        return jnp.sum(bits.astype(dtype), axis=0)

    sums = meshes.automatic(summed, given)
    if axes:
        sums = lax.psum(meshes.varying(sums, meshes.checked_axes() & {*axes}), axes)
    is_one = sums == devices
    bits = is_one.astype(jnp.int32) << jnp.arange(_BITS, dtype=jnp.int32)
    number = jnp.sum(bits, dtype=jnp.int32)
    return jnp.where(jnp.all(is_one | (sums == 0)), number ^ jnp.int32(salt), jnp.int32(-1))


def check(fingerprint: Any) -> None:
    """Raise RuntimeError, on every process, where they do not train alike."""
    if fingerprint is not None and int(fingerprint) < 0:
        raise RuntimeError(
            "the processes do not train alike: their controllers differ, or the sizes of their "
            "batches. Build the controllers with the same settings, load the same state on all "
            "processes, and call update with the same learning rates and with the statistics that "
            "all have; where the rule measures seconds, name the cost of a step, as "
            "cabs.Progress(overhead=512); give their samplers the same seed"
        )
