"""Datasets and loaders whose batches have the size that a controller says.

Imports the core alone; nothing that measures imports it.
"""
