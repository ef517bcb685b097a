"""Each legal form of an operation's arguments is exact, or refused before any gradient is written.

The forms are those of PyTorch's own schemas: one number in place of one for each axis, a string,
options that are given or None, every overload, and outputs that are used alone or together.
"""

import itertools
import random
import re
import zlib
from typing import Any

import pytest
import torch

import cabs_torch
from cabs_torch.graph.autograd_nodes import is_leaf, name_of
from cabs_torch.rules import batch_axis, broadcast, parameter_gradients
from cabs_torch.walk import leaves_behind
from tests.torch.forms import EXAMPLES, FACTORS, GIVEN, Batch, Fixed, Indices, Parameter, X

# Forms of one operation that are tried; more are drawn from at random, the same every time.
MOST = 40

# In need of another device, or random, so that no loop over the examples gives the same.
ELSEWHERE = frozenset(
    """
    NativeDropout RreluWithNoise CudnnBatchNorm MiopenBatchNorm ScaledDotProductCudnnAttention
    ScaledDotProductEfficientAttention ScaledDotProductFlashAttention
    ScaledDotProductFusedAttentionOverrideable
    """.split()
)


def elementwise_names():
    """Return the operations of the rules for elementwise ones, as their nodes are called."""
    for name in sorted(batch_axis.ELEMENTWISE):
        snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
        if snake not in GIVEN and hasattr(torch.ops.aten, snake):
            yield snake


RANDOM = {"native_dropout", "rrelu_with_noise"}
NAMES = sorted({*GIVEN, *elementwise_names()} - RANDOM)


def options_of(name, argument):
    """Return the values that an argument is given, of all forms that its schema allows."""
    kind, given = str(argument.type), GIVEN.get(name, {}).get(argument.name)
    options = list(given) if given is not None else default_options(argument, kind)
    if kind.startswith("Optional") and None not in options:
        options.append(None)
    forms = []
    for option in options:
        forms.append(option)
        is_list = isinstance(option, list) and "List[int]" in kind and option
        if is_list and len(set(option)) == 1 and len(option) > 1:
            # One for all axes, as a number and as a list.
            forms += [option[0], option[:1]]
    return forms


def default_options(argument, kind):
    if "bool" in kind:
        return [False, True]
    if "Tensor" in kind and "List" not in kind:
        return FACTORS if argument.name not in ("self", "input") else [X]
    if argument.has_default_value():
        return [argument.default_value]
    return {"number": [0.7], "float": [0.3], "int": [1]}.get(kind, [None])


def forms(name):
    """Yield overloads of an operation, and arguments for it."""
    packet = getattr(torch.ops.aten, name)
    for overload in packet.overloads():
        operation = getattr(packet, overload)
        schema = operation._schema
        names = {argument.name for argument in schema.arguments}
        if "out" in names or schema.is_mutable or "names" in overload or "dimname" in overload:
            continue
        choices = [options_of(name, argument) for argument in schema.arguments]
        combined = list(itertools.islice(itertools.product(*choices), 100_000))
        draw = random.Random(zlib.crc32(f"{name}.{overload}".encode()))
        if len(combined) > MOST:
            combined = draw.sample(combined, MOST)
        for values in combined:
            yield (
                operation,
                {
                    argument.name: value
                    for argument, value in zip(schema.arguments, values, strict=True)
                },
            )


class Call:
    """An operation and its arguments, for a batch, or for one example of it."""

    def __init__(self, operation, given):
        self.operation, self.given = operation, given
        self.parameters = []
        torch.manual_seed(0)
        self.made = {name: self._make(value) for name, value in given.items()}

    def _make(self, value):
        if isinstance(value, list):
            return [self._make(one) for one in value]
        if isinstance(value, Batch):
            # Through a parameter, so that gradients pass through the operation.
            scale = torch.rand(value.shape).double().mul(0.4).add(0.5).requires_grad_()
            self.parameters.append(scale)
            return value, torch.rand(EXAMPLES, *value.shape).double() * 0.9 + 0.05, scale
        if isinstance(value, Parameter):
            self.parameters.append(torch.rand(value.shape).double().requires_grad_())
            return value, self.parameters[-1]
        if isinstance(value, Fixed):
            return value, torch.rand(value.shape).double() + 0.1
        if isinstance(value, Indices):
            return value, torch.randint(4, (EXAMPLES, *value.shape))
        return value

    def __call__(self, chosen=slice(None)):
        found = {name: self._chosen(value, chosen) for name, value in self.made.items()}
        outputs = self.operation(**found)
        outputs = outputs if isinstance(outputs, (tuple, list)) else [outputs]
        return [one for one in outputs if isinstance(one, torch.Tensor) and one.requires_grad]

    def _chosen(self, value: Any, chosen: slice) -> Any:
        count = len(range(EXAMPLES)[chosen])
        if isinstance(value, list):
            # Sizes that speak of the batch speak of one example then.
            at_first = [count if one == EXAMPLES else one for one in value[:1]]
            keeps = self.operation._schema.name.endswith(("expand", "view"))
            repeats = self.operation._schema.name.endswith("repeat")
            if (keeps or repeats) and value and value[0] == EXAMPLES:
                return [*at_first, *value[1:]]
            return [self._chosen(one, chosen) for one in value]
        if isinstance(value, tuple) and isinstance(value[0], Batch):
            return value[1][chosen] * value[2]
        if isinstance(value, tuple) and isinstance(value[0], Indices):
            return value[1][chosen]
        if isinstance(value, tuple):
            whole = value[1]
            is_batch = whole.dim() == 3 and len(whole) == EXAMPLES and value[0].shape == whole.shape
            return whole[chosen] if is_batch and isinstance(value[0], Fixed) else whole
        if value is torch.bool:
            return (torch.arange(24).reshape(4, 6) % 3 == 0)[None].expand(count, 4, 6)
        if value is torch.int64:
            return torch.tensor([2, 0, 0, 3])
        if value is torch.arange:
            return torch.arange(count)
        return value


def losses_of(outputs, count):
    return sum((one.reshape(count, -1) + 0.3).square().sum(dim=1) for one in outputs)


def operations_in(losses):
    seen, waiting = set(), [losses.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting.extend(child for child, _ in node.next_functions)
    return {name_of(node) for node in seen}


def assert_exact_or_refused(call, places):
    """Assert it for some of the outputs; return the operations that were covered."""
    outputs = call()
    losses = losses_of([outputs[place] for place in places], EXAMPLES)
    operations = operations_in(losses)
    leaves = [one.variable for one in leaves_behind(losses.grad_fn) if is_leaf(one)]
    try:
        statistics = cabs_torch.backward(losses)
    except cabs_torch.UncoveredParameterError:
        assert all(one.grad is None for one in leaves)
        return set()
    rows = []
    for example in range(EXAMPLES):
        some = call(slice(example, example + 1))
        one = losses_of([some[place] for place in places], 1)
        gradients = torch.autograd.grad(one.sum(), leaves, allow_unused=True)
        rows.append(
            torch.cat(
                [
                    torch.zeros(leaf.numel()) if gradient is None else gradient.to_dense().flatten()
                    for leaf, gradient in zip(leaves, gradients, strict=True)
                ]
            )
        )
    square_sum = torch.stack(rows).square().sum()
    torch.testing.assert_close(
        statistics.group_square_sum, square_sum.double(), rtol=1e-5, atol=1e-12
    )
    return operations


covered: set[str] = set()


@pytest.mark.parametrize("name", NAMES)
def test_every_form_is_exact_or_refused_before_any_gradient(name):
    legal = 0
    for operation, given in forms(name):
        try:
            call = Call(operation, given)
            outputs, alone = call(), call(slice(0, 1))
            torch.autograd.grad([one.sum() for one in outputs], call.parameters, allow_unused=True)
        except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError):
            continue  # no legal form
        if not outputs or len(outputs) != len(alone):
            continue
        is_batch = [len(one.shape) > 0 and len(one) == EXAMPLES for one in outputs]
        if not all(is_batch) or any(len(one) != 1 for one in alone):
            continue
        legal += 1
        single = [(place,) for place in range(len(outputs))]
        for places in {*single, tuple(range(len(outputs)))}:
            covered.update(assert_exact_or_refused(call, places))
    assert legal, f"no form of {name} was legal"


def test_every_rule_was_driven():
    if len(covered) < len(NAMES) // 2:
        pytest.skip("only some of the operations were run")
    rules = {
        *parameter_gradients._RULES,
        *broadcast.FACTORS,
        *batch_axis._RULES,
        *batch_axis._SPLITTING,
        "Cat",
    }
    assert sorted(rules - covered - ELSEWHERE) == []
