"""What errors say first, and how much they say."""

import jax
import jax.numpy as jnp
import pytest

import cabs_jax


def test_an_error_gives_the_reason_first_then_three_names_and_how_many_more():
    def loss_fn(parameters, x):
        grown = 1.0 + sum(jnp.abs(one) for one in parameters)
        return jax.lax.while_loop(lambda y: y < 9.0, lambda y: y + grown, x)

    with pytest.raises(cabs_jax.UncoveredParameterError) as caught:
        cabs_jax.value_and_grad(loss_fn)([1.0] * 40, jnp.ones(3))
    message = str(caught.value)
    assert message.startswith("Reverse-mode differentiation does not work for lax.while_loop")
    assert "argument 0[0], argument 0[1], argument 0[2] and 37 more meet the example, in while" in (
        message
    )
    assert "argument 0[3]" not in message
    assert len(message) < 600


def test_an_error_about_one_leaf_of_a_batch_names_that_leaf_first_and_few_of_the_others():
    batch = {"odd": jnp.ones(3), **{f"x{at}": jnp.ones(4) for at in range(40)}}
    with pytest.raises(ValueError, match="must hold as many examples") as caught:
        cabs_jax.value_and_grad(lambda w, _: w)(1.0, batch)
    message = str(caught.value)
    assert "got 3 in argument 1['odd'], 4 in argument 1['x0']" in message
    assert message.endswith("and 37 more")
    assert message.count("argument") == 4


def test_an_error_about_gradients_does_not_print_them():
    with pytest.raises(ValueError, match="must hold arrays of real numbers") as caught:
        cabs_jax.PartialStatistics.of_group(2, [jnp.ones(1000, int)] * 40)
    assert len(str(caught.value)) < 300
