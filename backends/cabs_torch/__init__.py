"""Exact gradient statistics for PyTorch, from the backward pass that training does anyway.

Guarantees: measures, feeds, and decides nothing; the gradients are those of a plain backward pass.
Imports ``cabs.gradients`` and ``cabs.values``, for feeding ``cabs.data``, and no controller.
"""

from cabs.gradients.errors import UncoveredParameterError
from cabs_torch.backward import backward
from cabs_torch.compiled import CompiledStep, compile  # noqa: A004
from cabs_torch.data.loader import loader
from cabs_torch.microbatches.accumulation import Accumulation
from cabs_torch.microbatches.trainers import Microbatches
from cabs_torch.optimizers import learning_rates
from cabs_torch.rules.registered import OuterProduct, register_rule
from cabs_torch.statistics import BatchStatistics, gradient_norm_squared
from cabs_torch.verification import verify

__all__ = [
    "Accumulation",
    "BatchStatistics",
    "CompiledStep",
    "Microbatches",
    "OuterProduct",
    "UncoveredParameterError",
    "backward",
    "compile",
    "gradient_norm_squared",
    "learning_rates",
    "loader",
    "register_rule",
    "verify",
]
