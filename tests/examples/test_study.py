"""The study compares what it says that it compares, and its pages say what was measured."""

import json
import lzma
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, unfold

from tests.processes import finished

ROOT = Path(__file__).parents[2]
PAPER = ROOT / "examples" / "paper"
RESULTS = ROOT / "docs" / "study" / "results"
DATA = ROOT.parent / "shared" / "data"


def study(*options):
    command = [sys.executable, str(PAPER / "study.py"), "--quick", *map(str, options)]
    return finished(command)


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    out = tmp_path_factory.mktemp("quick")
    result = study("--out", out)
    assert result.returncode == 0, result.stderr
    return out


def test_a_quick_study_makes_every_run_that_bundled_data_allow(module, quick):
    made = module("study")
    for name, whole in made.STUDIES.items():
        wanted = made.quick(whole, has_data=False)
        if wanted.budgets:
            found = lines(quick / f"{name}.jsonl")
            assert {run["recipe"] for run in found} == set(wanted.recipes)
            for run in found:
                seen, steps = run["curve"][-1][:2]
                assert seen >= run["budget"] == made.QUICK_BUDGET
                assert steps <= seen / 16 + 1


def test_runs_that_are_there_are_not_made_again(quick, module, monkeypatch):
    before = {path: path.read_bytes() for path in quick.glob("*.jsonl")}
    monkeypatch.setattr(sys, "argv", ["study.py", "--quick", "--out", str(quick)])
    module("study").main()
    assert {path: path.read_bytes() for path in quick.glob("*.jsonl")} == before


def test_tables_and_figures_come_from_runs_alone(quick):
    command = [sys.executable, str(PAPER / "report.py"), str(quick)]
    result = finished(command)
    assert result.returncode == 0, result.stderr
    for name in ("images-digits", "images-digits-levels", "groups-digits", "floor-digits-smoothed"):
        assert "list-table" in (quick / f"{name}.inc").read_text(encoding="utf-8")
    assert "<svg" in (quick / "images-digits.svg").read_text(encoding="utf-8")


@pytest.mark.skipif(not DATA.is_dir(), reason="the published files are not beside the checkout")
def test_published_files_are_trained_on(tmp_path):
    data = tmp_path / "data"
    (data / "cifar10").mkdir(parents=True)
    (data / "tinyshakespeare").symlink_to(DATA / "tinyshakespeare")
    for path in (DATA / "cifar10").glob("*.xz"):
        # The first images of each file, since to read all of them takes longer than to train.
        with lzma.open(path) as file:
            first = file.read(500 * (1 + 3 * 32 * 32))
        (data / "cifar10" / path.name).write_bytes(lzma.compress(first, preset=0))
    options = ("--studies", "images", "text", "--problems", "cifar10", "tinyshakespeare")
    recipes = ("--recipes", "CABS", "CABS from 4")
    result = study("--out", tmp_path, "--data-dir", data, *options, *recipes)
    assert result.returncode == 0, result.stderr
    problems = {run["problem"] for path in tmp_path.glob("*.jsonl") for run in lines(path)}
    assert problems == {"cifar10", "tinyshakespeare"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "the study needs --data-dir"),
        (("--data-dir", "none"), "--data-dir none does not hold cifar10, fashion-mnist, mnist"),
        (("--quick", "--problems", "mnsit"), "these studies have the problems digits, digits sm"),
        (("--quick", "--studies", "text"), "have the problems of --data-dir only"),
        (("--quick", "--device", "nonsense"), "--device nonsense cannot be used here"),
    ],
)
def test_what_cannot_be_run_is_said_in_one_line(
    options, said, tmp_path, module, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "argv", ["study.py", "--out", str(tmp_path / "runs"), *options])
    with pytest.raises(SystemExit) as raised:
        module("study").main()
    code = raised.value.code
    message = code if isinstance(code, str) else capsys.readouterr().err
    assert said in message.splitlines()[-1]
    assert not (tmp_path / "runs").exists()


def test_a_file_that_is_missing_ends_the_study(tmp_path):
    (tmp_path / "mnist").mkdir()
    result = study("--out", tmp_path / "runs", "--data-dir", tmp_path, "--problems", "mnist")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("there is no ")


def test_pages_say_what_was_measured(tmp_path, module):
    for path in RESULTS.glob("*.jsonl"):
        shutil.copy(path, tmp_path)
    module("report").write(tmp_path)
    committed = {path.name for path in RESULTS.glob("*.inc")}
    assert committed == {path.name for path in tmp_path.glob("*.inc")}
    assert any(name.startswith("images-cifar10") for name in committed)
    for name in committed:
        assert (RESULTS / name).read_bytes() == (tmp_path / name).read_bytes(), name


@pytest.fixture
def batch(module):
    torch.manual_seed(0)
    model = module("networks").two_convolutions_and_two_dense(1, 8).double()
    images, labels = torch.randn(6, 1, 8, 8).double(), torch.randint(10, (6,))
    return (
        model,
        lambda scores, targets: cross_entropy(scores, targets, reduction="none"),
        (
            images,
            labels,
        ),
    )


def test_published_moments_are_squares_of_every_position_added_up(module, batch):
    model, losses, (images, labels) = batch
    layers = [one for one in model if isinstance(one, torch.nn.Conv2d | torch.nn.Linear)]
    expected = 0.0
    for place in range(len(images)):
        kept = []

        def keep(layer, inputs, out, kept=kept):
            kept.append((layer, *inputs, out))

        hooks = [layer.register_forward_hook(keep) for layer in layers]
        loss = losses(model(images[place : place + 1]), labels[place : place + 1]).sum()
        for hook in hooks:
            hook.remove()
        cotangents = torch.autograd.grad(loss, [out for *_, out in kept])
        for (layer, inputs, _), cotangent in zip(kept, cotangents, strict=True):
            if isinstance(layer, torch.nn.Linear):
                parts = torch.einsum("ni,no->noi", inputs, cotangent)
            else:
                patches = unfold(inputs, 5, padding=2)[0]
                parts = torch.einsum("ip,op->poi", patches, cotangent[0].flatten(1))
            expected += ((parts**2).sum() + (cotangent**2).sum()).item()
    _, statistics = module("measures").published(model, losses, images, labels)
    assert statistics.group_square_sum == pytest.approx(expected, rel=1e-12)
    exact = module("measures").exact
    model.zero_grad()
    _, right = exact(model, losses, images, labels)
    assert statistics.gradient_norm_squared == pytest.approx(right.gradient_norm_squared, rel=1e-9)
    assert abs(right.group_square_sum / expected - 1.0) > 1e-5


def test_as_many_groups_as_examples_are_exact(module, batch):
    measures = module("measures")
    model, losses, (images, labels) = batch
    found = []
    for measure in (measures.exact, measures.groups(6), measures.groups(16)):
        model.zero_grad()
        mean, statistics = measure(model, losses, images, labels)
        gradient = torch.cat([one.grad.flatten() for one in model.parameters()])
        found.append((float(mean), statistics.variance_trace, float(gradient.norm())))
    assert np.allclose(found, found[0], rtol=1e-9)


def test_a_crop_is_a_piece_of_its_image_perhaps_flipped(module):
    problems = module("problems")
    images = torch.arange(20 * 2 * 32 * 32, dtype=torch.float32).reshape(20, 2, 32, 32)
    crops = problems.cropped(images, torch.Generator().manual_seed(0))
    assert crops.shape == (20, 2, 24, 24)
    flips = set()
    for image, crop in zip(images, crops, strict=True):
        is_flipped = bool(crop[0, 0, 0] > crop[0, 0, 1])
        flips.add(is_flipped)
        piece = crop.flip(2) if is_flipped else crop
        row, column = divmod(int(piece[0, 0, 0] - image[0, 0, 0]), 32)
        assert torch.equal(piece, image[:, row : row + 24, column : column + 24])
    assert flips == {True, False}


def test_methods_with_the_same_sizes_make_the_same_run(module):
    rate, losses = 0.1, {}
    problem = module("problems").problem("digits", None, "cpu")
    for recipe in ("CABS", "constant 16"):
        setting = module("runs").Setting("digits", recipe, rate / 100, 0, 320, "cpu")
        run = module("runs").train(setting, problem)
        losses[recipe] = [point[3] for point in run["curve"]]
    assert losses["CABS"] == losses["constant 16"]


def test_a_run_that_diverges_ends_and_is_infinitely_bad(module):
    problem = module("problems").problem("digits", None, "cpu")
    setting = module("runs").Setting("digits", "CABS", 1e6, 0, 100_000, "cpu")
    run = module("runs").train(setting, problem)
    assert run["final_loss"] is None
    assert run["curve"][-1][0] < 10_000


def test_learning_rates_are_left_to_one_seed_for_all_methods_or_none(module):
    made = module("study")
    study = made.Study({"digits": 10}, ("CABS", "constant 16"), (0.1, 0.2, 0.4), once=(0.4,))
    found = [
        [(one.recipe, one.learning_rate) for one in made.settings(study, seed, "cpu")]
        for seed in (0, 1)
    ]
    assert found[0] == [(a, b) for a in study.recipes for b in (0.1, 0.2, 0.4)]
    assert found[1] == [(a, b) for a in study.recipes for b in (0.1, 0.2)]


def test_another_budget_leaves_no_learning_rate_to_one_seed(module, tmp_path, monkeypatch):
    made = module("study")
    options = ["study.py", "--out", str(tmp_path), "--data-dir", str(tmp_path)]
    for more, once in (([], made.FAR), (["--budget", "9"], ())):
        monkeypatch.setattr(sys, "argv", options + more)
        asked = made.arguments()
        assert made.chosen_of(made.offered(asked), asked)["images"].once == once


def numbers(trace, square):
    return SimpleNamespace(
        variance_trace=trace,
        gradient_norm_squared=2 * square,
        expected_gradient_norm_squared=square,
    )


def test_other_rules_divide_averages_and_not_numbers_of_one_step(module):
    methods = module("methods")
    test = methods.RECIPES["norm test 0.5"].method()
    test.update(0.1, 1.0, numbers(100.0, 1.0))
    assert test.asked == pytest.approx(100.0 / (0.25 * 2.0))
    assert test.batch_size == 200
    test.update(0.1, 1.0, numbers(float("nan"), 1.0))
    assert test.batch_size == 200
    test.update(0.1, 1.0, numbers(300.0, 1.0))
    # Weights 0.05 and 0.95 x 0.05 of a debiased average of two.
    assert test.asked == pytest.approx((300.0 + 0.95 * 100.0) / 1.95 / 0.5)


def test_the_noise_scale_waits_until_its_square_is_an_average(module):
    methods = module("methods")
    scale = methods.RECIPES["noise scale"].method()
    for step in range(methods.HELD):
        scale.update(0.1, 1.0, numbers(100.0, -1.0 if step == 0 else 2.0))
        assert scale.batch_size == 16
    scale.update(0.1, 1.0, numbers(100.0, 2.0))
    assert 50 <= scale.batch_size <= 70
    assert scale.batch_size == round(scale.asked)


def test_the_rule_is_given_the_effective_rate_and_the_smoothed_labels_floor(module):
    recipes = module("methods").RECIPES
    asked = {}
    names = ("CABS", "CABS, momentum, effective rate", "CABS, floor of the labels")
    for name in names:
        method = recipes[name].method()
        method.update(0.1, 1.0, numbers(1000.0, 1.0))
        asked[name] = method.asked
    label = np.full(10, 0.01)
    label[0] += 0.9
    floor = -(label * np.log(label)).sum()
    expected = np.array([1.0, 10.0, 1.0 / (1.0 - floor)]) * 100.0
    assert np.allclose([asked[name] for name in names], expected)


def test_a_decay_goes_along_half_a_cosine(module):
    recipes = module("methods").RECIPES
    for name in ("constant 16, decay", "CABS, decay"):
        found = [recipes[name].rate(0.2, share) for share in (0.0, 1 / 3, 0.5, 1.0)]
        assert np.allclose(found, [0.2, 0.15, 0.1, 0.0])
    assert recipes["CABS"].rate(0.2, 0.9) == 0.2


def test_a_penalty_is_told_only_where_the_recipe_says_so(module):
    runs, problem = module("runs"), module("problems").problem("digits", None, "cpu")
    told = []
    for recipe in ("CABS, weight decay", "CABS, weight decay, penalty in the loss"):
        setting = runs.Setting("digits", recipe, 0.1, 0, 16, "cpu")
        (point,) = runs.train(setting, problem)["curve"]
        told.append((point[3], point[4]))
    torch.manual_seed(0)
    weights = problem.network().parameters()
    penalty = 0.005 / 2.0 * sum(float((one.detach() ** 2).sum()) for one in weights)
    (loss, without), (_, among) = told
    assert without / among == pytest.approx((loss + penalty) / loss, rel=2e-3)


def line(recipe="CABS", rate=0.1, seed=0, budget=100, device="cpu", **more):
    # Stretches of 50, 40 and 20 examples.
    curve = [
        [50, 3, 1.0, 2.0, 9.0, None],
        [90, 5, 2.0, 1.0, 9.0, None],
        [110, 6, 3.0, 0.4, 9.0, 0.5],
    ]
    run = {"problem": "digits", "recipe": recipe, "learning_rate": rate, "seed": seed}
    return {**run, "budget": budget, "device": device, "final_loss": 0.3, "curve": curve, **more}


def written(path, lines):
    path.write_text("".join(json.dumps(one) + "\n" for one in lines), encoding="utf-8")
    return path


def test_the_late_loss_is_that_of_the_last_fifth_by_examples(module, tmp_path):
    path = written(tmp_path / "images.jsonl", [line(), line(seed=1, final_loss=None)])
    first, second = module("results").runs_of(path)["digits"]["CABS", 0.1]
    assert first.late_loss == pytest.approx((1.0 * 40 + 0.4 * 20) / 60)
    assert second.late_loss == float("inf")


def test_only_runs_with_the_largest_budget_are_compared(module, tmp_path):
    path = written(tmp_path / "images.jsonl", [line(budget=600), line(), line(seed=1, budget=600)])
    runs = module("results").runs_of(path)["digits"]
    assert [run.setting.seed for run in runs["CABS", 0.1]] == [0, 1]
    assert all(run.setting.budget == 600 for run in runs["CABS", 0.1])


def test_runs_of_different_devices_are_not_compared(module, tmp_path):
    path = written(tmp_path / "images.jsonl", [line(), line(seed=1, device="cuda")])
    with pytest.raises(SystemExit, match="digits on cpu and on cuda; keep those"):
        module("results").runs_of(path)


def test_the_best_learning_rate_is_that_of_the_median_and_its_neighbours_are_told(module, tmp_path):
    losses = {0.1: (1.0, 1.0, 9.0), 0.2: (0.99, 1.09, 1.5), 0.4: (1.2, 0.5, 1.3), 0.6: (None,)}
    lines = [
        line(rate=rate, seed=seed, final_loss=loss)
        for rate, some in losses.items()
        for seed, loss in enumerate(some)
    ]
    runs = module("results").runs_of(written(tmp_path / "images.jsonl", lines))["digits"]
    assert module("results").best_of(runs, "CABS")[0] == 0.1
    report = module("report")
    by_rate = module("results").by_rate(runs, "CABS")
    assert report.good_rates(by_rate, 1.0) == "0.1 to 0.2 (2 times)"
    assert report.good_rates(by_rate, 0.5) == "none"
    assert "diverged" in report.grid(runs)
    assert "1.000 (1.000 to 9.000)" in report.comparison(runs)


def test_levels_are_reached_at_the_rate_that_needs_the_fewest_examples(module, tmp_path):
    slow = [[50, 3, 1.0, 2.0, 9.0, None], [110, 6, 3.0, 0.4, 9.0, 0.5]]
    lines = [line(rate=rate, seed=seed) for rate in (0.1, 0.2) for seed in (0, 1)]
    for one in lines[:2]:
        one["curve"] = slow
    runs = module("results").runs_of(written(tmp_path / "images.jsonl", lines))["digits"]
    text = module("report").levels_reached(runs, (1.0, 0.1))
    assert "- 0.2: 90\n     - 2.0\n     - never\n     - never" in text


def test_an_interrupted_study_can_be_looked_at(module, tmp_path):
    for name in ("images", "groups"):
        lines = (RESULTS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        runs = [json.loads(one) for one in lines]
        first = [one for one in runs if one["seed"] == 0]
        second = [one for one in runs if one["seed"] == 1]
        written(tmp_path / f"{name}.jsonl", first[:7] if name == "groups" else first + second[:5])
    module("report").write(tmp_path)
    assert len(list(tmp_path.glob("*.inc"))) == 10
