"""How to read a node of the autograd graph.

Guarantees: a node's name and what it saved are read as PyTorch documents or prints them, without
changing anything; a value that can be unpacked only once can still be unpacked by the node itself.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.parallel.distributed import _DDPSink
from torch.utils.checkpoint import _Holder

from cabs.gradients.layout import MixedError, Shape
from cabs_torch.errors import HiddenError

Node: TypeAlias = Any
"""A node of the autograd graph; what else it has depends on its operation."""

Edge = tuple[Node, int]
"""One of a node's outputs."""


def name_of(node: Node) -> str:
    """Return the operation's name without the suffix that autograd adds.

    A function of a user's own may be called Relu and do something else; its node, ReluBackward,
    has no number at its end, and keeps its whole name.
    """
    return _name_of(node.name())


@cache
def _name_of(name: str) -> str:
    found = re.fullmatch(r"(\w+)Backward\d+", name)
    return found[1] if found else name


def is_leaf(node: Node) -> bool:
    """Return whether a node stands for a parameter and adds up its gradient."""
    return bool(node.name() == "torch::autograd::AccumulateGrad")


def is_own_function(node: Node) -> bool:
    """Return whether a node is that of a ``torch.autograd.Function`` written in Python."""
    return isinstance(node, torch.autograd.function.BackwardCFunction)


def is_sink(node: Node) -> bool:
    """Return whether a node is what an engine hands tensors through, which stay as they are.

    DDP does so with a model's outputs, and ``fully_shard`` with a module's inputs.
    """
    function = getattr(node, "_forward_cls", None)
    made_in = getattr(function, "__module__", "")
    return function is _DDPSink or (
        node.name() == "RegisterPostBackwardFunctionBackward"
        and made_in.startswith("torch.distributed.fsdp.")
    )


def behind(node: Node) -> Iterator[Node]:
    """Yield a node and those that it depends on, the nearest first."""
    seen, waiting = {node}, deque([node])
    while waiting:
        node = waiting.popleft()
        yield node
        for child, _ in node.next_functions:
            if child is not None and child not in seen:
                seen.add(child)
                waiting.append(child)


def is_measurable(edge: Edge) -> bool:
    """Return whether a node's output holds real numbers, one at least."""
    described = edge[0]._input_metadata[edge[1]]
    return described.dtype.is_floating_point and 0 not in described.shape


def shape_of(edge: Edge) -> Shape:
    """Return the shape of a node's output in the forward pass."""
    return tuple(edge[0]._input_metadata[edge[1]].shape)


def saved_axes(node: Node, rank: int) -> list[int]:
    """Return the axes along which an operation runs; all of them if it saved none."""
    saved = getattr(node, "_saved_dims", getattr(node, "_saved_dim", None))
    if saved is None or saved == ():
        return list(range(rank))
    return axes([saved] if isinstance(saved, int) else saved, rank)


def axes(saved: Sequence[int], rank: int) -> list[int]:
    """Return axes as autograd saves them, where -1 can read 2**64 - 1, as indices from 0."""
    return [signed(axis) % max(rank, 1) for axis in saved]


def signed(number: int) -> int:
    """Return a number that autograd saved without its sign."""
    return number - 2**64 if number >= 2**63 else number


def saved(node: Node, name: str) -> Tensor:
    """Return a tensor that a node saved."""
    packed = getattr(node, f"_raw_saved_{name}")
    tensor: Tensor
    if packed.unpack_hook is None:
        tensor = getattr(node, f"_saved_{name}")
    else:
        with _kept([packed]):
            tensor = getattr(node, f"_saved_{name}")
    return tensor


def call(node: Node, cotangents: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return what a node gives its inputs for cotangents of its outputs, one for each edge."""
    with _kept(_packed(node)), torch.no_grad():
        if is_own_function(node):
            # As the backward pass does; a function that would take None takes zeros too.
            with _no_backward_inside():
                results = node.apply(*filled(node, cotangents))
        else:
            results = node(*cotangents)
    given = list(results) if isinstance(results, tuple) else [results]
    if is_own_function(node):
        # One for each argument of the forward pass, tensor or not; edges are those of tensors.
        needed = zip(given, node.needs_input_grad, strict=False)
        wanted = [result for result, is_needed in needed if is_needed]
        given = [None if child is None else wanted.pop(0) for child, _ in node.next_functions]
    return [
        # What was broadcast is summed by whoever calls the node.
        None if result is None or edge[0] is None else result.sum_to_size(shape_of(edge))
        for result, edge in zip(given, node.next_functions, strict=True)
    ]


def filled(node: Node, cotangents: Sequence[Tensor | None]) -> list[Tensor]:
    """Return the cotangents of a node's outputs, with zeros for None."""
    return [
        _zeros(described) if one is None else one
        for one, described in zip(cotangents, node._input_metadata, strict=True)
    ]


def zeros_for(node: Node) -> list[Tensor]:
    """Return a cotangent of zeros for each of a node's outputs."""
    return [_zeros(described) for described in node._input_metadata]


def _zeros(described: Any) -> Tensor:
    return torch.zeros(described.shape, dtype=described.dtype, device=described.device)


def check_saved(node: Node, *names: str) -> None:
    """Raise if tensors that a node saved cannot be read, or are sparse.

    Raises:
        ValueError: If a backward pass has freed them.
        MixedError: If they are sparse.
    """
    for name in names:
        packed = getattr(node, f"_raw_saved_{name}")
        if packed.data is None:
            raise ValueError(
                "losses must carry a graph that no backward pass has used yet; compute them again"
            )
        if packed.unpack_hook is None and packed.data.layout is not torch.strided:
            raise MixedError("has a sparse input")


def are_at_hand(node: Node, names: Iterable[str]) -> bool:
    """Return whether tensors that a node saved pass :func:`check_saved`."""
    for name in names:
        packed = getattr(node, f"_raw_saved_{name}")
        data = packed.data
        if data is None or (data.__class__ is Tensor and data.layout is not torch.strided):
            return False
    return True


def is_packed(node: Node) -> bool:
    """Return whether a hook packs what a node saved, as checkpointing does."""
    return any(packed.unpack_hook is not None for packed in _packed(node))


@contextmanager
def _no_backward_inside() -> Iterator[None]:
    """Let a function that runs a backward pass of its own raise before it has written gradients."""

    def refuse(*_: object, **__: object) -> None:
        raise HiddenError("runs a backward pass of its own, which can hide parameters")

    run, torch.autograd.backward = torch.autograd.backward, refuse
    try:
        yield
    finally:
        torch.autograd.backward = run


class _Kept(dict[int, Any]):
    """Handles of recomputed tensors, which are not dropped with their first use."""

    def __setitem__(self, task: int, handle: Any) -> None:
        if handle is not None:
            super().__setitem__(task, handle)


@contextmanager
def _kept(packed: list[Any]) -> Iterator[None]:
    """Let what is unpacked inside be unpacked by the node itself once more.

    A checkpoint hands out each recomputed tensor once, through a handle that is dropped with it.
    """
    holders = [one.data for one in packed if one.unpack_hook is not None]
    holders = [holder for holder in holders if type(holder) is _Holder]
    for holder in holders:
        holder.handles = _Kept(holder.handles)
    try:
        yield
    finally:
        for holder in holders:
            holder.handles = dict(holder.handles)


@contextmanager
def readable(node: Node) -> Iterator[None]:
    """Let what a node saved be read inside, as it is by the node itself later."""
    with _kept(_packed(node)), torch.no_grad():
        yield


def _packed(node: Node) -> list[Any]:
    found: list[Any] = []
    kind: Any = type(node)
    for name in _raw_names(kind):
        packed = getattr(node, name)
        found.extend(packed if isinstance(packed, (tuple, list)) else [packed])
    return found


@cache
def _raw_names(kind: Any) -> list[str]:
    return [name for name in dir(kind) if name.startswith("_raw_saved_")]
