"""What a controller is fed after each step of ``fit``, and what workers compare before it.

Guarantees: workers whose controllers, samplers or batches differ have other fingerprints, and
workers that train alike have the same.
"""

from __future__ import annotations

import math
import zlib
from typing import Any

import tensorflow as tf

from cabs import Controller, RunLog, Stopwatch
from cabs.control import DebiasedAverage, Decision, noise_scale_rule
from cabs_tensorflow.data.drawn import Drawn
from cabs_tensorflow.keras.steps import Given
from cabs_tensorflow.statistics import TotalStatistics


class Feed:
    """A controller, and what is fed to it after each step."""

    def __init__(self, controller: Controller, log: RunLog | None) -> None:
        self.decision: Decision | None = None
        self.drawn: Drawn | None = None
        """Where batches come from, while that is known."""
        self._order: Any = None
        self.given: Given = {}
        """The tensors of a step for it, while that is traced and there are several workers."""
        self._controller, self._log = controller, log
        rule = controller.configuration.rule
        self.in_metric = bool(rule.in_metric)
        """Whether the rule takes norms in the metric of the optimizer's step."""
        self._watch = Stopwatch() if rule.needs_clock else None
        smoothing = controller.configuration.smoothing
        self._trace, self._square = DebiasedAverage(smoothing), DebiasedAverage(smoothing)

    def draw(self, drawn: Drawn | None) -> None:
        """Take batches from there from now on."""
        self.drawn, self._order = drawn, None if drawn is None else drawn.order

    def begin(self) -> None:
        """Leave what was done between two epochs, as validation, out of the time of a step."""
        if self._watch is not None:
            self._watch.lap()

    def of_step(self, examples: int) -> Given:
        """Return what a step of so many examples is given, where there are several workers."""
        # From the same order, batches of the same sizes are the same batches.
        said = self._controller.fingerprint, self._order, examples
        fingerprint = zlib.crc32(repr(said).encode()) >> 12
        own = self._controller.own_seconds
        # Whatever the rule, or the sums of workers whose rules differ would not be of one shape.
        seconds = math.nan if own is None else own
        return {
            "fingerprint": tf.constant(fingerprint, tf.int32),
            "seconds": tf.constant(seconds, tf.float32),
        }

    def __call__(self, statistics: Any, loss: Any, rate: Any) -> dict[str, float]:
        """Feed the controller, and return what to log."""
        found = statistics.read()
        is_timed = self._watch is not None and isinstance(statistics, TotalStatistics)
        trace, square = found.variance_trace, found.expected_gradient_norm_squared
        self.decision = self._controller.update(
            statistics if is_timed else found,
            learning_rate=rate,
            loss=float(loss),
            seconds=self._watch,
        )
        if self._log is not None:
            self._log.write(self.decision, examples=found.examples)
        if math.isfinite(trace) and math.isfinite(square):
            self._trace.update(trace)
            self._square.update(square)
        noise = noise_scale_rule(
            variance_trace=self._trace.value, gradient_norm_squared=self._square.value
        )
        size = (self.decision if self.drawn is None else self.drawn).batch_size
        return {"batch_size": size, "noise_scale": noise}
