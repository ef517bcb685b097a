"""Examples packed for the way from a worker, and unpacked again.

Guarantees: what is unpacked equals what was packed, in type, shape and dtype, whatever nest of
whatever objects an example is, or there was an error; all tensors of many examples travel as one,
and lie one behind the other. Knows nothing of collating.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

# Arrays of other kinds have no tensor that holds the same.
_ARRAYS = frozenset("?bBhilqefdFD")

# Where a tensor may begin in memory, in bytes, whatever its dtype is.
_ALIGNMENT = 64


class Column(NamedTuple):
    """Where the tensors or arrays lie that the examples have at one place."""

    start: int
    """Of the first, in bytes; the others follow without a gap."""
    dtype: torch.dtype
    shapes: list[tuple[int, ...]]
    """Of each; a single one stands for all."""
    is_array: bool


class Pickled(NamedTuple):
    """Where other objects lie, pickled, in bytes."""

    start: int
    end: int


class Packed(NamedTuple):
    """Examples on their way."""

    length: int
    nest: Any
    """How each is nested, see :func:`_flatten`; False if they differ, and travel as they are."""
    columns: list[Column | Pickled]
    """What the examples have at each place; pickled, where it is no tensor or array."""
    memory: torch.Tensor
    """What the columns lie in: bytes, one after the other. What is shared costs by the piece.

    All of them, so that a message is small: one that does not fit into a pipe is sent in parts, and
    a worker killed between them would leave the loop waiting for the rest.
    """


def pack(examples: list[Any], *, shared: bool = False) -> Packed:
    """Pack examples so that few objects travel; in memory that processes share, where asked to."""
    flat: list[list[Any]] = [[] for _ in examples]
    nests = [_flatten(example, leaves) for example, leaves in zip(examples, flat, strict=True)]
    is_one_nest = bool(nests) and nests.count(nests[0]) == len(nests)
    columns: list[Column | Pickled] = []
    contents: list[list[torch.Tensor] | bytes] = []
    end = 0
    for leaves in map(list, zip(*flat, strict=True)) if is_one_nest else [examples]:
        as_tensors = _tensors(leaves) if is_one_nest else None
        if as_tensors is None:
            contents.append(_pickled(leaves))
            size = len(contents[-1])
            columns.append(Pickled(end, end + size))
        else:
            contents.append(as_tensors)
            shapes = [tuple(one.shape) for one in as_tensors]
            size = sum(one.numel() for one in as_tensors) * as_tensors[0].element_size()
            if shapes.count(shapes[0]) == len(shapes):
                shapes = shapes[:1]
            is_array = type(leaves[0]) is np.ndarray
            columns.append(Column(end, as_tensors[0].dtype, shapes, is_array))
        end += -(-size // _ALIGNMENT) * _ALIGNMENT
    memory = torch.empty(0, dtype=torch.uint8, device="cpu")
    if shared:
        memory.set_(torch.UntypedStorage._new_shared(end))
    else:
        memory.resize_(end)
    for column, content in zip(columns, contents, strict=True):
        _write(column, content, len(examples), memory)
    return Packed(len(examples), nests[0] if is_one_nest else False, columns, memory)


def _write(column: Any, content: Any, length: int, memory: torch.Tensor) -> None:
    """Put what a column holds where it lies."""
    if isinstance(column, Pickled):
        memory.numpy()[column.start : column.end] = np.frombuffer(content, np.uint8)
        return
    whole = _whole(column, length, memory)
    if len(column.shapes) == 1:
        torch.stack(content, out=whole)
    else:
        torch.cat([part.reshape(-1) for part in content], out=whole)


def _pickled(objects: list[Any]) -> bytes:
    # Here, where an error can be told of: what multiprocessing pickles for itself is lost if it
    # fails, and the loop waits for ever.
    file = io.BytesIO()
    _ByValue(file, pickle.HIGHEST_PROTOCOL).dump(objects)
    return file.getvalue()


class _ByValue(pickle.Pickler):
    """Pickles tensors inside of other objects by what they hold.

    In shared memory each would need a file descriptor, of which there are few.
    """

    def reducer_override(self, value: Any) -> Any:
        if type(value) is not torch.Tensor or not _is_plain(value):
            return NotImplemented
        held = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return _tensor, (held, value.dtype, tuple(value.shape))


def _tensor(held: bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    if not held:
        return torch.empty(shape, dtype=dtype, device="cpu")
    return torch.frombuffer(bytearray(held), dtype=dtype).view(shape)


def _flatten(example: Any, leaves: list[Any]) -> Any:
    """Add an example's leaves to a list; return its nest: type, keys, nests; None for a leaf."""
    kind = type(example)
    if kind is dict:
        values = example.values()
    elif kind is list or kind is tuple or _is_named_tuple(example):
        values = example
    else:
        leaves.append(example)
        return None
    keys = tuple(example) if kind is dict else None
    return kind, keys, tuple([_flatten(value, leaves) for value in values])


def _is_named_tuple(example: Any) -> bool:
    # As collections.namedtuple and typing.NamedTuple make them, without anything of their own.
    kind = type(example)
    return (
        kind.__bases__ == (tuple,) and hasattr(kind, "_make") and not hasattr(example, "__dict__")
    )


def _nested(nest: Any, leaves: Iterator[Any]) -> Any:
    """Return an example of a nest, with leaves from an iterator."""
    if nest is None:
        return next(leaves)
    kind, keys, nests = nest
    values = [_nested(inner, leaves) for inner in nests]
    if kind is dict:
        return dict(zip(keys, values, strict=True))
    return kind._make(values) if hasattr(kind, "_make") else kind(values)


def _tensors(column: list[Any]) -> list[torch.Tensor] | None:
    """Return a column's tensors, or its arrays as tensors; None where it has others, or none."""
    first = column[0]
    if type(first) is np.ndarray:
        kind = first.dtype
        # Byte orders other than this machine's have no tensor.
        if kind.char not in _ARRAYS or not kind.isnative:
            return None
        if any(type(one) is not np.ndarray or one.dtype != kind for one in column):
            return None
        return [torch.from_numpy(one if one.flags.carray else one.copy()) for one in column]
    if type(first) is torch.Tensor:
        kind = first.dtype
        if all(
            type(one) is torch.Tensor and one.dtype == kind and _is_plain(one) for one in column
        ):
            return column
    return None


def _whole(column: Column, length: int, memory: torch.Tensor) -> torch.Tensor:
    """Return where a column's tensors lie in memory: stacked if they have one shape, or flat."""
    shapes = column.shapes
    shape = (length, *shapes[0]) if len(shapes) == 1 else (sum(map(math.prod, shapes)),)
    end = column.start + math.prod(shape) * column.dtype.itemsize
    return memory[column.start : end].view(column.dtype).view(shape)


def _is_plain(tensor: torch.Tensor) -> bool:
    return (
        tensor.layout is torch.strided
        and tensor.device.type == "cpu"
        and not tensor.requires_grad
        and not tensor.is_quantized
        and not tensor.is_conj()
        and not tensor.is_neg()
    )


def unpack(packed: Packed) -> list[Any]:
    """Return the examples; their tensors share the memory in which they came."""
    if packed.nest is False:
        return _unpacked(packed.columns[0], packed.length, packed.memory)
    columns = [iter(_unpacked(column, packed.length, packed.memory)) for column in packed.columns]
    # Columns are in the order of the leaves: one from each makes an example.
    return [_nested(packed.nest, map(next, iter(columns))) for _ in range(packed.length)]


def _unpacked(column: Any, length: int, memory: torch.Tensor) -> list[Any]:
    if isinstance(column, Pickled):
        leaves: list[Any] = pickle.loads(memory.numpy()[column.start : column.end].data)
        return leaves
    whole = _whole(column, length, memory)
    if len(column.shapes) == 1:
        tensors = list(whole.unbind())
    else:
        parts = zip(whole.split(list(map(math.prod, column.shapes))), column.shapes, strict=True)
        tensors = [part.view(shape) for part, shape in parts]
    return [tensor.numpy() for tensor in tensors] if column.is_array else tensors
