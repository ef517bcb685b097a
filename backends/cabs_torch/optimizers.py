"""What an optimizer makes of a gradient: the metric of its coming step, and its learning rate.

Guarantees: P is one over what the step to come divides each element by, with the gradient that the
parameter holds now in the second moment already, as ``torch.optim`` computes it up to rounding;
an optimizer that is not known here is refused; nothing of it is changed, and P waits for no device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, optim

from cabs_torch.errors import describe
from cabs_torch.norms import reductions
from cabs_torch.norms.sums import Weights

_Group = Mapping[str, Any]


def metric_of(optimizer: Any) -> Callable[[Any], Weights] | None:
    """Return P of the step to come, as a function of what scales gradients; None where it is 1.

    Args:
        optimizer: One of those in ``_METRICS``, or a function from a parameter to P.

    Raises:
        TypeError: If it is neither.
    """
    if isinstance(optimizer, optim.Optimizer):
        _check_known(optimizer)
        find = _METRICS[type(optimizer)]
        return None if find is None else lambda scale: _of_step(optimizer, find, scale)
    if isinstance(optimizer, type) or not callable(optimizer):
        raise TypeError(
            "optimizer must be a torch.optim.Optimizer, or a function from a parameter to the P of "
            f"its step, got {optimizer!r}"
        )
    return lambda _: lambda parameter: _of_function(optimizer(parameter), parameter)


def _check_known(optimizer: Any) -> None:
    if type(optimizer) not in _METRICS:
        known = ", ".join(kind.__name__ for kind in _METRICS)
        raise TypeError(
            f"optimizer must be one of torch.optim's {known} itself, whose step is known, got "
            f"{type(optimizer).__module__}.{type(optimizer).__qualname__}; give the one that it "
            "wraps, or, for statistics, a function from a parameter to the P of its step"
        )


def _of_step(
    optimizer: optim.Optimizer, find: Callable[..., Tensor], scale: Tensor | None
) -> Weights:
    groups = {id(one): group for group in optimizer.param_groups for one in group["params"]}

    def weights(parameter: Tensor) -> Callable[[slice], Tensor]:
        group, gradients = groups[id(parameter)], reductions.rows(_held(parameter))
        # Not by its index, which would make an empty one.
        state = optimizer.state.get(parameter, {})
        moments = {name: reductions.rows(one) for name, one in state.items() if name in _MOMENTS}
        is_decoupled = type(optimizer) is optim.AdamW or group.get("decoupled_weight_decay", False)
        decay = 0.0 if is_decoupled else group["weight_decay"]

        def of_part(part: slice) -> Tensor:
            gradient = reductions.at_least_single(gradients[part])
            if scale is not None:
                gradient = gradient / scale.to(gradient.device)
            if group["maximize"]:
                gradient = -gradient
            if decay != 0:
                gradient = gradient + decay * reductions.rows(parameter.detach())[part]
            some = {name: one[part] for name, one in moments.items()}
            root = find(group, {**state, **some}, gradient)
            return root.add_(group["eps"]).reciprocal_()

        return of_part

    return weights


_MOMENTS = frozenset({"exp_avg_sq", "grad_avg", "max_exp_avg_sq", "square_avg", "sum"})
"""What states hold for each element that P is made of."""


def _held(parameter: Tensor) -> Tensor:
    if parameter.grad is None:
        raise ValueError(
            "optimizer needs the gradients that the backward pass leaves in .grad, of which P is "
            f"made, got None for {describe(parameter)}; let no hook take it away"
        )
    return parameter.grad


def _of_function(found: Any, parameter: Tensor) -> Callable[[slice], Tensor | float]:
    """Return what a function gave for a parameter, if it can be its P."""
    if isinstance(found, Tensor) and found.shape == parameter.shape:
        rows = reductions.rows(found.detach())
        return lambda part: rows[part]
    if isinstance(found, Tensor | int | float) and not getattr(found, "shape", ()):
        return lambda _: found
    got = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else repr(found)
    raise ValueError(
        f"optimizer must give P as a number, or as a tensor in the shape of {describe(parameter)}, "
        f"got {got}"
    )


def _moment(held: Tensor | None, new: Tensor, decay: Any) -> Tensor:
    """Return a running average with a new value in it; one that begins is 0 before."""
    share = 1.0 - decay
    share = share.to(new) if isinstance(share, Tensor) else share
    return torch.mul(new, share) if held is None else torch.lerp(held.to(new.dtype), new, share)


def _of_adam(group: _Group, state: Mapping[str, Any], gradient: Tensor) -> Tensor:
    _, decay = group["betas"]
    second = _moment(state.get("exp_avg_sq"), gradient.square(), decay)
    if group.get("amsgrad") and "max_exp_avg_sq" in state:
        second = torch.maximum(state["max_exp_avg_sq"].to(second.dtype), second)
    step = torch.as_tensor(state.get("step", 0.0), dtype=torch.float64) + 1.0
    return torch.div(second, 1.0 - decay**step).sqrt_()


def _of_rmsprop(group: _Group, state: Mapping[str, Any], gradient: Tensor) -> Tensor:
    decay = group["alpha"]
    second = _moment(state.get("square_avg"), gradient.square(), decay)
    if group["centered"]:
        second = second - _moment(state.get("grad_avg"), gradient, decay).square()
    # A variance that is rounded below 0.
    return second.clamp_min(0.0).sqrt()


def _of_adagrad(group: _Group, state: Mapping[str, Any], gradient: Tensor) -> Tensor:
    held = state.get("sum", group["initial_accumulator_value"])
    return torch.add(gradient.square(), held).sqrt_()


_METRICS: dict[type[Any], Callable[..., Tensor] | None] = {
    optim.SGD: None,
    optim.Adam: _of_adam,
    optim.AdamW: _of_adam,
    optim.NAdam: _of_adam,
    optim.RMSprop: _of_rmsprop,
    optim.Adagrad: _of_adagrad,
}
"""By the optimizer, the root that its step divides by, before ``eps`` is added."""


def learning_rates(optimizer: Any) -> list[float]:
    r"""Return the learning rate that a rule takes, one for each parameter group.

    It is how far the parameter comes in the end for a unit of P times the gradient. With momentum
    :math:`\mu` a gradient is in the steps that follow too, together
    :math:`1 + \mu + \mu^2 + \dots = 1 / (1 - \mu)` times (Smith and others, "Don't decay the
    learning rate, increase the batch size", arXiv 1711.00489, section 4): ``lr / (1 - momentum)``
    for RMSprop, and for SGD, with or without Nesterov's, this times ``1 - dampening``. Adam,
    AdamW and NAdam average their gradients, and take ``lr``; Adagrad that of its coming step,
    which ``lr_decay`` lowers.

    Args:
        optimizer: One of ``torch.optim``'s SGD, Adam, AdamW, NAdam, RMSprop and Adagrad.

    Raises:
        TypeError: If it is another.

    Example:
        >>> import torch, cabs_torch
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> cabs_torch.learning_rates(torch.optim.SGD([weight], lr=0.5, momentum=0.75))
        [2.0]
    """
    _check_known(optimizer)
    return [_rate(optimizer, group) for group in optimizer.param_groups]


def _rate(optimizer: optim.Optimizer, group: _Group) -> float:
    rate, momentum = float(group["lr"]), float(group.get("momentum", 0.0))
    dampening = float(group.get("dampening", 0.0))
    if isinstance(optimizer, optim.Adagrad):
        states = [optimizer.state.get(parameter, {}) for parameter in group["params"]]
        step = max((float(state.get("step", 0.0)) for state in states), default=0.0)
        return rate / (1.0 + step * float(group["lr_decay"]))
    return rate if momentum == 0.0 else rate * (1.0 - dampening) / (1.0 - momentum)
