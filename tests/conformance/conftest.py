"""The suite runs with the adapter that a session is for, or with all of them."""

import importlib

import pytest

# The ways in which an adapter is called, the usual one first.
ADAPTERS = {
    "torch": {"torch": {}, "torch with summed gradients": {"is_summed": True}},
    "jax": {"jax": {"is_jitted": True}, "jax without jit": {"is_jitted": False}},
    "tensorflow": {
        "tensorflow": {"is_size_known": False},
        "tensorflow of known size": {"is_size_known": True},
    },
}


def pytest_ignore_collect(collection_path, config):
    """Leave alone, when examples in docstrings are looked for, what needs other frameworks."""
    chosen = config.getoption("--backend")
    others = {f"{name}_adapter.py" for name in ADAPTERS if chosen and name != chosen}
    return True if collection_path.name in others else None


def pytest_generate_tests(metafunc):
    chosen = metafunc.config.getoption("--backend")
    ways = {name: ADAPTERS[name] for name in ([chosen] if chosen else ADAPTERS)}
    if "any_adapter" in metafunc.fixturenames:
        cases = {way: (name, how) for name in ways for way, how in ways[name].items()}
        metafunc.parametrize("any_adapter", cases.values(), ids=cases, indirect=True)
    elif "adapter" in metafunc.fixturenames:
        cases = {name: (name, next(iter(ways[name].values()))) for name in ways}
        metafunc.parametrize("adapter", cases.values(), ids=cases, indirect=True)


def made(request):
    name, how = request.param
    module = importlib.import_module(f"tests.conformance.{name}_adapter")
    return getattr(module, f"{name.title()}Adapter")(**how)


@pytest.fixture
def adapter(request):
    """Return a framework's adapter, called as it usually is."""
    return made(request)


@pytest.fixture
def any_adapter(request):
    """Return a framework's adapter, called in each way that there is."""
    return made(request)
