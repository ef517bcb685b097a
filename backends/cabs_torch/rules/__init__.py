"""What each operation does to the batch axis, and how a parameter meets it.

One table says where the examples lie, another what gradient a parameter gets, a third what users
register; what has no rule is tried out. Imports ``cabs_torch.graph`` and ``norms``, and what says
how ranks share parameters; does not walk the graph.
"""
