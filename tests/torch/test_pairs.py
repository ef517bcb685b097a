"""Pairs that go through a model in one pass, and are then taken apart, are single examples."""

import pytest
import torch
from torch import nn

import cabs_torch
from tests.torch.models import Residual
from tests.torch.reference import assert_exact

APART = {
    "slices": lambda z, m: (z[:m], z[m:]),
    "negative slices": lambda z, m: (z[:-m], z[-m:]),
    "chunk": lambda z, m: z.chunk(2),  # noqa: ARG005
    "split": lambda z, m: z.split(m),
    "sizes": lambda z, m: z.split([m, m]),
    "narrow": lambda z, m: (z.narrow(0, 0, m), z.narrow(0, m, m)),
    "tensor_split": lambda z, m: z.tensor_split(2),  # noqa: ARG005
    "unflatten": lambda z, m: z.unflatten(0, (2, m)).unbind(0),
}


class Pairs(nn.Module):
    """The distance of two outputs of a network that sees both inputs in one batch."""

    def __init__(self, network, apart):
        super().__init__()
        self.network, self.apart = network, apart

    def forward(self, pairs):
        m = len(pairs)
        one, two = self.apart(self.network(torch.cat(pairs.unbind(1))), m)
        return one - 2.0 * two


def losses_of(outputs, targets):
    return (outputs.flatten(1).square().sum(dim=1) - targets).square()


@pytest.mark.parametrize("name", APART)
def test_pairs_in_one_pass_are_exact_however_they_are_taken_apart(name):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3))
    model = Pairs(network, APART[name]).double()
    assert_exact(model, losses_of, torch.randn(5, 2, 4).double(), torch.randn(5).double())


@pytest.mark.parametrize("shape", [(2, 9, 9), (4,)])
def test_pairs_through_convolutions_and_sequences_are_exact(shape):
    torch.manual_seed(0)
    if len(shape) == 3:
        network = Residual()
    else:
        network = nn.Sequential(nn.Unflatten(1, (2, 2)), nn.Linear(2, 5), nn.GELU(), nn.Flatten())
    model = Pairs(network, APART["slices"]).double()
    assert_exact(model, losses_of, torch.randn(4, 2, *shape).double(), torch.randn(4).double())


def test_triplets_and_pairs_that_lie_side_by_side_are_exact():
    class Triplets(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(4, 3), nn.Linear(3, 3)

        def forward(self, triplets):
            m = len(triplets)
            hidden = self.one(triplets.flatten(0, 1))  # each example's three rows together
            anchor, rest = hidden[::3], torch.cat([hidden[1::3], hidden[2::3].sin()])
            near, far = self.two(rest)[:m], self.two(rest)[m:]
            both = torch.cat([anchor, torch.cat([near, far])]).tanh()
            return torch.cat([both[: 2 * m][m:], both[m:].chunk(2)[1]], dim=1)

    torch.manual_seed(0)
    assert_exact(
        Triplets().double(), losses_of, torch.randn(5, 3, 4).double(), torch.randn(5).double()
    )


def test_a_row_that_is_repeated_for_both_sides_of_pairs_is_a_parameter():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.token, self.layer = nn.Parameter(torch.randn(1, 4)), nn.Linear(4, 3)

        def forward(self, inputs):
            m = len(inputs)
            hidden = self.layer(inputs).repeat(2, 1)  # the batch itself, twice
            both = self.layer(torch.cat([inputs, inputs.sin()]) * self.token.repeat(2 * m, 1))
            both = both + hidden.square()
            return both[:m] * both[m:]

    torch.manual_seed(0)
    assert_exact(Tokens().double(), losses_of, torch.randn(5, 4).double(), torch.randn(5).double())


def test_an_input_without_a_graph_beside_another_leaves_no_doubt():
    class Against(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, inputs):
            both = self.two(torch.cat([inputs, self.one(inputs)]))
            return both[: len(inputs)] * both[len(inputs) :]

    torch.manual_seed(0)
    assert_exact(Against().double(), losses_of, torch.randn(5, 4).double(), torch.randn(5).double())


@pytest.mark.parametrize(
    "apart",
    [lambda z: z[1:7] - z[:6], lambda z: z[:6] - z[6:].roll(1, 0), lambda z: z[3:9]],
    ids=["neighbours", "others", "in between"],
)
def test_parts_of_a_batch_that_mix_examples_are_refused(apart):
    torch.manual_seed(0)
    layer = nn.Linear(4, 3)
    losses = apart(layer(torch.randn(12, 4))).square().sum(dim=1)
    with pytest.raises(cabs_torch.UncoveredParameterError, match="runs along the axis that holds"):
        cabs_torch.backward(losses)
    assert layer.weight.grad is None
