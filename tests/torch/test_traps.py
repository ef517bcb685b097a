"""Mistakes that are easily made, by others and here: one test each, named after it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import cabs_torch
from cabs import Controller
from tests.torch.models import Residual, cross_entropy, squares
from tests.torch.reference import assert_exact, gradients_one_by_one


def test_gradient_accumulation_the_mean_square_is_of_this_batch_alone():
    torch.manual_seed(0)
    model, inputs, targets = nn.Linear(3, 2), torch.randn(4, 3), torch.randint(2, (4,))
    first = cabs_torch.backward(cross_entropy(model(inputs), targets))
    second = cabs_torch.backward(cross_entropy(model(inputs), targets))
    assert float(first.gradient_norm_squared) == float(second.gradient_norm_squared)
    accumulated = model.weight.grad.clone()
    model.zero_grad()
    cabs_torch.backward(cross_entropy(model(inputs), targets))
    assert torch.equal(accumulated, 2.0 * model.weight.grad)


def test_frozen_parameters_are_left_out():
    torch.manual_seed(0)
    model = Residual()
    for parameter in (model.stem.weight, model.body.bias, model.head.weight):
        parameter.requires_grad_(False)
    assert_exact(model, cross_entropy, torch.randn(4, 2, 8, 9), torch.randint(5, (4,)))


def test_dropout_has_the_same_mask_in_both_passes():
    torch.manual_seed(0)
    model, inputs, targets = Residual(dropout=0.5), torch.randn(4, 2, 8, 9), torch.randint(5, (4,))
    torch.manual_seed(1)
    losses = cross_entropy(model(inputs), targets)
    rows = [
        torch.cat(
            [
                part.flatten()
                for part in torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
            ]
        )
        for loss in losses
    ]
    statistics = cabs_torch.backward(losses)
    expected = torch.stack(rows).double().square().sum()
    torch.testing.assert_close(statistics.group_square_sum, expected, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_accumulated_in_single(dtype):
    torch.manual_seed(0)
    layer = nn.Linear(4096, 8, bias=False).to(dtype)
    inputs = torch.rand(4, 3, 4096).to(dtype)
    outputs = layer(inputs)
    (cotangents,) = torch.autograd.grad(
        outputs.float().mean(dim=(1, 2)).mean(), outputs, retain_graph=True
    )
    shares = torch.einsum("itn,itk->ink", cotangents.double(), inputs.double())
    statistics = cabs_torch.backward(outputs.float().mean(dim=(1, 2)))
    expected = shares.square().sum() * 16
    torch.testing.assert_close(statistics.group_square_sum, expected, rtol=1e-6, atol=0.0)


def test_a_long_sum_in_single_precision_loses_no_digits():
    torch.manual_seed(0)
    layer = nn.Linear(4096, 2048, bias=False)
    statistics = cabs_torch.backward(layer(torch.randn(2, 4096)).square().mean(dim=1))
    expected = layer.weight.grad.double().square().sum()
    torch.testing.assert_close(statistics.gradient_norm_squared, expected, rtol=1e-8, atol=0.0)


def test_chunks_of_examples_do_not_change_the_sum(monkeypatch):
    torch.manual_seed(0)
    model, inputs, targets = Residual(), torch.randn(6, 2, 8, 9), torch.randint(5, (6,))
    whole = cabs_torch.backward(cross_entropy(model(inputs), targets))
    monkeypatch.setattr("cabs_torch.norms.reductions._CHUNK", 1)
    chunked = cabs_torch.backward(cross_entropy(model(inputs), targets))
    torch.testing.assert_close(chunked.group_square_sum, whole.group_square_sum, rtol=1e-6, atol=0)


def test_losses_may_be_any_output_of_a_graph_that_goes_on():
    torch.manual_seed(0)
    layer = nn.Linear(3, 3)
    outputs = layer(torch.randn(4, 3))
    losses = outputs.square().mean(dim=1)
    kept = losses.detach().clone()
    statistics = cabs_torch.backward(losses)
    assert torch.equal(losses.detach(), kept)
    assert float(statistics.variance_trace) > 0.0


def test_a_tensor_that_requires_gradients_can_be_handed_to_the_controller_as_it_is():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    losses = cross_entropy(model(torch.randn(4, 3)), torch.randint(2, (4,)))
    statistics = cabs_torch.backward(losses)
    controller = Controller(16)
    decision = controller.update(
        learning_rate=torch.tensor([0.1, 0.2]),
        variance_trace=torch.stack([statistics.variance_trace, statistics.gradient_norm_squared]),
        loss=losses.mean(),
    )
    assert not decision.held


@pytest.mark.parametrize("offset", [0.0, 100.0, 1000.0])
def test_cotangents_that_cancel_within_an_example_lose_no_more_than_a_loop_does(offset):
    torch.manual_seed(1)
    inputs = torch.randn(4, 3, 64) + offset
    layer = nn.Linear(64, 64, bias=False)
    weights = torch.sin(torch.arange(192.0)).view(3, 64)

    def losses_of(one):
        return (F.softmax(layer(one) / 64, dim=1) * weights).sum(1).square().sum(1)

    loop = [torch.autograd.grad(losses_of(one[None]).squeeze(0), layer.weight)[0] for one in inputs]
    expected = torch.stack(loop).double().square().sum()
    statistics = cabs_torch.backward(losses_of(inputs))
    torch.testing.assert_close(statistics.group_square_sum, expected, rtol=1e-4, atol=0.0)


def test_a_sum_of_squares_is_never_negative_when_gradients_cancel():
    torch.manual_seed(1)
    weight = nn.Parameter(torch.randn(64, 64, dtype=torch.float64))
    inputs = torch.randn(2, 1, 64, dtype=torch.float64).expand(2, 4, 64).contiguous()
    factors = torch.randn(2, 4, 64, dtype=torch.float64)
    factors -= factors.mean(dim=1, keepdim=True)
    statistics = cabs_torch.backward(((inputs @ weight) * factors).sum(dim=(1, 2)))
    assert 0.0 <= float(statistics.group_square_sum) < 1e-10


def test_losses_in_half_precision_are_averaged_by_a_rounded_number():
    torch.manual_seed(0)
    layer, inputs = nn.Linear(5, 3), torch.randn(3, 5)
    exact = cabs_torch.backward(layer(inputs).square().sum(dim=1))
    half = cabs_torch.backward(layer(inputs).square().sum(dim=1).to(torch.bfloat16))
    torch.testing.assert_close(half.group_square_sum, exact.group_square_sum, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(
        half.gradient_norm_squared, exact.gradient_norm_squared, rtol=1e-5, atol=0.0
    )


def test_autocast_around_the_backward_pass_does_not_round_the_sums():
    torch.manual_seed(0)
    layer, inputs = nn.Linear(32, 32), torch.randn(4, 40, 32)
    exact = cabs_torch.backward(layer(inputs).square().sum(dim=(1, 2)))
    losses = layer(inputs).square().sum(dim=(1, 2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = cabs_torch.backward(losses)
    torch.testing.assert_close(rounded.group_square_sum, exact.group_square_sum, rtol=1e-6, atol=0)


def test_autocast_in_the_model_is_exact_for_what_was_computed():
    torch.manual_seed(0)
    model, inputs, targets = Residual(), torch.randn(4, 2, 8, 9), torch.randint(5, (4,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = cross_entropy(model(inputs), targets)
    statistics = cabs_torch.backward(losses)
    rows = gradients_one_by_one(model, cross_entropy, inputs, targets)
    torch.testing.assert_close(statistics.group_square_sum, rows.square().sum(), rtol=0.05, atol=0)


def test_padding_ids_have_no_gradient():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(5, 4, padding_idx=2), nn.Flatten(), nn.Linear(12, 3)
    ).double()
    words = torch.tensor([[2, 2, 2], [0, 2, 0], [1, 1, 1], [2, 4, 3]])
    assert_exact(model, squares, words, torch.randn(4).double())


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_recomputes_what_is_read_twice(reentrant):
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    first, inputs = nn.Linear(3, 3).double(), torch.randn(4, 3).double()
    plain = cabs_torch.backward(block(first(inputs)).square().sum(dim=1))
    packed = checkpoint(block, first(inputs), use_reentrant=reentrant)
    found = cabs_torch.backward(packed.square().sum(dim=1))
    torch.testing.assert_close(found.variance_trace, plain.variance_trace, rtol=1e-12, atol=0.0)


def test_loss_scaling_does_not_scale_the_statistics():
    torch.manual_seed(0)
    layer, inputs = nn.Linear(3, 2), torch.randn(4, 3)
    scaler = torch.amp.GradScaler("cpu", init_scale=3.0)
    plain = cabs_torch.backward(layer(inputs).square().sum(dim=1))
    scaled = cabs_torch.backward(layer(inputs).square().sum(dim=1), scaler=scaler)
    torch.testing.assert_close(scaled.variance_trace, plain.variance_trace)
    torch.testing.assert_close(scaled.gradient_norm_squared, plain.gradient_norm_squared)


def test_recurrent_cells_are_used_once_a_step():
    torch.manual_seed(0)

    class Unrolled(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = nn.RNNCell(3, 4)

        def forward(self, inputs):
            state = None
            for step in inputs.unbind(1):
                state = self.cell(step, state)
            return state

    assert_exact(
        Unrolled().double(), squares, torch.randn(4, 5, 3).double(), torch.randn(4).double()
    )


def test_as_many_positions_as_examples_are_told_apart():
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(4, 2)

    class Moved(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = layer

        def forward(self, inputs):
            moved = inputs.transpose(0, 1)
            return self.attention(moved, moved, moved)[0].transpose(0, 1)

    assert_exact(Moved().double(), squares, torch.randn(4, 4, 4).double(), torch.randn(4).double())
