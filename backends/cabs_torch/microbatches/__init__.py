"""Statistics from microbatches, each of which is a group of examples with one gradient.

Their backward passes are called here, or by a loop that somebody else has written; of the graph
between losses and parameters nothing is asked but which parameters are in it, and whether numbers
pass from rank to rank. Imports the statistics and every other room but ``data`` and ``rules``.
"""
