"""Norms in the metric of the step that an optimizer takes next."""

import copy
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

import cabs
import cabs_torch
from cabs_torch import summed
from cabs_torch.norms import reductions
from tests.torch.dispatched import Dispatched
from tests.torch.models import Residual, cross_entropy, squares
from tests.torch.reference import gradients_one_by_one
from tests.torch.test_networks import BLOCKS, Network, word_losses

OPTIMIZERS = [
    ("Adam", {}),
    ("Adam", {"amsgrad": True, "weight_decay": 0.1, "eps": 1e-2}),
    ("Adam", {"maximize": True, "weight_decay": 0.1, "foreach": True}),
    ("Adam", {"amsgrad": True, "fused": True, "betas": (0.5, 0.7)}),
    ("Adam", {"decoupled_weight_decay": True, "weight_decay": 0.3}),
    ("AdamW", {"weight_decay": 0.3}),
    ("AdamW", {"amsgrad": True, "foreach": True}),
    ("NAdam", {"weight_decay": 0.1, "maximize": True}),
    ("NAdam", {"decoupled_weight_decay": True, "weight_decay": 0.3}),
    ("RMSprop", {"weight_decay": 0.1, "foreach": True}),
    ("RMSprop", {"centered": True, "momentum": 0.9, "maximize": True, "alpha": 0.8}),
    ("Adagrad", {"lr_decay": 0.1, "initial_accumulator_value": 0.2}),
    ("Adagrad", {"weight_decay": 0.1, "maximize": True}),
    ("Adagrad", {"fused": True}),
]


class Texts(nn.Module):
    """Rows of a table, as many as each text has."""

    def __init__(self):
        super().__init__()
        self.bag = nn.EmbeddingBag(9, 4, mode="sum", padding_idx=0)
        self.out = nn.Linear(4, 9)

    def forward(self, words):
        return self.out(self.bag(words)).unsqueeze(1).expand(-1, words.shape[1], -1)


def network(name):
    """Return a model, its losses, and a batch."""
    if name == "convolutions":
        inputs, labels = torch.randn(4, 2, 8, 9).double(), torch.randint(5, (4,))
        return Residual().double(), cross_entropy, inputs, labels
    if name == "perceptron":
        norms = nn.GroupNorm(2, 6), nn.LayerNorm(6)
        layers = nn.Linear(3, 6), nn.Tanh(), *norms, nn.Linear(6, 1)
        return nn.Sequential(*layers).double(), squares, torch.randn(5, 3).double(), torch.randn(5)
    words, labels = torch.randint(9, (2, 4, 5))
    if name == "bags":
        return Texts().double(), word_losses, words, labels
    model = Network(name.split(", "), [0], tied="tied" in name or len(name) % 2 == 0)
    return model.double(), word_losses, words, labels


NETWORKS = ["convolutions", "perceptron", "bags", "attention, layer norm", *sorted(BLOCKS)]


def optimizer_of(model, kind, options):
    """Return an optimizer with two groups that have nothing in common."""
    parameters = list(model.parameters())
    groups = [{"params": parameters[1::2], "lr": 0.02}, {"params": parameters[::2], "eps": 1e-3}]
    return getattr(torch.optim, kind)(groups, **{"lr": 0.01, **options})


def steps(model, optimizer):
    """Return how far the coming step moves each parameter for a unit of its gradient and rate."""
    gradients = [one.grad for one in model.parameters()]
    model, optimizer = copy.deepcopy((model, optimizer))
    for one, gradient in zip(model.parameters(), gradients, strict=True):
        one.grad = gradient.clone()
    found = {}
    for group in optimizer.param_groups:
        # Momentum and decoupled decay are not in P.
        if group.get("decoupled_weight_decay"):
            group["weight_decay"] = 0.0
        group.update(lr=1.0, lr_decay=0.0, momentum=0.0)
        if "betas" in group:
            group["betas"] = (0.0, group["betas"][1])
        sign = -1.0 if group["maximize"] else 1.0
        for one in group["params"]:
            gradient = one.grad.to_dense() + sign * group["weight_decay"] * one.detach()
            found[one] = one.detach().clone(), gradient
    optimizer.step()
    return [
        torch.where(gradient == 0.0, 0.0, (one.detach() - before).abs() / gradient.abs())
        for one in model.parameters()
        for before, gradient in [found[one]]
    ]


def expected(model, losses_of, inputs, targets, optimizer, sample=None):
    """Return the two sums of each group, for a model that holds the batch's gradient."""
    rows = gradients_one_by_one(model, losses_of, inputs, targets)
    split = rows.split([one.numel() for one in model.parameters()], dim=1)
    sums = {}
    for parameter, weights, mine in zip(
        model.parameters(), steps(model, optimizer), split, strict=True
    ):
        # Where the batch's gradient is 0, nothing moves, and nothing is known of P.
        assert bool((mine[:, weights.flatten() == 0.0].abs() < 1e-14).all())
        share = len(rows) / len(mine[:sample])
        square_sum = (mine[:sample].square() @ weights.flatten()).sum() * share
        sums[parameter] = square_sum, mine.mean(dim=0).square() @ weights.flatten()
    by_group = ([sums[one] for one in group["params"]] for group in optimizer.param_groups)
    return torch.tensor([[sum(part) for part in zip(*one, strict=True)] for one in by_group]).T


def assert_sums(statistics, sums, rtol=1e-9):
    found = torch.stack([statistics.group_square_sum, statistics.gradient_norm_squared])
    torch.testing.assert_close(found.double(), sums, rtol=rtol, atol=1e-12)


@pytest.mark.parametrize(("kind", "options"), OPTIMIZERS)
@settings(max_examples=20)
@given(
    seed=st.integers(0, 2**31),
    name=st.sampled_from(NETWORKS),
    before=st.integers(0, 3),
    chunk=st.sampled_from([None, 1, 3]),
    sample=st.sampled_from([None, 2]),
    is_summed=st.booleans(),
    small=st.sampled_from([1, 2**14]),
    cached=st.sampled_from([1, 7, 2**17]),
)
def test_p_is_what_a_step_divides_by(
    kind, options, seed, name, before, chunk, sample, is_summed, small, cached
):
    torch.manual_seed(seed)
    model, losses_of, inputs, targets = network(name)
    optimizer = optimizer_of(model, kind, options)
    for _ in range(before):
        optimizer.zero_grad()
        losses_of(model(inputs), targets).mean().backward()
        optimizer.step()
    optimizer.zero_grad()
    plain = copy.deepcopy(model)
    losses_of(plain(inputs), targets).mean().backward()
    state = copy.deepcopy(optimizer.state_dict())
    with (
        mock.patch.object(summed, "_WORTHWHILE", 1 if is_summed else 2**60),
        mock.patch("cabs.gradients.outer_products.ADDED", -(10**9)),
        mock.patch.multiple(reductions, _SMALL=small, _CACHED=cached),
    ):
        losses = losses_of(model(inputs), targets)
        statistics = cabs_torch.backward(losses, optimizer=optimizer, chunk=chunk, sample=sample)
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(optimizer.state_dict(), state, rtol=0.0, atol=0.0)
    assert_sums(statistics, expected(model, losses_of, inputs, targets, optimizer, sample))


def trained(kind="Adam", examples=5, **options):
    """Return a small model, what stands for its batch, and an optimizer that has taken a step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    inputs, targets = torch.randn(examples, 3).double(), torch.randn(examples)
    optimizer = optimizer_of(model, kind, options)
    squares(model(inputs), targets).mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    return model, inputs, targets, optimizer


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}])
def test_the_metric_of_gradient_descent_is_that_of_no_metric(options):
    model, inputs, targets, _ = trained()
    optimizer = torch.optim.SGD(
        [{"params": model[0].parameters()}, {"params": model[2].parameters()}], lr=0.1, **options
    )
    found = cabs_torch.backward(squares(model(inputs), targets), optimizer=optimizer)
    model.zero_grad()
    plain = cabs_torch.backward(squares(model(inputs), targets), parameter_groups=optimizer)
    assert torch.equal(found.group_square_sum, plain.group_square_sum)
    assert torch.equal(found.gradient_norm_squared, plain.gradient_norm_squared)


@pytest.mark.parametrize("positions", [1, 2])
def test_one_product_an_example_is_not_materialized(positions):
    examples, layer = 16, nn.Linear(40, 30, bias=False)
    optimizer = torch.optim.Adam(layer.parameters())
    inputs = torch.randn(examples, positions, 40)
    losses = layer(inputs).tanh().sum(dim=(1, 2))
    with Dispatched() as seen:
        cabs_torch.backward(losses, optimizer=optimizer)
    # Where there are several, they are formed to be squared.
    assert seen.largest == 40 * 30 * (1 if positions == 1 else examples)


def test_a_function_says_what_p_is_and_sees_the_gradient():
    model, inputs, targets, optimizer = trained()
    rows = gradients_one_by_one(model, squares, inputs, targets)

    def weights(parameter):
        assert parameter.grad is not None
        return steps(model, optimizer)[[*map(id, model.parameters())].index(id(parameter))]

    losses = squares(model(inputs), targets)
    statistics = cabs_torch.backward(losses, optimizer=weights)
    sums = expected(model, squares, inputs, targets, optimizer).sum(dim=1)
    assert statistics.group_square_sum.shape == ()
    assert_sums(statistics, sums)
    # A number, of some parameters.
    statistics = cabs_torch.backward(
        squares(model(inputs), targets), optimizer=lambda _: 3, parameters=model[0].parameters()
    )
    rows = rows[:, :16]
    sums = torch.stack([rows.square().sum(), rows.mean(dim=0).square().sum()])
    assert_sums(statistics, 3.0 * sums)
    assert statistics.measured == pytest.approx(16 / 21)


@pytest.mark.parametrize("kind", ["Adam", "Adagrad"])
def test_what_reentrant_checkpoints_and_several_ways_hide_is_measured_too(kind):
    model, inputs, targets, optimizer = trained(kind)

    def outputs(model, inputs):
        hidden = checkpoint(model[:2], inputs.requires_grad_(), use_reentrant=True)
        # A matrix that is computed, and one that is met as it is besides.
        return F.linear(hidden, model[2].weight.exp() * 0.1, model[2].bias) + hidden @ (
            model[2].weight.T
        )

    def losses_of(model):
        return squares(outputs(model, inputs), targets)

    statistics = cabs_torch.backward(losses_of(model), optimizer=optimizer)

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = model

        def forward(self, inputs):
            hidden, last = self.layers[:2](inputs), self.layers[2]
            return F.linear(hidden, last.weight.exp() * 0.1, last.bias) + hidden @ last.weight.T

    assert_sums(statistics, expected(Plain(), squares, inputs, targets, optimizer))


def test_sparse_gradients_are_those_of_the_same_table():
    torch.manual_seed(0)
    words, labels = torch.randint(9, (2, 4, 5))
    found = []
    for is_sparse in (False, True):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Embedding(9, 4, sparse=is_sparse), nn.Linear(4, 9)).double()
        optimizer = torch.optim.Adagrad(model.parameters(), initial_accumulator_value=0.1)
        statistics = cabs_torch.backward(word_losses(model(words), labels), optimizer=optimizer)
        assert model[0].weight.grad.is_sparse == is_sparse
        found.append(torch.cat([statistics.group_square_sum, statistics.gradient_norm_squared]))
    torch.testing.assert_close(*found)


def test_gradients_that_were_zeroed_or_scaled_are_those_of_the_batch():
    model, inputs, targets, optimizer = trained(weight_decay=0.1)
    once = cabs_torch.backward(squares(model(inputs), targets), optimizer=optimizer)
    sums = torch.stack([once.group_square_sum, once.gradient_norm_squared])
    optimizer.zero_grad(set_to_none=False)
    again = cabs_torch.backward(squares(model(inputs), targets), optimizer=optimizer)
    assert_sums(again, sums)
    optimizer.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaled = cabs_torch.backward(
        squares(model(inputs), targets), optimizer=optimizer, scaler=scaler
    )
    assert_sums(scaled, sums)


def test_p_is_that_of_what_gradients_have_added_up_to():
    model, inputs, targets, optimizer = trained()
    squares(model(inputs), targets).mean().backward()
    held = [one.grad.clone() for one in model.parameters()]
    statistics = cabs_torch.backward(squares(model(inputs), targets), optimizer=optimizer)
    torch.testing.assert_close([one.grad for one in model.parameters()], [2 * one for one in held])
    # The norm is that of the batch's gradient alone.
    weights = steps(model, optimizer)
    numbers = [0 if name.endswith("bias") else 1 for name, _ in model.named_parameters()]
    norms = torch.zeros(2).double()
    for number, weight, gradient in zip(numbers, weights, held, strict=True):
        norms[number] += (weight * gradient.square()).sum()
    torch.testing.assert_close(statistics.gradient_norm_squared, norms)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_low_precision_is_as_good_as_its_gradients(dtype, rtol):
    model, inputs, targets, optimizer = trained(examples=40)
    exact = cabs_torch.backward(squares(model(inputs), targets), optimizer=optimizer)
    optimizer.zero_grad()
    model.to(dtype)
    losses = squares(model(inputs.to(dtype)).float(), targets)
    low = cabs_torch.backward(losses, optimizer=optimizer)
    sums = torch.stack([exact.group_square_sum, exact.gradient_norm_squared])
    assert_sums(low, sums, rtol=rtol)


@pytest.mark.parametrize("name", ["convolutions", "bags", "attention, layer norm"])
@pytest.mark.parametrize("worthwhile", [1, 2**60])
def test_single_precision_takes_the_same_ways(name, worthwhile, monkeypatch):
    torch.manual_seed(0)
    model, losses_of, inputs, targets = network(name)
    # Where a gradient is 0 but for rounding, P depends on that.
    optimizer = torch.optim.RMSprop(model.parameters(), eps=1e-2)
    exact = cabs_torch.backward(losses_of(model(inputs), targets), optimizer=optimizer)
    sums = torch.stack([exact.group_square_sum, exact.gradient_norm_squared])
    optimizer.zero_grad()
    monkeypatch.setattr(summed, "_WORTHWHILE", worthwhile)
    monkeypatch.setattr("cabs.gradients.outer_products.ADDED", -(10**9))
    inputs = inputs.float() if inputs.is_floating_point() else inputs
    found = cabs_torch.backward(losses_of(model.float()(inputs), targets), optimizer=optimizer)
    assert_sums(found, sums, rtol=1e-4)


def test_layers_that_no_rule_covers_are_left_out():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double()
    optimizer = torch.optim.Adam(model.parameters())
    losses = squares(model(torch.randn(5, 3).double()), torch.randn(5))
    with pytest.warns(UserWarning, match="leave out"):
        statistics = cabs_torch.backward(losses, optimizer=optimizer, uncovered="ignore")
    norms = sum(
        (one.grad.square() / (one.grad.abs() + 1e-8)).sum() for one in model[2].parameters()
    )
    torch.testing.assert_close(statistics.gradient_norm_squared, norms.detach().reshape(1))


class Wrapped(torch.optim.Adam):
    """May do anything in its step."""


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"optimizer": torch.optim.Adamax},
            TypeError,
            r"must be a torch\.optim\.Optimizer, or a fu",
        ),
        ({"optimizer": "adam"}, TypeError, "from a parameter to the P of its step, got 'adam'"),
        (
            {"optimizer": lambda _: torch.ones(7)},
            ValueError,
            r"in the shape of .*, got shape \(7,\)",
        ),
        ({"optimizer": lambda _: None}, ValueError, "P as a number, or as a tensor in .* got None"),
        ({"parameter_groups": [[]]}, ValueError, "parameter_groups must not be given beside optim"),
        ({"parameters": []}, ValueError, "parameters must not be given beside optimizer"),
        ({"batch_size": 50}, ValueError, "P is made of the whole batch's gradient"),
        ({"uncovered": "microbatches"}, ValueError, "uncovered='ignore' leaves these parameters"),
    ],
)
def test_what_does_not_go_together_is_refused(options, error, message):
    model, inputs, targets, optimizer = trained()
    with pytest.raises(error, match=message):
        cabs_torch.backward(squares(model(inputs), targets), **{"optimizer": optimizer, **options})


@pytest.mark.parametrize("kind", [torch.optim.Adamax, Wrapped])
def test_an_optimizer_whose_step_is_not_known_is_refused(kind):
    model, inputs, targets, _ = trained()
    optimizer = kind(model.parameters())
    with pytest.raises(TypeError, match=rf"RMSprop, Adagrad itself.*{kind.__name__}; give the one"):
        cabs_torch.backward(squares(model(inputs), targets), optimizer=optimizer)
    assert model[0].weight.grad is None
    with pytest.raises(TypeError, match="whose step is known"):
        cabs_torch.learning_rates(optimizer)


def test_gradients_that_a_hook_takes_away_are_missed():
    model, inputs, targets, optimizer = trained()
    model[0].weight.register_post_accumulate_grad_hook(lambda one: setattr(one, "grad", None))
    with pytest.raises(ValueError, match=r"needs the gradients .* shape \(4, 3\)"):
        cabs_torch.backward(squares(model(inputs), targets), optimizer=optimizer)


def moved(kind, **options):
    """Return how far a parameter goes for a gradient of 1, after one of 0 and before many."""
    weight = nn.Parameter(torch.zeros(1).double())
    optimizer = getattr(torch.optim, kind)([weight], **options)
    for gradient in [0.0, 1.0, *[0.0] * 500]:
        weight.grad = torch.full((1,), gradient).double()
        optimizer.step()
    return -weight.item(), cabs_torch.learning_rates(optimizer)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9},
        {"momentum": 0.9, "dampening": 0.3},
        {"momentum": 0.8, "nesterov": True},
    ],
)
def test_a_rate_is_how_far_a_gradient_moves_a_parameter(options):
    distance, rates = moved("SGD", lr=0.5, **options)
    assert rates == pytest.approx([distance])
    options = {"momentum": options.get("momentum", 0.0)}
    distance, rates = moved("RMSprop", lr=0.5, alpha=0.75, eps=1e-30, **options)
    assert rates == pytest.approx([0.5 * distance])


def test_rates_of_averages_are_those_of_the_groups():
    for kind in ("Adam", "AdamW", "NAdam"):
        *_, optimizer = trained(kind)
        assert cabs_torch.learning_rates(optimizer) == [0.02, 0.01]
    *_, optimizer = trained("Adagrad", lr_decay=0.5)
    assert cabs_torch.learning_rates(optimizer) == pytest.approx([0.02 / 1.5, 0.01 / 1.5])


def test_a_rule_takes_them():
    model, inputs, targets, optimizer = trained(examples=20)
    controller = cabs.Controller(16, rule=cabs.Progress(overhead=128, adaptive=True))
    for _ in range(5):
        optimizer.zero_grad()
        statistics = cabs_torch.backward(squares(model(inputs), targets), optimizer=optimizer)
        rates = cabs_torch.learning_rates(optimizer)
        decision = controller.update(statistics, learning_rate=rates)
        assert not decision.held
        optimizer.step()
    assert decision.batch_size > 0
    plain = cabs_torch.backward(squares(model(inputs), targets))
    with pytest.raises(ValueError, match="statistics are not in the metric"):
        controller.update(plain, learning_rate=rates)
