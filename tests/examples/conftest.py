"""The examples run with the backend that a session is for, or with all of them."""

import importlib
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
BACKENDS = ("torch", "jax", "tensorflow")
# What does not depend on the backend runs with one: files, and tests that take no backend.
ONLY = {
    "test_keras_fit.py": "tensorflow",
    "test_readme.py": "torch",
    "test_study.py": "torch",
    "test_convex.py": "torch",
    "test_seconds.py": "torch",
    "test_torchrun.py": "torch",
}


@pytest.fixture(scope="session")
def module():
    """Return what imports a module of the paper's study, whose scripts find each other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        patch.syspath_prepend(EXAMPLES / "paper")
        yield importlib.import_module


def pytest_ignore_collect(collection_path, config):
    chosen = config.getoption("--backend")
    return True if chosen and ONLY.get(collection_path.name, chosen) != chosen else None


def pytest_collection_modifyitems(config, items):
    chosen = config.getoption("--backend")
    if chosen in (None, "torch"):
        return
    free = [
        item
        for item in items
        if item.path.parent == Path(__file__).parent
        and "backend" not in item.fixturenames
        and item.path.name not in ONLY
    ]
    config.hook.pytest_deselected(items=free)
    items[:] = [item for item in items if item not in free]


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        chosen = metafunc.config.getoption("--backend")
        metafunc.parametrize("backend", [chosen] if chosen else BACKENDS, scope="module")
