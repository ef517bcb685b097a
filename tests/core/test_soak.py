"""As many updates as anybody makes: sizes stay admissible, memory flat, and states whole.

``CABS_UPDATES`` says how many; a million is proven by ``nox -s soak``.
"""

import gc
import json
import math
import os
import random
import tracemalloc

import pytest

from cabs import CABS, BatchSizes, Controller

UPDATES = int(os.environ.get("CABS_UPDATES", "20000"))

CONTROLLERS = {
    "range": lambda: Controller(16),
    "multiples": lambda: Controller(32, sizes=BatchSizes.range(8, 4096, multiple_of=8)),
    "grid": lambda: Controller(64, sizes=BatchSizes.geometric(16, 1024), hysteresis=0.2),
    "list": lambda: Controller(7, sizes=[3, 7, 50, 51, 900], max_growth=1.5, every=3),
    "floor": lambda: Controller(16, rule=CABS(1.0), smoothing=0.999),
    "memoryless": lambda: Controller(16, smoothing=0.0),
    "published": lambda: Controller.as_published(),
}

ADVERSARIAL = (
    math.nan, math.inf, -math.inf, 0.0, -0.0, -1.0, 5e-324, -5e-324, 1e-310, 2.2e-308,
    1.7e308, -1.7e308, 1e300, 1e-300, 3.4e38, 1.0, 2**53 + 1.0,
)  # fmt: skip


def observation(numbers, step):
    """Quiet stretches, bursts of bad values, and slow drifts over many orders of magnitude."""
    if numbers.random() < (0.5 if step // 500 % 7 == 3 else 0.02):
        values = [numbers.choice(ADVERSARIAL) for _ in range(3)]
    else:
        drift = 10.0 ** (3.0 + 3.0 * math.sin(step / 400.0))
        values = [
            numbers.lognormvariate(-2.0, 1.0),
            drift * numbers.expovariate(1.0) * (1.0 if numbers.random() < 0.97 else -1.0),
            numbers.lognormvariate(0.0, 0.5),
        ]
    rate, trace, loss = values
    # A learning rate below 0 is an error, and tested elsewhere.
    return {"learning_rate": abs(rate), "variance_trace": trace, "loss": loss}


def traced():
    # Also empties the lists of objects that Python keeps for the next of their kind.
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


@pytest.mark.parametrize("name", CONTROLLERS)
def test_sizes_stay_admissible_memory_flat_and_states_whole(name):
    numbers = random.Random(name)
    controller, resumed = CONTROLLERS[name](), CONTROLLERS[name]()
    sizes = controller.configuration.sizes
    updates = UPDATES // len(CONTROLLERS)
    held, reached = 0, bytearray(sizes.maximum + 1)
    tracemalloc.start()
    before = None
    for step in range(updates):
        observed = observation(numbers, step)
        decision = controller.update(**observed)
        assert decision.batch_size in sizes
        assert decision.batch_size == controller.batch_size
        assert 0.0 < decision.learning_rate_factor <= 1.0
        assert decision.raw is None or math.isfinite(decision.raw)
        held += decision.held
        reached[decision.batch_size] = True
        if step % 101 == 0:
            # One that was saved and read back decides the next hundred alike.
            resumed = CONTROLLERS[name]()
            state = controller.state_dict()
            resumed.load_state_dict(json.loads(json.dumps(state, allow_nan=False)))
            assert resumed.state_dict() == state
        else:
            assert repr(resumed.update(**observed)) == repr(decision)
        if step == updates // 4:
            before = traced()
    after = traced()
    tracemalloc.stop()
    assert controller.step == updates
    assert controller.held_steps == held > 0
    assert sum(reached) > 4
    assert after - before < 30_000
