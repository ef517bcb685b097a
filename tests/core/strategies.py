"""What hypothesis draws for the controller: configurations and observations."""

import math

from hypothesis import strategies as st

from cabs import CABS, BatchSizes, Controller, NoiseScale, NormTest, Progress

sizes = st.one_of(
    st.builds(
        lambda low, width: BatchSizes.range(low, low + width),
        st.integers(1, 64),
        st.integers(1, 900),
    ),
    st.builds(
        lambda step, count: BatchSizes.range(step, step * count, multiple_of=step),
        st.integers(1, 64),
        st.integers(1, 40),
    ),
    st.builds(BatchSizes.geometric, st.integers(1, 32), st.integers(32, 4096)),
    st.sets(st.integers(1, 3000), min_size=1, max_size=12).map(BatchSizes),
)


papers = st.sampled_from([0.0, 0.1, -1.0]).map(CABS)
others = st.sampled_from(
    [
        *(NoiseScale(), NormTest(0.5), Progress(0.0), Progress(300.0, loss_floor=None)),
        *(Progress(1000, adaptive=True), Progress(), Progress(seconds={1: 0.1, 40: 0.2})),
    ]
)


@st.composite
def controllers(draw, largest_every=4, rules=papers | others):
    """Draw a controller with any settings."""
    allowed = draw(sizes)
    return Controller(
        draw(st.sampled_from(list(allowed))),
        sizes=allowed,
        smoothing=draw(st.floats(0.0, 0.999)),
        debias=draw(st.booleans()),
        rule=draw(rules),
        hysteresis=draw(st.sampled_from([0.0, 0.1, 0.5])),
        max_growth=draw(st.sampled_from([None, 1.1, 2.0])),
        every=draw(st.integers(1, largest_every)),
    )


ordinary = st.fixed_dictionaries(
    {
        "learning_rate": st.floats(0.0, 10.0),
        "variance_trace": st.floats(-10.0, 1e6),
        "loss": st.floats(-0.5, 10.0),
    }
)
strange = st.sampled_from([math.nan, math.inf, -math.inf, 1e308, -1e308, 5e-324, 0.0, -0.0])
adversarial = st.fixed_dictionaries(
    {
        "learning_rate": strange.filter(lambda rate: not rate < 0.0),
        "variance_trace": strange,
        "loss": strange,
    }
)
observations = st.lists(ordinary | adversarial, max_size=30)


def feed(controller, observations):
    """Let the controller decide on each observation, measured or not as it wants."""
    decisions = []
    for observation in observations:
        given = dict(observation)
        if not controller.due:
            del given["variance_trace"]
        elif controller.configuration.rule.needs_gradient:
            # As ordinary, or as strange, as what is there.
            given["expected_gradient_norm_squared"] = given["loss"]
        if controller.configuration.rule.needs_clock:
            # Any time, as strange as the variance is, so that sizes are varied and clocks drift.
            given["seconds"] = abs(observation["variance_trace"])
        decisions.append(controller.update(**given))
    return decisions


def updated(**observation):
    """Return the decision of a new controller on an ordinary observation, changed as given."""
    controller = Controller(32)
    return controller.update(
        **{"learning_rate": 0.1, "variance_trace": 900.0, "loss": 1.5, **observation}
    )
