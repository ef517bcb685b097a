"""What a program that XLA has compiled holds, read from its text."""

import math
import re


def largest(program):
    """Return how many elements the largest array of real numbers has."""
    shapes = re.findall(r"f(?:32|64)\[([\d,]+)\]", program)
    return max(math.prod(int(size) for size in shape.split(",")) for shape in shapes)
