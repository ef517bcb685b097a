"""Batch sizes that follow the variance of the gradient.

The core of CABS (Balles, Romero, Hennig: "Coupling Adaptive Batch Sizes with Learning Rates",
UAI 2017, arXiv 1612.05086). Guarantees: needs NumPy alone, and imports no framework.
"""

from cabs.averages import DebiasedAverage
from cabs.configuration import Configuration
from cabs.controller import Controller
from cabs.decision import Averages, Decision, Observation, Reason, State, decide, initial_state
from cabs.log import Run, RunLog, read_run
from cabs.moments import GradientMoments
from cabs.rules import cabs_rule, noise_scale_rule, norm_test
from cabs.sampler import BatchSampler
from cabs.sizes import BatchSizes
from cabs.statistics import GradientStatistics, PartialStatistics
from cabs.verification import Checked, Verification

__all__ = [
    "Averages",
    "BatchSampler",
    "BatchSizes",
    "Checked",
    "Configuration",
    "Controller",
    "DebiasedAverage",
    "Decision",
    "GradientMoments",
    "GradientStatistics",
    "Observation",
    "PartialStatistics",
    "Reason",
    "Run",
    "RunLog",
    "State",
    "Verification",
    "cabs_rule",
    "decide",
    "initial_state",
    "noise_scale_rule",
    "norm_test",
    "read_run",
]
