"""The error for what cannot be measured exactly, in words that a user can act upon.

Guarantees: it names the parameter, the operation and the way out.
"""

from __future__ import annotations

import gc

import torch


class UncoveredParameterError(RuntimeError):
    """A parameter whose per-example gradient norms this adapter cannot give exactly.

    It is raised before anything was computed: the graph and all gradients are as they were.

    Example:
        >>> import torch, cabs_torch
        >>> scale = torch.ones(3, requires_grad=True)
        >>> cabs_torch.backward((torch.eye(3) * scale).softmax(dim=0).sum(dim=1))
        Traceback (most recent call last):
        ...
        cabs_torch.errors.UncoveredParameterError: a parameter of shape (3,) lies behind
        SoftmaxBackward0, which runs along the axis that holds the examples. Estimate the variance
        from groups of examples instead, with cabs_torch.Accumulation, or with uncovered='groups'
        for such parameters alone; or freeze what cannot be measured
    """


def uncovered(parameter: torch.Tensor, problem: str) -> UncoveredParameterError:
    """Return the error for a parameter and what is the matter with it."""
    return UncoveredParameterError(
        f"{describe(parameter)} {problem}. Estimate the variance from groups of examples instead, "
        "with cabs_torch.Accumulation, or with uncovered='groups' for such parameters alone; or "
        "freeze what cannot be measured"
    )


def describe(parameter: torch.Tensor) -> str:
    """Return the parameter's name in its outermost module, and its shape."""
    shape = f"shape {tuple(parameter.shape)}"
    found = named(parameter)
    return f"parameter {found[0]!r} of {found[1]}, {shape}," if found else f"a parameter of {shape}"


def named(parameter: torch.Tensor) -> tuple[str, str] | None:
    """Return the parameter's name in its outermost module, and the name of that module's class."""
    # The autograd graph knows no names. The longest one is that in the outermost module.
    names = [
        (name, type(module).__name__)
        for module in _all_modules()
        for name, candidate in module.named_parameters()
        if candidate is parameter
    ]
    return max(names, key=lambda found: found[0].count(".")) if names else None


def _all_modules() -> list[torch.nn.Module]:
    """Return the modules of this process whose construction was completed."""
    return [
        found
        for found in gc.get_objects()
        if issubclass(type(found), torch.nn.Module) and vars(found).keys() >= _REGISTERS
    ]


_REGISTERS = {"_parameters", "_modules"}
