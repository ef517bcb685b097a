"""Operations that keep examples apart are known, and what lies behind them is exact."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.torch.models import squares
from tests.torch.reference import assert_exact


class Layers(nn.Module):
    """Two matrices with anything between them."""

    def __init__(self, between, width):
        super().__init__()
        self.first, self.second, self.between = nn.Linear(3, 6), nn.Linear(width, 2), between

    def forward(self, inputs):
        return self.second(self.between(self.first(inputs)))


BETWEEN = {
    "split": (lambda h: h.split(2, dim=1)[2] * h.split([3, 2, 1], dim=-1)[1], 2),
    "chunk": (lambda h: torch.cat(h.chunk(2, dim=1)[::-1], dim=1), 6),
    "unbind": (lambda h: h.view(-1, 3, 2).unbind(1)[2], 2),
    "glu": (F.glu, 3),
    "select": (lambda h: h.view(-1, 3, 2)[:, -1], 2),
    "slice": (lambda h: h[:, 1:5:2], 2),
    "stack": (lambda h: torch.stack([h.sin(), h], dim=0).amax(0), 6),
    "stack behind": (lambda h: torch.stack([h.sin(), h], dim=-1).flatten(1), 12),
    "max": (lambda h: h.view(-1, 3, 2).max(dim=1)[0], 2),
    "expand": (lambda h: h[:, None].expand(-1, 2, -1).flatten(1), 12),
    "normalize": (F.normalize, 6),
    "flip": (lambda h: h.flip(1), 6),
    "cumsum": (lambda h: h.cumsum(-1), 6),
    "masked": (lambda h: h.masked_fill(h > 0.5, 0.25), 6),
    "var": (lambda h: torch.cat([h.var(dim=1, keepdim=True), h.std(dim=1, keepdim=True)], 1), 2),
    "gather": (lambda h: h.gather(1, torch.zeros(len(h), 2, dtype=torch.int64)), 2),
    "upsample": (lambda h: F.interpolate(h.view(-1, 1, 2, 3), scale_factor=2).flatten(1), 24),
    "shuffle": (lambda h: F.pixel_shuffle(h.view(-1, 6, 1, 1)[:, :4], 2).flatten(1), 4),
    "checked": (lambda h: torch.where(h > 0, h, h.abs().sqrt() * 0.1), 6),
}


@pytest.mark.parametrize("name", BETWEEN)
def test_operations_that_keep_examples_apart_are_exact(name):
    torch.manual_seed(0)
    between, width = BETWEEN[name]
    assert_exact(
        Layers(between, width).double(),
        squares,
        torch.randn(5, 3).double(),
        torch.randn(5).double(),
    )


class Token(nn.Module):
    """A class token and positions, expanded over the batch or broadcast, and a vector weight."""

    def __init__(self):
        super().__init__()
        self.token, self.places = (
            nn.Parameter(torch.randn(1, 1, 4)),
            nn.Parameter(torch.randn(6, 4)),
        )
        self.matrix, self.vector = nn.Linear(4, 3), nn.Parameter(torch.randn(3))

    def forward(self, inputs):
        tokens = self.token.expand(len(inputs), -1, -1)
        hidden = torch.cat([tokens, inputs], dim=1) + self.places
        return self.matrix(hidden).tanh() @ self.vector


def test_expanded_parameters_and_vectors_are_exact():
    torch.manual_seed(0)
    assert_exact(Token(), squares, torch.randn(4, 5, 4), torch.randn(4))


@pytest.mark.parametrize(
    "settings", [{"label_smoothing": 0.1}, {"weight": torch.arange(1.0, 6.0)}, {"ignore_index": 2}]
)
def test_the_options_of_cross_entropy_are_exact(settings):
    torch.manual_seed(0)

    def loss(outputs, targets):
        if "weight" in settings:
            settings["weight"] = settings["weight"].to(outputs.dtype)
        return F.cross_entropy(outputs, targets, reduction="none", **settings)

    assert_exact(nn.Linear(3, 5), loss, torch.randn(6, 3), torch.tensor([0, 1, 2, 3, 4, 2]))
