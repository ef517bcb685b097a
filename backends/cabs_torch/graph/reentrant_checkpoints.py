"""Reentrant checkpoints, whose operations are not in the graph until they are run once more.

Guarantees: the graph that a checkpoint will make in the backward pass is seen before, by running
its function as PyTorch will, and changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import CheckpointFunction

from cabs_torch.errors import HiddenError
from cabs_torch.graph.autograd_nodes import Node


class _SeenError(Exception):
    """Ends a checkpoint's backward pass where its function has been run."""


def is_reentrant_checkpoint(node: Node) -> bool:
    """Return whether a node is that of a reentrant checkpoint."""
    return getattr(node, "_forward_cls", None) is CheckpointFunction


def run_again(node: Node) -> tuple[list[Tensor], Sequence[Any]]:
    """Run a checkpoint's function, and return its tensor inputs and its outputs, with a graph.

    Raises:
        HiddenError: If it would not do the same as it did before.
    """
    if not node.preserve_rng_state:
        raise HiddenError("does not preserve the state of the random numbers")
    found: list[tuple[list[Tensor], Sequence[Any]]] = []

    def see(inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        found.append(([inputs[place] for place in node.tensor_indices], outputs))
        raise _SeenError

    with watched(node, see):
        try:
            node.apply(*(None for _ in node._input_metadata))
        except _SeenError:
            return found[0]
    raise AssertionError("a checkpoint runs its function in its backward pass")


@contextmanager
def watched(node: Node, see: Callable[[Sequence[Any], Sequence[Any]], None]) -> Iterator[None]:
    """Show the inputs and the outputs of a checkpoint's function whenever it is run."""
    run = node.run_function

    def run_and_show(*inputs: Any) -> Any:
        outputs = run(*inputs)
        see(inputs, outputs if isinstance(outputs, tuple) else (outputs,))
        return outputs

    node.run_function = run_and_show
    try:
        yield
    finally:
        node.run_function = run
