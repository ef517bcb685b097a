"""Programs that look harmless: each was wrong, or broke something, at some time."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import cabs_torch
from cabs_torch import UncoveredParameterError

DOUBLE = {"dtype": torch.float64}


def parameter(*shape):
    return nn.Parameter(torch.randn(*shape, **DOUBLE))


def assert_sums(losses, parameters, **options):
    """Assert that statistics are those of the gradients of single losses, in the same graph."""
    rows = []
    for loss in losses:
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        rows.append(
            torch.cat(
                [
                    torch.zeros_like(one).flatten() if g is None else g.to_dense().flatten()
                    for g, one in zip(gradients, parameters, strict=True)
                ]
            )
        )
    rows = torch.stack(rows)
    statistics = cabs_torch.backward(losses, **options)
    torch.testing.assert_close(
        statistics.group_square_sum, rows.square().sum(), rtol=1e-10, atol=1e-12
    )
    mean = rows.mean(dim=0).square().sum()
    torch.testing.assert_close(statistics.gradient_norm_squared, mean, rtol=1e-10, atol=1e-12)


class Fused(torch.autograd.Function):
    """Computes gradients ahead, and overwrites them in the backward pass."""

    @staticmethod
    def forward(ctx, inputs):
        ctx.ready = 2 * inputs
        return (inputs * inputs).sum(1)

    @staticmethod
    def backward(ctx, cotangents):
        return ctx.ready.mul_(cotangents[:, None])


class Dropped(torch.autograd.Function):
    """Throws away what it kept."""

    @staticmethod
    def forward(ctx, inputs):
        ctx.kept = inputs
        return (inputs * inputs).sum(1)

    @staticmethod
    def backward(ctx, cotangents):
        kept = ctx.kept
        del ctx.kept
        return 2 * kept * cotangents[:, None]


@pytest.mark.parametrize("function", [Fused, Dropped])
@pytest.mark.parametrize("of_data", [False, True])
def test_a_function_that_uses_up_what_it_kept_is_refused_and_still_works(function, of_data):
    torch.manual_seed(0)
    weight, inputs = parameter(5, 3) if of_data else parameter(3, 3), torch.randn(5, 3, **DOUBLE)
    losses = function.apply(weight) if of_data else function.apply(inputs @ weight)
    with pytest.raises(UncoveredParameterError, match="changes in its backward pass what it kept"):
        cabs_torch.backward(losses)
    losses.mean().backward()
    other = weight.grad.clone()
    weight.grad = None
    outputs = weight if of_data else inputs @ weight
    outputs.square().sum(1).mean().backward()
    torch.testing.assert_close(weight.grad, other)


MIXING = {
    "rows taken twice": lambda y: y[[0, 1, 2, 2, 4]],
    "two rows swapped": lambda y: y + y[[0, 1, 3, 2, 4]],
    "an index of another shape": lambda y: y[torch.arange(5), torch.zeros(5, 1).long()],
    "scattered": lambda y: y.scatter_add(
        0, torch.tensor([0, 1, 2, 2, 4])[:, None].expand(5, 4), y.sin()
    ),
    "a mask": lambda y: y[torch.tensor([1, 1, 1, 0, 1]).bool()].repeat(5, 1)[::4],
    "taken": lambda y: torch.take(y, torch.tensor([0, 4, 12, 8, 16])[:, None]),
}


@pytest.mark.parametrize("name", MIXING)
def test_mixing_among_few_examples_is_found_out(name):
    torch.manual_seed(0)
    weight = parameter(3, 4)
    losses = MIXING[name](torch.randn(5, 3, **DOUBLE) @ weight).square().flatten(1).sum(1)
    with pytest.raises(UncoveredParameterError):
        cabs_torch.backward(losses)


def test_indices_that_do_not_lie_side_by_side_put_their_axes_first():
    torch.manual_seed(0)
    weight, every = parameter(3, 5), torch.arange(4)
    hidden = torch.randn(4, 4, 2, 3, **DOUBLE) @ weight
    assert_sums(hidden[:, every, :, every].square().sum((1, 2)), [weight])


def test_an_index_beside_a_slice_is_exact():
    torch.manual_seed(0)
    weight = parameter(3, 5)
    hidden = torch.randn(4, 6, 2, 3, **DOUBLE) @ weight
    indices = torch.tensor([[0, 2], [5, 2]])
    assert_sums(hidden[:, indices].square().sum((1, 2, 3, 4)), [weight])
    hidden = torch.randn(4, 6, 2, 3, **DOUBLE) @ weight
    assert_sums(hidden[:, [0, 1], :, [2, 2]].square().sum((0, 2)), [weight])


def test_a_quotient_that_is_rounded_has_no_gradient():
    weight = parameter(3)
    losses = torch.div(weight, torch.ones(2, 3), rounding_mode="floor").sum(1)
    assert_sums(losses, [weight])


@pytest.mark.parametrize("policy", ["ignore", "microbatches"])
def test_a_parameter_that_is_lost_in_one_place_is_lost_in_all(policy):
    torch.manual_seed(0)
    inputs, first, second = torch.randn(8, 3, **DOUBLE), parameter(3), parameter(3)
    mixed = (first * torch.randn(8, 3, **DOUBLE)).sum(0) + second
    third = parameter(3)
    losses = ((inputs * second + inputs * mixed + third) ** 2).sum(1)
    rows = torch.stack([torch.autograd.grad(x, third, retain_graph=True)[0] for x in losses])
    if policy == "ignore":
        with pytest.warns(UserWarning, match=r"leave out 66\.7%"):
            statistics = cabs_torch.backward(losses, uncovered=policy)
        torch.testing.assert_close(statistics.variance_trace, rows.var(dim=0).sum())
    else:
        statistics = cabs_torch.backward(losses, uncovered=policy)
        whole = cabs_torch.gradient_norm_squared([first, second, third])
        torch.testing.assert_close(statistics.gradient_norm_squared, whole)
    assert statistics.measured == pytest.approx(1 / 3)


def test_groups_beside_a_reentrant_checkpoint_are_an_error_in_words():
    torch.manual_seed(0)
    first, second = parameter(4, 4), parameter(4, 4)
    hidden = checkpoint(
        lambda a: (a @ first).tanh(), torch.randn(5, 4, **DOUBLE) @ second, use_reentrant=True
    )
    losses = (hidden @ first).square().sum(1)
    with pytest.raises(ValueError, match="does not work with reentrant checkpoints"):
        cabs_torch.backward(losses, uncovered="microbatches")


def test_a_tied_table_whose_uses_cancel_keeps_its_digits():
    torch.manual_seed(0)
    table = nn.Parameter(torch.randn(50, 8))
    indices = torch.randint(50, (16, 3))
    cotangents, others = torch.randn(16, 3, 8) * 1e4, torch.randn(16, 3, 8)
    looked = (F.embedding(indices, table) * cotangents).sum((1, 2))
    multiplied = ((F.one_hot(indices, 50).float() @ table) * cotangents).sum((1, 2))
    more = (F.embedding(indices, table) * others).sum((1, 2))
    expected = torch.zeros(16, 50, 8).double()
    for example in range(16):
        expected[example].index_add_(0, indices[example], others[example].double())
    statistics = cabs_torch.backward(looked - multiplied + more)
    torch.testing.assert_close(
        statistics.group_square_sum, expected.square().sum(), rtol=0.02, atol=0
    )


class Two(torch.autograd.Function):
    """Two outputs, an argument that is no tensor, and one result too many."""

    @staticmethod
    def forward(ctx, inputs, weight, factor):
        ctx.save_for_backward(inputs, weight)
        ctx.factor = factor
        return inputs * weight * factor, inputs + weight

    @staticmethod
    def backward(ctx, one, other):
        inputs, weight = ctx.saved_tensors
        scaled = one * ctx.factor
        return scaled * weight + other, (scaled * inputs + other).sum(0), None, None


@pytest.mark.parametrize("outputs", [(0,), (1,), (0, 1)])
def test_a_function_of_several_outputs_is_exact(outputs):
    torch.manual_seed(0)
    matrix, weight = parameter(3, 4), parameter(4)
    given = Two.apply(torch.randn(5, 3, **DOUBLE) @ matrix, weight, 2.0)
    losses = sum(given[number].sin() for number in outputs).sum(1)
    assert_sums(losses, [matrix, weight])


class Rounded(torch.autograd.Function):
    """A straight-through estimator on a weight."""

    @staticmethod
    def forward(_, weight):
        return weight.round()

    @staticmethod
    def backward(_, cotangents):
        return cotangents * 2.0


def test_a_weight_that_is_quantized_is_exact():
    torch.manual_seed(0)
    weight = parameter(3, 4)
    assert_sums((torch.randn(5, 3, **DOUBLE) @ Rounded.apply(weight)).square().sum(1), [weight])


def test_deep_graphs_are_walked_without_recursion():
    torch.manual_seed(0)
    weight, scale = parameter(3, 3), parameter(3)
    deep = scale
    for _ in range(1500):
        deep = deep * 1.0
    hidden = torch.randn(4, 3, **DOUBLE) * deep
    for _ in range(400):
        hidden = (hidden @ weight).tanh()
    distances = torch.cdist(hidden[:, None], torch.ones(1, 2, 3, **DOUBLE).expand(4, 2, 3))
    losses = distances.sum((1, 2))
    statistics = cabs_torch.backward(losses)
    assert float(statistics.group_square_sum) >= 0.0
    hidden = scale * torch.ones(4, 3, **DOUBLE)
    for _ in range(1200):
        hidden = hidden + 0.1
    with pytest.raises(UncoveredParameterError):
        cabs_torch.backward((hidden @ hidden.T).sum(1))


@pytest.mark.parametrize("again", [False, True])
def test_sparse_gradients_that_are_pushed_on_are_exact(again):
    torch.manual_seed(0)
    table = nn.Embedding(4, 3, sparse=True).double()
    hidden = torch.randn(5, 4, 3, **DOUBLE) + table(torch.arange(4))
    if again:
        hidden = hidden * table(torch.randint(4, (5, 4)))
    assert_sums(hidden.square().sum((1, 2)), [table.weight])


def test_empty_bags_are_exact():
    bag = nn.EmbeddingBag(7, 3, mode="sum").double()
    shift = parameter(1)
    outputs = bag(torch.tensor([], dtype=torch.long), torch.zeros(5, dtype=torch.long))
    assert_sums(outputs.sum(1) + torch.randn(5, **DOUBLE) * shift[0], [bag.weight, shift])


def test_bags_of_different_sizes_are_exact():
    torch.manual_seed(0)
    for mode in ("sum", "mean", "max"):
        bag = nn.EmbeddingBag(7, 3, mode=mode, padding_idx=1).double()
        indices, offsets = torch.randint(7, (11,)), torch.tensor([0, 2, 2, 7, 8])
        weights = torch.randn(11, **DOUBLE) if mode == "sum" else None
        outputs = bag(indices, offsets, per_sample_weights=weights)
        assert_sums(outputs.square().sum(1), [bag.weight])


def test_a_refused_parameter_in_no_group_is_left_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    losses = model(torch.randn(5, 3, **DOUBLE)).square().sum(1)
    last = list(model[2].parameters())
    rows = [torch.autograd.grad(loss, last, retain_graph=True) for loss in losses]
    rows = torch.stack([torch.cat([one.flatten() for one in row]) for row in rows])
    statistics = cabs_torch.backward(losses, parameter_groups=[last])
    torch.testing.assert_close(statistics.variance_trace.sum(), rows.var(dim=0).sum())


def test_optimizer_groups_may_be_given_as_they_are_and_names_may_not():
    layer = nn.Linear(3, 2).double()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    inputs = torch.randn(4, 3, **DOUBLE)
    one = cabs_torch.backward(layer(inputs).sum(1), parameter_groups=optimizer.param_groups)
    other = cabs_torch.backward(layer(inputs).sum(1), parameter_groups=optimizer)
    assert torch.equal(one.variance_trace, other.variance_trace)
    assert float(one.group_square_sum) > 0.0
    with pytest.raises(TypeError, match="parameter_groups must hold parameters, got tuple"):
        cabs_torch.backward(layer(inputs).sum(1), parameter_groups=[list(layer.named_parameters())])


def test_batch_normalization_without_epsilon_is_exact():
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(3, eps=0.0).double().eval()
    assert_sums(norm(torch.randn(4, 3, **DOUBLE)).square().sum(1), list(norm.parameters()))


class Rectified(torch.autograd.Function):
    """One of a user's own, that can be dead for a whole batch."""

    @staticmethod
    def forward(ctx, inputs):
        ctx.save_for_backward(inputs)
        return inputs.clamp_min(0.0)

    @staticmethod
    def backward(ctx, cotangents):
        return cotangents * (ctx.saved_tensors[0] > 0.0)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_function_that_passes_no_gradient_in_some_batch_is_exact(sign):
    torch.manual_seed(0)
    weight, shift = parameter(3, 4).abs(), parameter(4)
    weight = nn.Parameter(weight.detach())
    hidden = Rectified.apply(sign * torch.rand(5, 3, **DOUBLE) @ weight) + shift
    assert_sums(hidden.square().sum(1), [weight, shift])


def test_a_power_that_is_learned_is_exact():
    torch.manual_seed(0)
    power, divisor = parameter(4), parameter(1)
    inputs = torch.rand(5, 3, 4, **DOUBLE)
    inputs[0, 0, 0] = 0.0
    assert_sums(((inputs ** power.exp()).mean(1) / divisor).sin().sum(1), [power, divisor])


def test_rows_of_a_parameter_that_each_example_picks_are_exact():
    torch.manual_seed(0)
    table, labels = parameter(7, 3), torch.tensor([0, 4, 4, 6])
    inputs = torch.randn(4, 3, **DOUBLE)
    for rows in (table[labels], table.index_select(0, labels)):
        assert_sums((inputs - rows).square().sum(1), [table])


def test_a_checkpoint_that_draws_other_random_numbers_is_refused():
    torch.manual_seed(0)
    first, dropout = nn.Linear(3, 3).double(), nn.Dropout(0.5)
    hidden = checkpoint(
        dropout, first(torch.randn(4, 3, **DOUBLE)), use_reentrant=True, preserve_rng_state=False
    )
    with pytest.raises(UncoveredParameterError, match="does not preserve the state of the random"):
        cabs_torch.backward(hidden.square().sum(1))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
def test_verify_looks_into_checkpoints_inside_of_checkpoints():
    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(3)).double()

    def inner(hidden):
        return checkpoint(layers[1], hidden, use_reentrant=True) * 2.0

    def losses_of(inputs):
        hidden = layers[0](inputs).tanh()
        return layers[2](checkpoint(inner, hidden, use_reentrant=True)).square().mean(1)

    found = cabs_torch.verify(losses_of, torch.randn(4, 3, **DOUBLE))
    assert found.error < 1e-10
    assert len(found.rows) == 6
