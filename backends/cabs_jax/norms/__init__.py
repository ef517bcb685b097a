"""Squared norms of per-example gradients, from inputs and cotangents, on arrays of JAX.

The arithmetic is that of ``cabs.gradients``; here are the array operations that it is written in,
and convolutions of any layout. Imports the core and the framework alone.
"""
