"""The jaxpr of a loss, and where its parameters meet the example in it.

Finds uses of parameters, slices and penalties, the derivative of an operation, and the meshes on
which arrays lie. Imports ``cabs_jax.rules`` and ``cabs_jax.norms``.
"""
