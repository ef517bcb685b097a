"""Squared norms of per-example gradients, from inputs and cotangents.

Ghost norms, Gram matrices, convolutions, lookups, and several uses of one variable. Imports the
core alone.
"""
