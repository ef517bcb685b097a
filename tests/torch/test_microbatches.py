"""Passes that a loop of somebody else runs are groups, with the statistics of Accumulation."""

import contextlib

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.graph import get_gradient_edge
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import cabs_torch
from tests.torch.engines import ENGINES, M, batch, gradients, losses_of, network, unreduced
from tests.torch.models import cross_entropy
from tests.torch.test_ranks_statistics import Branches, assert_same

# Microbatches of each of two ranks.
K = 3


def expected(count, dtype=torch.float64):
    """Return the statistics of so many groups, and the gradient, by an Accumulation."""
    model = network(dtype)
    accumulation = cabs_torch.Accumulation(model.parameters(), batch_size=M)
    for piece in torch.arange(M).tensor_split(count):
        loss = losses_of(model, piece, dtype).mean()
        accumulation.backward(loss, examples=len(piece))
    return accumulation.complete().read(), gradients(model)


def train(model, pieces, divisor, dtype=torch.float64):
    """Run the passes of some pieces, as a trainer does, and return their mean loss."""
    total = 0.0
    for piece in pieces:
        loss = losses_of(model, piece, dtype).mean() / divisor
        loss.backward()
        total += loss.detach()
    return total


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("count", [2, 4, 12])
def test_a_loop_has_the_statistics_of_an_accumulation(count, dtype):
    model = network(dtype)
    model.zero_grad(set_to_none=False)
    with cabs_torch.Microbatches(model, batch_size=M) as groups:
        loss = train(model, torch.arange(M).tensor_split(count), count, dtype)
    statistics = groups.complete(loss=loss)
    rtol = 1e-10 if dtype == torch.float64 else 1e-5
    found = [[statistics.read()], gradients(model)]
    other, gradient = expected(count, dtype)
    assert statistics.groups == count
    assert_same(found, [[other], gradient], rtol)


def test_gradients_are_to_the_bit_those_of_the_loop_alone():
    plain, model = network(torch.float32), network(torch.float32)
    train(plain, torch.arange(M).tensor_split(4), 4, torch.float32)
    with cabs_torch.Microbatches(model, batch_size=M):
        train(model, torch.arange(M).tensor_split(4), 4, torch.float32)
    assert torch.equal(gradients(plain), gradients(model))


def test_a_large_gradient_is_not_copied():
    layer, given = nn.Linear(200, 200, bias=False), []
    node = get_gradient_edge(layer.weight).node
    node.register_prehook(lambda gradients: given.append(gradients[0].data_ptr()))
    with cabs_torch.Microbatches(layer, batch_size=4):
        layer(torch.randn(2, 200)).sum().backward()
    assert [layer.weight.grad.data_ptr()] == given


def test_an_optimizer_gives_a_trace_a_group_and_old_gradients_may_be_zeroed_inside():
    model = network()
    halves = [{"params": list(model[:2].parameters())}, {"params": list(model[2:].parameters())}]
    optimizer = torch.optim.SGD(halves, 0.1)
    model(batch()[0]).sum().backward()
    with cabs_torch.Microbatches(optimizer, batch_size=M) as groups:
        optimizer.zero_grad()
        train(model, torch.arange(M).tensor_split(4), 4)
    statistics = groups.complete()
    assert statistics.variance_trace.shape == (2,)
    other, _ = expected(4)
    assert float(statistics.variance_trace.sum()) == pytest.approx(other.variance_trace)
    assert statistics.loss is None


def test_a_norm_stands_for_gradients_that_are_clipped():
    model = network()
    with cabs_torch.Microbatches(model, batch_size=M) as groups:
        train(model, torch.arange(M).tensor_split(4), 4)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    statistics = groups.complete(norm=norm)
    assert statistics.read().variance_trace == pytest.approx(expected(4)[0].variance_trace)


def test_a_compiled_model_has_groups():
    model = network()
    compiled = torch.compile(model, backend="aot_eager")
    with cabs_torch.Microbatches(model, batch_size=M) as groups:
        train(compiled, torch.arange(M).tensor_split(4), 4)
    found = groups.complete().read()
    assert found.variance_trace == pytest.approx(expected(4)[0].variance_trace)


def one_has_unused():
    """Return what is said where one rank's passes leave out a parameter that the other's use."""
    model = Branches()
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    pieces = torch.arange(M).tensor_split(4)[dist.get_rank() :: 2]
    inputs, targets = batch()
    with cabs_torch.Microbatches(
        [*model.first.parameters(), *model.others[0].parameters()], batch_size=M
    ) as groups:
        for number, piece in enumerate(pieces):
            with unreduced(wrapped, is_last=number == 1):
                outputs = wrapped(inputs[piece], dist.get_rank())
                (cross_entropy(outputs, targets[piece]).mean() / 2).backward()
    return groups.complete().read()


def test_a_parameter_that_one_rank_leaves_out_is_an_error_on_each(two):
    found = two.run(one_has_unused)
    assert all("RuntimeError" in said for said in found), found
    assert any("were given no gradient in backward pass" in said for said in found), found


def test_checkpoints_and_frozen_parameters_are_passed_over():
    model = network()
    model[0].requires_grad_(False)
    inputs, targets = batch()
    found = []
    for is_checkpointed in (False, True):
        model.zero_grad()
        with cabs_torch.Microbatches(model, batch_size=M) as groups:
            for piece in torch.arange(M).tensor_split(4):
                outputs = (
                    checkpoint(model, inputs[piece], use_reentrant=False)
                    if is_checkpointed
                    else model(inputs[piece])
                )
                (cross_entropy(outputs, targets[piece]).mean() / 4).backward()
        found.append(groups.complete().read())
    assert found[0] == found[1]


def add_up(model):
    """Have every part of a model add gradients up over ranks."""
    for module in model.modules():
        if hasattr(module, "set_gradient_divide_factor"):
            module.set_gradient_divide_factor(1.0)


def by_an_engine(engine, is_reduced_once, reduction, clipped=False):
    """Return the statistics and the gradient of K microbatches of each rank, in two steps."""
    model = ENGINES[engine](network())
    if reduction == "sum":
        add_up(model)
    ranks = dist.get_world_size()
    pieces = torch.arange(M).tensor_split(ranks * K)[dist.get_rank() :: ranks]
    divisor = K * ranks if reduction == "sum" else K
    for _ in range(2):
        model.zero_grad()
        with cabs_torch.Microbatches(model, batch_size=M, reduction=reduction) as groups:
            loss = 0.0
            for number, piece in enumerate(pieces):
                is_last = number == K - 1 or not is_reduced_once
                with unreduced(model, is_last=is_last):
                    loss += train(model, [piece], divisor)
        if clipped:
            norm = nn.utils.clip_grad_norm_(model.parameters(), 0.01)
            return groups.complete(norm=norm).read().variance_trace
        loss *= divisor / K
        statistics = groups.complete(loss=loss).read()
    return statistics, gradients(model)


@pytest.mark.parametrize("engine", ["ddp", "views", "unused", "fsdp", "fsdp by layers"])
@pytest.mark.parametrize("is_reduced_once", [True, False], ids=["once", "each"])
def test_engines_have_the_statistics_of_one_process(two, engine, is_reduced_once):
    other, gradient = expected(2 * K)
    found = two.all(by_an_engine, engine, is_reduced_once, "mean")
    assert found[0][0] == found[1][0]
    for statistics, one in found:
        assert statistics.groups == 2 * K
        assert_same([[statistics], one], [[other], gradient], 1e-10)


def test_replicas_of_pieces_count_once(four):
    other, gradient = expected(4 * K)
    for statistics, one in four.all(by_an_engine, "hsdp", True, "mean"):
        assert statistics.groups == 4 * K
        assert_same([[statistics], one], [[other], gradient], 1e-10)


def test_gradients_sent_in_half_precision_are_those_that_arrive(two):
    other, gradient = expected(2 * K)
    for statistics, one in two.all(by_an_engine, "compressed", True, "mean"):
        assert_same([[statistics], one], [[other], gradient], 3e-3)


@pytest.mark.parametrize("is_reduced_once", [True, False], ids=["once", "each"])
def test_a_sum_over_ranks_of_losses_over_all_examples(two, is_reduced_once):
    other, gradient = expected(2 * K)
    for statistics, one in two.all(by_an_engine, "fsdp by layers", is_reduced_once, "sum"):
        assert_same([[statistics], one], [[other], gradient], 1e-10)


@pytest.mark.parametrize(
    ("engine", "reduction"),
    [("ddp", "mean"), ("fsdp by layers", "mean"), ("fsdp by layers", "sum")],
)
def test_a_norm_over_ranks(two, engine, reduction):
    for trace in two.all(by_an_engine, engine, True, reduction, True):
        assert trace == pytest.approx(expected(2 * K)[0].variance_trace)


def wrongly(how):
    engine = "fsdp" if how == "summed" else "ddp"
    model = ENGINES[engine](network())
    if how == "summed":
        add_up(model)
    if how == "stale":
        losses_of(model, range(M)).mean().backward()
    count = 2 if how == "counts" and dist.get_rank() else 1
    pieces = torch.arange(M).tensor_split(2 * count)[dist.get_rank() :: 2]
    told = 3 if how == "short" else None
    with cabs_torch.Microbatches(model, batch_size=M, microbatches=told) as groups:
        for number, piece in enumerate(pieces):
            is_last = how != "unreduced" and number == count - 1
            with unreduced(model, is_last=is_last):
                train(model, [piece], count)
    if how == "clipped":
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    return groups.complete().read()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("summed", "if the engine makes their sum over ranks, give reduction='sum'"),
        ("unreduced", "holds another gradient than the mean over 2 ranks of what 1"),
        ("clipped", "before gradients are clipped"),
        ("stale", "set them to zero before the first pass"),
        ("short", "microbatches = 3 were expected, got 1 backward passes"),
        ("counts", "take different numbers of microbatches"),
    ],
)
def test_what_ranks_do_wrong_is_an_error_on_each(two, how, message):
    for said in two.run(wrongly, how):
        assert message in said, said


class Parts(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.other = nn.Linear(5, 3), nn.Linear(5, 3)
        self.double()

    def forward(self, inputs):
        return self.used(inputs)


def some(model, count=4):
    train(model, torch.arange(M).tensor_split(count), count)


def doubled(model):
    some(model)
    for one in model.parameters():
        one.grad.mul_(2.0)


def stopped(model):
    some(model)
    model[3].weight.sum().backward()


def zeroed(model):
    some(model)
    model.zero_grad()


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda _: None, "no backward pass was seen: run the forward and backward"),
        (lambda model: some(model, 1), "at least two microbatches are needed, got 1 of one rank"),
        (lambda model: some(model, 5), "24 examples were given, which are not 5 microbatches"),
        (doubled, "holds another gradient than what 4 backward passes gave"),
        (zeroed, "before gradients are clipped, unscaled or set to zero"),
        (stopped, "were given no gradient in backward pass 5 before the with block ended"),
    ],
)
def test_what_is_no_batch_is_an_error(act, message):
    model = network()
    with cabs_torch.Microbatches(model, batch_size=M) as groups:
        act(model)
    with pytest.raises(RuntimeError, match=message):
        groups.complete()


def test_gradients_of_before_are_an_error():
    model = network()
    some(model)
    with cabs_torch.Microbatches(model, batch_size=M) as groups:
        some(model)
    with pytest.raises(RuntimeError, match="gradients were not zero before the first backward"):
        groups.complete()


def test_a_parameter_without_a_gradient_is_named_and_the_loop_goes_on():
    model = Parts()
    with cabs_torch.Microbatches(model, batch_size=M) as groups:
        some(model)
    assert model.used.weight.grad is not None
    with pytest.raises(RuntimeError, match=r"in backward pass 1 before [^:]*: .*other\.weight"):
        groups.complete()
    model.zero_grad()
    with cabs_torch.Microbatches(model.used.parameters(), batch_size=M) as groups:
        some(model)
    assert groups.complete().groups == 4


def test_gradients_in_several_parts_are_an_error():
    layer, inputs = nn.Linear(3, 3), torch.randn(2, 3, requires_grad=True)
    other = nn.Linear(3, 3)
    with cabs_torch.Microbatches([*layer.parameters(), *other.parameters()], batch_size=2) as one:
        hidden = checkpoint(layer, inputs, use_reentrant=True)
        other(checkpoint(layer, hidden, use_reentrant=True)).square().mean().backward()
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        one.complete()


def test_order_is_checked():
    model = network()
    with cabs_torch.Microbatches(model, batch_size=M) as groups:
        some(model)
        with pytest.raises(RuntimeError, match="after the with block"):
            groups.complete()
    groups.complete()
    with pytest.raises(RuntimeError, match="make a new Microbatches each step"):
        groups.complete()
    with pytest.raises(RuntimeError, match="entered before"), groups:
        pass


def test_arguments_are_checked():
    model = network()
    with pytest.raises(ValueError, match="reduction must be 'mean' or 'sum', got reduction = 'a'"):
        cabs_torch.Microbatches(model, batch_size=M, reduction="a")
    with pytest.raises(TypeError, match="microbatches must be an integer"):
        cabs_torch.Microbatches(model, batch_size=M, microbatches=2.0)
    with pytest.raises(ValueError, match="batch_size must be at least 2"):
        cabs_torch.Microbatches(model, batch_size=1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with cabs_torch.Microbatches(optimizer, batch_size=M) as groups:
        some(model)
    with pytest.raises(ValueError, match="norm must not be given with an optimizer"):
        groups.complete(norm=1.0)


def test_hooks_are_gone_after_an_error():
    model = network()
    with (
        contextlib.suppress(ZeroDivisionError),
        cabs_torch.Microbatches(model, batch_size=M) as groups,
    ):
        some(model)
        raise ZeroDivisionError
    seen = len(groups._sums)
    some(model)
    assert len(groups._sums) == seen == 4


def on_its_own():
    """Return whether what an engine reduces is told apart from this rank's own."""
    inner = network()
    with cabs_torch.Microbatches(inner, batch_size=M, process_group=False) as groups:
        some(inner)
    own = groups.complete().read().variance_trace
    model = DistributedDataParallel(network())
    with cabs_torch.Microbatches(model, batch_size=M, process_group=False) as groups:
        train(model, torch.arange(M).tensor_split(4)[2 * dist.get_rank() :][:2], 2)
    with pytest.raises(RuntimeError, match="holds another gradient than what 2 backward passes"):
        groups.complete()
    return own


def of_an_odd_batch():
    return cabs_torch.Microbatches(network(), batch_size=M + 1)


def test_a_batch_that_ranks_cannot_share_alike_is_an_error(two):
    for said in two.run(of_an_odd_batch):
        assert "batch_size must be a multiple of the 2 ranks" in said


def test_a_rank_can_be_on_its_own(two):
    for trace in two.all(on_its_own):
        assert trace == pytest.approx(expected(4)[0].variance_trace)
