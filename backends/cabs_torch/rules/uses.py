"""What the operations between a parameter and one of its uses make of the gradients.

Guarantees: gradients are those of the parameter itself; where nothing but casts and transpositions
lies between, from the same factors.
"""

from __future__ import annotations

from functools import partial

from cabs.gradients.terms import Lookup, Product, Term
from cabs.gradients.uses import Pulled
from cabs_torch.graph.autograd_nodes import Edge, name_of, shape_of
from cabs_torch.rules.batch_axis import KEEPING, PERMUTING, permutation
from cabs_torch.rules.parameter_paths import MULTIPLE, back, settings


def of_parameter(term: Term, path: tuple[Edge, ...]) -> Term:
    """Return the gradients of a parameter from those of what a path has rearranged it to.

    Args:
        term: Those of what was made of it.
        path: The operations between, which rearrange the parameter, the nearest to the batch first.
    """
    while path and isinstance(term, (Product, Lookup)):
        node, rank = path[0][0], len(term.shape)
        name, shape = name_of(node), shape_of(node.next_functions[0])
        if name in PERMUTING and isinstance(term, Product):
            term = term.placed(shape, permutation(node, rank))
        elif shape != term.shape or name not in KEEPING:
            break
        path = path[1:]
    if not path:
        return term
    last = path[-1]
    return Pulled(
        term,
        partial(back, path=path),
        shape_of(last[0].next_functions[0]),
        is_rearranged=True,
        how=tuple(map(settings, path)),
        part=last if name_of(last[0]) in MULTIPLE else None,
    )
