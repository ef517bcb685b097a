"""A data loader with workers that read ahead while the batch size is still open.

Processes, what they send, and the random numbers that they draw. Imports the core alone; nothing
that measures imports it.
"""
