"""The study compares what it says that it compares, and its pages say what was measured."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, unfold

ROOT = Path(__file__).parents[2]
PAPER = ROOT / "examples" / "paper"
RESULTS = ROOT / "docs" / "study" / "results"
DATA = ROOT.parent / "shared" / "data"


def study(*options):
    command = [sys.executable, str(PAPER / "study.py"), "--quick", *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


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


def test_runs_that_are_there_are_not_made_again(quick):
    before = {path: path.read_bytes() for path in quick.glob("*.jsonl")}
    result = study("--out", quick)
    assert result.returncode == 0, result.stderr
    assert {path: path.read_bytes() for path in quick.glob("*.jsonl")} == before


def test_tables_and_figures_come_from_runs_alone(quick):
    command = [sys.executable, str(PAPER / "report.py"), str(quick)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    for name in ("images-digits", "images-digits-levels", "groups-digits", "floor-digits-smoothed"):
        assert "list-table" in (quick / f"{name}.inc").read_text(encoding="utf-8")
    assert "<svg" in (quick / "images-digits.svg").read_text(encoding="utf-8")


@pytest.mark.skipif(not DATA.is_dir(), reason="the published files are not beside the checkout")
def test_published_files_are_trained_on(tmp_path):
    options = ("--studies", "images", "text", "--problems", "cifar10", "tinyshakespeare")
    recipes = ("--recipes", "CABS", "CABS from 4")
    result = study("--out", tmp_path, "--data-dir", DATA, *options, *recipes)
    assert result.returncode == 0, result.stderr
    problems = {run["problem"] for path in tmp_path.glob("*.jsonl") for run in lines(path)}
    assert problems == {"cifar10", "tinyshakespeare"}


def test_missing_data_are_said_in_one_line(tmp_path):
    command = [sys.executable, str(PAPER / "study.py"), "--out", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("the study needs --data-dir")


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
    assert statistics.mean_square == pytest.approx(right.mean_square, rel=1e-9)
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
        setting = module("runs").Setting("digits", recipe, rate / 100, 0, 320)
        run = module("runs").train(setting, problem, "cpu")
        losses[recipe] = [point[3] for point in run["curve"]]
    assert losses["CABS"] == losses["constant 16"]


def test_a_run_that_diverges_ends_and_is_infinitely_bad(module):
    problem = module("problems").problem("digits", None, "cpu")
    setting = module("runs").Setting("digits", "CABS", 1e6, 0, 100_000)
    run = module("runs").train(setting, problem, "cpu")
    assert run["final_loss"] is None
    assert run["curve"][-1][0] < 10_000


def test_only_hopeless_learning_rates_are_left_to_one_seed(module):
    made = module("study")
    whole = made.Study({"digits": 10}, ("CABS",), (0.1, 0.2, 0.4), is_pruned=True)
    losses = {0.1: 1.0, 0.2: 1.2, 0.4: None}
    done = [
        {"problem": "digits", "recipe": "CABS", "seed": 0, "learning_rate": a, "final_loss": b}
        for a, b in losses.items()
    ]
    assert [one.learning_rate for one in made.settings(whole, 0, [])] == [0.1, 0.2, 0.4]
    assert [one.learning_rate for one in made.settings(whole, 1, done)] == [0.1, 0.2]
    every = whole._replace(is_pruned=False)
    assert [one.learning_rate for one in made.settings(every, 1, done)] == [0.1, 0.2, 0.4]
