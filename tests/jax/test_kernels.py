"""What statistics add to a compiled step, read from its program: nothing that asks the host."""

import jax
import jax.numpy as jnp
import pytest

import cabs_jax
from tests.jax.compiled import kernels
from tests.jax.reference import draw, mean_loss

PARAMETERS = {
    "table": draw(0, 9, 4),
    "layers": draw(1, 3, 4, 4),
    "kernel": draw(2, 3, 4, 2),
    "scale": draw(3, 2),
}
BATCH = {"ids": jnp.arange(30).reshape(5, 6) % 9, "mark": jnp.arange(5)}


def loss_fn(parameters, example):
    rows = parameters["table"][example["ids"]]
    rows, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), rows, parameters["layers"])
    convolved = jax.lax.conv_general_dilated(
        rows[None], parameters["kernel"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )
    return jnp.sum(jnp.square(convolved * parameters["scale"]))


@pytest.mark.parametrize("options", [{}, {"sample": 3}])
def test_nothing_in_a_step_waits_for_the_host(options):
    count, waiting = kernels(cabs_jax.value_and_grad(loss_fn, **options), PARAMETERS, BATCH)
    plain, _ = kernels(jax.value_and_grad(mean_loss(loss_fn)), PARAMETERS, BATCH)
    assert waiting == 0
    # Each parameter is met once; loops that guard against cancellation are counted whole.
    assert plain < count <= plain + 30 * len(PARAMETERS)


def test_a_step_that_asks_the_host_is_seen():
    def printing(parameters, example):
        jax.debug.print("{}", example["mark"])
        return loss_fn(parameters, example)

    assert kernels(cabs_jax.value_and_grad(printing), PARAMETERS, BATCH)[1] > 0
