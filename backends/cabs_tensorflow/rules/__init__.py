"""What each operation does to the batch axis, and how a variable meets it.

One table says where the examples lie after an operation, another what gradient a variable gets from
it. Imports ``cabs_tensorflow.norms``; does not walk the graph.
"""
