"""The jaxpr of a loss, and where its parameters meet the example in it.

Uses of parameters, slices, the derivative of an operation, and the meshes on which arrays lie.
Computes no norms. Imports the core alone; rules and what measures import it.
"""
