"""Gradients and statistics of split batches, against a float64 loop over the examples."""

import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import cabs
import cabs_torch
from tests.torch.models import Residual, cross_entropy
from tests.torch.reference import gradients_one_by_one


def draw(seed, examples, dtype=torch.float64):
    """Return a network with convolutions and a batch for it."""
    torch.manual_seed(seed)
    inputs = torch.randn(examples, 2, 6, 6).to(dtype)
    return Residual().to(dtype), {"x": inputs, "y": torch.randint(5, (examples,))}


def losses_of(model, piece):
    return cross_entropy(model(piece["x"]), piece["y"])


def rows_of(model, batch):
    """Return each example's gradient, shape (m, parameters), in float64."""
    return gradients_one_by_one(model, cross_entropy, batch["x"], batch["y"])


def flat_gradient(model):
    return torch.cat([one.grad.flatten() for one in model.parameters()]).double()


def assert_near(found, expected, rtol):
    slack = rtol * float(torch.as_tensor(expected).abs().max())
    torch.testing.assert_close(found, expected, rtol=rtol, atol=slack)


def exact(model, pieces, examples):
    """Return exact statistics of a batch from its pieces; gradients are left in the model."""
    model.zero_grad()
    parts = [
        cabs_torch.backward(losses_of(model, piece), batch_size=examples).partial
        for piece in pieces
    ]
    return sum(parts).complete(
        gradient_norm_squared=cabs_torch.gradient_norm_squared(model.parameters())
    )


# At most three at a time: pieces are then of two at least, and one example shows no variance.
@given(st.integers(0, 99), st.integers(2, 11), st.integers(3, 6), st.booleans())
@settings(max_examples=15)
def test_exact_statistics_of_pieces_are_those_of_the_batch(seed, examples, most, is_double):
    model, batch = draw(seed, examples, torch.float64 if is_double else torch.float32)
    rtol = 1e-10 if is_double else 5e-5
    pieces = cabs.split(batch, max_microbatch=most)
    assert max(len(piece["y"]) for piece in pieces) <= most
    found = exact(model, pieces, examples)
    rows = rows_of(model, batch)
    mean = rows.mean(dim=0)
    assert (found.examples, found.groups) == (examples, examples)
    assert_near(flat_gradient(model), mean, rtol)
    assert_near(found.group_square_sum, rows.square().sum(), rtol)
    assert_near(found.gradient_norm_squared, mean.square().sum(), rtol)
    # The trace is a difference, and carries the rounding errors of what it is the difference of.
    slack = rtol * float(rows.square().sum()) / (examples - 1)
    trace = rows.var(dim=0).sum()
    torch.testing.assert_close(found.variance_trace, trace, rtol=rtol, atol=slack)
    # And so they are those of a single backward pass.
    model.zero_grad()
    whole = cabs_torch.backward(losses_of(model, batch))
    assert_near(found.group_square_sum, whole.group_square_sum, rtol)
    assert_near(found.gradient_norm_squared, whole.gradient_norm_squared, rtol)


def test_the_plain_mean_over_unequal_pieces_would_be_another_gradient():
    model, batch = draw(0, 5)
    pieces = cabs.split(batch, max_microbatch=3)
    assert [len(piece["y"]) for piece in pieces] == [2, 3]
    found = []
    for weights in ([2 / 5, 3 / 5], [1 / 2, 1 / 2]):
        model.zero_grad()
        for weight, piece in zip(weights, pieces, strict=True):
            (weight * losses_of(model, piece).mean()).backward()
        found.append(flat_gradient(model))
    mean = rows_of(model, batch).mean(dim=0)
    assert_near(found[0], mean, 1e-12)
    assert (found[1] - mean).norm() > 0.01 * mean.norm()


def test_replicas_have_the_gradient_and_the_statistics_of_the_batch_together():
    model, batch = draw(1, 14)
    shares = cabs.split(batch, max_microbatch=4, replicas=2)
    assert [[len(piece["y"]) for piece in share] for share in shares] == [[3, 4], [3, 4]]
    # Their gradients are summed, as those of microbatches are.
    found = exact(model, [piece for share in shares for piece in share], 14)
    rows = rows_of(model, batch)
    assert_near(flat_gradient(model), rows.mean(dim=0), 1e-10)
    assert_near(found.variance_trace, rows.var(dim=0).sum(), 1e-9)


def test_pieces_are_views_in_containers_of_the_same_kind():
    x = torch.randn(5, 2)
    pieces = cabs.split((x, [x[:, 0]], None), max_microbatch=2)
    assert torch.equal(torch.cat([piece[0] for piece in pieces]), x)
    assert all(piece[0]._base is x for piece in pieces)
    assert all(type(piece) is tuple and type(piece[1]) is list for piece in pieces)
    with pytest.raises(ValueError, match=r"batch\[0\], 2 in batch\[1\]"):
        cabs.split((x, torch.ones(2)))
    with pytest.raises(ValueError, match=r"batch\['n'\] must have .* got shape torch.Size\(\[\]\)"):
        cabs.split({"x": x, "n": torch.tensor(3)})


class Saving(torch.autograd.Function):
    """Keeps what autograd keeps, and runs out of memory for more examples than fit."""

    limit = 3
    saved: list = []  # noqa: RUF012

    @staticmethod
    def forward(ctx, x):
        copied = x.clone()
        ctx.save_for_backward(copied)
        Saving.saved.append(weakref.ref(copied))
        return copied * 1.0

    @staticmethod
    def backward(ctx, grad):
        (copied,) = ctx.saved_tensors
        if len(copied) > Saving.limit:
            raise torch.OutOfMemoryError(f"{len(copied)} examples")
        return grad


@pytest.mark.parametrize("limit", [2, 4, 7])
def test_a_run_that_is_out_of_memory_goes_on_with_the_same_gradient(limit):
    model, batch = draw(2, 16)
    cap, tried = cabs.MemoryCap(64), []

    def step(pieces):
        tried.append([len(piece["y"]) for piece in pieces])
        model.zero_grad()
        for index, piece in enumerate(pieces):
            # A part of the gradient is there when memory runs out.
            if len(piece["y"]) > limit and index == len(pieces) - 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            (losses_of(model, piece).sum() / 16).backward()
        return "done"

    with pytest.warns(RuntimeWarning, match="the cap is lowered from"):
        assert cap.run(step, batch, out_of_memory=torch.OutOfMemoryError) == "done"
    assert max(tried[-1]) <= limit
    assert tried[:2] == [[16], [8, 8]]
    assert_near(flat_gradient(model), rows_of(model, batch).mean(dim=0), 1e-10)


def test_exact_statistics_go_on_too():
    model, batch = draw(3, 12)
    cap = cabs.MemoryCap(12)

    def step(pieces):
        if max(len(piece["y"]) for piece in pieces) > 3:
            raise torch.OutOfMemoryError
        return exact(model, pieces, 12)

    with pytest.warns(RuntimeWarning):
        found = cap.run(step, batch, out_of_memory=torch.OutOfMemoryError)
    assert cap.examples == 3
    rows = rows_of(model, batch)
    assert_near(found.variance_trace, rows.var(dim=0).sum(), 1e-9)


def test_tensors_of_a_failed_backward_pass_are_freed_before_memory_is_released():
    torch.manual_seed(0)
    layer, inputs = nn.Linear(3, 3).double(), torch.randn(6, 3).double()
    Saving.saved.clear()
    alive = []

    def step(pieces):
        layer.zero_grad()
        for piece in pieces:
            (Saving.apply(layer(piece)).square().sum() / 6).backward()

    def release():
        alive.append([one() is not None for one in Saving.saved])

    gc.disable()
    try:
        with pytest.warns(RuntimeWarning):
            cabs.MemoryCap(6).run(
                step, inputs, out_of_memory=torch.OutOfMemoryError, release=release
            )
    finally:
        gc.enable()
    assert alive == [[False]]
    assert len(Saving.saved) == 3


def test_another_error_of_the_framework_passes_through():
    def step(pieces):
        return pieces[0] @ torch.ones(7)

    cap = cabs.MemoryCap(4)
    with pytest.raises(RuntimeError, match="size mismatch"):
        cap.run(step, torch.ones(4, 3), out_of_memory=torch.OutOfMemoryError)
    assert cap.examples == 4
