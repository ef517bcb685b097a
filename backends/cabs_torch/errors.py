"""The error for what cannot be measured exactly, in words that a user can act upon.

Guarantees: it says the operation and what is the matter, names three parameters at most, and tells
the way out.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence

import torch

from cabs.gradients.errors import UncoveredParameterError, listed


class HiddenError(Exception):
    """An operation that can hide parameters from the graph; says how."""


class UnknownError(Exception):
    """An operation without a rule, which has to be tried out."""


def uncovered(problem: str, parameters: Sequence[torch.Tensor]) -> UncoveredParameterError:
    """Return the error for what is the matter, and the parameters that it concerns."""
    remedy = (
        "Estimate the variance from groups of examples instead, with cabs_torch.Accumulation, or "
        "with uncovered='microbatches' for such parameters alone; or leave"
    )
    if any(hasattr(one, "device_mesh") for one in parameters):
        remedy = (
            "Of tensor parallelism there are no statistics, of groups of examples neither: train "
            "with DistributedDataParallel or fully_shard; or leave"
        )
    return UncoveredParameterError(
        f"{problem}. This concerns {describe_some(parameters)}. {remedy} them out, with "
        "parameter_groups= of those that matter"
    )


def between_ranks(name: str) -> UncoveredParameterError:
    """Return the error for an operation that passes numbers from rank to rank."""
    return UncoveredParameterError(
        f"{name} passes numbers from rank to rank, as context and expert parallelism do, so that "
        "a rank's gradients are not those of its own examples, nor of groups of them; measure "
        "where each rank computes the losses of its examples alone, as with "
        "DistributedDataParallel and fully_shard"
    )


def describe(parameter: torch.Tensor) -> str:
    """Return the parameter's name in its outermost module, and its shape."""
    shape = f"of shape {tuple(parameter.shape)}"
    found = names().get(id(parameter))
    if found:
        return f"parameter {found[0]!r} of {found[1]}, {shape}"
    if isinstance(parameter, torch.nn.Parameter):
        return f"a parameter {shape}"
    return f"a tensor that requires gradients, {shape}"


def describe_some(parameters: Sequence[torch.Tensor]) -> str:
    """Return what the first three parameters are, and how many more there are."""
    return listed(map(describe, parameters), len(parameters), separator="; ")


def names() -> dict[int, tuple[str, str]]:
    """Return the parameters' names in their outermost modules, and the names of their classes."""
    # The autograd graph knows no names. The longest one is that in the outermost module.
    found: dict[int, tuple[str, str]] = {}
    for module in _all_modules():
        for name, parameter in module.named_parameters():
            known = found.get(id(parameter))
            if known is None or name.count(".") > known[0].count("."):
                found[id(parameter)] = (name, type(module).__name__)
    return found


def _all_modules() -> list[torch.nn.Module]:
    """Return the modules of this process whose construction was completed."""
    return [
        found
        for found in gc.get_objects()
        if issubclass(type(found), torch.nn.Module) and vars(found).keys() >= _REGISTERS
    ]


_REGISTERS = {"_parameters", "_modules"}
