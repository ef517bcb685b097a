"""What others take for per-example statistics in PyTorch, beside this library, on two threads.

    python tests/benchmarks/peers_torch.py

Each is asked for the sum of squared norms of the examples' gradients, beside the mean gradient, the
way its documentation has it, and is first held against this library's number. Time is that of a
step, forward and backward, as a ratio to the neighbouring plain step; memory one of peaks, of
processes of their own. What a peer refuses is printed. Needs BackPACK, Opacus and Cockpit. Writes
JSON with --json FILE.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from networks_torch import NETWORKS, Batch, batch, losses_of
from rounds import (
    THREADS,
    compare,
    describe,
    in_words,
    options,
    peak,
    report_peak,
    write,
)
from steps_torch import full, plain
from torch import nn

import cabs_torch

# Fewer than in steps_torch.py, since some peers take many times as long.
PAIRS = 7
# How many examples' gradients vmap forms at once; more is slower here, and takes more memory.
CHUNK = 16
RATE = 0.1

# Returns a step that returns the sum of squares.
Peer = Callable[[Batch], Callable[[], float]]


def backpack_step(extension: str) -> Peer:
    """Return the peer that takes one of BackPACK's extensions."""

    def build(data: Batch) -> Callable[[], float]:
        from backpack import backpack, extend, extensions

        model = extend(copy.deepcopy(data.model))
        loss_of = extend(nn.CrossEntropyLoss())
        examples = len(data.inputs)

        def step() -> float:
            model.zero_grad()
            with backpack(getattr(extensions, extension)()):
                loss_of(model(data.inputs).movedim(-1, 1), data.targets).backward()
            total = 0.0
            for parameter in model.parameters():
                if extension == "BatchL2Grad":
                    total += float(parameter.batch_l2.sum()) * examples**2
                elif extension == "SumGradSquared":
                    total += float(parameter.sum_grad_squared.sum()) * examples**2
                else:
                    # The mean of squares less the square of the mean, of gradients over m.
                    assert parameter.grad is not None
                    second = parameter.variance + parameter.grad.square() / examples**2
                    total += float(second.sum()) * examples**3
            return total

        return step

    return build


def opacus_hooks(data: Batch) -> Callable[[], float]:
    """Let Opacus form each example's gradient in hooks."""
    from opacus import GradSampleModule

    model = GradSampleModule(copy.deepcopy(data.model))

    def step() -> float:
        model.zero_grad()
        losses_of(model(data.inputs), data.targets).mean().backward()
        return sum(float(one.grad_sample.square().sum()) for one in model.parameters())

    return step


def opacus_ghost(data: Batch) -> Callable[[], float]:
    """Let Opacus take norms without forming gradients, which it calls ghost clipping."""
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    model = GradSampleModuleFastGradientClipping(
        copy.deepcopy(data.model), max_grad_norm=1.0, use_ghost_clipping=True
    )

    def step() -> float:
        model.zero_grad()
        losses_of(model(data.inputs), data.targets).mean().backward()
        return float(model.get_norm_sample().square().sum())

    return step


def cockpit_cabs(data: Batch) -> Callable[[], float]:
    """Let Cockpit tell the size that the rule asks for, out of gradients that BackPACK forms."""
    from backpack import extend
    from cockpit import Cockpit, quantities

    model = extend(copy.deepcopy(data.model))
    loss_of = extend(nn.CrossEntropyLoss())
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    quantity = quantities.CABS(track_schedule=lambda _: True)
    cockpit = Cockpit(model.parameters(), quantities=[quantity])
    examples, steps = len(data.inputs), iter(range(10**9))

    def step() -> float:
        number = next(steps)
        model.zero_grad()
        scores = model(data.inputs)
        loss, losses = loss_of(scores.movedim(-1, 1), data.targets), losses_of(scores, data.targets)
        info = {
            "batch_size": examples,
            "individual_losses": losses,
            "loss": loss,
            "optimizer": optimizer,
        }
        with cockpit(number, info=info):
            loss.backward(create_graph=cockpit.create_graph(number))
        size = quantity.get_output()[number]
        squares = float(cabs_torch.gradient_norm_squared(model.parameters()))
        return size * examples * float(loss) / RATE + examples * squares

    return step


def vmap_of_grad(data: Batch) -> Callable[[], float]:
    """Take PyTorch's own way to each example's gradient."""
    from torch.func import functional_call, grad, vmap

    def loss_of(parameters: dict[str, Any], inputs: Any, targets: Any) -> Any:
        scores = functional_call(data.model, parameters, (inputs[None],))
        return losses_of(scores, targets[None]).squeeze()

    each = vmap(grad(loss_of), in_dims=(None, 0, 0), chunk_size=CHUNK)
    parameters = dict(data.model.named_parameters())

    def step() -> float:
        detached = {name: one.detach() for name, one in parameters.items()}
        gradients = each(detached, data.inputs, data.targets)
        for name, one in parameters.items():
            one.grad = gradients[name].mean(dim=0)
        return sum(float(one.square().sum()) for one in gradients.values())

    return step


PEERS: dict[str, Peer] = {
    "BackPACK, BatchL2Grad": backpack_step("BatchL2Grad"),
    "BackPACK, SumGradSquared": backpack_step("SumGradSquared"),
    "BackPACK, Variance": backpack_step("Variance"),
    "Opacus, hooks": opacus_hooks,
    "Opacus, ghost": opacus_ghost,
    "Cockpit, CABS": cockpit_cabs,
    "torch.func, vmap of grad": vmap_of_grad,
}


def refusal(peer: Peer, data: Batch) -> str:
    """Return why a peer does not give the number, or nothing."""
    expected = float(cabs_torch.backward(data.losses()).group_square_sum)
    try:
        found = peer(data)()
    except ModuleNotFoundError:
        raise
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
    # Cockpit's goes through a difference of nearly equal numbers.
    return "" if abs(found / expected - 1.0) < 1e-3 else f"gives {found}, expected {expected}"


def taker(label: str, data: Batch) -> Callable[[], object]:
    """Return a step by the name of who takes it."""
    own = {"plain": plain, "cabs": full}
    return partial(own[label], data) if label in own else PEERS[label](data)


def main() -> None:
    """Measure, print, and write."""
    chosen = options(__doc__)
    result: dict[str, object] = {}
    for name, network in NETWORKS.items():
        print(f"{name}, m = {network.examples}")
        data, rows = batch(name), {}
        off = peak(__file__, name, "plain")
        for label in ("cabs", *PEERS):
            why = refusal(PEERS[label], data) if label in PEERS else ""
            if why:
                rows[label] = {"refused": why}
                print(f"  {label}: {why}")
                continue
            # Each beside the plain step alone: what others leave in memory would count for it.
            ratio = compare(PAIRS, partial(plain, data), taker(label, data))
            memory = peak(__file__, name, label) / off
            rows[label] = {"on : off": ratio, "memory, on : off": memory}
            print(f"  {label}: {in_words(ratio)}, memory {memory:.2f}")
        result[name] = rows
    write(chosen, {**describe(), "networks": result})


if __name__ == "__main__":
    torch.set_num_threads(THREADS)
    warnings.simplefilter("ignore")
    if sys.argv[1:2] == ["--peak"]:
        name, label = sys.argv[2:]
        report_peak(lambda: taker(label, batch(name)))
    else:
        main()
