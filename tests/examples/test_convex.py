"""The convex problems are what their page says, and a run leaves what is drawn from it."""

import gzip
import json
import math
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from tests.processes import finished

ROOT = Path(__file__).parents[2]
PAPER = ROOT / "examples" / "paper"
DATA = ROOT.parent / "shared" / "data"


@pytest.fixture
def problems(module):
    return module("convex_problems")


@pytest.fixture
def logistic(problems):
    random = np.random.default_rng(0)
    inputs = random.standard_normal((40, 5))
    labels = np.sign(inputs[:, 0] + random.standard_normal(40))
    return problems.Logistic(inputs, labels, 0.05), inputs, labels


def by_loop(inputs, labels, weights, penalty):
    """Return losses and gradients, one example at a time."""
    losses, gradients = [], []
    for x, y in zip(inputs, labels, strict=True):
        margin = y * float(x @ weights)
        square = sum(float(weight) ** 2 for weight in weights)
        losses.append(math.log1p(math.exp(-margin)) + penalty / 2 * square)
        gradients.append(-y / (1 + math.exp(margin)) * x + penalty * weights)
    return np.array(losses), np.array(gradients)


@pytest.mark.parametrize("seed", range(5))
def test_statistics_equal_a_loop_over_the_examples(logistic, seed):
    made, inputs, labels = logistic
    random = np.random.default_rng(seed)
    weights, chosen = random.standard_normal(5), random.choice(40, 7, replace=False)
    losses, gradients = by_loop(inputs[chosen], labels[chosen], weights, 0.05)
    batch = made.of(weights, chosen)
    assert batch.loss == pytest.approx(losses.mean(), rel=1e-12)
    assert batch.gradient == pytest.approx(gradients.mean(axis=0), rel=1e-11)
    trace = gradients.var(axis=0, ddof=1).sum()
    assert batch.statistics.variance_trace == pytest.approx(trace, rel=1e-11)
    assert batch.statistics.gradient_norm_squared == pytest.approx(
        (gradients.mean(axis=0) ** 2).sum()
    )
    assert made.gradients(weights, chosen) == pytest.approx(gradients, rel=1e-11)


def test_the_largest_batch_is_the_whole(logistic):
    made, _, _ = logistic
    weights = np.arange(5.0)
    batch = made.batch(weights, 40, np.random.default_rng(0))
    loss, norm = made.whole(weights)
    assert batch.statistics.examples == 40
    assert batch.loss == pytest.approx(loss, rel=1e-12)
    assert np.linalg.norm(batch.gradient) == pytest.approx(norm, rel=1e-12)


def test_the_minimum_is_one(logistic):
    made, _, _ = logistic
    assert made.whole(made.minimum)[1] < 1e-12
    steps = np.random.default_rng(1).standard_normal((20, 5))
    assert all(made.whole(made.minimum + 1e-3 * step)[0] > made.floor for step in steps)


def test_the_curvature_bounds_every_hessian(logistic):
    made, inputs, labels = logistic
    random = np.random.default_rng(2)
    for _ in range(10):
        weights, step = random.standard_normal((2, 5))
        ahead, behind = (
            by_loop(inputs, labels, weights + sign * 1e-5 * step, 0.05)[1].mean(axis=0)
            for sign in (1, -1)
        )
        assert step @ (ahead - behind) / 2e-5 <= made.curvature * (step @ step) * (1 + 1e-6)


def test_a_quadratic_draws_what_its_examples_would_be(problems):
    made = problems.quadratic(10.0, is_noise_like_hessian=True, floor=2.0)
    random, weights = np.random.default_rng(3), np.linspace(-1.0, 1.0, problems.DIMENSION)
    batches = [made.batch(weights, 8, random) for _ in range(4000)]
    gradients = np.array([batch.gradient for batch in batches])
    traces = np.array([batch.statistics.variance_trace for batch in batches])
    losses = np.array([batch.loss for batch in batches])
    trace = made.variances.sum()
    assert trace == pytest.approx(problems.DIMENSION)
    assert traces.mean() == pytest.approx(trace, rel=0.01)
    # The variance of a sum of scaled chi squares.
    assert traces.var() == pytest.approx(2 * (made.variances**2).sum() / 7, rel=0.1)
    assert gradients.var(axis=0).sum() == pytest.approx(trace / 8, rel=0.03)
    assert gradients.mean(axis=0) == pytest.approx(made.eigenvalues * weights, abs=0.05)
    assert losses.mean() == pytest.approx(made.whole(weights)[0], abs=0.1)
    examples = made.pool(random)(20_000)
    drawn = made.gradients(weights, examples).var(axis=0).sum()
    assert drawn == pytest.approx(trace, rel=0.01)


@pytest.mark.parametrize("rate", [0.1, 0.5, 1.0, 1.5])
@pytest.mark.parametrize("condition", [1.0, 100.0])
@pytest.mark.parametrize("is_noise_like_hessian", [False, True])
def test_the_exact_optimum_gains_most_for_each_example(
    problems, rate, condition, is_noise_like_hessian
):
    made = problems.quadratic(condition, is_noise_like_hessian=is_noise_like_hessian)
    weights = np.random.default_rng(4).standard_normal(problems.DIMENSION)
    best, near = 20.0, 19.95
    # Closer and closer to the largest gain.
    for step in (0.05, 5e-4):
        sizes = np.arange(best - near, best + near, step)
        best = sizes[int(np.argmax([made.gain(weights, rate, size) for size in sizes]))]
        near = 2 * step
    assert made.sizes(weights, rate).exact == pytest.approx(best, abs=1e-3)


def test_the_gain_is_what_steps_gain(problems):
    made = problems.quadratic(100.0, is_noise_like_hessian=True)
    random, weights = np.random.default_rng(5), np.ones(problems.DIMENSION)
    loss = made.whole(weights)[0]
    gains = [
        loss - made.whole(weights - 0.5 * made.batch(weights, 4, random).gradient)[0]
        for _ in range(4000)
    ]
    error = np.std(gains) / np.sqrt(len(gains))
    assert np.mean(gains) == pytest.approx(4 * made.gain(weights, 0.5, 4), abs=4 * error)


@pytest.mark.parametrize("rate", [0.1, 0.5, 1.0, 1.5])
def test_on_an_isotropic_quadratic_the_rule_is_off_by_a_factor_known(problems, rate):
    made = problems.QUADRATICS["isotropic"]()
    rule, bound, exact = made.sizes(np.random.default_rng(6).standard_normal(100), rate)
    assert rule == pytest.approx((2.0 - rate) * exact, rel=1e-12)
    assert bound == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("rate", [0.1, 0.5, 1.0, 1.5])
@pytest.mark.parametrize(("part", "noise"), [(1.0, 0.5), (0.5, 1.0)])
def test_under_the_rule_a_step_multiplies_the_excess_by_what_the_page_says(
    problems, rate, part, noise
):
    made = problems.QUADRATICS["isotropic"]()
    weights = np.random.default_rng(7).standard_normal(problems.DIMENSION)
    size, excess = part * made.sizes(weights, rate).rule, made.whole(weights)[0]
    left = 1.0 - size * made.gain(weights, rate, size) / excess
    assert left == pytest.approx((1.0 - rate) ** 2 + noise * rate)


def test_libsvm_files_are_read(problems, tmp_path):
    path = tmp_path / "small.gz"

    def wrote(text):
        with gzip.open(path, "wt") as file:
            file.write(text)
        return path

    inputs, labels = problems.read_libsvm(wrote("+1 1:0.5 3:-2 \n-1 2:1e1\n\n-1\n"), 4)
    assert inputs.tolist() == [[0.5, 0, -2, 0], [0, 10, 0, 0], [0, 0, 0, 0]]
    assert labels.tolist() == [1, -1, -1]
    with pytest.raises(ValueError, match="features must be 1 to 4, got 5"):
        problems.read_libsvm(wrote("1 5:1\n"), 4)
    with pytest.raises(ValueError, match="labels must be -1 and 1"):
        problems.read_libsvm(wrote("2 1:1\n"), 4)
    with pytest.raises(SystemExit, match="there is no"):
        problems.read_libsvm(tmp_path / "none.gz", 4)


@pytest.mark.skipif(not DATA.is_dir(), reason="the published files are not beside the checkout")
def test_published_files_are_read(problems):
    for name, examples, ones, nonzero in (
        ("a9a", 32_561, 7_841, 0.11),
        ("mushrooms", 8_124, 3_916, 0.19),
    ):
        inputs, labels = problems.read_libsvm(
            DATA / "libsvm" / f"{name}.gz", problems.FEATURES[name]
        )
        assert inputs.shape == (examples, problems.FEATURES[name])
        assert (labels == 1).sum() == ones
        assert (inputs != 0).mean() == pytest.approx(nonzero, abs=0.01)
        made = problems.Logistic(inputs, labels, problems.REGULARISATION)
        assert made.whole(made.minimum)[1] < 1e-12


def test_evaluations_are_the_examples_drawn(module, problems):
    methods = module("convex_methods")
    made = problems.QUADRATICS["isotropic"]()
    for name in ("constant 16", "norm test, 0.5", "CABS", "exact optimum, told"):
        steps = methods.descend(made, name, 1.0, 0)
        some = [next(steps) for _ in range(30)]
        assert some[0].size == 16 or "told" in name
        assert [step.evaluations for step in some] == np.cumsum([s.size for s in some]).tolist()


def convex(*options):
    command = [sys.executable, "-W", "error", str(PAPER / "convex.py"), *map(str, options)]
    return finished(command)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    out = tmp_path_factory.mktemp("quick")
    result = convex("--out", out, "--quick")
    assert result.returncode == 0, result.stderr
    return out


def lines(folder):
    text = (folder / "convex.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_a_quick_run_needs_no_data_and_is_what_is_drawn(module, quick):
    runs = lines(quick)
    assert {run["problem"] for run in runs} == set(module("convex_problems").QUADRATICS)
    points = module("convex").POINTS
    assert max(len(run["curve"]) for run in runs if "curve" in run) == points
    module("convex_report").write(quick)
    first = {path.name: path.read_bytes() for path in quick.iterdir()}
    assert {"convex-isotropic.inc", "convex-optimum.inc", "convex-optimum.svg"} <= set(first)
    assert b"exact optimum, told" in first["convex-isotropic.inc"]
    module("convex_report").write(quick)
    assert first == {path.name: path.read_bytes() for path in quick.iterdir()}


class Differences:
    """In place of MICE: gradients of ten examples, at the point before too, which it is told of."""

    def __init__(self, *, grad, sampler, min_batch, max_cost, policy):
        self.policy = policy
        self._grad, self._sampler, self._examples, self._most = grad, sampler, min_batch, max_cost
        self._before, self._cost = [], 0
        self.terminate = False

    def __call__(self, weights):
        cost = self._examples * (1 + len(self._before))
        if self._cost + cost > self._most:
            self.terminate = True
            return np.zeros_like(weights)
        self._cost += cost
        draw = self._sampler
        some = draw(self._examples) if callable(draw) else draw[: self._examples]
        for point in self._before:
            self._grad(point, some)
        self._before = [weights]
        return self._grad(weights, some).mean(axis=0)


@pytest.fixture
def stub(monkeypatch):
    """Put a module in place of ``mice``, and return the policies that were asked for."""
    policies = []
    package, policy = types.ModuleType("mice"), types.ModuleType("mice.policy")
    package.MICE = Differences
    policy.DropRestartClipPolicy = lambda **options: policies.append(options)
    monkeypatch.setitem(sys.modules, "mice", package)
    monkeypatch.setitem(sys.modules, "mice.policy", policy)
    return policies


def test_of_mice_gradients_at_earlier_points_are_counted_too(module, problems, stub):
    made = module("convex")
    # Without noise, a step at half of 1 / L halves the norm, which begins at 2.
    problem = problems.Quadratic(np.ones(4), np.zeros(4))
    found = made.run(made.Setting("isotropic", "MICE", 0.5, 0, 1000), problem)
    assert found["reached"] == {"1.0": 10, "0.3": 50, "0.1": 90, "0.05": 110}
    assert [size for _, _, size in found["curve"]] == [0, 10, 20, 20, 20, 20, 20]
    assert [norm for _, norm, _ in found["curve"]] == pytest.approx(
        [2 / 2**step for step in range(7)], rel=1e-3
    )
    assert [options["clip_type"] for options in stub] == [None]


def test_mice_ends_with_its_budget_and_clips_where_sums_are_finite(module, logistic, stub):
    steps = list(module("convex_methods").descend_by_mice(logistic[0], 0.1, 0, 75))
    assert [step.evaluations for step in steps] == [10, 30, 50, 70]
    assert [options["clip_type"] for options in stub] == ["full"]


def run_what_is_missing(module, monkeypatch, out):
    monkeypatch.setattr(sys, "argv", ["convex.py", "--out", str(out), "--quick"])
    module("convex").main()
    module("convex_report").write(out)
    return (out / "convex-isotropic.inc").read_text(encoding="utf-8")


@pytest.fixture
def without_mice(quick, tmp_path):
    """Return a folder with the quick runs of all other methods."""
    kept = [json.dumps(run) + "\n" for run in lines(quick) if run["method"] != "MICE"]
    (tmp_path / "convex.jsonl").write_text("".join(kept), encoding="utf-8")
    return tmp_path


def test_what_is_not_installed_is_said_to_be(module, monkeypatch, without_mice, capsys):
    monkeypatch.setitem(sys.modules, "mice", None)
    text = run_what_is_missing(module, monkeypatch, without_mice)
    missing = [run for run in lines(without_mice) if run["outcome"] == "not installed"]
    assert {run["method"] for run in missing} == {"MICE"}
    assert "* - MICE\n     - not installed\n" in text
    assert "the package mice is not installed" in capsys.readouterr().out


def test_what_was_missing_is_run_once_it_is_installed(module, monkeypatch, without_mice, stub):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "mice", None)
        run_what_is_missing(module, patch, without_mice)
    assert not stub
    before = lines(without_mice)
    text = run_what_is_missing(module, monkeypatch, without_mice)
    made = lines(without_mice)[len(before) :]
    assert len(made) == len(stub) > 0
    assert {run["method"] for run in made} == {"MICE"}
    assert "not installed" not in text


def at_rates(reached):
    """Return runs at the rates 1, 2 and so on, by when they are at a norm."""
    curve = [[0, 1.0, 0], [9000, 0.2, 2]]
    return {
        ("CABS", float(rate)): [{"reached": {"0.1": at}, "curve": curve}]
        for rate, at in enumerate(reached, 1)
    }


@pytest.mark.parametrize(
    ("reached", "of_norms", "of_rates"),
    [
        ((1000, 2000, 3000), "1, lowest: 1", ("**1**, lowest", "2", "3")),
        ((2000, 1000, 3000), "2: 1", ("2", "**1**", "3")),
        ((3000, 2000, 1000), "3, highest: 1", ("3", "2", "**1**, highest")),
        ((None, None, None), "never", ("never", "never", "never")),
    ],
)
def test_a_best_rate_at_an_end_of_those_tried_is_marked(module, reached, of_norms, of_rates):
    report = module("convex_report")
    runs = at_rates(reached)
    assert report.of_norms(runs).splitlines()[-1] == f"     - {of_norms}"
    cells = [line.strip(" -") for line in report.of_rates(runs).splitlines()[-3:]]
    assert cells == list(of_rates)


def test_runs_that_are_there_are_not_made_again(quick):
    before = lines(quick)
    result = convex("--out", quick, "--quick")
    assert result.returncode == 0, result.stderr
    assert lines(quick) == before


def test_a_report_without_runs_writes_nothing(module, tmp_path):
    module("convex_report").write(tmp_path)
    assert not list(tmp_path.iterdir())


def test_cabs_comes_to_rest_where_theory_says(module, problems):
    made = module("convex")
    problem = problems.QUADRATICS["isotropic, floor 1"]()
    for rate in (0.5, 1.0):
        found = made.run(made.Setting("isotropic, floor 1", "CABS", rate, 0, 60_000), problem)
        expected = module("convex_report").expected_excess(problem, "CABS", rate)
        assert found["late_excess"] == pytest.approx(expected, rel=0.15)


def test_without_a_norm_to_reach_a_run_spends_its_budget(module, problems):
    made = module("convex")
    setting = made.Setting("isotropic, floor 1", "CABS, known floor", 0.5, 0, 100_000)
    found = made.run(setting, problems.QUADRATICS["isotropic, floor 1"]())
    assert found["outcome"] == "budget spent"
    assert found["curve"][-1][0] > 0.9 * setting.budget
