"""The examples run with the backend that a session is for, or with all of them."""

import importlib
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
BACKENDS = ("torch", "jax", "tensorflow")
# What does not depend on the backend runs with one.
ONLY = {
    "test_keras_fit.py": "tensorflow",
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


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        chosen = metafunc.config.getoption("--backend")
        metafunc.parametrize("backend", [chosen] if chosen else BACKENDS)
