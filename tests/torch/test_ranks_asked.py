"""What averages gradients is asked in a first step, by all ranks or by none of them."""

import warnings

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import cabs_torch
from cabs_torch.ranks.share import Share
from tests.torch.engines import ENGINES, M, batch, losses_of, network, share, unreduced
from tests.torch.models import cross_entropy
from tests.torch.test_microbatches import add_up
from tests.torch.test_ranks_statistics import Branches

pytestmark = pytest.mark.slow


def steps_of_branches(branches, are_named):
    """Return statistics of steps in which each rank takes a branch of the model."""
    model = DistributedDataParallel(Branches(), find_unused_parameters=True)
    inputs, targets = batch()
    mine = share(True)
    named = {"parameters": list(model.parameters())} if are_named else {}
    found = []
    for of_rank in branches:
        model.zero_grad()
        losses = cross_entropy(model(inputs[mine], of_rank[dist.get_rank()]), targets[mine])
        found.append(cabs_torch.backward(losses, **named).read().variance_trace)
    return found


def of_one_process(of_rank):
    """Return the variance's trace over all examples, each by the branch of its rank."""
    model, (inputs, targets) = Branches(), batch()
    rows = []
    for rank, branch in enumerate(of_rank):
        for example in range(rank, M, len(of_rank)):
            model.zero_grad()
            loss = cross_entropy(model(inputs[[example]], branch), targets[[example]])
            loss.sum().backward()
            given = [one.grad for one in model.parameters()]
            pairs = zip(given, model.parameters(), strict=True)
            rows.append(
                torch.cat([(torch.zeros_like(b) if a is None else a).flatten() for a, b in pairs])
            )
    return float(torch.stack(rows).var(dim=0).sum())


def test_ranks_may_take_other_branches_in_every_step(two):
    branches = [(0, 1), (0, 0), (1, 0), (1, 1)]
    for found in two.all(steps_of_branches, branches, True):
        assert found == pytest.approx([of_one_process(of_rank) for of_rank in branches])


def test_a_branch_that_is_new_to_one_rank_leaves_no_rank_waiting(two):
    for said in two.run(steps_of_branches, [(0, 0), (0, 1)], False):
        assert "give parameters=model.parameters()" in said


class TwoHeads(nn.Module):
    """Parameters of the same size, found in other orders from one example and from several."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right = nn.Linear(5, 3), nn.Linear(5, 3)
        self.last = nn.Linear(3, 3, bias=False)
        self.double()

    def forward(self, inputs):
        return self.last(self.left(inputs).tanh()) + self.right(inputs)


def one_and_several():
    model = DistributedDataParallel(TwoHeads())
    inputs, targets = batch()
    mine = share(None)
    found = []
    for _ in range(2):
        model.zero_grad()
        losses = cross_entropy(model(inputs[mine]), targets[mine])
        found.append(cabs_torch.backward(losses, batch_size=M).read().variance_trace)
    return found


def test_a_rank_with_one_example_asks_about_the_same_parameter(two):
    model, (inputs, targets) = TwoHeads(), batch()
    expected = cabs_torch.backward(cross_entropy(model(inputs), targets)).read().variance_trace
    for found in two.all(one_and_several):
        assert found == pytest.approx([expected] * 2)


def added_up_behind_zeros():
    # The head is zero at first, so that what lies before it has no gradient.
    torch.manual_seed(0)
    first, head = nn.Linear(5, 1, bias=False), nn.Linear(1, 6, bias=False)
    nn.init.zeros_(head.weight)
    model = fully_shard(nn.Sequential(first, head).double(), mesh=init_device_mesh("cpu", (2,)))
    model.set_gradient_divide_factor(1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    said = []
    for _ in range(2):
        optimizer.zero_grad()
        try:
            said.append(str(cabs_torch.backward(losses_of(model, share(True))).read().examples))
        except ValueError as error:
            said.append(str(error))
        optimizer.step()
    return said


def test_gradients_that_are_zero_at_first_are_asked_about_again(two):
    for first, second in two.all(added_up_behind_zeros):
        assert first == str(M)
        assert "has the sum of the gradients of 2 ranks" in second


def in_microbatches(engine, is_sum, each):
    """Return what is said of each step whose last microbatch, or each, is reduced."""
    model = ENGINES[engine](network())
    if is_sum:
        add_up(model)
    pieces, said = torch.arange(M).tensor_split(4)[dist.get_rank() :: 2], []
    for _ in range(2):
        model.zero_grad()
        parts = []
        try:
            for number, piece in enumerate(pieces):
                with unreduced(model, is_last=number == 1 or each):
                    parts.append(cabs_torch.backward(losses_of(model, piece), batch_size=M))
        except ValueError as error:
            return str(error)
        norm_squared = cabs_torch.gradient_norm_squared(model.parameters())
        whole = sum(one.partial for one in parts).complete(gradient_norm_squared=norm_squared)
        said.append(whole.read().variance_trace)
    return said


@pytest.mark.parametrize("each", [False, True])
def test_an_engine_that_adds_up_is_asked_in_each_microbatch_of_a_first_step(two, each):
    model = network()
    expected = cabs_torch.backward(losses_of(model, range(M))).read().variance_trace
    for engine in ("ddp", "fsdp by layers"):
        for said in two.all(in_microbatches, engine, False, each):
            assert said == pytest.approx([expected] * 2)
    for said in two.run(in_microbatches, "fsdp by layers", True, each):
        assert "has the sum of the gradients of 2 ranks" in said


def with_gradients_on_one_rank():
    model = DistributedDataParallel(network())
    cabs_torch.backward(losses_of(model, share(True))).read()
    if dist.get_rank():
        model.zero_grad()
    return cabs_torch.backward(losses_of(model, share(True))).read()


def test_gradients_left_on_one_rank_are_an_error_on_all(two):
    first, second = two.run(with_gradients_on_one_rank)
    assert "gradients were not zero before the pass" in first
    assert "a rank had gradients before the pass" in second


def of_the_same_examples(are_same):
    model = DistributedDataParallel(network())
    mine = list(range(0, M, 2)) if are_same else share(True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            model.zero_grad()
            cabs_torch.backward(losses_of(model, mine)).read()
    return [str(one.message) for one in caught if one.category is RuntimeWarning]


def test_ranks_that_have_the_same_examples_are_warned_once(two):
    for said in two.all(of_the_same_examples, True):
        assert len(said) == 1
        assert "give each rank a share of the batch of its own" in said[0]
    assert two.all(of_the_same_examples, False) == [[], []]


@given(st.integers(0, 2**40), st.integers(1, 2**17))
def test_equal_marks_are_seen_to_be_equal_on_many_ranks(batch_size, ranks):
    nothing = torch.zeros(())
    shared = Share(1, batch_size, True, None, None, nothing[None], nothing[None], nothing, 1)
    square = np.float64(shared.mark) ** 2
    # Added up one after another, as a ring does, every sum on the way is exact.
    assert square == shared.mark**2
    assert int(ranks * square) == ranks * shared.mark**2 < 2**53
