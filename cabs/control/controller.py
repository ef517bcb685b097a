"""The object that a training loop talks to: it keeps the state, and a pure function decides.

Guarantees: ``update`` either raises and changes nothing, or returns a decision; after a round
trip of its state through JSON every later decision is the same to the bit.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

from cabs.control.configuration import DEFAULT_SIZES, Configuration
from cabs.control.costs import StepCost
from cabs.control.deciding import decide
from cabs.control.decision import Decision, Observation, initial_state, is_due
from cabs.control.progress import check_metric
from cabs.control.reasons import Reason
from cabs.control.rules import PAPER, Rule
from cabs.control.sizes import BatchSizes
from cabs.control.state import carry_over, fingerprint_of, read_state, write_state
from cabs.control.stopwatch import Stopwatch
from cabs.values.scalars import Scalar, Scalars, as_float, as_floats, as_integer

_UNTIMED: tuple[float | None, int | None] = None, None


class Controller:
    r"""Chooses the size of the next batch, by the CABS rule unless another is given.

    .. math:: m = \frac{\eta \, \mathrm{tr}(\Sigma)}{F - F_*}

    Balles, Romero, Hennig: "Coupling Adaptive Batch Sizes with Learning Rates", UAI 2017, arXiv
    1612.05086, equation 22. Variance and loss are averaged exponentially; the value is moved to the
    nearest allowed size.

    Args:
        batch_size: Size of the first batch, in examples; one of ``sizes``. By default what the rule
            begins with: near the overhead for ``Progress(overhead)``, otherwise the smallest.
        sizes: The sizes allowed: a :class:`cabs.BatchSizes`, or integers one by one. Within-batch
            statistics need at least 2.
        smoothing: Constant of the exponential averages, in [0, 1).
        debias: Whether the averages are free of a bias towards their start. Without, they start
            at a variance of 0 and a loss of 1, as published.
        rule: What asks for sizes: :class:`cabs.CABS`, with the floor of the loss if it is not 0;
            :class:`cabs.Progress`, :class:`cabs.NormTest` or :class:`cabs.NoiseScale`.
        hysteresis: Keep the size unless the rule asks for a change with this relative margin to
            spare; 0 follows every change. Saves compilations where each size needs one.
        max_growth: Grow at most this many times at one step, though always to the next allowed
            size if the rule asks for it; None sets no limit.
        every: Measure the variance at every so many steps; see :attr:`due`.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If one is out of its range, or ``batch_size`` is not allowed by ``sizes``.

    Example:
        >>> controller = Controller(32, sizes=BatchSizes.range(16, 512))
        >>> decision = controller.update(learning_rate=0.1, variance_trace=900.0, loss=1.5)
        >>> decision.batch_size, decision.reason.value
        (60, 'rule')
        >>> controller.batch_size
        60
    """

    def __init__(
        self,
        batch_size: int | None = None,
        *,
        sizes: BatchSizes | Iterable[int] = DEFAULT_SIZES,
        smoothing: float = 0.95,
        debias: bool = True,
        rule: Rule = PAPER,
        hysteresis: float = 0.0,
        max_growth: float | None = None,
        every: int = 1,
    ) -> None:
        allowed = sizes if isinstance(sizes, BatchSizes) else BatchSizes(sizes)
        if batch_size is None and hasattr(rule, "first_size"):
            batch_size = rule.first_size(allowed)
        self._start(
            Configuration(
                batch_size=batch_size,  # type: ignore[arg-type]
                sizes=allowed,
                smoothing=smoothing,
                debias=debias,
                rule=rule,
                hysteresis=hysteresis,
                max_growth=max_growth,
                every=every,
            )
        )

    def _start(self, configuration: Configuration) -> None:
        self._configuration = configuration
        self._state = initial_state(configuration)
        self._own_timing: tuple[float | None, int | None] = _UNTIMED

    @classmethod
    def as_published(
        cls, batch_size: int = 16, *, minimum: int = 16, maximum: int = 2048
    ) -> Controller:
        """Return a controller that decides as the authors' TensorFlow code does, to the bit.

        Averages with constant 0.95 in single precision, from a variance of 0 and a loss of 1, not
        debiased; the value rounded half to even, then clipped. Give it the biased variance
        (:attr:`cabs.GradientStatistics.biased_variance_trace`), as that code computes it. Where
        that code has no sound answer, for a value that is not finite or an averaged loss that is
        not positive, this one holds. From ``statistics`` it takes that variance itself.

        Example:
            >>> controller = Controller.as_published()
            >>> controller.update(learning_rate=0.1, variance_trace=5e4, loss=2.3).batch_size
            235
        """
        return cls.from_configuration(
            Configuration(
                batch_size=batch_size,
                sizes=BatchSizes.range(minimum, maximum),
                debias=False,
                single_precision=True,
            )
        )

    @classmethod
    def from_configuration(cls, configuration: Configuration) -> Controller:
        """Return a new controller with these settings, for example those of a run log."""
        controller = cls.__new__(cls)
        controller._start(configuration)
        return controller

    @property
    def batch_size(self) -> int:
        """Size of the next batch, in examples."""
        return self._state.batch_size

    @property
    def due(self) -> bool:
        """Whether the next :meth:`update` must be given the variance.

        With ``every=k``, true at one step in k, and until a finite variance has been given.
        """
        return is_due(self._configuration, self._state)

    @property
    def step(self) -> int:
        """How many times :meth:`update` has decided."""
        return self._state.step

    @property
    def held_steps(self) -> int:
        """How many of these decisions held the batch size for want of a value of the rule."""
        return self._state.held

    @property
    def step_cost(self) -> StepCost | None:
        """What a step was measured to take; None before, or where the rule does not measure it."""
        return self._state.clock.cost

    @property
    def own_seconds(self) -> float | None:
        """What the last step took on the clock of this rank, if it is one of several.

        Clocks differ, so it is no part of the state: the statistics of the next step bring the mean
        of all ranks', which each of them takes in.
        """
        return self._own_timing[0]

    @property
    def configuration(self) -> Configuration:
        """The settings, immutable."""
        return self._configuration

    @property
    def fingerprint(self) -> int:
        """A number below 2**20 that tells states and settings apart, alike in every process.

        Ranks that train together compare it: see ``controller`` of :func:`cabs_torch.backward`.

        Example:
            >>> Controller(16).fingerprint == Controller(16).fingerprint
            True
            >>> Controller(16).fingerprint == Controller(32).fingerprint
            False
        """
        return fingerprint_of(self._configuration, self._state)

    def update(
        self,
        statistics: Any = None,
        *,
        learning_rate: Scalars,
        loss: Scalar | None = None,
        variance_trace: Scalars | None = None,
        expected_gradient_norm_squared: Scalars | None = None,
        seconds: Scalar | Stopwatch | None = None,
        examples: int | None = None,
    ) -> Decision:
        r"""Take in what one step showed, and set :attr:`batch_size`.

        Give what an adapter returned, or the numbers themselves, from any loop. A number may be a
        Python or NumPy number, or a 0-d array or tensor of any framework; reading a tensor waits
        for its device.

        Args:
            statistics: :class:`cabs.GradientStatistics` of the step, or what an adapter returned,
                for the variance and the loss.
            learning_rate: :math:`\eta`, or one per parameter group; with momentum :math:`\beta`,
                :math:`\eta / (1 - \beta)`.
            loss: Mean loss of the batch, if ``statistics`` do not hold it.
            variance_trace: Without ``statistics``, the estimate of :math:`\mathrm{tr}(\Sigma)` for
                one example's gradient (:attr:`cabs.GradientStatistics.variance_trace`), or one per
                parameter group. May be left out where :attr:`due` is false; the average then stays.
            expected_gradient_norm_squared: Beside ``variance_trace``, where the rule needs it: the
                unbiased estimate
                (:attr:`cabs.GradientStatistics.expected_gradient_norm_squared`); of several
                parameter groups it is the sum.
            seconds: What the step took, or a :class:`cabs.Stopwatch`, which is read once all
                numbers have arrived. Needed where the rule measures
                what a step costs; the log keeps it anyway. With statistics over several ranks each
                gives its own, and the rule takes the mean of all, a step later.
            examples: How many examples the step had, if ``statistics`` do not hold it, and it is
                not :attr:`batch_size`: the last batch of an epoch, or one that a loader has drawn
                ahead.

        Returns:
            The decision. A value that is not finite never reaches the averages: the size is held,
            and the decision says so.

        Raises:
            TypeError: If an argument is no number, or ``statistics`` hold none.
            ValueError: If a learning rate is negative, the loss, or a variance that is due, is
                missing or given twice, seconds are missing where the rule needs them or are
                negative, the statistics say that they are in another metric than the rule's, or
                the numbers of parameter groups do not fit. Nothing has changed then.

        Example:
            Two parameter groups, and a step without a measurement:

            >>> controller = Controller(16, every=2)
            >>> decision = controller.update(
            ...     learning_rate=[0.1, 0.01], variance_trace=[300.0, 1000.0], loss=1.0
            ... )
            >>> decision.batch_size, controller.due
            (40, False)
            >>> controller.update(learning_rate=[0.1, 0.01], loss=1.0).batch_size
            40
        """
        square, rule = expected_gradient_norm_squared, self._configuration.rule
        if statistics is not None:
            if any(one is not None for one in (variance_trace, square, examples)):
                raise ValueError(
                    "variance_trace, expected_gradient_norm_squared and examples must not be given "
                    "beside statistics, which hold them"
                )
            variance_trace, square, loss, examples = self._read(statistics, loss)
        if loss is None:
            raise ValueError("loss must be given, since there are no statistics that hold it")
        # All numbers before the clock, since to read them can wait for a device.
        rates = as_floats(learning_rate, "learning_rate")
        traces = None if variance_trace is None else as_floats(variance_trace, "variance_trace")
        loss = as_float(loss, "loss")
        if square is not None:
            square = sum(as_floats(square, "expected_gradient_norm_squared"))
        timing = own = _UNTIMED
        if seconds is not None or rule.needs_clock:
            size = self.batch_size if examples is None else as_integer(examples, "examples", 1)
            timing = own = self._timed(seconds, size)
        if rule.needs_clock and hasattr(type(statistics), "seconds_before"):
            # A mean, since a sum over ranks gives no maximum; all wait for the slowest anyway.
            before = statistics.seconds_before
            timing = _UNTIMED if before is None else (before, self._own_timing[1])
        observation = Observation(rates, traces, loss, square, *timing)
        state, decision = decide(self._configuration, self._state, observation)
        if decision.batch_size == 1 and decision.reason is Reason.VARIANCE_NOT_FINITE:
            warnings.warn(
                "the batch size is 1 and the variance is not finite: one example shows no "
                "variance, so a run can stay here for ever; allow sizes of at least 2, or estimate "
                "the variance from groups",
                RuntimeWarning,
                stacklevel=2,
            )
        # Last, since a warning can be an error, and then nothing is to have changed.
        self._state = state
        if statistics is not None:
            self._own_timing = own
        return decision

    def _read(
        self, statistics: Any, loss: Scalar | None
    ) -> tuple[Scalars, Scalars | None, Scalar | None, int]:
        """Return variance, the gradient's squared norm if it is needed, loss and examples."""
        # Those of an adapter are read in one go.
        numbers = statistics.read() if hasattr(statistics, "read") else statistics
        if not hasattr(numbers, "variance_trace"):
            raise TypeError(
                "statistics must be cabs.GradientStatistics, or what an adapter returned, got "
                f"{type(statistics).__name__}; give a number as variance_trace="
            )
        check_metric(self._configuration.rule, numbers)
        is_biased = self._configuration.single_precision
        trace = numbers.biased_variance_trace if is_biased else numbers.variance_trace
        square = None
        if self._configuration.rule.needs_gradient:
            square = numbers.expected_gradient_norm_squared
        loss = getattr(numbers, "loss", None) if loss is None else loss
        return trace, square, loss, getattr(numbers, "examples", self.batch_size)

    def _timed(
        self, seconds: Scalar | Stopwatch | None, examples: int
    ) -> tuple[float | None, int | None]:
        """Return the seconds of a step and its examples; None twice if it was not timed."""
        if seconds is None:
            raise ValueError(
                "seconds must be given, since the rule measures what a step costs: pass a "
                "cabs.Stopwatch() at every update, or name the overhead, as "
                "cabs.Progress(overhead=512)"
            )
        taken = seconds.lap() if isinstance(seconds, Stopwatch) else seconds
        if taken is None:
            return _UNTIMED
        return as_float(taken, "seconds"), examples

    def state_dict(self) -> dict[str, Any]:
        """Return the settings and the state as plain values that JSON can hold.

        Example:
            >>> controller = Controller(16)
            >>> _ = controller.update(learning_rate=0.1, variance_trace=400.0, loss=1.0)
            >>> resumed = Controller(16)
            >>> resumed.load_state_dict(controller.state_dict())
            >>> resumed.batch_size
            40
        """
        return write_state(self._configuration, self._state)

    def load_state_dict(
        self, state_dict: dict[str, Any], *, changed_settings: bool = False
    ) -> None:
        """Go on from a state that :meth:`state_dict` returned.

        Args:
            state_dict: The state.
            changed_settings: Whether it may come from a controller with other settings, as when a
                run goes on where there is less memory. The averages stay, so ``smoothing``,
                ``debias`` and the published mode must be equal; the batch size moves to the nearest
                that is allowed here. A run log does not go on through such a change: begin a new
                one.

        Raises:
            ValueError: If it is no such state, is of another version, or belongs to a controller
                with other settings; the message says which. Nothing has changed then.

        Example:
            >>> controller = Controller(64, sizes=BatchSizes.range(16, 512))
            >>> smaller = Controller(16, sizes=BatchSizes.range(16, 48))
            >>> smaller.load_state_dict(controller.state_dict(), changed_settings=True)
            >>> smaller.batch_size
            48
        """
        configuration, state = read_state(state_dict)
        if changed_settings:
            state = carry_over(configuration, state, self._configuration)
        elif configuration != self._configuration:
            raise ValueError(
                "this state belongs to a controller with other settings: "
                f"{self._configuration.difference(configuration)}; build the controller with the "
                "settings it was saved with, or load the state with changed_settings=True"
            )
        self._state, self._own_timing = state, _UNTIMED

    def __repr__(self) -> str:
        return (
            f"Controller(batch_size={self.batch_size}, step={self.step}, "
            f"held_steps={self.held_steps})"
        )
