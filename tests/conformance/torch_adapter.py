"""The PyTorch adapter as the conformance suite sees it."""

from contextlib import ExitStack
from unittest import mock

import torch
import torch.nn.functional as F

import cabs
import cabs_torch
from tests.conformance.adapter import Measured


class Operations:
    einsum, tanh, sin, sqrt, exp = torch.einsum, torch.tanh, torch.sin, torch.sqrt, torch.exp
    stack, concatenate, relu, sigmoid = torch.stack, torch.cat, torch.relu, torch.sigmoid
    reshape, transpose, stop_gradient = torch.reshape, torch.permute, torch.detach

    @staticmethod
    def mean(x, axes, keepdims=False):
        return x.mean(dim=axes, keepdim=keepdims)

    @staticmethod
    def total(x, axes, keepdims=False):
        return x.sum(dim=axes, keepdim=keepdims)

    @staticmethod
    def softmax(x):
        return F.softmax(x, dim=-1)

    @staticmethod
    def log_softmax(x):
        return F.log_softmax(x, dim=-1)

    @staticmethod
    def cross_entropy(scores, labels):
        losses = F.cross_entropy(scores.flatten(0, -2), labels.flatten(), reduction="none")
        return losses.view(labels.shape)

    @staticmethod
    def take(table, numbers):
        return F.embedding(numbers, table)

    @staticmethod
    def convolve(x, kernel, *, stride=1, groups=1):
        x, kernel = x.permute(0, 3, 1, 2), kernel.permute(3, 2, 0, 1)
        return F.conv2d(x, kernel, stride=stride, groups=groups).permute(0, 2, 3, 1)

    @staticmethod
    def layer_norm(x, scale, offset):
        return F.layer_norm(x, scale.shape, scale, offset, eps=0.1)


class TorchAdapter:
    draws = 200
    operations = Operations

    def __init__(self, *, is_summed=False):
        self._is_summed = is_summed
        # Sums of the examples' gradients are those of another order.
        self.ulps = 2**14 if is_summed else 0

    def _losses(self, losses_of, parameters, batch):
        leaves = {name: torch.tensor(one, requires_grad=True) for name, one in parameters.items()}
        batch = {name: torch.tensor(one) for name, one in batch.items()}
        return leaves, losses_of(Operations, leaves, batch)

    def measure(self, losses_of, parameters, batch, *, sample=None):
        leaves, losses = self._losses(losses_of, parameters, batch)
        with ExitStack() as stack:
            if self._is_summed:
                # As in a large network.
                stack.enter_context(mock.patch("cabs_torch.summed._WORTHWHILE", 1))
                stack.enter_context(mock.patch("cabs.gradients.outer_products.ADDED", -(10**9)))
            statistics = cabs_torch.backward(losses, sample=sample)
        return Measured(float(statistics.loss), _gradients(leaves), statistics)

    def plain(self, losses_of, parameters, batch):
        leaves, losses = self._losses(losses_of, parameters, batch)
        losses.mean().backward()
        return _gradients(leaves)

    def of_group(self, examples, gradients):
        square = cabs_torch.gradient_norm_squared(_leaves(gradients))
        return cabs.gradients.PartialStatistics.of_group(examples, square)

    def complete(self, part, gradients, loss=None):
        square = cabs_torch.gradient_norm_squared(_leaves(gradients))
        return part.complete(gradient_norm_squared=square, loss=loss)


def _gradients(leaves):
    return {
        name: (torch.zeros_like(one) if one.grad is None else one.grad.to_dense()).numpy()
        for name, one in leaves.items()
    }


def _leaves(gradients):
    leaves = [torch.zeros(one.shape, dtype=torch.tensor(one).dtype) for one in gradients.values()]
    for leaf, one in zip(leaves, gradients.values(), strict=True):
        leaf.grad = torch.tensor(one)
    return leaves
