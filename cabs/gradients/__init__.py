"""The arithmetic of per-example gradients, and what is known of a batch's gradient.

Statistics and their sums; where the examples of a batch lie, in integers; and the squared norms of
per-example gradients, written once over some twenty array operations, with NumPy as its reference.
Imports ``cabs.values`` alone; adapters import it.
"""

from cabs.gradients.errors import UncoveredParameterError
from cabs.gradients.moments import GradientMoments
from cabs.gradients.statistics import GradientStatistics, PartialStatistics
from cabs.gradients.verification import Checked, Verification

__all__ = [
    "Checked",
    "GradientMoments",
    "GradientStatistics",
    "PartialStatistics",
    "UncoveredParameterError",
    "Verification",
]
