"""What a caller may ask for: parameter groups, samples, chunks, microbatches, scaled losses."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

import cabs
import cabs_torch
from cabs.gradients.errors import UncoveredParameterError
from tests.torch.models import Residual, cross_entropy, squares
from tests.torch.reference import gradients_one_by_one


class Mixed(nn.Module):
    """Layers that are covered, before and behind one that is not."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 5)

    def forward(self, inputs):
        return self.last(self.norm(self.first(inputs)).tanh())


def batch(examples):
    return torch.randn(examples, 2, 8, 9), torch.randint(5, (examples,))


@given(st.integers(0, 2**31), st.integers(2, 6), st.integers(1, 6), st.sampled_from([None, 1, 4]))
def test_a_sample_is_that_of_the_first_examples(seed, examples, sample, chunk):
    torch.manual_seed(seed)
    model = Residual().double()
    inputs, targets = batch(examples)
    losses = cross_entropy(model(inputs.double()), targets)
    statistics = cabs_torch.backward(losses, sample=sample, chunk=chunk)
    rows = gradients_one_by_one(model, cross_entropy, inputs, targets)
    kept = rows[:sample]
    expected = kept.square().sum() * (examples / len(kept))
    torch.testing.assert_close(statistics.group_square_sum, expected, rtol=1e-9, atol=0)
    mean = rows.mean(0).square().sum()
    torch.testing.assert_close(statistics.gradient_norm_squared, mean, rtol=1e-9, atol=1e-20)
    assert (statistics.examples, statistics.groups) == (examples, examples)


def test_an_optimizer_gives_one_trace_a_group_for_its_learning_rates():
    torch.manual_seed(0)
    model = Residual()
    optimizer = torch.optim.SGD(
        [
            {"params": model.stem.parameters(), "lr": 0.1},
            {"params": [model.body.weight, model.head.bias], "lr": 0.2},
            {"params": [nn.Parameter(torch.ones(2), requires_grad=False)], "lr": 0.3},
        ]
    )
    inputs, targets = batch(4)
    losses = cross_entropy(model(inputs), targets)
    statistics = cabs_torch.backward(losses, parameter_groups=optimizer)
    rows = gradients_one_by_one(model, cross_entropy, inputs, targets)
    names = [name for name, one in model.named_parameters() for _ in range(one.numel())]
    for index, wanted in enumerate(
        [("stem.weight", "stem.bias"), ("body.weight", "head.bias"), ()]
    ):
        place = torch.tensor([name in wanted for name in names])
        trace = (rows - rows.mean(dim=0))[:, place].square().sum() / 3
        torch.testing.assert_close(statistics.variance_trace[index], trace, rtol=1e-4, atol=1e-9)
    read = statistics.read()
    assert read.variance_trace.tolist() == pytest.approx(statistics.variance_trace.tolist())
    decision = cabs.Controller(16).update(
        learning_rate=[group["lr"] for group in optimizer.param_groups],
        variance_trace=statistics.variance_trace,
        loss=losses.mean(),
    )
    assert not decision.held


@given(st.integers(0, 2**31), st.lists(st.integers(1, 4), min_size=2, max_size=4))
def test_microbatches_add_up_to_the_statistics_of_the_whole_batch(seed, sizes):
    torch.manual_seed(seed)
    model, total = Residual().double(), sum(sizes)
    whole = copy.deepcopy(model)
    inputs, targets = batch(total)
    inputs = inputs.double()
    expected = cabs_torch.backward(cross_entropy(whole(inputs), targets))
    parts = []
    for piece in torch.arange(total).split(sizes):
        losses = cross_entropy(model(inputs[piece]), targets[piece])
        parts.append(cabs_torch.backward(losses, batch_size=total).partial)
    merged = sum(parts).complete(
        gradient_norm_squared=cabs_torch.gradient_norm_squared(model.parameters())
    )
    torch.testing.assert_close(merged.group_square_sum, expected.group_square_sum)
    torch.testing.assert_close(
        merged.gradient_norm_squared, expected.gradient_norm_squared, rtol=1e-9, atol=1e-20
    )
    for one, other in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_a_microbatch_of_one_example_is_that_or_an_error():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    inputs, targets = torch.randn(1, 3).double(), torch.tensor([1])
    groups = [list(model[0].parameters()), [model[2].bias]]
    losses = cross_entropy(model(inputs), targets)
    found = cabs_torch.backward(losses, batch_size=6, parameter_groups=groups).partial
    plain = [one.grad * 6 for one in (*groups[0], *groups[1])]
    squares = torch.stack([one.square().sum() for one in plain])
    expected = torch.stack([squares[:2].sum(), squares[2]])
    torch.testing.assert_close(found.group_square_sum, expected)
    with pytest.raises(ValueError, match="must not be 'ignore' for a single example"):
        cabs_torch.backward(cross_entropy(model(inputs), targets), batch_size=6, uncovered="ignore")
    hidden = checkpoint(model[1], model[0](inputs), use_reentrant=True)
    with pytest.raises(UncoveredParameterError, match="checkpoint behind a single example; take"):
        cabs_torch.backward(cross_entropy(model[2](hidden), targets), batch_size=6)
    model[0].weight.register_hook(lambda gradient: 2.0 * gradient)
    with pytest.raises(UncoveredParameterError, match="has a hook, which can change its gradient"):
        cabs_torch.backward(cross_entropy(model(inputs), targets), batch_size=6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loss_scaling_under_autocast_is_taken_out_again(dtype):
    torch.manual_seed(0)
    inputs, targets = torch.randn(8, 3), torch.randint(2, (8,))
    model = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.LayerNorm(16), nn.Linear(16, 2))
    scaled = copy.deepcopy(model)
    optimizer = torch.optim.SGD(scaled.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    def losses_of(network):
        with torch.autocast("cpu", dtype=dtype):
            return cross_entropy(network(inputs), targets)

    found = cabs_torch.backward(losses_of(scaled), scaler=scaler)
    # Scaled gradients are rounded less; those without scaling lose digits in float16.
    rows = gradients_one_by_one(model, cross_entropy, inputs, targets)
    expected = rows.square().sum()
    torch.testing.assert_close(found.group_square_sum, expected, rtol=0.05, atol=0)
    mean = rows.mean(0).square().sum()
    torch.testing.assert_close(found.gradient_norm_squared, mean, rtol=0.05, atol=0)
    scaler.unscale_(optimizer)
    mean = cabs_torch.gradient_norm_squared(optimizer).sum()
    torch.testing.assert_close(found.gradient_norm_squared, mean, rtol=1e-5, atol=0)


def test_a_gradient_that_overflows_is_held():
    model = nn.Linear(3, 2).half()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
    losses = model(torch.ones(4, 3).half()).square().sum(dim=1)
    statistics = cabs_torch.backward(losses, scaler=scaler)
    decision = cabs.Controller(16).update(
        learning_rate=0.1, variance_trace=statistics.variance_trace, loss=1.0
    )
    assert decision.held


def test_uncovered_parameters_can_be_estimated_from_groups():
    torch.manual_seed(0)
    model = Mixed().double()
    inputs, targets = torch.randn(12, 3).double(), torch.randint(5, (12,))
    plain = copy.deepcopy(model)
    cross_entropy(plain(inputs), targets).mean().backward()
    losses = cross_entropy(model(inputs), targets)
    rows = [
        torch.cat(
            [
                one.flatten()
                for one in torch.autograd.grad(
                    part.mean(), list(model.parameters())[:4], retain_graph=True
                )
            ]
        )
        for part in losses.tensor_split(4)
    ]
    last = [
        torch.cat(
            [
                g.flatten()
                for g in torch.autograd.grad(loss, list(model.parameters())[4:], retain_graph=True)
            ]
        )
        for loss in losses
    ]
    statistics = cabs_torch.backward(losses, uncovered="microbatches")
    # Three examples a group: what varies between the means of groups is a third.
    expected = torch.stack(rows).var(dim=0).sum() * 3 + torch.stack(last).var(dim=0).sum()
    torch.testing.assert_close(statistics.variance_trace, expected)
    whole = cabs_torch.gradient_norm_squared(plain.parameters())
    torch.testing.assert_close(statistics.gradient_norm_squared, whole)
    assert statistics.measured < 1.0
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


def test_uncovered_parameters_can_be_left_out_and_are_counted():
    torch.manual_seed(0)
    model = Mixed().double()
    inputs, targets = torch.randn(12, 3).double(), torch.randint(5, (12,))
    losses = cross_entropy(model(inputs), targets)
    rows = torch.stack(
        [
            torch.cat(
                [
                    g.flatten()
                    for g in torch.autograd.grad(
                        loss, list(model.last.parameters()), retain_graph=True
                    )
                ]
            )
            for loss in losses
        ]
    )
    with pytest.warns(UserWarning, match=r"leave out 49\.0% of the parameters, .*'norm\.weight'"):
        statistics = cabs_torch.backward(losses, uncovered="ignore")
    assert statistics.measured == pytest.approx(25 / 49)
    torch.testing.assert_close(statistics.variance_trace, rows.var(dim=0).sum())
    torch.testing.assert_close(statistics.gradient_norm_squared, rows.mean(dim=0).square().sum())


def test_several_losses_are_added_before():
    torch.manual_seed(0)
    model = nn.Linear(3, 4).double()
    inputs, targets = torch.randn(5, 3).double(), torch.randint(4, (5,))

    def losses_of(outputs, targets):
        return cross_entropy(outputs, targets) + 0.5 * outputs.square().mean(dim=1)

    found = cabs_torch.backward(losses_of(model(inputs), targets))
    rows = gradients_one_by_one(model, losses_of, inputs, targets)
    torch.testing.assert_close(found.variance_trace, rows.var(dim=0).sum())


def test_a_group_with_nothing_measured_is_an_error_before_any_gradient():
    torch.manual_seed(0)
    model, other = nn.Linear(3, 2), nn.Parameter(torch.ones(3))
    losses = squares(model(torch.randn(4, 3)), torch.randn(4))
    with pytest.raises(ValueError, match="nothing is measured for parameter group 0 of 2"):
        cabs_torch.backward(losses, parameter_groups=[[other], model.parameters()])
    assert model.weight.grad is None
    # One outside of the graph beside others is left alone.
    statistics = cabs_torch.backward(losses, parameter_groups=[[other, model.bias], [model.weight]])
    assert other.grad is None
    assert bool((statistics.group_square_sum > 0.0).all())


def test_a_warning_says_the_reason_first_and_then_three_names_at_most():
    norms = nn.Sequential(*(nn.BatchNorm1d(3) for _ in range(5)), nn.Linear(3, 1))
    losses = squares(norms(torch.randn(4, 3)), torch.randn(4))
    with pytest.warns(UserWarning, match=r"normalizes over the batch.*: .*; and 7 more$") as said:
        cabs_torch.backward(losses, uncovered="ignore")
    assert str(said[0].message).count("of shape") == 3


def test_an_error_says_the_reason_first_and_then_three_names_at_most():
    layers = nn.Sequential(*(nn.Linear(3, 3) for _ in range(4)), nn.BatchNorm1d(3))
    with pytest.raises(
        cabs_torch.UncoveredParameterError,
        match=r"^NativeBatchNormBackward0 normalizes .* concerns .*; and 7 more\. Estimate",
    ) as said:
        cabs_torch.backward(squares(layers(torch.randn(4, 3)), torch.randn(4)))
    assert str(said.value).count("of shape") == 3


def test_losses_of_frozen_or_left_out_parameters_alone_are_an_error():
    norm = nn.BatchNorm1d(3)
    losses = squares(norm(torch.randn(4, 3)), torch.randn(4))
    with pytest.raises(ValueError, match="must depend on a parameter that can be measured"):
        cabs_torch.backward(losses, uncovered="ignore")
    assert norm.weight.grad is None


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sample": 0}, ValueError, "sample must be at least 1, got sample = 0"),
        ({"sample": 1.5}, TypeError, "sample must be an integer, got sample = 1.5"),
        ({"chunk": 0}, ValueError, "chunk must be at least 1"),
        ({"batch_size": 3}, ValueError, "batch_size must be at least 4, got batch_size = 3"),
        (
            {"uncovered": "guess"},
            ValueError,
            "'error', 'microbatches' or 'ignore', got uncovered = 'gue",
        ),
        ({"parameter_groups": []}, ValueError, "parameter_groups must hold parameters, got none"),
        (
            {"parameter_groups": [torch.ones(2)]},
            TypeError,
            "got an iterable of tensors; wrap it in a list",
        ),
    ],
)
def test_options_that_make_no_sense_are_refused(options, error, message):
    losses = F.mse_loss(nn.Linear(3, 1)(torch.randn(4, 3)), torch.ones(4, 1), reduction="none")
    with pytest.raises(error, match=message):
        cabs_torch.backward(losses.squeeze(1), **options)


def test_groups_that_overlap_are_refused():
    layer = nn.Linear(3, 2)
    losses = squares(layer(torch.randn(4, 3)), torch.randn(4))
    with pytest.raises(
        ValueError, match=r"must not overlap: parameter 'bias' of Linear.*, is in two"
    ):
        cabs_torch.backward(losses, parameter_groups=[layer.parameters(), [layer.bias]])


def test_losses_of_inference_mode_are_refused():
    with torch.inference_mode():
        losses = squares(nn.Linear(3, 2)(torch.randn(4, 3)), torch.randn(4))
    with pytest.raises(ValueError, match=r"a tensor of torch\.inference_mode"):
        cabs_torch.backward(losses)


def test_an_accumulation_of_a_group_with_nothing_measured_is_an_error():
    layer, other = nn.Linear(3, 2), nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([{"params": [other]}, {"params": layer.parameters()}], 0.1)
    accumulation = cabs_torch.Accumulation(optimizer, batch_size=4)
    for _ in range(2):
        accumulation.backward(layer(torch.randn(2, 3)).square().mean(), examples=2)
    for act in (accumulation.complete, lambda: cabs_torch.gradient_norm_squared(optimizer)):
        with pytest.raises(ValueError, match="nothing is measured for parameter group 0 of 2"):
            act()


def test_gradients_of_an_earlier_step_beside_partial_statistics_are_an_error():
    layer, inputs = nn.Linear(3, 1), torch.randn(4, 3) + 5.0
    parts = []
    for part in (inputs[:2], inputs[2:], inputs[2:], inputs[2:]):
        losses = layer(part).squeeze(1)
        parts.append(cabs_torch.backward(losses, batch_size=4).partial)
    square = cabs_torch.gradient_norm_squared(layer.parameters())
    with pytest.raises(ValueError, match="set them to zero before a step"):
        sum(parts[:2]).complete(gradient_norm_squared=square)


def test_a_frozen_group_counts_as_zero():
    layer, other = nn.Linear(3, 2), nn.Linear(3, 2).requires_grad_(False)
    optimizer = torch.optim.SGD([{"params": other.parameters()}, {"params": layer.parameters()}])
    accumulation = cabs_torch.Accumulation(optimizer, batch_size=4)
    for _ in range(2):
        accumulation.backward(layer(torch.randn(2, 3)).square().mean(), examples=2)
    assert cabs_torch.gradient_norm_squared(optimizer)[0] == 0.0
    trace = accumulation.complete().variance_trace
    assert trace[0] == 0.0
    assert trace[1] > 0.0


def test_the_variance_of_a_sample_may_be_negative_and_says_that_it_is_estimated():
    layer = nn.Linear(3, 1, bias=False)
    inputs = torch.tensor([[0.1, 0.0, 0.0]] * 2 + [[5.0, 0.0, 0.0]] * 2)
    statistics = cabs_torch.backward(layer(inputs).squeeze(1), sample=2)
    assert statistics.estimated == 2
    assert statistics.read().variance_trace < 0.0


def test_mean_square_without_gradients_is_an_error():
    with pytest.raises(ValueError, match="parameters must hold gradients, got none"):
        cabs_torch.gradient_norm_squared(nn.Linear(3, 2).parameters())


@pytest.mark.parametrize("kind", ["exact", "groups of parameters", "microbatches", "compiled"])
def test_a_controller_takes_statistics_as_they_are(kind):
    model = Residual()
    inputs, targets = batch(6)
    losses_of = lambda x, y: cross_entropy(model(x), y)  # noqa: E731
    mean = float(losses_of(inputs, targets).detach().mean())
    if kind == "microbatches":
        accumulation = cabs_torch.Accumulation(model.parameters(), batch_size=6)
        for part in (slice(0, 2), slice(2, 6)):
            loss = losses_of(inputs[part], targets[part]).mean()
            accumulation.backward(loss, examples=part.stop - part.start)
        statistics = accumulation.complete()
    elif kind == "compiled":
        _, statistics = cabs_torch.compile(model, losses_of, backend="aot_eager")(inputs, targets)
    else:
        groups = None if kind == "exact" else [[one] for one in model.parameters()]
        statistics = cabs_torch.backward(losses_of(inputs, targets), parameter_groups=groups)
    rates = 0.1 if kind != "groups of parameters" else [0.1] * len([*model.parameters()])
    given, alone = cabs.Controller(16), cabs.Controller(16)
    decision = given.update(statistics, learning_rate=rates)
    assert decision.observation.loss == pytest.approx(mean, rel=1e-6)
    trace = statistics.read().variance_trace
    loss = decision.observation.loss
    assert decision == alone.update(learning_rate=rates, variance_trace=trace, loss=loss)


def test_some_parameters_alone_are_measured_and_their_share_is_said():
    torch.manual_seed(0)
    model = Residual()
    inputs, targets = batch(6)
    wanted = [model.stem.weight, model.head.bias]
    statistics = cabs_torch.backward(cross_entropy(model(inputs), targets), parameters=wanted)
    total = sum(one.numel() for one in model.parameters())
    assert statistics.measured == pytest.approx(sum(one.numel() for one in wanted) / total)
    assert all(one.grad is not None for one in model.parameters())
    model.zero_grad()
    grouped = cabs_torch.backward(
        cross_entropy(model(inputs), targets), parameter_groups=[[one] for one in wanted]
    )
    assert grouped.measured == statistics.measured
    torch.testing.assert_close(statistics.group_square_sum, grouped.group_square_sum.sum())
    torch.testing.assert_close(
        statistics.gradient_norm_squared, grouped.gradient_norm_squared.sum()
    )
    losses = cross_entropy(model(inputs), targets)
    with pytest.raises(ValueError, match="must not both be given"):
        cabs_torch.backward(losses, parameters=wanted, parameter_groups=[wanted])
