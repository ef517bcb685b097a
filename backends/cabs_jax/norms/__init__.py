"""Squared norms of per-example gradients, from inputs and cotangents.

Ghost norms, Gram matrices, convolutions, lookups, and several uses of one parameter. Imports JAX
alone.
"""
