"""Exact gradient statistics for JAX, from the backward pass that training does anyway.

Guarantees: measures and decides nothing; loss and gradients are those of ``jax.value_and_grad``.
Imports ``cabs.gradients`` and ``cabs.values`` alone: feeding and deciding are the core's.
"""

from cabs.gradients.errors import UncoveredParameterError
from cabs_jax.alike import fingerprint
from cabs_jax.gradient import value_and_grad
from cabs_jax.metric import adam_metric
from cabs_jax.padding import pad
from cabs_jax.statistics import BatchStatistics, PartialStatistics
from cabs_jax.verification import verify

__all__ = [
    "BatchStatistics",
    "PartialStatistics",
    "UncoveredParameterError",
    "adam_metric",
    "fingerprint",
    "pad",
    "value_and_grad",
    "verify",
]
