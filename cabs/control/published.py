"""The averages and the rule of the authors' code, in its precision and order of operations."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import repeat
from typing import Any

import numpy as np

from cabs.control.averages import Averages
from cabs.control.configuration import Configuration
from cabs.control.decision import Observation
from cabs.control.reasons import Reason


def averaged(
    configuration: Configuration, averages: Averages, observation: Observation
) -> Averages:
    """Return the averages with the observation in them."""
    number: Callable[[float], Any] = np.float32 if configuration.single_precision else np.float64
    smoothing = number(configuration.smoothing)

    def step(mean: float, value: float) -> float:
        return float(smoothing * number(mean) + (number(1.0) - smoothing) * number(value))

    means, weight, values = *averages[:2], observation.variance_trace
    square, square_weight, measured = *averages[4:], observation.expected_gradient_norm_squared
    with np.errstate(all="ignore"):
        if values is not None:
            means, weight = tuple(map(step, means or repeat(0.0), values)), 1.0
        if measured is not None:
            square, square_weight = step(square, measured), 1.0
        loss = step(averages.loss, observation.loss)
        return Averages(means, weight, loss, 1.0, square, square_weight)


def rule(rates: tuple[float, ...], averages: Averages) -> float | Reason:
    """Return the size that is asked for, or that the loss is not above 0."""
    traces = averages.variance_trace
    if not 0.0 < averages.loss < math.inf:
        return Reason.LOSS_AT_FLOOR
    with np.errstate(all="ignore"):
        loss = np.float32(averages.loss)
        if len(rates) == 1:
            total = sum(map(np.float32, traces), np.float32(0.0))
            return float(np.float32(rates[0]) * (total / loss))
        pairs = zip(rates, traces, strict=True)
        terms = [np.float32(rate) * (np.float32(trace) / loss) for rate, trace in pairs]
        return float(sum(terms, np.float32(0.0)))
