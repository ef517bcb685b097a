"""The core needs no framework, and does not even try to import one."""

import sys

from tests.processes import finished

PROGRAM = """
import sys

tried = []

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {
            "torch", "jax", "tensorflow", "keras", "sklearn", "matplotlib", "scipy"
        }:
            tried.append(name)

sys.meta_path.insert(0, Watch())
import cabs, cabs.plot
assert not tried, tried
"""


def test_importing_cabs_tries_to_import_no_framework():
    done = finished([sys.executable, "-W", "error", "-c", PROGRAM])
    assert done.returncode == 0, done.stderr


def test_the_watch_would_notice_an_import():
    program = PROGRAM.replace(
        "import cabs, cabs.plot", "import importlib.util as u; u.find_spec('torch')"
    )
    result = finished([sys.executable, "-c", program])
    assert "AssertionError: ['torch']" in result.stderr


def test_all_public_names_exist_and_are_sorted():
    import cabs

    # Acronyms first.
    assert cabs.__all__ == sorted(cabs.__all__, key=lambda name: (not name.isupper(), name))
    assert all(hasattr(cabs, name) for name in cabs.__all__)


def test_every_public_name_has_an_example():
    import cabs

    assert [name for name in cabs.__all__ if ">>>" not in (getattr(cabs, name).__doc__ or "")] == []
