"""Operations without a rule are exact or refused; no gradient through one is dropped."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cabs_torch

M, WIDTH = 4, 6


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(context, inputs, weight):
        context.save_for_backward(inputs, weight)
        return inputs * weight

    @staticmethod
    def backward(context, cotangent):
        inputs, weight = context.saved_tensors
        return cotangent * weight, (cotangent * inputs).sum(0)


def assigned(hidden, place, values):
    whole = hidden * 1.0
    whole[place] = values
    return whole


SOME = torch.tensor([True, False, True, True])
ROWS = torch.tensor([0, 2, 3])

# From what a layer gives, shape (m, width), another layer, and a weight, shape (width,).
# ruff: noqa: ARG005
THROUGH = {
    "half of the rows": lambda h, layer, w: (
        assigned(torch.zeros(M, WIDTH), slice(0, 2), h[:2] * 2.0) + h.sin()
    ),
    "the first row": lambda h, layer, w: assigned(h, slice(0, 1), layer(h[:1])),
    "an expert's rows": lambda h, layer, w: assigned(h, SOME, layer(h[SOME]).tanh()),
    "an expert's sum": lambda h, layer, w: h.index_add(0, ROWS, layer(h[ROWS]).tanh()),
    "rows put": lambda h, layer, w: torch.zeros(M, WIDTH).index_put((ROWS,), layer(h[ROWS])) + h,
    "a mask token": lambda h, layer, w: assigned(h, SOME, w.exp()),
    "a mask token itself": lambda h, layer, w: assigned(h, SOME, w),
    "a function of a computed weight": lambda h, layer, w: Scaled.apply(h, w.exp()),
    "a function of a weight": lambda h, layer, w: Scaled.apply(h, w),
    "distances": lambda h, layer, w: torch.cdist(h, F.normalize(layer.weight) + w),
    "distances to a weight": lambda h, layer, w: torch.cdist(h, layer.weight) * w.sum(),
    "a solution": lambda h, layer, w: (
        torch.linalg.solve(layer.weight @ layer.weight.T + torch.eye(WIDTH), h.T).T
    ),
}


def test_verify_shows_a_parameter_whose_gradient_is_not_measured(monkeypatch):
    torch.manual_seed(0)
    layer, weight = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.randn(WIDTH))
    # What a fault of the library would do: say that nothing passes to the weight.
    monkeypatch.setattr("cabs_torch.walk.positions", lambda *_: None)

    def losses_of(inputs):
        return Scaled.apply(layer(inputs), weight.exp()).square().sum(dim=1)

    found = {row.name: row for row in cabs_torch.verify(losses_of, torch.randn(M, WIDTH)).rows}
    assert found[str((WIDTH,))].error == 1.0


@pytest.mark.parametrize("name", THROUGH)
def test_what_has_no_rule_is_exact_or_refused_before_any_gradient(name):
    torch.manual_seed(0)
    first, second = (nn.Linear(WIDTH, WIDTH).double() for _ in range(2))
    weight = nn.Parameter(torch.randn(WIDTH).double())
    inputs = torch.randn(M, WIDTH).double()
    parameters = [*first.parameters(), *second.parameters(), weight]

    def losses():
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            return THROUGH[name](first(inputs), second, weight).tanh().square().sum(dim=1)
        finally:
            torch.set_default_dtype(default)

    rows = []
    for loss in losses():
        one = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        pairs = zip(one, parameters, strict=True)
        rows.append(
            torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])
        )
    try:
        statistics = cabs_torch.backward(losses())
    except cabs_torch.UncoveredParameterError:
        assert all(parameter.grad is None for parameter in parameters)
    else:
        torch.testing.assert_close(statistics.variance_trace, torch.stack(rows).var(dim=0).sum())
