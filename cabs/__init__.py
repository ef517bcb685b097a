"""Batch sizes that follow the variance of the gradient.

The core of CABS (Balles, Romero, Hennig: "Coupling Adaptive Batch Sizes with Learning Rates",
UAI 2017, arXiv 1612.05086). Guarantees: needs NumPy alone, and imports no framework.
"""

from cabs.atomic import atomic_write
from cabs.averages import DebiasedAverage
from cabs.configuration import Configuration
from cabs.controller import Controller
from cabs.decision import Averages, Decision, Observation, Reason, State, decide, initial_state
from cabs.fetch import DrawnBatch, Fetch
from cabs.loader import Loader
from cabs.log import RunLog
from cabs.memory import MemoryCap
from cabs.microbatches import split
from cabs.moments import GradientMoments
from cabs.replay import NotDecidedError, Replay, Run, read_run
from cabs.rules import cabs_rule, noise_scale_rule, norm_test
from cabs.sampler import BatchSampler
from cabs.sizes import BatchSizes
from cabs.statistics import GradientStatistics, PartialStatistics
from cabs.stream import StreamSampler
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
    "DrawnBatch",
    "Fetch",
    "GradientMoments",
    "GradientStatistics",
    "Loader",
    "MemoryCap",
    "NotDecidedError",
    "Observation",
    "PartialStatistics",
    "Reason",
    "Replay",
    "Run",
    "RunLog",
    "State",
    "StreamSampler",
    "Verification",
    "atomic_write",
    "cabs_rule",
    "decide",
    "initial_state",
    "noise_scale_rule",
    "norm_test",
    "read_run",
    "split",
]
