"""What each operation does to the batch axis, and how a variable meets it.

One table says where the examples lie, another what gradient a variable gets; several uses
of it are added up here. Imports ``cabs_tensorflow.graph`` and ``norms``; does not walk the graph.
"""
