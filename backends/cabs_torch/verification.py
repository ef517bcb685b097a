"""A comparison of what is measured with a plain loop over the examples.

Guarantees: the loop knows nothing of graphs and rules; gradients that parameters hold are as they
were afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cabs.gradients import Checked, Verification
from cabs.gradients.layout import Layout
from cabs.gradients.verification import relative_error
from cabs_torch.backward import check_losses
from cabs_torch.errors import names
from cabs_torch.graph.autograd_nodes import is_leaf
from cabs_torch.measure import Measurement
from cabs_torch.norms.arrays import TorchArrays
from cabs_torch.walk import Walk, leaves_behind


def verify(losses_of: Callable[[Any], Tensor], batch: Any) -> Verification:
    """Compare the squared norms of per-example gradients with a loop over the examples.

    The loop calls ``losses_of`` with one example after the other, so a few examples are enough,
    and a model that mixes examples in any way shows. In single precision expect errors around
    1e-6, in half precision as much as the loop itself rounds.

    Args:
        losses_of: From a batch, one loss an example, shape (m,). It must not draw random numbers:
            put dropout to sleep with ``model.eval()``.
        batch: A tensor, or a tuple, list or dictionary of tensors, each with the examples along
            its first axis, at least two.

    Returns:
        A :class:`cabs.gradients.Verification`: for each parameter the relative error, and the rules
        that cover it, or why none does.

    Raises:
        ValueError: If ``losses_of`` gives other losses when it is called again, or ``batch`` has
            less than two examples, or tensors of different lengths.

    Example:
        >>> import torch, cabs_torch
        >>> layer = torch.nn.Linear(2, 3, bias=False).double()
        >>> inputs = torch.tensor([[1.0, 0.0], [3.0, 2.0]]).double()
        >>> found = cabs_torch.verify(lambda x: layer(x).square().sum(dim=1), inputs)
        >>> found.error < 1e-12
        True
        >>> found.rows[0].name, found.rows[0].rule
        ('weight', 'matrix')
    """
    examples = _count(batch)
    losses = losses_of(batch)
    check_losses(losses)
    if not torch.equal(losses, losses_of(batch)):
        raise ValueError(
            "losses_of must give the same losses when it is called again; does the model draw "
            "random numbers? model.eval() ends dropout"
        )
    if losses.shape != (examples,):
        raise ValueError(
            f"losses_of must give one loss an example, shape ({examples},), got shape "
            f"{tuple(losses.shape)}"
        )
    walk = Walk([(losses, Layout((examples,), 1, examples))], strict=False)
    covered = {**walk.leaves, **walk.hidden}
    # Whatever is behind the losses: what the walk did not reach must have no gradient.
    behind = {id(leaf.variable): leaf for leaf in leaves_behind(losses.grad_fn) if is_leaf(leaf)}
    known_leaves = {**behind, **covered, **walk.refused}
    parameters = {key: leaf.variable for key, leaf in known_leaves.items()}
    held = {key: parameter.grad for key, parameter in parameters.items()}
    try:
        for parameter in parameters.values():
            parameter.grad = None
        with Measurement(walk, examples, TorchArrays()) as measurement:
            losses.mean().backward()
        numbers = {key: at for at, key in enumerate(parameters)}
        sums = measurement.squares.by_group(
            lambda leaf: numbers[id(leaf.variable)], len(numbers), losses.device
        )
        squares = dict(zip(numbers, (sums * examples**2).tolist(), strict=True))
        expected = dict.fromkeys(parameters, 0.0)
        for index in range(examples):
            for parameter in parameters.values():
                parameter.grad = None
            losses_of(_one(batch, index)).sum().backward()
            for key, parameter in parameters.items():
                if parameter.grad is not None:
                    gradient = parameter.grad.to_dense().double()
                    expected[key] += float(gradient.square().sum())
    finally:
        for key, parameter in parameters.items():
            parameter.grad = held[key]
    rules = walk.rules()
    rows, known = [], names()
    for key, parameter in parameters.items():
        name = known[key][0] if key in known else str(tuple(parameter.shape))
        if key in walk.refused:
            rows.append(Checked(name, walk.problems[key], math.nan))
        else:
            error = relative_error(squares.get(key, 0.0), expected[key])
            rows.append(Checked(name, rules.get(key, "no gradient passes"), error))
    return Verification(tuple(sorted(rows, key=lambda row: row.name)))


def _count(batch: Any) -> int:
    lengths = {len(tensor) for tensor in _tensors(batch)}
    if len(lengths) != 1 or min(lengths) < 2:
        raise ValueError(
            "batch must hold tensors with at least two examples along their first axes, and the "
            f"same number in all, got {sorted(lengths)}"
        )
    return lengths.pop()


def _tensors(batch: Any) -> list[Tensor]:
    if isinstance(batch, Tensor):
        return [batch]
    if not isinstance(batch, (tuple, list, dict)):
        raise TypeError(
            f"batch must be a tensor, or a tuple, list or dictionary of some, got {batch!r}"
        )
    inner = batch.values() if isinstance(batch, dict) else batch
    return [tensor for one in inner for tensor in _tensors(one)]


def _one(batch: Any, index: int) -> Any:
    """Return a batch of one example."""
    if isinstance(batch, Tensor):
        return batch[index : index + 1]
    if isinstance(batch, dict):
        return {key: _one(one, index) for key, one in batch.items()}
    parts = [_one(one, index) for one in batch]
    return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
