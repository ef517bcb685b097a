"""Squared norms of per-example gradients, from inputs and cotangents, on arrays of PyTorch.

The arithmetic is that of ``cabs.gradients``; here are the array operations that it is written in,
bags of rows, and convolutions by kernels of PyTorch's own. Imports the core and the framework
alone.
"""
