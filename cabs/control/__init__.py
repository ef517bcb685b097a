"""The batch size of the next step: rules, averages, allowed sizes, decisions, and their state.

``decide`` is a pure function of configuration, state and observation; ``Controller`` holds the
state between the calls. Imports ``cabs.values`` alone; knows nothing of data and frameworks.
"""

from cabs.control.averages import Averages, DebiasedAverage
from cabs.control.configuration import Configuration
from cabs.control.controller import Controller
from cabs.control.costs import StepCost
from cabs.control.deciding import decide
from cabs.control.decision import (
    Decision,
    Observation,
    State,
    initial_state,
)
from cabs.control.progress import Progress
from cabs.control.reasons import Reason
from cabs.control.registry import register_batch_size_rule
from cabs.control.rules import (
    CABS,
    Known,
    NoiseScale,
    NormTest,
    Rule,
    cabs_rule,
    noise_scale_rule,
    norm_test,
)
from cabs.control.sizes import BatchSizes
from cabs.control.stopwatch import Stopwatch

__all__ = [
    "CABS",
    "Averages",
    "BatchSizes",
    "Configuration",
    "Controller",
    "DebiasedAverage",
    "Decision",
    "Known",
    "NoiseScale",
    "NormTest",
    "Observation",
    "Progress",
    "Reason",
    "Rule",
    "State",
    "StepCost",
    "Stopwatch",
    "cabs_rule",
    "decide",
    "initial_state",
    "noise_scale_rule",
    "norm_test",
    "register_batch_size_rule",
]
