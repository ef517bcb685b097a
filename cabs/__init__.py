"""Batch sizes that follow the variance of the gradient.

The core of CABS (Balles, Romero, Hennig: "Coupling Adaptive Batch Sizes with Learning Rates",
UAI 2017, arXiv 1612.05086). What most loops need is here; :mod:`cabs.control`,
:mod:`cabs.gradients`, :mod:`cabs.data` and :mod:`cabs.runs` hold the rest. Guarantees: needs NumPy
alone, and imports no framework.
"""

from cabs.control import CABS, BatchSizes, Controller, NoiseScale, NormTest, Progress, Stopwatch
from cabs.data import BatchSampler, MemoryCap, StreamSampler, split
from cabs.gradients import GradientStatistics
from cabs.runs import RunLog, read_run

__all__ = [
    "CABS",
    "BatchSampler",
    "BatchSizes",
    "Controller",
    "GradientStatistics",
    "MemoryCap",
    "NoiseScale",
    "NormTest",
    "Progress",
    "RunLog",
    "Stopwatch",
    "StreamSampler",
    "read_run",
    "split",
]
