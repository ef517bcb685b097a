"""On the way that a GPU takes nothing waits for it, and few kernels are added."""

import numpy as np
import pytest
import torch
from torch import nn

import cabs_torch
from tests.conformance.networks import BLOCKS, Network
from tests.conformance.torch_adapter import Operations
from tests.torch.dispatched import WAITING, as_on_a_device
from tests.torch.models import Residual, cross_entropy


def kernels_of(step):
    with as_on_a_device() as kernels:
        step()
    return kernels


def assert_no_wait(step):
    waiting = {name: count for name, count in kernels_of(step).items() if name in WAITING}
    assert not waiting


@pytest.mark.parametrize("name", sorted(BLOCKS))
@pytest.mark.parametrize("sample", [None, 2])
def test_nothing_waits_for_a_device(name, sample):
    rng, network = np.random.default_rng(0), Network([name])
    parameters = {
        name: torch.tensor(one, requires_grad=True)
        for name, one in network.parameters(rng, np.float32).items()
    }
    batch = {name: torch.tensor(one) for name, one in network.batch(rng, 4, np.float32).items()}
    losses = network.losses_of(Operations, parameters, batch)
    assert_no_wait(lambda: cabs_torch.backward(losses, sample=sample))


def test_nothing_waits_in_a_convolutional_network_by_parameter_groups():
    model = Residual()
    losses = cross_entropy(model(torch.randn(4, 2, 8, 9)), torch.randint(5, (4,)))
    groups = [[one] for one in model.parameters()]
    assert_no_wait(lambda: cabs_torch.backward(losses, parameter_groups=groups))


def test_nothing_waits_with_microbatches_as_groups():
    model = Residual()
    accumulation = cabs_torch.Accumulation(model.parameters(), batch_size=8)

    def step():
        for _ in range(2):
            losses = cross_entropy(model(torch.randn(4, 2, 8, 9)), torch.randint(5, (4,)))
            accumulation.backward(losses.mean(), examples=4)
        accumulation.complete()

    assert_no_wait(step)


def test_what_would_wait_is_seen():
    with as_on_a_device() as kernels:
        float(torch.randn(4, 3).sum())
    assert kernels["_local_scalar_dense"] == 1


def test_few_kernels_are_added_for_each_parameter():
    layers = [one for _ in range(8) for one in (nn.Linear(32, 32), nn.LayerNorm(32), nn.GELU())]
    model = nn.Sequential(*layers, nn.Linear(32, 4))
    inputs, targets = torch.randn(4, 6, 32), torch.randn(4, 6, 4)
    losses_of = lambda: (model(inputs) - targets).square().mean(dim=(1, 2))  # noqa: E731
    plain = kernels_of(lambda: losses_of().mean().backward()).total()
    model.zero_grad()
    added = kernels_of(lambda: cabs_torch.backward(losses_of())).total() - plain
    assert added / len([*model.parameters()]) <= 6.0
