"""Walks that are not repeated: each way in which a graph can differ from one seen before."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import cabs_torch
from tests.torch.reference import assert_exact

M = 4


@pytest.fixture(autouse=True)
def walks(monkeypatch):
    """Count walks, with no plans at hand."""
    made = []

    class Counted(cabs_torch.walk.Walk):
        def __init__(self, *given, **options):
            made.append(self)
            super().__init__(*given, **options)

    monkeypatch.setattr("cabs_torch.plans._plans", [])
    monkeypatch.setattr("cabs_torch.plans.Walk", Counted)
    return made


def weights(*shapes):
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(*shape, dtype=torch.float64)) for shape in shapes]


def inputs_of(*shape):
    torch.manual_seed(1)
    return torch.randn(*shape, dtype=torch.float64)


def rows_of(losses, parameters):
    """Return each example's gradient, by a loop over the losses."""
    rows = []
    for loss in losses:
        found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        rows.append(torch.cat([one.flatten() for one in found if one is not None]))
    return torch.stack(rows)


def assert_measured(losses, of, **options):
    """Assert that statistics are those of a loop over the losses."""
    rows = rows_of(losses, of)
    statistics = cabs_torch.backward(losses, **options)
    for found, expected in (
        (statistics.group_square_sum, rows.square().sum()),
        (statistics.gradient_norm_squared, rows.mean(dim=0).square().sum()),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=0.0)


class Deep(nn.Module):
    def __init__(self, dtype=torch.float64, width=5):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential()
        for _ in range(4):
            self.layers.extend([nn.Linear(width, width), nn.LayerNorm(width), nn.Tanh()])
        self.to(dtype)

    def forward(self, inputs):
        return self.layers(inputs)


def summed(outputs, targets=None):  # noqa: ARG001
    return outputs.flatten(1).square().sum(dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(M, 5), (M, 3, 5)])
def test_a_graph_seen_before_is_not_walked_again(walks, dtype, shape):
    model = Deep(dtype)
    for _ in range(3):
        model.zero_grad()
        assert_exact(model, summed, inputs_of(*shape).to(dtype), torch.zeros(M))
    assert len(walks) == 1


def test_parameters_that_are_alike_keep_sums_of_their_own():
    model, inputs = Deep(), inputs_of(M, 3, 5)
    parameters = [*model.parameters()]
    losses = summed(model(inputs))
    expected = [rows_of(losses, [one]).square().sum() for one in parameters]
    means = [rows_of(losses, [one]).mean(dim=0).square().sum() for one in parameters]
    statistics = cabs_torch.backward(losses, parameter_groups=[[one] for one in parameters])
    torch.testing.assert_close(statistics.group_square_sum, torch.stack(expected))
    torch.testing.assert_close(statistics.gradient_norm_squared, torch.stack(means))


def test_factors_of_what_is_alike_are_its_own():
    w, v, inputs = *weights((5,), (5,)), inputs_of(M, 5)
    assert_measured((inputs + torch.add(w, v, alpha=3.0)).square().sum(dim=1), [w, v])
    w.grad = v.grad = None
    outputs = torch.add(inputs, w, alpha=2.0)
    assert_measured(torch.add(outputs, v, alpha=3.0).square().sum(dim=1), [w, v])


def test_axes_of_what_is_alike_are_its_own():
    w, v, inputs = *weights((3, 1), (5,)), inputs_of(M, 3, 5)
    assert_measured(((inputs + w).tanh() + v).square().sum(dim=(1, 2)), [w, v])


def test_more_than_a_chunk_of_small_parameters(monkeypatch):
    monkeypatch.setattr("cabs_torch.norms.reductions._CHUNK", 50)
    for shape in ((M, 5), (M, 3, 5)):
        assert_exact(Deep(), summed, inputs_of(*shape), torch.zeros(M))


def test_gradients_that_are_there_are_not_those_of_the_pass():
    model, inputs = Deep(), inputs_of(M, 5)
    for _ in range(2):
        assert_measured(summed(model(inputs)), [*model.parameters()])
    assert all(one.grad is not None for one in model.parameters())


def test_parameters_made_anew_are_those_that_are_measured(walks):
    for _ in range(3):
        w, b = weights((3, 3), (3,))
        with torch.no_grad():
            w.mul_(len(walks) + 1.0)
        assert_measured(torch.addmm(b, inputs_of(M, 3), w).square().sum(dim=1), [w, b])
        assert w.grad is not None
    assert len(walks) == 1


def test_a_tied_weight_is_not_two():
    (w, v), inputs = weights((3, 3), (3, 3)), inputs_of(M, 3)
    assert_measured(((inputs @ w).tanh() @ v).square().sum(dim=1), [w, v])
    w.grad = None
    assert_measured(((inputs @ w).tanh() @ w).square().sum(dim=1), [w])


@pytest.mark.parametrize("is_first", [False, True])
def test_a_graph_of_as_many_nodes_with_other_edges(is_first):
    (p, q), inputs = weights((3,), (3,)), [inputs_of(M, 3) * at for at in (1.0, 2.0, 3.0)]

    def losses_of(second):
        terms = (p * inputs[0] + second * inputs[1]) + q * inputs[2]
        return terms.square().sum(dim=1)

    for second in (p, q) if is_first else (q, p):
        p.grad = q.grad = None
        assert_measured(losses_of(second), [p, q])


@pytest.mark.parametrize("orders", [((1, 2), (0, 1)), ((0, 1), (1, 2))])
def test_a_transposition_of_other_axes_of_one_size(orders):
    (w,), inputs = weights((M, M)), inputs_of(M, M, M)
    for first, second in orders:
        w.grad = None
        assert_measured((inputs @ w).transpose(first, second).square().sum(dim=(1, 2)), [w])


def test_a_part_that_begins_elsewhere_mixes_examples():
    (w,), inputs = weights((3, 3)), inputs_of(2 * M, 3)
    assert_measured((inputs @ w)[:M].square().sum(dim=1), [w])
    assert_measured((inputs @ w)[M:].square().sum(dim=1), [w])
    with pytest.raises(cabs_torch.UncoveredParameterError, match="axis that holds the examples"):
        cabs_torch.backward((inputs @ w)[1 : M + 1].square().sum(dim=1))


def test_a_convolution_of_other_settings_and_the_same_shapes():
    (w,), images = weights((2, 2, 3, 3)), inputs_of(M, 2, 6, 6)
    for padding, dilation in ((1, 1), (2, 2), (1, 1)):
        w.grad = None
        outputs = nn.functional.conv2d(images, w, padding=padding, dilation=dilation)
        assert_measured(outputs.flatten(1).square().sum(dim=1), [w])


def test_a_table_with_another_row_for_padding():
    (w,), words = weights((5, 3)), torch.randint(5, (M, 6), generator=torch.Generator())
    for padding in (None, 1, 2):
        w.grad = None
        outputs = nn.functional.embedding(words, w, padding_idx=padding)
        assert_measured(outputs.flatten(1).square().sum(dim=1), [w])


def test_batches_of_other_sizes_have_plans_of_their_own(walks):
    model = Deep()
    # As many rows in each.
    for shape in ((4, 3, 5), (6, 2, 5), (2, 6, 5), (4, 3, 5), (6, 2, 5)):
        model.zero_grad()
        rows = model(inputs_of(*shape).reshape(12, 5)).reshape(shape)
        assert_measured(summed(rows), [*model.parameters()])
    assert len(walks) == 3


def test_the_plans_of_few_graphs_are_kept(walks):
    (w,) = weights((3,))
    for m in (*range(2, 22), 21):
        cabs_torch.backward((inputs_of(m, 3) * w).sum(dim=1))
    assert len(walks) == 20
    assert len(cabs_torch.plans._plans) == 16


def test_one_dimension_less_or_as_many_positions_as_examples():
    (w,) = weights((M,))
    assert_measured((inputs_of(M, M) * w).square().sum(dim=1), [w])
    w.grad = None
    with pytest.raises(cabs_torch.UncoveredParameterError):
        cabs_torch.backward((inputs_of(M, M) * w).square().sum(dim=0))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoints_are_seen_at_each_step(walks, use_reentrant):
    model, inputs = Deep(), inputs_of(M, 5)

    def losses_of(outputs_of):
        first, rest = model.layers[:1], model.layers[1:]
        return summed(outputs_of(rest, first(inputs)))

    expected = rows_of(losses_of(lambda rest, hidden: rest(hidden)), [*model.parameters()])
    for _ in range(2):
        model.zero_grad()
        losses = losses_of(
            lambda rest, hidden: checkpoint(rest, hidden, use_reentrant=use_reentrant)
        )
        found = cabs_torch.backward(losses).group_square_sum
        torch.testing.assert_close(found, expected.square().sum(), rtol=1e-10, atol=0.0)
    assert len(walks) == (2 if use_reentrant else 1)


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale):
        ctx.save_for_backward(x, scale)
        return x * scale

    @staticmethod
    def backward(ctx, cotangent):
        x, scale = ctx.saved_tensors
        return cotangent * scale, (cotangent * x).sum(dim=0)


def test_a_rule_that_is_registered_later_holds(monkeypatch):
    monkeypatch.setattr("cabs_torch.rules.registered._rules", {})
    (w,), called = weights((3,)), []

    def rule(name):
        def of_scale(ctx, cotangent):
            called.append(name)
            return cotangent * ctx.saved_tensors[0]

        return of_scale

    for name in ("", "first", "first", "second"):
        if name not in ("", *called):
            cabs_torch.register_rule(Scaled, {1: rule(name)})
        w.grad = None
        assert_measured(Scaled.apply(inputs_of(M, 3), w).square().sum(dim=1), [w])
    assert called == ["first", "first", "second"]


def test_other_parameters_are_asked_for():
    (w, v), inputs = weights((3, 3), (3, 3)), inputs_of(M, 3)
    for wanted in ([w, v], [v], [w], None):
        w.grad = v.grad = None
        losses = ((inputs @ w).tanh() @ v).square().sum(dim=1)
        options = {} if wanted is None else {"parameters": wanted}
        assert_measured(losses, wanted or [w, v], **options)


def test_what_is_not_covered_is_refused_or_left_out_each_time():
    (w, v), inputs = weights((3, 3), (3,)), inputs_of(M, 3)

    def losses_of():
        w.grad = v.grad = None
        outputs = inputs @ w
        return (outputs * v).square().sum(dim=1) + outputs.mean()

    with pytest.warns(UserWarning, match="leave out"):
        cabs_torch.backward(losses_of(), uncovered="ignore")
    with pytest.raises(cabs_torch.UncoveredParameterError):
        cabs_torch.backward(losses_of())
    statistics = cabs_torch.backward(losses_of(), uncovered="ignore")
    expected = rows_of(losses_of(), [v]).square().sum()
    torch.testing.assert_close(statistics.group_square_sum, expected)
    assert statistics.measured == pytest.approx(3 / 12)


def test_requires_grad_is_switched():
    (w, b), inputs = weights((3, 3), (3,)), inputs_of(M, 3)
    for is_trained in (True, False, True):
        w.grad = b.grad = None
        b.requires_grad_(is_trained)
        losses = torch.addmm(b, inputs, w).square().sum(dim=1)
        assert_measured(losses, [w, b] if is_trained else [w])


def test_a_parameter_frozen_after_the_forward_pass_is_in_the_graph():
    (w, b), inputs = weights((3, 3), (3,)), inputs_of(M, 3)
    losses = torch.addmm(b, inputs, w).square().sum(dim=1)
    rows = rows_of(losses, [w, b])
    b.requires_grad_(False)
    statistics = cabs_torch.backward(losses)
    expected = rows.mean(dim=0).square().sum()
    torch.testing.assert_close(statistics.gradient_norm_squared, expected)


def test_a_hook_is_added_later():
    (w,), inputs = weights((3, 3)), inputs_of(M, 3)
    assert_measured((inputs @ w).square().sum(dim=1), [w])
    hook = w.register_hook(lambda gradient: 2.0 * gradient)
    with pytest.raises(cabs_torch.UncoveredParameterError, match="has a hook"):
        cabs_torch.backward((inputs @ w).square().sum(dim=1))
    hook.remove()
    w.grad = None
    assert_measured((inputs @ w).square().sum(dim=1), [w])


def test_a_hook_that_takes_gradients_away_is_added_later():
    (w,), inputs = weights((3, 3)), inputs_of(M, 3)
    assert_measured((inputs @ w).square().sum(dim=1), [w])
    w.grad = None
    w.register_post_accumulate_grad_hook(lambda one: setattr(one, "grad", None))
    assert_measured((inputs @ w).square().sum(dim=1), [w])


def test_values_that_say_where_examples_lie_are_looked_at_each_time():
    (w,), inputs = weights((3, 3)), inputs_of(M, 3)
    assert_measured((inputs @ w)[torch.arange(M)].square().sum(dim=1), [w])
    with pytest.raises(cabs_torch.UncoveredParameterError, match="picks or reorders"):
        cabs_torch.backward((inputs @ w)[torch.arange(M).flip(0)].square().sum(dim=1))


def test_a_graph_that_was_used_is_refused():
    model, inputs = Deep(), inputs_of(M, 5)
    losses = summed(model(inputs))
    cabs_torch.backward(losses)
    held = [one.grad.clone() for one in model.parameters()]
    with pytest.raises(ValueError, match="no backward pass has used"):
        cabs_torch.backward(losses)
    assert all(map(torch.equal, held, [one.grad for one in model.parameters()]))


def test_a_parameter_that_changed_its_shape_is_not_that_of_the_plan():
    (w,), inputs = weights((3,)), inputs_of(M, 3)
    losses = (inputs * w).square().sum(dim=1)
    w.data = torch.zeros(3, 1, dtype=torch.float64)
    cabs_torch.plans.walked(losses, strict=True, wanted=None)
    assert not cabs_torch.plans._plans


def test_a_plan_keeps_nothing_alive(walks):
    def step():
        model, images = nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4)), inputs_of(M, 2, 5, 5)
        model.append(nn.Sequential(nn.Flatten(), Deep(torch.float32, 36), nn.PReLU()))
        losses = summed(model(images.float()))
        found = [weakref.ref(one) for one in (*model.parameters(), images, losses)]
        cabs_torch.backward(losses)
        return found

    held = step()
    walks.clear()
    gc.collect()
    assert len(cabs_torch.plans._plans) == 1
    assert [one() for one in held] == [None] * len(held)


def test_complex_numbers_in_between():
    (w,), inputs = weights((3,)), inputs_of(M, 3)
    for dtype in (torch.float32, torch.complex64):
        w.grad = None
        losses = (inputs.to(dtype) * w.to(dtype)).abs().double().sum(dim=1)
        if dtype.is_complex:
            with pytest.raises(cabs_torch.UncoveredParameterError, match="complex"):
                cabs_torch.backward(losses)
        else:
            cabs_torch.backward(losses)


def test_a_constant_of_another_width():
    (w,) = weights((1,))
    for width in (3, 7, 3):
        w.grad = None
        assert_measured((inputs_of(M, width) + w).square().sum(dim=1), [w])


def test_another_output_of_the_same_operation():
    (w,), inputs = weights((3, 3)), inputs_of(8, 3)
    halves = lambda: (inputs @ w).square().sum(dim=1).split([2, 4, 2])  # noqa: E731
    assert_measured(halves()[0], [w])
    with pytest.raises(cabs_torch.UncoveredParameterError, match="axis that holds the examples"):
        cabs_torch.backward(halves()[1])
    w.grad = None
    assert_measured(halves()[2], [w])


def test_a_parameter_that_is_in_two_places():
    def losses_of(w, v):
        return (inputs * w).square().sum(dim=1) + (inputs * v).square().sum(dim=1)

    (w, v), inputs = weights((3,), (3,)), inputs_of(M, 3)
    assert_measured(losses_of(w, v), [w, v])
    first = (inputs * w).square().sum(dim=1)
    # Its data in another type and back leave the graph with two nodes for it.
    w.data = w.data.float()
    w.data = w.data.double()
    with pytest.raises(cabs_torch.UncoveredParameterError, match="in two places"):
        cabs_torch.backward(first + (inputs * w).square().sum(dim=1))


def test_a_parameter_of_another_kind(monkeypatch):
    class Spread(nn.Parameter):
        pass

    monkeypatch.setattr("cabs_torch.walk.is_distributed", lambda one: isinstance(one, Spread))
    (w,), inputs = weights((3, 3)), inputs_of(M, 3)
    assert_measured((inputs @ w).square().sum(dim=1), [w])
    with pytest.raises(cabs_torch.UncoveredParameterError, match="DTensor"):
        cabs_torch.backward((inputs @ Spread(w.detach())).square().sum(dim=1))


@pytest.mark.parametrize("padding", [None, 1])
@pytest.mark.parametrize("is_tied", [False, True])
def test_rows_that_all_examples_take_need_no_pass_for_each(monkeypatch, padding, is_tied):
    (w, v), inputs = weights((6, 3), (3,)), inputs_of(M, 4, 3)
    places = torch.tensor([[3, 1, 0, 3]])
    taken = nn.functional.embedding(places, w, padding_idx=padding)
    outputs = (inputs + taken) @ w.mT if is_tied else inputs * v + taken
    of = [w] if is_tied else [w, v]
    losses = outputs.square().sum(dim=(1, 2))
    rows = rows_of(losses, of)
    monkeypatch.setattr(torch.autograd, "grad", None)
    found = cabs_torch.backward(losses).group_square_sum
    torch.testing.assert_close(found, rows.square().sum(), rtol=1e-10, atol=0.0)
