"""What a compiled program sends between devices."""

import math
import re

import jax


def reduced_in(function, *args):
    """Return how many elements each collective of the compiled program has, by its kind."""
    found = {}
    pattern = r" (all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all)(?:-start)?\("
    for line in jax.jit(function).lower(*args).compile().as_text().splitlines():
        match = re.search(pattern, line)
        if match is not None:
            shapes = re.findall(r"\w\d+\[([\d,]*)\]", line[: match.start()])
            sizes = [math.prod(map(int, filter(None, shape.split(",")))) for shape in shapes]
            found.setdefault(match[1], []).append(sum(sizes))
    return found
