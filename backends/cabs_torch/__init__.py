"""Exact gradient statistics for PyTorch, from the backward pass that training does anyway.

Guarantees: measures and decides nothing; the gradients are those of a plain backward pass.
"""

from cabs_torch.backward import backward, mean_square
from cabs_torch.errors import UncoveredParameterError
from cabs_torch.statistics import BatchStatistics

__all__ = ["BatchStatistics", "UncoveredParameterError", "backward", "mean_square"]
