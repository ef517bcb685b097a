"""With ``process_group=False``, a number is that of this rank's own examples, or an error."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, distribute_module, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import cabs_torch
from tests.processes import joined
from tests.torch.engines import ENGINES
from tests.torch.models import cross_entropy
from tests.torch.reference import gradients_one_by_one

pytestmark = pytest.mark.slow

EACH = 4


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3)).double()


def share():
    """Return this rank's share of the batch."""
    torch.manual_seed(1)
    inputs, targets = torch.randn(2 * EACH, 5).double(), torch.randint(3, (2 * EACH,))
    mine = slice(EACH * dist.get_rank(), EACH * (dist.get_rank() + 1))
    return inputs[mine], targets[mine]


# What averages gradients, and nothing.
WRAPPERS = {"none": lambda model: model} | {
    name: ENGINES[name] for name in ("ddp", "static", "unused", "views", "fsdp", "fsdp by layers")
}


def own_rows():
    """Return the gradients of this rank's own examples, one by one."""
    return gradients_one_by_one(network(), cross_entropy, *share())


def trace_of(rows):
    return rows.var(dim=0).sum()


def assert_nothing_written(model):
    assert all(parameter.grad is None for parameter in model.parameters())


def what_is_no_process_group_is_an_error():
    model = network()
    inputs, targets = share()
    losses = cross_entropy(model(inputs), targets)
    for act in (
        lambda: cabs_torch.backward(losses, process_group=True),
        lambda: cabs_torch.Accumulation(model.parameters(), batch_size=4, process_group="gloo"),
        lambda: cabs_torch.gradient_norm_squared(model.parameters(), process_group=0),
    ):
        with pytest.raises(TypeError, match="process_group must be a process group"):
            act()
    groups = [dist.new_group([rank]) for rank in range(2)]
    with pytest.raises(ValueError, match="must have this rank in it"):
        cabs_torch.backward(losses, process_group=groups[1 - dist.get_rank()])
    assert_nothing_written(model)
    # A group of this rank alone.
    own = groups[dist.get_rank()]
    torch.testing.assert_close(
        cabs_torch.backward(losses, process_group=own).variance_trace, trace_of(own_rows())
    )
    step = cabs_torch.compile(model, lambda x, y: cross_entropy(model(x), y), backend="aot_eager")
    with pytest.raises(ValueError, match="a compiled step adds nothing up over 2 ranks"):
        step(inputs, targets)


def backward_measures_this_ranks_own_examples_under_every_wrapper():
    inputs, targets = share()
    rows = own_rows()
    for name, wrap in WRAPPERS.items():
        model = wrap(network())
        plain = wrap(network())
        for _ in range(3):
            for one in (model, plain):
                one.zero_grad()
            cross_entropy(plain(inputs), targets).mean().backward()
            statistics = cabs_torch.backward(
                cross_entropy(model(inputs), targets), process_group=False
            )
            assert statistics.examples == EACH, name
            torch.testing.assert_close(statistics.variance_trace, trace_of(rows))
            torch.testing.assert_close(
                statistics.gradient_norm_squared, rows.mean(dim=0).square().sum()
            )
            for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
                same = ours.grad == theirs.grad
                assert bool((same.to_local() if hasattr(same, "to_local") else same).all()), name


def gradients_that_somebody_reduces_give_no_statistics_of_microbatches():
    inputs, targets = share()
    for make in (DistributedDataParallel, lambda one: DistributedDataParallel(one, None, None, 0)):
        model = make(network())
        accumulation = cabs_torch.Accumulation(
            model.parameters(), batch_size=EACH, process_group=False
        )
        with model.no_sync():
            accumulation.backward(cross_entropy(model(inputs[:2]), targets[:2]).mean(), examples=2)
        loss = cross_entropy(model(inputs[2:]), targets[2:]).mean()
        with pytest.raises(RuntimeError, match="something reduces gradients over ranks"):
            accumulation.backward(loss, examples=2)
        model = make(network())
        losses = cross_entropy(model(inputs), targets)
        with pytest.raises(RuntimeError, match="something reduces gradients over ranks"):
            cabs_torch.backward(losses, batch_size=2 * EACH, process_group=False)


def reductions_are_noticed_in_tables_and_in_reentrant_checkpoints():
    torch.manual_seed(0)
    factors = nn.ModuleList(
        [nn.Embedding(100_000, 4, sparse=is_sparse) for is_sparse in (True, False)]
    ).double()
    torch.manual_seed(dist.get_rank())
    ids = torch.randint(100_000, (2, EACH))

    class Factors(nn.Module):
        def __init__(self):
            super().__init__()
            self.both = factors

        def forward(self, one, two):
            return (self.both[0](one) * self.both[1](two)).sum(dim=1)

    class Inside(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network()

        def forward(self, inputs):
            return checkpoint(self.inner, inputs.clone().requires_grad_(), use_reentrant=True)

    class Classes(nn.Module):
        def __init__(self):
            super().__init__()
            self.matrix = nn.Parameter(torch.randn(1024, 10).double())

        def forward(self, inputs):
            return inputs @ self.matrix

    inputs, targets = share()
    # A row of the matrix has gradients that are 0 in the sum over the classes.
    classes, pixels = DistributedDataParallel(Classes()), torch.randn(EACH, 1024).double()
    # Held, since nothing is reduced for a wrapper that is gone.
    inside, tables = DistributedDataParallel(Inside()), DistributedDataParallel(Factors())
    for losses, options in (
        (tables(*ids).square(), {}),
        (cross_entropy(classes(pixels), targets), {}),
        (cross_entropy(inside(inputs), targets), {"parameter_groups": [list(inside.parameters())]}),
    ):
        with pytest.raises(RuntimeError, match="something reduces gradients over ranks"):
            cabs_torch.backward(losses, batch_size=2 * EACH, process_group=False, **options)


def gradients_that_overflow_are_no_reduction():
    inputs, targets = share()
    inputs[0, 0] = torch.inf
    model = network()
    losses = cross_entropy(model(inputs), targets)
    statistics = cabs_torch.backward(losses, batch_size=2 * EACH, process_group=False)
    assert not bool(statistics.group_square_sum.isfinite())


def microbatches_without_a_reduction_are_this_ranks_groups():
    inputs, targets = share()
    rows = own_rows()
    model = DistributedDataParallel(network())
    accumulation = cabs_torch.Accumulation(model.parameters(), batch_size=EACH, process_group=False)
    with model.no_sync():
        for part in (slice(0, 2), slice(2, 4)):
            loss = cross_entropy(model(inputs[part]), targets[part]).mean()
            accumulation.backward(loss, examples=2)
    groups = rows.view(2, 2, -1).mean(dim=1)
    found = accumulation.complete().variance_trace
    torch.testing.assert_close(found, 2 * trace_of(groups))
    model.zero_grad()
    parts = []
    with model.no_sync():
        for part in (slice(0, 2), slice(2, 4)):
            losses = cross_entropy(model(inputs[part]), targets[part])
            statistics = cabs_torch.backward(losses, batch_size=EACH, process_group=False)
            parts.append(statistics.partial)
    square = cabs_torch.gradient_norm_squared(model.parameters(), process_group=False)
    torch.testing.assert_close(
        sum(parts).complete(gradient_norm_squared=square).variance_trace, trace_of(rows)
    )


def sharded_parameters_are_errors_and_no_zeros():
    inputs, targets = share()
    mesh = init_device_mesh("cpu", (2,))
    model = fully_shard(network(), mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for parameters in (model.parameters(), optimizer):
        with pytest.raises(ValueError, match="is a DTensor"):
            cabs_torch.Accumulation(parameters, batch_size=EACH, process_group=False)
    losses = cross_entropy(model(inputs), targets)
    held = [nn.Parameter(torch.ones(3))]
    accumulation = cabs_torch.Accumulation(held, batch_size=EACH, process_group=False)
    with pytest.raises(ValueError, match="none of them in its graph"):
        accumulation.backward(losses.mean(), examples=2)
    # Between the passes the model holds the whole parameters, whose gradients it then shards.
    accumulation = cabs_torch.Accumulation(model.parameters(), batch_size=EACH, process_group=False)
    with pytest.raises(RuntimeError, match="something reduces gradients over ranks"):
        accumulation.backward(losses.mean(), examples=2)
    with pytest.raises(ValueError, match="is a DTensor"):
        cabs_torch.gradient_norm_squared(model.parameters(), process_group=False)


def distributed_tensors_are_errors():
    model = distribute_module(network(), init_device_mesh("cpu", (2,)))
    whole = [distribute_tensor(one, model[0].weight.device_mesh, [Replicate()]) for one in share()]
    losses = cross_entropy(model(whole[0]), whole[1])
    with pytest.raises(ValueError, match="is a DTensor"):
        cabs_torch.backward(losses, process_group=False)
    with pytest.raises(cabs_torch.UncoveredParameterError, match="computes a DTensor"):
        cabs_torch.backward(losses.to_local(), process_group=False)
    assert_nothing_written(model)


def a_compiled_step_of_a_wrapper_is_an_error():
    wrapped = DistributedDataParallel(network())
    with pytest.raises(ValueError, match="each rank would train alone"):
        cabs_torch.compile(wrapped, cross_entropy, process_group=False)
    model = network()
    step = cabs_torch.compile(
        model, lambda x, y: cross_entropy(model(x), y), backend="aot_eager", process_group=False
    )
    found = step(*share())[1].variance_trace
    torch.testing.assert_close(found, trace_of(own_rows()))


def the_metric_is_that_of_the_gradient_with_which_a_rank_steps():
    inputs, targets = share()
    rows = own_rows()
    for name in ("none", "ddp", "static", "views"):
        model = WRAPPERS[name](network())
        optimizer = torch.optim.Adam(model.parameters(), eps=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            losses = cross_entropy(model(inputs), targets)
            statistics = cabs_torch.backward(losses, optimizer=optimizer, process_group=False)
            held = torch.cat([one.grad.flatten() for one in model.parameters()])
            is_own = torch.allclose(held, rows.mean(dim=0))
            assert is_own == (name == "none"), name
            weights = 1.0 / (held.abs() + 0.1)
            found = statistics.group_square_sum, statistics.gradient_norm_squared
            norms = (rows.square() @ weights).sum(), rows.mean(dim=0).square() @ weights
            torch.testing.assert_close(found, tuple(one.reshape(1) for one in norms))


CLAIMS = (
    what_is_no_process_group_is_an_error,
    backward_measures_this_ranks_own_examples_under_every_wrapper,
    the_metric_is_that_of_the_gradient_with_which_a_rank_steps,
    gradients_that_somebody_reduces_give_no_statistics_of_microbatches,
    reductions_are_noticed_in_tables_and_in_reentrant_checkpoints,
    gradients_that_overflow_are_no_reduction,
    microbatches_without_a_reduction_are_this_ranks_groups,
    sharded_parameters_are_errors_and_no_zeros,
    distributed_tensors_are_errors,
    a_compiled_step_of_a_wrapper_is_an_error,
)


def on_a_rank(rank, meeting, number):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    try:
        CLAIMS[number]()
    except BaseException as error:
        # What pytest raises is no Exception, of which alone the parent process is told.
        raise AssertionError(str(error)) from error
    dist.destroy_process_group()


@pytest.mark.parametrize("number", range(len(CLAIMS)), ids=[claim.__name__ for claim in CLAIMS])
def test_on_two_ranks(tmp_path, number):
    arguments = (tmp_path / "meeting", number)
    joined(
        mp.start_processes(on_a_rank, arguments, nprocs=2, join=False, start_method="fork"),
        limit=120.0,
    )
