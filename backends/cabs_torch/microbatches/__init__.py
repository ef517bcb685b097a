"""Statistics from microbatches, each of which is a group of examples with one gradient.

Their backward passes are called here, or by a loop that somebody else has written; nothing looks
into the graph between losses and parameters. Imports every other room but ``data``, and the
statistics.
"""
