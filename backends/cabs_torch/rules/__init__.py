"""What each operation does to the batch axis, and how a parameter meets it.

One table says where the examples lie after an operation, another what gradient a parameter gets
from it; what has no rule is tried out. Imports ``cabs_torch.norms``; does not walk the graph.
"""
