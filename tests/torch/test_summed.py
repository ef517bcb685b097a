"""Gradients that are sums of the per-example gradients, against those of PyTorch."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

import cabs_torch
from cabs.gradients.layout import Layout
from cabs_torch import summed
from cabs_torch.norms.arrays import TorchArrays
from cabs_torch.walk import Walk
from tests.torch.models import Residual, cross_entropy
from tests.torch.reference import gradients_one_by_one
from tests.torch.test_networks import BLOCKS, Network, word_losses


@pytest.fixture(autouse=True)
def _always(monkeypatch):
    """Sum wherever it can be done, whatever it saves."""
    monkeypatch.setattr(summed, "_WORTHWHILE", 1)
    monkeypatch.setattr("cabs.gradients.outer_products.ADDED", -(10**9))


def chosen(losses):
    """Return how many parameters have gradients that are summed."""
    walk = Walk([(losses, Layout((len(losses),), 1, len(losses)))])
    return len(summed.choose(losses, walk, TorchArrays()).meetings)


def assert_as_plain(model, losses_of, rtol=1e-10):
    """Assert that gradients are those of plain backward, and return statistics."""
    plain = copy.deepcopy(model)
    losses_of(plain).mean().backward()
    model.zero_grad()
    statistics = cabs_torch.backward(losses_of(model))
    for (name, one), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        if other.grad is None:
            assert one.grad is None, name
            continue
        assert (one.grad.dtype, one.grad.shape) == (other.grad.dtype, other.grad.shape), name
        slack = rtol * float(other.grad.abs().max()) + 1e-14
        torch.testing.assert_close(one.grad, other.grad, rtol=rtol, atol=slack, msg=name)
    return statistics


@settings(max_examples=100)
@given(
    st.integers(0, 2**31),
    st.lists(st.sampled_from(sorted(BLOCKS)), min_size=1, max_size=4),
    st.lists(st.integers(0, 3), max_size=1),
    st.booleans(),
    st.integers(2, 6),
    st.sampled_from([None, 1, 2]),
)
def test_networks_are_exact(seed, names, again, tied, examples, chunk):
    torch.manual_seed(seed)
    model = Network(names, again, tied=tied).double()
    words, labels = torch.randint(9, (2, examples, 5))
    statistics = assert_as_plain(model, lambda model: word_losses(model(words), labels))
    rows = gradients_one_by_one(model, word_losses, words, labels)
    torch.testing.assert_close(statistics.group_square_sum, rows.square().sum(), rtol=1e-9, atol=0)
    norm_squared = rows.mean(dim=0).square().sum()
    torch.testing.assert_close(
        statistics.gradient_norm_squared, norm_squared, rtol=1e-9, atol=1e-14
    )
    model.zero_grad()
    again = cabs_torch.backward(word_losses(model(words), labels), chunk=chunk)
    torch.testing.assert_close(again.group_square_sum, rows.square().sum(), rtol=1e-9, atol=0)


def words_and_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 9))
    return model, torch.randint(9, (5, 7)), torch.randint(9, (5, 7))


def test_matrices_and_kernels_are_chosen():
    model, words, labels = words_and_model()
    assert chosen(word_losses(model(words), labels)) == 2
    inputs, targets = torch.randn(4, 2, 8, 9), torch.randint(5, (4,))
    # All but the first, whose inputs need no gradient, with their biases where they have some.
    assert chosen(cross_entropy(Residual()(inputs), targets)) >= 2


def test_convolutions_are_exact_in_single_precision():
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU()
    model = nn.Sequential(*layers, nn.Conv2d(16, 8, (3, 2), stride=2, bias=False), nn.Flatten())
    inputs = torch.randn(5, 2, 12, 9)
    losses_of = lambda model: model(inputs).square().mean(dim=1)  # noqa: E731
    assert chosen(losses_of(model)) == 3
    found = assert_as_plain(model, losses_of, rtol=1e-4)
    model.zero_grad()
    bitwise = cabs_torch.backward(losses_of(model), bitwise=True)
    torch.testing.assert_close(
        found.group_square_sum, bitwise.group_square_sum, rtol=1e-5, atol=0.0
    )


def test_bitwise_gradients_are_those_of_pytorch_to_the_bit():
    model, words, labels = words_and_model()
    plain = copy.deepcopy(model)
    word_losses(plain(words), labels).mean().backward()
    cabs_torch.backward(word_losses(model(words), labels), bitwise=True)
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


def test_an_operation_that_nothing_else_needs_is_left_to_pytorch():
    torch.manual_seed(0)
    inputs = torch.randn(4, 3, 5)
    first = nn.Linear(5, 5, bias=False)
    losses_of = lambda model: model(inputs).square().sum(dim=(1, 2))  # noqa: E731
    assert chosen(losses_of(first)) == 0
    assert_as_plain(first, losses_of, rtol=1e-6)
    with_bias = nn.Linear(5, 5)
    assert chosen(losses_of(with_bias)) == 1
    assert_as_plain(with_bias, losses_of, rtol=1e-5)


def test_what_is_used_twice_is_left_to_pytorch():
    torch.manual_seed(0)
    layer = nn.Linear(5, 5)
    inputs = torch.randn(4, 3, 5)
    losses = layer(layer(inputs).tanh()).square().sum(dim=(1, 2))
    assert chosen(losses) == 0


def test_a_penalty_on_a_weight_is_part_of_its_gradient():
    model, words, labels = words_and_model()

    def losses_of(model):
        return word_losses(model(words), labels) + model[1].weight.square().sum()

    assert chosen(losses_of(model)) == 1
    assert_as_plain(model, losses_of, rtol=1e-5)


def test_gradients_are_accumulated_and_hooks_see_them_once():
    model, words, labels = words_and_model()
    seen = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda one: seen.append(one.grad.clone()))
    losses_of = lambda: word_losses(model(words), labels)  # noqa: E731
    cabs_torch.backward(losses_of())
    once = [one.grad.clone() for one in model.parameters()]
    assert len(seen) == len(once)
    cabs_torch.backward(losses_of())
    assert len(seen) == 2 * len(once)
    for one, expected in zip(model.parameters(), once, strict=True):
        torch.testing.assert_close(one.grad, 2.0 * expected)


def test_parameters_of_no_group_and_frozen_ones_are_as_in_pytorch():
    model, words, labels = words_and_model()
    model[1].weight.requires_grad_(False)
    losses_of = lambda model: word_losses(model(words), labels)  # noqa: E731
    assert chosen(losses_of(model)) == 1
    assert_as_plain(model, losses_of, rtol=1e-5)
    plain = [one.grad.clone() for one in model.parameters() if one.requires_grad]
    model.zero_grad()
    cabs_torch.backward(losses_of(model), parameter_groups=[[model[3].weight], [model[3].bias]])
    found = [one.grad for one in model.parameters() if one.requires_grad]
    for one, other in zip(found, plain, strict=True):
        torch.testing.assert_close(one, other)


def test_inputs_and_tensors_on_the_way_have_their_gradients():
    torch.manual_seed(0)
    first, second = nn.Linear(5, 5), nn.Linear(5, 5)
    inputs = torch.randn(4, 3, 5)
    gradients = []
    for bitwise in (False, True):
        hidden = first(inputs).tanh()
        hidden.retain_grad()
        losses = second(hidden).square().sum(dim=(1, 2))
        cabs_torch.backward(losses, bitwise=bitwise)
        gradients.append(hidden.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_are_exact(reentrant):
    model, words, labels = words_and_model()

    def losses_of(model):
        hidden = checkpoint(model[1:3], model[0](words), use_reentrant=reentrant)
        return word_losses(model[3](hidden), labels)

    assert chosen(losses_of(model)) == (0 if reentrant else 2)
    assert_as_plain(model, losses_of, rtol=1e-5)


def test_autocast_gives_gradients_in_the_type_of_the_parameter():
    model, words, labels = words_and_model()

    def losses_of(model):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = model(words)
        return word_losses(outputs.float(), labels)

    assert chosen(losses_of(model)) == 2
    # PyTorch rounds a gradient to half precision before it is handed over.
    assert_as_plain(model, losses_of, rtol=2e-2)


def test_a_scaled_loss_has_a_scaled_gradient():
    model, words, labels = words_and_model()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    cabs_torch.backward(word_losses(model(words), labels), scaler=scaler)
    scaled = [one.grad.clone() for one in model.parameters()]
    model.zero_grad()
    word_losses(model(words), labels).mean().backward()
    for one, other in zip(scaled, model.parameters(), strict=True):
        torch.testing.assert_close(one, 8.0 * other.grad)


def test_gradients_that_others_wait_for_are_left_to_pytorch(tmp_path):
    model, words, labels = words_and_model()
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(tmp_path / "s"), 1), rank=0, world_size=1
    )
    try:
        assert chosen(word_losses(model(words), labels)) == 0
    finally:
        dist.destroy_process_group()


def test_a_failure_says_that_gradients_are_missing(monkeypatch):
    model, words, labels = words_and_model()

    def fail(*_):
        raise RuntimeError("no memory")

    monkeypatch.setattr("cabs_torch.norms.arrays.TorchArrays.squares_and_sum", fail)
    with pytest.raises(RuntimeError, match="no memory") as said:
        cabs_torch.backward(word_losses(model(words), labels))
    assert any("some gradients are missing" in note for note in said.value.__notes__)


def test_a_sample_leaves_gradients_to_pytorch():
    model, words, labels = words_and_model()
    plain = copy.deepcopy(model)
    word_losses(plain(words), labels).mean().backward()
    cabs_torch.backward(word_losses(model(words), labels), sample=2)
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


def test_an_optimizer_that_steps_in_hooks_takes_the_same_steps():
    model, words, labels = words_and_model()
    plain = copy.deepcopy(model)

    def step(parameter):
        with torch.no_grad():
            parameter -= 0.1 * parameter.grad
        parameter.grad = None

    for one in (model, plain):
        for parameter in one.parameters():
            parameter.register_post_accumulate_grad_hook(step)
    cabs_torch.backward(word_losses(model(words), labels))
    word_losses(plain(words), labels).mean().backward()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_a_small_network_is_left_to_pytorch(monkeypatch):
    monkeypatch.undo()
    model, words, labels = words_and_model()
    assert chosen(F.relu(word_losses(model(words), labels))) == 0


def test_a_cotangent_of_one_position_is_not_written_to():
    torch.manual_seed(0)
    model = nn.Sequential(nn.GroupNorm(4, 16), nn.Conv2d(16, 32, 2, stride=2))
    inputs = torch.randn(6, 16, 2, 2)
    losses_of = lambda model: model(inputs).flatten(1).square().mean(dim=1)  # noqa: E731
    plain = copy.deepcopy(model)
    losses_of(plain).mean().backward()
    cabs_torch.backward(losses_of(model), chunk=1)
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_what_was_frozen_or_replaced_after_the_forward_pass_is_left_to_pytorch():
    for change in (
        lambda model: model[1].weight.requires_grad_(False),
        lambda model: model[1].bias.requires_grad_(False),
        lambda model: setattr(model[1].bias, "data", model[1].bias.data.double()),
    ):
        model, words, labels = words_and_model()
        plain = copy.deepcopy(model)
        for one in (model, plain):
            losses = word_losses(one(words), labels)
            change(one)
            assert chosen(losses) == 0
            losses.mean().backward() if one is plain else cabs_torch.backward(losses)
        for one, other in zip(model.parameters(), plain.parameters(), strict=True):
            assert (one.grad is None) == (other.grad is None)
            if one.grad is not None:
                assert torch.equal(one.grad, other.grad)


def test_hooks_between_a_weight_and_its_use_see_its_gradient():
    torch.manual_seed(0)
    table, matrix = nn.Embedding(9, 4), nn.Parameter(torch.randn(6, 4))
    words = torch.randint(9, (5, 7))
    found = []
    for bitwise in (True, False):
        matrix.grad, seen = None, []
        turned = matrix.t()
        turned.retain_grad()
        turned.register_hook(seen.append)
        losses = (table(words) @ turned).tanh().square().sum(dim=(1, 2))
        assert chosen(losses) == 1
        cabs_torch.backward(losses, bitwise=bitwise)
        found.append((matrix.grad, turned.grad, *seen))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
