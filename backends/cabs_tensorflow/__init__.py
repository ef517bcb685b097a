"""Exact gradient statistics for TensorFlow, from the backward pass that training does anyway.

Guarantees: measures, feeds, and decides nothing; gradients are those of ``tf.GradientTape``,
to rounding.
Imports ``cabs.gradients`` and ``cabs.values``; ``data`` and ``keras`` import
more of the core.
"""

from cabs.gradients.errors import UncoveredParameterError
from cabs_tensorflow.data.dataset import dataset
from cabs_tensorflow.data.loader import loader
from cabs_tensorflow.keras.fitting import AdaptiveBatchSize, adaptive
from cabs_tensorflow.optimizers import learning_rate
from cabs_tensorflow.replicas import apply, share_of
from cabs_tensorflow.statistics import BatchStatistics, PartialStatistics
from cabs_tensorflow.tape import GradientTape
from cabs_tensorflow.verification import verify

__all__ = [
    "AdaptiveBatchSize",
    "BatchStatistics",
    "GradientTape",
    "PartialStatistics",
    "UncoveredParameterError",
    "adaptive",
    "apply",
    "dataset",
    "learning_rate",
    "loader",
    "share_of",
    "verify",
]
