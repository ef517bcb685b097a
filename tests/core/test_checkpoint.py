"""Controller states: they go through JSON, and nothing else is taken for one."""

import copy
import json
import math
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cabs import BatchSizes, Controller
from tests.core.strategies import controllers, feed, observations

pytestmark = pytest.mark.filterwarnings("ignore:the batch size is 1:RuntimeWarning")


def saved(**settings):
    controller = Controller(32, **settings)
    controller.update(learning_rate=0.1, variance_trace=[700.0, 200.0], loss=1.5)
    return controller.state_dict()


@given(controllers(), observations, observations)
def test_after_a_round_trip_every_later_decision_is_identical_to_the_bit(controller, before, after):
    feed(controller, before)
    resumed = Controller.from_configuration(controller.configuration)
    resumed.load_state_dict(json.loads(json.dumps(controller.state_dict(), allow_nan=False)))
    assert resumed.state_dict() == controller.state_dict()
    # Observations may hold NaN, which equals nothing; their text does.
    assert repr(feed(resumed, after)) == repr(feed(controller, after))


@given(observations)
def test_a_published_controller_goes_through_a_round_trip_too(observed):
    controller, resumed = Controller.as_published(), Controller.as_published()
    feed(controller, observed[:10])
    resumed.load_state_dict(json.loads(json.dumps(controller.state_dict())))
    assert repr(feed(resumed, observed[10:])) == repr(feed(controller, observed[10:]))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_a_controller_can_be_copied_and_pickled(duplicate):
    controller = Controller(32)
    controller.update(learning_rate=0.1, variance_trace=900.0, loss=1.5)
    assert duplicate(controller).state_dict() == controller.state_dict()


def test_a_state_from_other_settings_is_refused_and_the_message_says_what_differs():
    other = Controller(32, smoothing=0.9, sizes=BatchSizes.geometric(16, 64))
    with pytest.raises(ValueError, match="other settings") as refused:
        other.load_state_dict(saved())
    assert "smoothing = 0.95 there and 0.9 here" in str(refused.value)
    assert "sizes = BatchSizes(16 to 2048) there and BatchSizes([16, 32, 64]) here" in str(
        refused.value
    )
    assert "every" not in str(refused.value)
    assert other.step == 0


def damaged(*path, value):
    state = copy.deepcopy(saved())
    *outer, last = path
    inner = state
    for name in outer:
        inner = inner[name]
    inner[last] = value
    return state


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (None, "no state of a controller"),
        ({}, "no state of a controller"),
        ({"format": "cabs.batch_sampler"}, "no state of a controller"),
        (damaged("version", value=2), "version 2, expected 1"),
        (damaged("extra", value=2), "not whole"),
        (damaged("configuration", value=None), "a configuration holds"),
        (damaged("configuration", "smoothing", value=2.0), "smoothing must be in"),
        (damaged("configuration", "smoothing", value="0.95"), "no configuration"),
        (damaged("configuration", "sizes", value=7), "describes no batch sizes"),
        (damaged("state", value=None), "damaged"),
        (damaged("state", "extra", value=1), "damaged: it holds"),
        (damaged("state", "step", value=-1), "damaged: it has step = -1"),
        (damaged("state", "step", value=1.0), r"damaged: it has step = 1\.0"),
        (damaged("state", "held", value=99), "counts contradict each other"),
        (damaged("state", "age", value=0), "counts contradict each other"),
        (damaged("state", "variance_weight", value=1e300), "weigh more than they can"),
        (damaged("state", "loss_weight", value=21.0), "weigh more than they can"),
        (damaged("state", "loss_weight", value=0.0), "weigh more than they can"),
        (damaged("configuration", "single_precision", value=True), "excludes debias"),
        (damaged("state", "held", value=True), "damaged: it has held = True"),
        (damaged("state", "batch_size", value=15), "which its sizes exclude"),
        (damaged("state", "loss", value=math.nan), "damaged: it has loss = nan"),
        (damaged("state", "loss", value="1"), "damaged: it has loss = '1'"),
        (damaged("state", "variance_trace", value=[1.0, None]), "damaged: it has variance_trace"),
        (damaged("state", "variance_trace", value=[]), "contradict each other"),
        (damaged("state", "variance_weight", value=0.0), "contradict each other"),
        (damaged("state", "learning_rate_factor", value=0.0), "learning_rate_factor = 0"),
        (damaged("state", "loss", value=10**400), "damaged"),
    ],
)
def test_a_damaged_state_is_refused_and_nothing_changes(state, message):
    controller = Controller(32)
    with pytest.raises(ValueError, match=message):
        controller.load_state_dict(state)
    assert controller.state_dict() == Controller(32).state_dict()


def test_averages_of_nothing_seen_are_refused():
    state = Controller(32, every=2).state_dict()
    for change in ({"step": 3}, {"age": 1}):
        with pytest.raises(ValueError, match="contradict each other"):
            Controller(32, every=2).load_state_dict(
                {**state, "state": {**state["state"], **change}}
            )


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
names = st.sampled_from(
    [("configuration", name) for name in saved()["configuration"]]
    + [("state", name) for name in saved()["state"]]
    + [(name,) for name in saved()]
)


@given(names, anything)
def test_any_json_in_any_place_is_refused_or_harmless(path, value):
    controller = Controller(32)
    try:
        controller.load_state_dict(damaged(*path, value=value))
    except ValueError:
        assert controller.state_dict() == Controller(32).state_dict()
    else:
        # A value of the right kind was drawn: the state is a state of this controller.
        json.dumps(controller.state_dict(), allow_nan=False)
        assert controller.batch_size in controller.configuration.sizes
        traces = [1.0] * len(controller.state_dict()["state"]["variance_trace"])
        controller.update(learning_rate=0.1, variance_trace=traces, loss=1.0)


def test_a_fingerprint_is_that_of_settings_and_state():
    # Whichever process, release and machine computes it.
    assert Controller(16).fingerprint == 216469
    controller = Controller(32)
    numbers = {Controller(16).fingerprint, controller.fingerprint}
    for step in range(50):
        controller.update(learning_rate=0.1, variance_trace=700.0 + step, loss=1.5)
        numbers.add(controller.fingerprint)
    assert len(numbers) == 52
    assert max(numbers) < 2**20
    resumed = Controller(32)
    resumed.load_state_dict(json.loads(json.dumps(controller.state_dict())))
    assert resumed.fingerprint == controller.fingerprint
    resumed.update(learning_rate=0.1, variance_trace=700.0, loss=1.5 + 1e-12)
    controller.update(learning_rate=0.1, variance_trace=700.0, loss=1.5)
    assert resumed.fingerprint != controller.fingerprint
