"""The autograd graph: how to read its nodes, and checkpoints that make a graph of their own.

Computes no norms. Imports the core and ``cabs_torch.errors`` alone; rules and the walk import it.
"""
