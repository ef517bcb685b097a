"""Training that other ranks go on with is what one process trains, and sees each example once."""

import pytest
import torch

import cabs_torch
from tests.torch.test_ranks import Run, dataset

pytestmark = pytest.mark.slow

# Steps before the end, in the middle of an epoch.
BEFORE = 7


def in_parts(state, steps):
    """Return which examples this rank has seen from a state on, and the state after some steps."""
    run, seen = Run(), []
    with cabs_torch.loader(dataset(), run.controller, seed=3) as loader:
        if state is not None:
            run.model.load_state_dict(state["model"])
            loader.load_state_dict(state["loader"])
        while loader.epoch < 2 and len(seen) < steps:
            for indices, inputs, outputs in loader:
                decided = run.step(loader.batch.examples, inputs, outputs)
                seen.append((loader.batch.epoch, decided, indices.tolist()))
                if len(seen) == steps:
                    break
        state = {"model": run.model.state_dict(), "loader": loader.state_dict()}
    return seen, state, run.weights()


@pytest.mark.parametrize("others", ["three", "one"])
def test_other_ranks_go_on_with_a_run(two, three, others):
    first = two.all(in_parts, None, BEFORE)
    assert first[0][1]["loader"] == first[1][1]["loader"]
    state = first[0][1]
    rest = three.all(in_parts, state, 10**6) if others == "three" else [in_parts(state, 10**6)]
    alone, drawn, sizes = Run(), {}, set()
    for ranks in (first, rest):
        for shares in zip(*(seen for seen, *_ in ranks), strict=True):
            ((epoch, decided),) = {share[:2] for share in shares}
            indices = [one for share in shares for one in share[2]]
            assert alone.step(len(indices), *dataset()[indices][1:]) == decided
            drawn.setdefault(epoch, []).extend(indices)
            sizes.add(decided)
    assert len(sizes) > 3
    assert [sorted(drawn[epoch]) for epoch in range(2)] == [list(range(203))] * 2
    for *_, found in rest:
        torch.testing.assert_close(found, alone.weights(), rtol=1e-9, atol=0)
