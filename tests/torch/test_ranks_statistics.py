"""Statistics over ranks are those of one process on the same examples, by one collective more."""

import dataclasses

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import cabs_torch
from tests.torch.engines import ENGINES, M, batch, gradients, losses_of, network, share, weights
from tests.torch.models import cross_entropy


def steps(engine, is_equal, dtype, options):
    """Return the statistics of three steps, the gradient of the last, and the weights after it."""
    model = ENGINES[engine](network(dtype))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    found = []
    for _ in range(3):
        optimizer.zero_grad()
        losses = losses_of(model, share(is_equal), dtype)
        if "parameter_groups" in options:
            options = {**options, "parameter_groups": halves(model)}
        found.append(cabs_torch.backward(losses, batch_size=None if is_equal else M, **options))
        optimizer.step()
    return [one.read() for one in found], gradients(model), weights(model)


def halves(model):
    parameters = list(model.parameters())
    return [parameters[:3], parameters[3:]]


def alone(dtype, options, count=3):
    model = network(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    found = []
    for _ in range(count):
        optimizer.zero_grad()
        if "parameter_groups" in options:
            options = {**options, "parameter_groups": halves(model)}
        losses = losses_of(model, list(range(M)), dtype)
        found.append(cabs_torch.backward(losses, **options))
        optimizer.step()
    return [one.read() for one in found], gradients(model), weights(model)


def assert_same(found, expected, rtol):
    for one, other in zip(found, expected, strict=True):
        if isinstance(one, list):
            # Of parts that were completed by hand, nobody has said which metric they are in.
            one, other = (
                [
                    torch.as_tensor(number)
                    for step in of
                    for name, number in dataclasses.asdict(step).items()
                    if name != "in_metric"
                ]
                for of in (one, other)
            )
        torch.testing.assert_close(one, other, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("engine", [name for name in ENGINES if name != "hsdp"])
@pytest.mark.parametrize("is_equal", [True, False], ids=["equal", "unequal"])
def test_two_ranks_are_one_process(two, engine, is_equal):
    rtol = 3e-3 if engine == "compressed" else 1e-10
    expected = alone(torch.float64, {})
    found = two.all(steps, engine, is_equal, torch.float64, {})
    for one in found:
        assert_same(one, expected, rtol)
    # The same to the bit, since decisions hang on them.
    assert found[0][0] == found[1][0]


@pytest.mark.parametrize("engine", ["ddp", "fsdp by layers", "hsdp"])
@pytest.mark.parametrize("is_equal", [True, False], ids=["equal", "unequal"])
def test_four_ranks_are_one_process(four, engine, is_equal):
    expected = alone(torch.float64, {})
    found = four.all(steps, engine, is_equal, torch.float64, {})
    for one in found:
        assert_same(one, expected, 1e-10)
        assert one[0] == found[0][0]


@pytest.mark.parametrize("engine", ["ddp", "fsdp by layers"])
def test_single_precision_is_kept(two, engine):
    expected = alone(torch.float32, {})
    for one in two.all(steps, engine, False, torch.float32, {}):
        assert_same(one, expected, 1e-5)


@pytest.mark.parametrize("engine", ["ddp", "fsdp", "fsdp by layers"])
def test_parameter_groups_have_sums_of_their_own(two, engine):
    options = {"parameter_groups": True}
    expected = alone(torch.float64, options)
    for one in two.all(steps, engine, False, torch.float64, options):
        for step, other in zip(one[0], expected[0], strict=True):
            assert step.variance_trace.shape == (2,)
            torch.testing.assert_close(
                torch.tensor(step.variance_trace), torch.tensor(other.variance_trace)
            )


class Branches(nn.Module):
    """A model of which the ranks use different parts."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.others = nn.Linear(5, 3), nn.ModuleList([nn.Linear(3, 3) for _ in "12"])
        self.double()

    def forward(self, inputs, branch):
        return self.others[branch](self.first(inputs).tanh())


def of_branches(are_named):
    model = DistributedDataParallel(Branches(), find_unused_parameters=True)
    inputs, targets = batch()
    mine = share(True)
    losses = cross_entropy(model(inputs[mine], dist.get_rank()), targets[mine])
    named = {"parameters": model.parameters()} if are_named else {}
    return cabs_torch.backward(losses, **named).read(), gradients(model.module)


def test_ranks_may_use_different_parameters(two):
    model, (inputs, targets) = Branches(), batch()
    shares = [list(range(rank, M, 2)) for rank in range(2)]
    losses = [
        cross_entropy(model(inputs[mine], rank), targets[mine]) for rank, mine in enumerate(shares)
    ]
    rows = []
    for loss in torch.cat(losses):
        given = torch.autograd.grad(
            loss, list(model.parameters()), retain_graph=True, allow_unused=True
        )
        pairs = zip(given, model.parameters(), strict=True)
        rows.append(
            torch.cat(
                [torch.zeros_like(b).flatten() if a is None else a.flatten() for a, b in pairs]
            )
        )
    rows = torch.stack(rows)
    for statistics, gradient in two.all(of_branches, True):
        torch.testing.assert_close(gradient, rows.mean(dim=0))
        assert statistics.variance_trace == pytest.approx(float(rows.var(dim=0).sum()))
    for said in two.run(of_branches, False):
        assert "If a parameter is used on some ranks alone, give parameters=" in said


def under_options():
    """Return what options change, beside what one process computes of the same share."""
    model = DistributedDataParallel(network())
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaled = cabs_torch.backward(losses_of(model, share(False)), batch_size=M, scaler=scaler).read()
    model.zero_grad()
    sampled = cabs_torch.backward(losses_of(model, share(True)), sample=3)
    found = sampled.estimated, sampled.examples, sampled.measured, float(sampled.group_square_sum)
    own = cabs_torch.backward(
        losses_of(network(), share(True)), sample=3, process_group=False
    ).group_square_sum
    return scaled, found, float(own)


def test_options_are_those_of_one_process(two):
    (expected, *_), _, _ = alone(torch.float64, {})
    found = two.all(under_options)
    sums = sum(own for _, _, own in found)
    for scaled, (estimated, examples, measured, square_sum), _ in found:
        assert_same([[scaled]], [[expected]], 1e-10)
        assert (estimated, examples, measured) == (M - 6, M, 1.0)
        assert square_sum == pytest.approx(sums)


class Words(nn.Module):
    """A model with a sparse gradient, inside of a reentrant checkpoint or not."""

    def __init__(self, is_sparse):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.out = nn.Embedding(9, 4, sparse=is_sparse), nn.Linear(4, 3)
        self.is_sparse = is_sparse
        self.double()

    def forward(self, words):
        found = self.table(words)
        if self.is_sparse:
            return self.out(found)
        return checkpoint(self.out, found, use_reentrant=True)


def of_words(is_sparse, alone=False):
    generator = torch.Generator().manual_seed(2)
    words, targets = (torch.randint(high, (M,), generator=generator) for high in (9, 3))
    model = Words(is_sparse)
    mine = list(range(M)) if alone else share(False)
    wrapped = model if alone else DistributedDataParallel(model)
    losses = cross_entropy(wrapped(words[mine]), targets[mine])
    return cabs_torch.backward(losses, batch_size=M).read()


@pytest.mark.parametrize("is_sparse", [True, False], ids=["sparse", "reentrant"])
def test_sparse_gradients_and_checkpoints_are_those_of_one_process(two, is_sparse):
    for found in two.all(of_words, is_sparse):
        assert_same([[found]], [[of_words(is_sparse, alone=True)]], 1e-10)


def with_an_estimate():
    model = DistributedDataParallel(network())
    model.module[0].weight.register_hook(lambda gradient: gradient)
    return cabs_torch.backward(
        losses_of(model, share(True)), uncovered="microbatches"
    ).read(), gradients(model)


def test_what_is_estimated_has_the_gradient_of_all(two):
    model = network()
    expected = cabs_torch.backward(losses_of(model, list(range(M)))).read()
    for found, gradient in two.all(with_an_estimate):
        torch.testing.assert_close(gradient, gradients(model))
        assert found.gradient_norm_squared == pytest.approx(expected.gradient_norm_squared)
        assert found.variance_trace == pytest.approx(expected.variance_trace, rel=0.5)


def adam_steps(engine, is_equal):
    """Return the statistics of three steps in the metric of Adam, on all ranks or one."""
    model = network() if engine is None else ENGINES[engine](network())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    examples = range(M) if engine is None else share(is_equal)
    options = {} if engine is None or is_equal else {"batch_size": M}
    found = []
    for _ in range(3):
        optimizer.zero_grad()
        losses = losses_of(model, list(examples))
        found.append(cabs_torch.backward(losses, optimizer=optimizer, **options).read())
        optimizer.step()
    return found


@pytest.mark.parametrize("is_equal", [True, False, None])
def test_the_metric_of_adam_is_that_of_one_process(two, is_equal):
    alone = adam_steps(None, is_equal)
    for found in two.all(adam_steps, "ddp", is_equal):
        for one, expected in zip(found, alone, strict=True):
            assert one.group_square_sum == pytest.approx(expected.group_square_sum, rel=1e-9)
            norms = (one.gradient_norm_squared, expected.gradient_norm_squared)
            assert norms[0] == pytest.approx(norms[1], rel=1e-9)


def test_the_metric_of_pieces_and_of_microbatches_is_refused(two):
    for message in two.run(adam_steps, "fsdp", True):
        assert "is a DTensor, as FSDP and tensor parallelism make them" in message
    for message in two.run(metric_of_a_microbatch):
        assert "the metric of a step is made of the whole batch's gradient" in message


def metric_of_a_microbatch():
    model = DistributedDataParallel(network())
    losses = losses_of(model, share(is_equal=True)[:4])
    optimizer = torch.optim.Adam(model.parameters())
    return cabs_torch.backward(losses, optimizer=optimizer, batch_size=M).partial.group_square_sum
