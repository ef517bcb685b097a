"""What a caller may ask for, checked.

Guarantees: an error says what was given and what is allowed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cabs_torch.errors import describe
from cabs_torch.ranks.arrived import as_used


@dataclass(frozen=True)
class Groups:
    """Which parameter belongs to which group."""

    numbers: Mapping[int, int]
    """The number of each parameter's group, by the parameter's id."""
    count: int
    trained: frozenset[int] = frozenset()
    """The groups with a parameter that requires gradients."""
    parameters: tuple[Tensor, ...] = ()
    """All of them, as the forward pass uses them."""

    def check_measured(self, measured: Iterable[int]) -> None:
        """Raise ValueError for a group none of whose parameters is among those of these ids."""
        missing = self.trained - {self.numbers[key] for key in measured if key in self.numbers}
        if missing:
            numbers = ", ".join(map(str, sorted(missing)))
            raise ValueError(
                f"nothing is measured for parameter group {numbers} of {self.count}, counted from "
                "0: the loss depends on none of its parameters, so that its variance would read 0; "
                "leave out groups that this loss does not train, and give the parameters that the "
                "forward pass uses, which are not those that FSDP keeps sharded"
            )

    def of(self, twins: Mapping[int, Tensor]) -> list[list[Tensor]]:
        """Return groups of the tensors that stand for parameters, given by the parameters' ids."""
        given = [(self.numbers[key], one) for key, one in twins.items() if key in self.numbers]
        return [[one for number, one in given if number == k] for k in range(self.count)]


def parameter_lists(parameters: Iterable[Tensor] | Any) -> list[list[Tensor]]:
    """Return the parameters of each group of an optimizer, or of an iterable as a single group."""
    if isinstance(parameters, torch.optim.Optimizer):
        return [group["params"] for group in parameters.param_groups]
    return [list(parameters)]


def as_groups(groups: Any) -> Groups:
    """Return parameter groups, given as an optimizer or as iterables of parameters."""
    if isinstance(groups, torch.optim.Optimizer):
        groups = parameter_lists(groups)
    numbers: dict[int, int] = {}
    trained: set[int] = set()
    kept: list[Tensor] = []
    count = 0
    for number, parameters in enumerate(groups):
        count = number + 1
        if isinstance(parameters, Mapping):
            parameters = parameters["params"]
        if isinstance(parameters, Tensor):
            raise TypeError(
                "parameter_groups must be an optimizer or an iterable of iterables of parameters, "
                "got an iterable of tensors; wrap it in a list for a single group"
            )
        for parameter in parameters:
            if not isinstance(parameter, Tensor):
                raise TypeError(
                    f"parameter_groups must hold parameters, got {type(parameter).__name__}; pass "
                    "model.parameters(), not named_parameters()"
                )
            parameter = as_used(parameter)
            if id(parameter) not in numbers:
                kept.append(parameter)
            if numbers.setdefault(id(parameter), number) != number:
                raise ValueError(
                    f"parameter_groups must not overlap: {describe(parameter)}, is in two"
                )
            if parameter.requires_grad:
                trained.add(number)
    if not numbers:
        raise ValueError("parameter_groups must hold parameters, got none")
    return Groups(numbers, count, frozenset(trained), tuple(kept))


def check_beside(
    optimizer: Any, parameters: Any, parameter_groups: Any, batch_size: Any, uncovered: str
) -> None:
    """Raise ValueError for what does not go with norms in the metric of an optimizer."""
    refused = {
        "parameter_groups": (
            parameter_groups is not None,
            "the optimizer's groups are those of the statistics",
        ),
        "parameters": (
            parameters is not None and isinstance(optimizer, torch.optim.Optimizer),
            "the optimizer's groups say what is measured; give a function from a parameter to P",
        ),
        "batch_size": (
            batch_size is not None,
            "P is made of the whole batch's gradient, which a microbatch does not have",
        ),
        "uncovered='microbatches'": (
            uncovered == "microbatches",
            "it estimates norms and no elements; uncovered='ignore' leaves these parameters out",
        ),
    }
    for name, (is_given, reason) in refused.items():
        if is_given:
            raise ValueError(f"{name} must not be given beside optimizer: {reason}")
