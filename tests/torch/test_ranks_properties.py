"""Whatever is trained on several ranks, in whatever shares, is what one process trains."""

import dataclasses

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import cabs
import cabs_torch
from tests.torch.engines import ENGINES, unreduced, weights
from tests.torch.models import cross_entropy
from tests.torch.reference import gradients_one_by_one

pytestmark = pytest.mark.slow

RATE = 0.5


@dataclasses.dataclass(frozen=True)
class Case:
    """A network, and how many examples each microbatch of each rank has in each step."""

    widths: tuple[int, ...]
    is_normalized: bool
    is_double: bool
    engine: str
    way: str
    sizes: tuple[tuple[tuple[int, ...], ...], ...]
    seed: int

    def model(self):
        torch.manual_seed(self.seed)
        layers = [nn.Linear(3, self.widths[0])]
        for before, after in zip(self.widths, (*self.widths[1:], 4), strict=True):
            # Of a large epsilon, since few numbers that are nearly equal magnify rounding errors.
            layers += [nn.LayerNorm(before, eps=1.0)] if self.is_normalized else []
            layers += [nn.Tanh(), nn.Linear(before, after, bias=after % 2 == 0)]
        return nn.Sequential(*layers).to(torch.float64 if self.is_double else torch.float32)

    def controller(self):
        return cabs.Controller(sizes=cabs.BatchSizes.range(2, 100_000))

    def data(self, step):
        """Return the examples of a step, cut into those of each microbatch of each rank."""
        generator = torch.Generator().manual_seed(self.seed + step)
        shares = self.sizes[step]
        flat = [size for share in shares for size in share]
        inputs = torch.randn(sum(flat), 3, generator=generator, dtype=torch.float64)
        targets = torch.randint(4, (sum(flat),), generator=generator)
        inputs = inputs.to(torch.float64 if self.is_double else torch.float32)
        pieces = list(zip(inputs.split(flat), targets.split(flat), strict=True))
        count = len(shares[0])
        return [pieces[start : start + count] for start in range(0, len(pieces), count)]


@st.composite
def cases(draw, ranks):
    way = draw(st.sampled_from(["exact", "added", "groups"]))
    count = 1 if way == "exact" else draw(st.integers(1, 3))
    size = st.integers(1, 5)
    share = st.lists(size, min_size=count, max_size=count).map(tuple)
    step = st.lists(share, min_size=ranks, max_size=ranks).map(tuple)
    return Case(
        widths=tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))),
        is_normalized=draw(st.booleans()),
        is_double=draw(st.booleans()),
        engine=draw(st.sampled_from(["ddp", "views", "fsdp", "fsdp by layers"])),
        way=way,
        sizes=tuple(draw(st.lists(step, min_size=1, max_size=3))),
        seed=draw(st.integers(0, 1000)),
    )


def measured(case, model, controller, pieces, batch_size):
    """Do the passes of a rank's microbatches, and return the statistics of all ranks."""
    groups, parts = None, []
    if case.way == "groups":
        groups = cabs_torch.Accumulation(model, batch_size=batch_size, controller=controller)
    for number, (inputs, targets) in enumerate(pieces):
        with unreduced(model, is_last=number == len(pieces) - 1):
            losses = cross_entropy(model(inputs), targets)
            if groups is not None:
                groups.backward(losses.mean(), examples=len(losses))
            else:
                options = {"batch_size": batch_size, "controller": controller}
                parts.append(cabs_torch.backward(losses, **options))
    if groups is not None:
        return groups.complete()
    if case.way == "exact":
        return parts[0]
    norm_squared = cabs_torch.gradient_norm_squared(model.parameters())
    loss = sum(one.loss * one.examples for one in parts) / batch_size
    return sum(one.partial for one in parts).complete(gradient_norm_squared=norm_squared, loss=loss)


def on_a_rank(case):
    """Return what each step shows and decides, and the weights after the last one."""
    model, controller, found = ENGINES[case.engine](case.model()), case.controller(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for step, sizes in enumerate(case.sizes):
        optimizer.zero_grad()
        pieces = case.data(step)[dist.get_rank()]
        statistics = measured(case, model, controller, pieces, sum(map(sum, sizes))).read()
        optimizer.step()
        decided = controller.update(statistics, learning_rate=100.0 * RATE)
        found.append((statistics, decided.batch_size))
    return found, weights(model)


def mean_of(rows, pieces):
    """Return the sizes and mean gradients of groups, which follow each other in the rows."""
    sizes = [len(targets) for share in pieces for _, targets in share]
    return torch.tensor(sizes), torch.stack([one.mean(dim=0) for one in rows.split(sizes)])


def assert_as_one_process(case, found):
    """Compare with a loop over the examples in float64, and with plain training."""
    model, controller = case.model(), case.controller()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    rtol = 1e-10 if case.is_double else 1e-5
    for step, (statistics, decided) in enumerate(found[0]):
        pieces = case.data(step)
        inputs, targets = map(
            torch.cat, zip(*(one for share in pieces for one in share), strict=True)
        )
        rows = gradients_one_by_one(model, cross_entropy, inputs, targets)
        sizes, means = torch.ones(len(rows)), rows
        if case.way == "groups":
            sizes, means = mean_of(rows, pieces)
        squares, norm = sizes.double() @ means.square().sum(dim=1), rows.mean(dim=0).square().sum()
        trace = (squares - len(rows) * norm) / (len(means) - 1)
        losses = cross_entropy(model(inputs), targets)
        loss = float(losses.detach().mean())
        assert (statistics.examples, statistics.groups) == (len(rows), len(means))
        assert statistics.group_square_sum == pytest.approx(float(squares), rel=rtol)
        # Where gradients nearly cancel or agree, the small differences carry rounding errors.
        slack = 2 * rtol * float(squares) / (len(means) - 1)
        assert statistics.gradient_norm_squared == pytest.approx(float(norm), rel=rtol, abs=slack)
        assert statistics.variance_trace == pytest.approx(float(trace), rel=rtol, abs=slack)
        assert statistics.loss == pytest.approx(loss, rel=rtol)
        expected = controller.update(
            learning_rate=100.0 * RATE, variance_trace=float(trace), loss=loss
        )
        # Of some thousands, in single precision.
        assert abs(decided - expected.batch_size) <= (0 if case.is_double else 1 + decided * 1e-4)
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
    torch.testing.assert_close(found[1], weights(model), rtol=rtol, atol=rtol)


@given(case=cases(2))
@settings(max_examples=25)
def test_two_ranks_are_one_process(two, case):
    first, second = two.all(on_a_rank, case)
    # To the bit, since decisions hang on them.
    assert first[0] == second[0]
    assert_as_one_process(case, first)


@given(case=cases(4))
@settings(max_examples=15)
def test_four_ranks_are_one_process(four, case):
    found = four.all(on_a_rank, case)
    assert all(one[0] == found[0][0] for one in found)
    assert_as_one_process(case, found[0])
