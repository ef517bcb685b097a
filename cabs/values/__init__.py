"""Numbers and files that come from outside the library.

Turns what any framework calls a number into a float, marks saved states with a format and a
version, and replaces files as a whole. Imports NumPy alone; every other package may import it.
"""
