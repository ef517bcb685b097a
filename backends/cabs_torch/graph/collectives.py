"""Numbers that pass from rank to rank inside of a forward and backward pass.

Guarantees: PyTorch's differentiable collectives are known in the graph; a collective that the
backward pass of a ``torch.autograd.Function`` calls is seen before it is begun, and nothing is
called that the pass does not call itself. What such a function sends in its forward pass alone is
in no graph, and not seen, nor what compiled functions do, and others inside of checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import get_gradient_edge
from torch.nn.modules._functions import SyncBatchNorm
from torch.utils._python_dispatch import TorchDispatchMode

from cabs_torch.errors import between_ranks
from cabs_torch.graph.autograd_nodes import Node, behind, is_packed, is_sink
from cabs_torch.graph.reentrant_checkpoints import is_reentrant_checkpoint

# Where PyTorch's collectives are registered as operations.
_NAMESPACES = {"c10d", "_c10d_functional", "_c10d_functional_autograd", "_dtensor", "symm_mem"}


def is_collective(node: Node) -> bool:
    """Return whether a node passes numbers from rank to rank."""
    function = getattr(node, "_forward_cls", None)
    maker = getattr(function, "__module__", "")
    is_own = function is SyncBatchNorm or maker == "torch.distributed.nn.functional"
    return is_own or "_c10d_functional_" in node.name()


def refuse(node: Node) -> None:
    """Raise UncoveredParameterError for a node that passes numbers from rank to rank."""
    raise between_ranks(node.name())


def look_behind(root: Node, see: Callable[[Node], None] = refuse) -> None:
    """Call a function with each collective among a node and those that it depends on."""
    for node in behind(root):
        if is_collective(node):
            see(node)


@contextmanager
def alone(root: Node) -> Iterator[None]:
    """Raise UncoveredParameterError if a pass from a node, run inside, has been on other ranks."""
    look_behind(root)
    with functions_watched():
        yield


class Sent(TorchDispatchMode):
    """Has a function called before each collective that is begun inside."""

    supports_higher_order_operators = True

    def __init__(self, see: Callable[[], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._see = see

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let compiled functions run as they are."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation."""
        if any(hasattr(kind, "device_mesh") for kind in types):
            # What a DTensor sends is in the operations that it runs itself.
            return NotImplemented
        if getattr(func, "namespace", "") in _NAMESPACES:
            self._see()
        return func(*args, **(kwargs or {}))


@contextmanager
def functions_watched(see: Callable[[Node], None] = refuse) -> Iterator[None]:
    """Have a function called with each node of a user's own that is about to send numbers."""
    run: Any = BackwardCFunction.apply

    def apply(node: Node, *cotangents: Any) -> Any:
        # Engines and checkpoints run forward passes there, which gather parameters.
        is_other = is_sink(node) or is_reentrant_checkpoint(node) or is_packed(node)
        if is_other or node.name() == "CompiledFunctionBackward":
            return run(node, *cotangents)
        with Sent(lambda: see(node)):
            return run(node, *cotangents)

    function: Any = BackwardCFunction
    function.apply = apply
    try:
        yield
    finally:
        function.apply = run


@contextmanager
def roots_watched(see: Callable[[Node], None]) -> Iterator[None]:
    """Have a function called with each node that a backward pass is about to begin at."""
    run: Any = torch.autograd.backward

    def backward(tensors: Any, *options: Any, **named: Any) -> None:
        given = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
        for one in given:
            if isinstance(one, torch.Tensor) and one.requires_grad:
                see(get_gradient_edge(one).node)
        run(given, *options, **named)

    torch.autograd.backward = backward
    try:
        yield
    finally:
        torch.autograd.backward = run
