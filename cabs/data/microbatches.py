"""A batch cut into microbatches that fit into memory, and into shares of replicas.

Guarantees: the pieces are the batch, in order, with no example lost or repeated; their sizes differ
by one unit at most, and so do the shares of replicas, each of which has the same number of pieces,
so that none waits for a collective that another never enters. Nothing is copied here: pieces are
slices, views where the framework has them. Refuses empty pieces, whose mean would be no number, and
arrays that do not agree on how many examples there are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from copy import copy
from itertools import pairwise
from typing import Any, TypeVar, overload

import numpy as np

from cabs.values.scalars import as_integer

Batch = TypeVar("Batch")


@overload
def split(
    batch: Batch,
    *,
    max_microbatch: int | None = None,
    replicas: None = None,
    multiple_of: int = 1,
) -> list[Batch]: ...


@overload
def split(
    batch: Batch,
    *,
    max_microbatch: int | None = None,
    replicas: int,
    multiple_of: int = 1,
) -> list[list[Batch]]: ...


def split(
    batch: Batch,
    *,
    max_microbatch: int | None = None,
    replicas: int | None = None,
    multiple_of: int = 1,
) -> list[Batch] | list[list[Batch]]:
    r"""Split a batch into as few microbatches as fit, equal in size up to one unit.

    Larger and smaller pieces alternate as evenly as integers allow: of n units, piece i of P holds
    those from :math:`\lfloor n i / P \rfloor` to :math:`\lfloor n (i + 1) / P \rfloor`. So the
    shares of replicas differ by one unit at most, too, however many pieces they have.

    The mean gradient of a batch is that of its pieces weighted by :math:`m_k / m`; with pieces that
    differ in size it is not the plain mean.

    Args:
        batch: Arrays or tensors of any framework with the examples along their first axes, alone or
            in a nest of mappings, tuples, named tuples and lists. None stands for what is not
            there, and stays. Or a number of examples; the pieces are then numbers, too.
        max_microbatch: How many examples fit at once; all by default.
        replicas: Into how many shares to split first; by default there are none.
        multiple_of: A unit, in examples. Every piece is a multiple of it.

    Returns:
        A list of microbatches. With ``replicas``, a list of shares, one a replica, each a list of
        equally many microbatches, as few as ``max_microbatch`` allows.

    Raises:
        TypeError: If a number is no integer, or the batch holds something that is no array.
        ValueError: If arrays differ in the number of examples or have no axis for them; if the
            batch is no multiple of ``multiple_of``, or has less than a unit for each replica; if
            ``max_microbatch`` is less than a unit; or if microbatches of one unit, and no more,
            cannot be equally many for all replicas.

    Example:
        >>> split(10, max_microbatch=4)
        [3, 3, 4]
        >>> split(14, max_microbatch=4, replicas=2)
        [[3, 4], [3, 4]]
        >>> import numpy as np
        >>> batch = {"x": np.arange(10).reshape(5, 2), "y": np.arange(5)}
        >>> [piece["y"].tolist() for piece in split(batch, max_microbatch=2)]
        [[0], [1, 2], [3, 4]]
    """
    unit = as_integer(multiple_of, "multiple_of", 1)
    shares = 1 if replicas is None else as_integer(replicas, "replicas", 1)
    examples = examples_of(batch)
    if examples % unit:
        raise ValueError(
            f"a batch of {examples} examples is no multiple of multiple_of = {unit}; draw sizes "
            f"from cabs.BatchSizes.range(..., multiple_of={unit}), and fill up or leave out the "
            "last batch of an epoch"
        )
    units = examples // unit
    if units < shares:
        raise ValueError(
            f"a batch of {examples} examples has less than one unit, {unit} examples, for each of "
            f"{shares} replicas; give it at least {shares * unit} examples"
        )
    each = 1
    if max_microbatch is not None:
        at_once = as_integer(max_microbatch, "max_microbatch", 1) // unit
        if not at_once:
            raise ValueError(
                f"max_microbatch must be at least one unit, got max_microbatch = {max_microbatch}, "
                f"multiple_of = {unit}; lower multiple_of"
            )
        each = -(-units // (shares * at_once))
    pieces = shares * each
    # It happens with microbatches of one unit alone: two units leave room for a smaller piece.
    if pieces > units:
        raise ValueError(
            f"{shares} replicas cannot have equally many microbatches of {unit} examples each in a "
            f"batch of {examples}; make the batch a multiple of {shares * unit}, or raise "
            f"max_microbatch = {max_microbatch} to {2 * unit}"
        )
    edges = [units * at // pieces * unit for at in range(pieces + 1)]
    found = [_part(batch, *ends) for ends in pairwise(edges)]
    if replicas is None:
        return found
    return [found[first : first + each] for first in range(0, pieces, each)]


def examples_of(batch: Any) -> int:
    """Return how many examples a batch has; TypeError and ValueError as in :func:`split`."""
    if isinstance(batch, (int, np.integer)):
        return as_integer(batch, "batch", 1)
    lengths: dict[int, str] = {}

    def note(array: Any, path: str) -> None:
        try:
            length = next(iter(array.shape), None)
        except ValueError:  # TensorFlow's shape of unknown rank
            length = None
        if not isinstance(length, int):
            raise ValueError(
                f"{path} must have the examples along a first axis of known length, got shape "
                f"{array.shape}; leave out what all examples share, and split outside of functions "
                "that are traced for any size"
            )
        lengths.setdefault(length, path)

    _map(note, batch, "batch")
    if not lengths:
        raise ValueError(f"batch must hold at least one array, got {batch!r}")
    if len(lengths) > 1:
        found = ", ".join(f"{count} in {path}" for count, path in lengths.items())
        raise ValueError(
            "arrays must have equally many examples along their first axes, got "
            f"{found}; leave out what all examples share, and move the examples to the first axis"
        )
    return next(iter(lengths))


def _part(batch: Any, start: int, stop: int) -> Any:
    """Return some examples of a batch that follow one another, or how many these are."""
    if isinstance(batch, (int, np.integer)):
        return stop - start

    def cut(array: Any, _: str) -> Any:
        # Not every framework knows that a slice of everything is the array itself.
        return array if stop - start == array.shape[0] else array[start:stop]

    return _map(cut, batch, "batch")


def _map(function: Callable[[Any, str], Any], nest: Any, path: str) -> Any:
    """Return a nest of the same kinds, with what a function makes of each array and its path."""
    if nest is None:
        return None
    # Before containers: an object may be both, and then knows best how its entries are cut.
    if hasattr(nest, "shape") and hasattr(nest, "__getitem__"):
        return function(nest, path)
    if isinstance(nest, Mapping):
        mapped = {key: _map(function, one, f"{path}[{key!r}]") for key, one in nest.items()}
        if not isinstance(nest, MutableMapping):
            return type(nest)(mapped)  # type: ignore[call-arg]
        # Subclasses of dict have constructors of their own.
        same_kind = copy(nest)
        same_kind.update(mapped)
        return same_kind
    if isinstance(nest, (tuple, list)):
        entries = [_map(function, one, f"{path}[{at}]") for at, one in enumerate(nest)]
        return type(nest)(*entries) if hasattr(nest, "_fields") else type(nest)(entries)
    raise TypeError(
        f"{path} must be an array, or a nest of mappings, tuples and lists of arrays, got "
        f"{type(nest).__name__}; make an array of it, or split the batch without it"
    )
