"""What is known of a batch's gradient: its variance, from any groups of examples.

Statistics and their sums, moments of gradients that are at hand, and the table in which adapters
compare themselves with a loop over the examples. Imports ``cabs.values`` alone; adapters import it.
"""

from cabs.gradients.moments import GradientMoments
from cabs.gradients.statistics import GradientStatistics, PartialStatistics
from cabs.gradients.verification import Checked, Verification

__all__ = ["Checked", "GradientMoments", "GradientStatistics", "PartialStatistics", "Verification"]
