"""How a parameter meets an example in an operation, and what its gradient is made of.

What no rule accepts, the derivative of the operation itself tells; several uses and penalties are
added up here. Imports ``cabs_jax.graph`` and ``norms``.
"""
