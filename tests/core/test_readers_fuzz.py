"""Readers of states and logs meet damage: they refuse it in words, or it changed no meaning."""

import json
import re
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cabs import BatchSampler, Controller, RunLog, Stopwatch, read_run
from cabs.__main__ import main
from cabs.control import decide
from cabs.runs import records
from cabs.runs.replay import NotDecidedError
from tests.core.strategies import controllers, feed, observations

pytestmark = pytest.mark.filterwarnings("ignore:the batch size is 1:RuntimeWarning")

text = st.text(max_size=6)
leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | text
    | st.sampled_from([-0.0, 0, 1, True, 1e308, 10**400, 2**53 + 1, "NaN", "Infinity", [], {}])
)
anything = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4),
    max_leaves=8,
)


@st.composite
def changed(draw, value):
    """Draw a value of JSON that differs from another one in a single place."""
    if isinstance(value, dict) and value and draw(st.integers(0, 9)):
        name = draw(st.sampled_from(sorted(value)))
        change = draw(st.sampled_from(["inside", "inside", "inside", "drop", "rename", "add"]))
        others = {key: inner for key, inner in value.items() if key != name}
        if change == "inside":
            return {**value, name: draw(changed(value[name]))}
        if change == "add":
            return {**value, draw(text): draw(anything)}
        return others if change == "drop" else {**others, draw(text): value[name]}
    if isinstance(value, list) and value and draw(st.integers(0, 3)):
        place = draw(st.integers(0, len(value) - 1))
        return [*value[:place], draw(changed(value[place])), *value[place + 1 :]]
    if type(value) in (int, float) and draw(st.booleans()):
        near = [value + 1, value - 1, -value, value * (1 + 2**-52), float(value), str(value)]
        return draw(st.sampled_from(near))
    return draw(anything)


@st.composite
def damaged(draw, content):
    """Draw bytes that differ from others in a single place, or lines in another order."""
    kind = draw(st.sampled_from(["flip", "cut", "insert", "drop", "repeat", "swap", "end"]))
    place = draw(st.integers(0, len(content) - 1))
    if kind == "flip":
        flipped = content[place] ^ (1 << draw(st.integers(0, 7)))
        return content[:place] + bytes([flipped]) + content[place + 1 :]
    if kind == "cut":
        return content[:place] + content[place + draw(st.integers(1, 5)) :]
    if kind == "insert":
        return content[:place] + draw(st.binary(min_size=1, max_size=4)) + content[place:]
    if kind == "end":
        return content[:place]
    lines = content.splitlines(keepends=True)
    first, second = (draw(st.integers(0, len(lines) - 1)) for _ in range(2))
    if kind == "swap":
        lines[first], lines[second] = lines[second], lines[first]
    elif kind == "repeat":
        lines.insert(second, lines[first])
    else:
        del lines[first]
    return b"".join(lines)


@st.composite
def logs(draw):
    """Draw the bytes of a log, as a controller's run leaves it."""
    controller = draw(controllers())
    feed(controller, draw(observations)[: draw(st.sampled_from([0, 0, 3]))])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.jsonl"
        with RunLog(path, controller) as log:
            for decision in feed(controller, draw(observations)):
                log.write(decision, examples=16, **{"a name": draw(st.floats(-10.0, 10.0))})
        return path.read_bytes()


def is_of_python(message):
    """Return whether a message speaks of Python's objects, not of what was read."""
    return re.search("object|attribute|not supported|unhashable|indices|argument", message)


def check_reading(content):
    """Read a log, which raises ValueError or holds decisions that all follow; return them."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.jsonl"
        path.write_bytes(content)
        try:
            run = read_run(path)
        except ValueError as error:
            expected = 1 if isinstance(error, NotDecidedError) else 2
            message = str(error)
            assert message.startswith(str(path))
            assert not is_of_python(message)
            run = None
        else:
            expected = 0
        for command in ("replay", "show"):
            assert main([command, str(path)]) == expected
        assert path.read_bytes() == content
    if run is None:
        return None
    state = run.start
    for decision in run.decisions:
        state, again = decide(run.configuration, state, decision.observation)
        assert repr(again) == repr(decision)
    # No line was passed over.
    assert len(run.decisions) == len(run.measurements) == content.count(b"\n") - 1
    assert run.cut_off == (not content.endswith(b"\n"))
    for numbers in run.measurements:
        assert all(type(value) in (int, float) for value in numbers.values())
    # A controller can go on from there.
    controller = Controller.from_configuration(run.configuration)
    for decision in run.decisions if run.start.step == 0 else []:
        rates, traces, loss, square, seconds, _ = decision.observation
        if seconds is None and controller.configuration.rule.needs_clock:
            seconds = Stopwatch()
        controller.update(
            learning_rate=rates,
            variance_trace=traces,
            loss=loss,
            expected_gradient_norm_squared=square,
            seconds=seconds,
        )
    Controller.from_configuration(run.configuration).load_state_dict(controller.state_dict())
    return run.decisions


@given(st.binary(max_size=200))
def test_random_bytes_are_no_log(content):
    assert check_reading(content) is None


@given(logs(), st.binary(max_size=60))
def test_random_bytes_after_a_header_are_no_decision(content, line):
    header = content.splitlines(keepends=True)[0]
    assert not check_reading(header + line + b"\n")


@given(logs(), st.lists(anything, max_size=3), st.booleans())
def test_random_json_is_no_log_and_no_decision(content, values, with_header):
    header = content.splitlines(keepends=True)[0] if with_header else b""
    lines = b"".join(json.dumps(value).encode() + b"\n" for value in values)
    decisions = check_reading(header + lines)
    assert decisions is None or (with_header and not values)


@given(st.data(), logs())
def test_a_log_damaged_once_is_refused_or_all_its_decisions_follow(data, content):
    check_reading(data.draw(damaged(content)))


@given(st.data(), logs())
def test_a_log_with_one_value_changed_is_refused_or_all_its_decisions_follow(data, content):
    lines = content.splitlines(keepends=True)
    place = data.draw(st.integers(0, len(lines) - 1))
    value = data.draw(changed(json.loads(lines[place])))
    lines[place] = json.dumps(value).encode() + b"\n"
    check_reading(b"".join(lines))


@given(st.data(), logs().filter(lambda content: content.count(b"\n") > 3))
def test_lines_dropped_repeated_or_swapped_are_noticed(data, content):
    header, *lines = content.splitlines(keepends=True)
    first = data.draw(st.integers(0, len(lines) - 2))
    second = data.draw(st.integers(first + 1, len(lines) - 1))
    dropped = lines[:first] + lines[first + 1 :]
    repeated = [*lines[:second], lines[first], *lines[second:]]
    swapped = list(lines)
    swapped[first], swapped[second] = swapped[second], swapped[first]
    for spoilt in (dropped, repeated, swapped):
        assert check_reading(b"".join([header, *spoilt])) is None


@given(st.data(), logs().filter(lambda content: content.count(b"\n") > 1))
def test_both_ways_to_read_a_line_accept_the_same_and_read_the_same(data, content):
    line = data.draw(st.sampled_from(content.splitlines(keepends=True)[1:]))
    number = rb"(?<=[ \[])-?[0-9][-+.e0-9]*"
    places = [found.span() for found in re.finditer(number, line)]
    start, end = data.draw(st.sampled_from(places))
    odd = data.draw(st.text("0123456789.-+eE_ nul", max_size=6) | st.from_regex(r"-?\d+\.\d+e?\d*"))
    for spoilt in (line, data.draw(damaged(line)), line[:start] + odd.encode() + line[end:]):
        read = records._read_as_written(spoilt)
        if read is not None:
            assert repr(read) == repr(records._read_json(spoilt))


def check_loading(target, state):
    """Load a state, which raises ValueError and changes nothing, or is then the state."""
    before = json.dumps(target.state_dict())
    try:
        target.load_state_dict(state)
    except ValueError as error:
        message = str(error)
    else:
        message = None
    if message is not None:
        assert not is_of_python(message)
        assert json.dumps(target.state_dict()) == before
        return False
    assert target.state_dict() == state
    json.dumps(target.state_dict(), allow_nan=False)
    return True


@given(st.data(), controllers(), observations)
def test_a_controller_state_changed_once_is_refused_or_becomes_the_state(data, controller, seen):
    feed(controller, seen)
    state = json.loads(json.dumps(controller.state_dict()))
    other = Controller.from_configuration(controller.configuration)
    assert check_loading(other, state)
    if check_loading(other, data.draw(changed(state))):
        known = len(other.state_dict()["state"]["variance_trace"])
        observed = {"learning_rate": 0.1, "variance_trace": [1.0] * max(known, 1), "loss": 1.0}
        feed(other, [observed])


@given(anything, controllers())
def test_random_json_is_no_state(value, controller):
    assert not check_loading(controller, value)
    assert not check_loading(BatchSampler(10, 4), value)
    for state in (controller.state_dict(), BatchSampler(10, 4).state_dict()):
        for name in state:
            check_loading(controller, {**state, name: value})
            check_loading(BatchSampler(10, 4), {**state, name: value})


@pytest.mark.parametrize("key", [1, None, (), b"step"])
def test_a_state_with_a_name_that_is_no_text_is_refused(key):
    state = Controller(16).state_dict()
    inner = {**state, "state": {**state["state"], key: 1}}
    settings = {**state, "configuration": {**state["configuration"], key: 1}}
    for spoilt in ({**state, key: 1}, inner, settings):
        assert not check_loading(Controller(16), spoilt)


@given(st.data(), st.integers(1, 60), st.integers(1, 20), st.integers(0, 5))
def test_a_sampler_state_changed_once_is_refused_or_becomes_the_state(data, examples, size, drawn):
    sampler = BatchSampler(examples, size)
    for _, _ in zip(range(drawn), sampler, strict=False):
        pass
    state = json.loads(json.dumps(sampler.state_dict()))
    other = BatchSampler(examples, size)
    assert check_loading(other, state)
    if check_loading(other, data.draw(changed(state))):
        left = [index for batch in other for index in batch.tolist()]
        assert len(left) == len(set(left)) <= examples
