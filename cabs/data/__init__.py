"""Batches of the size that a controller says, every example once an epoch.

Samplers draw indices, a loader fetches what they draw ahead of the decision, and ``split`` cuts
what does not fit into memory. Imports ``cabs.values`` alone, and asks a controller for nothing but
``batch_size``; measuring and feeding do not know each other.
"""

from cabs.data.batch_sampler import BatchSampler
from cabs.data.fetch import DrawnBatch, Fetch
from cabs.data.loader import Loader
from cabs.data.memory import MemoryCap
from cabs.data.microbatches import split
from cabs.data.stream_sampler import StreamSampler

__all__ = ["BatchSampler", "DrawnBatch", "Fetch", "Loader", "MemoryCap", "StreamSampler", "split"]
