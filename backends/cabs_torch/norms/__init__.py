"""Squared norms of per-example gradients, from inputs and cotangents.

Ghost norms, Gram matrices, convolutions, lookups, and several uses of one parameter. Imports the
core alone, but for the paths by which a parameter is reached.
"""
