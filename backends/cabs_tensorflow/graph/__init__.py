"""The traced graph: called functions laid open, and sizes that tracing does not know.

Computes no norms. Imports the core alone; rules and the walk import it.
"""
