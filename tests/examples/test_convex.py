"""The convex problems are what their page says, and a run leaves what is drawn from it."""

import gzip
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
PAPER = ROOT / "examples" / "paper"
RESULTS = ROOT / "docs" / "study" / "results"
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
    assert batch.statistics.mean_square == pytest.approx((gradients.mean(axis=0) ** 2).sum())
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
    sizes = np.linspace(0.05, 40.0, 80_000)
    gains = [made.gain(weights, rate, size) for size in sizes]
    best = sizes[int(np.argmax(gains))]
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
    return subprocess.run(command, capture_output=True, text=True, check=False)


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
    assert all(len(run["curve"]) <= 40 for run in runs if "curve" in run)
    module("convex_report").write(quick)
    first = {path.name: path.read_bytes() for path in quick.iterdir()}
    assert {"convex-isotropic.inc", "convex-optimum.inc", "convex-optimum.svg"} <= set(first)
    assert b"exact optimum, told" in first["convex-isotropic.inc"]
    module("convex_report").write(quick)
    assert first == {path.name: path.read_bytes() for path in quick.iterdir()}


def test_what_is_not_installed_is_said_to_be(module, quick):
    missing = [run for run in lines(quick) if run["outcome"] == "not installed"]
    if module("convex_methods").mice() is None:
        assert {run["method"] for run in missing} == {"MICE"}
        module("convex_report").write(quick)
        assert "not installed" in (quick / "convex-isotropic.inc").read_text(encoding="utf-8")
    else:
        assert not missing


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


@pytest.mark.skipif(not (RESULTS / "convex.jsonl").exists(), reason="there are no results here")
def test_the_tables_of_the_page_are_those_of_its_runs(module, tmp_path):
    (tmp_path / "convex.jsonl").write_bytes((RESULTS / "convex.jsonl").read_bytes())
    module("convex_report").write(tmp_path)
    for path in tmp_path.glob("*.inc"):
        assert path.read_bytes() == (RESULTS / path.name).read_bytes(), path.name
