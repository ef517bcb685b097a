"""Settings shared by all tests."""

import os

from hypothesis import settings

# Time limits say more about the machine than about the code. In continuous integration the same
# examples are drawn every time, so that a change fails for what it changed.
settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_addoption(parser):
    parser.addoption("--backend", choices=("torch", "jax", "tensorflow"), help="only this one")
