"""The examples run with the backend that a session is for, or with all of them."""

BACKENDS = ("torch", "jax", "tensorflow")


def pytest_addoption(parser):
    parser.addoption("--backend", choices=BACKENDS, help="only this one, and NumPy")


def pytest_ignore_collect(collection_path, config):
    is_for_another = config.getoption("--backend") not in (None, "tensorflow")
    return True if is_for_another and collection_path.name == "test_keras_fit.py" else None


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        chosen = metafunc.config.getoption("--backend")
        metafunc.parametrize("backend", [chosen] if chosen else BACKENDS)
