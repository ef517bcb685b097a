"""Squared norms of per-example gradients, from inputs and cotangents, on arrays of TensorFlow.

The arithmetic is that of ``cabs.gradients``; here are the array operations that it is written in,
convolutions by pairs of positions, and the norm of gradients as a tape gives them. Imports the core
and the framework alone.
"""
