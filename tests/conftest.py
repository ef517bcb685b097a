"""Settings shared by all tests."""

import gc
import os

from hypothesis import settings

# Time limits say more about the machine than about the code. In continuous integration the same
# examples are drawn every time, so that a change fails for what it changed.
settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_addoption(parser):
    parser.addoption("--backend", choices=("torch", "jax", "tensorflow"), help="only this one")


def pytest_collection_modifyitems(items):
    """Run files with slow tests first, so that no process waits for another's at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish():
    """Leave out what is there by now when modules and their parameters are looked for."""
    gc.freeze()
