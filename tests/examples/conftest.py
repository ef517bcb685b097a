"""The examples run with the backend that a session is for, or with all of them."""


def pytest_addoption(parser):
    parser.addoption("--backend", choices=("torch", "jax"), help="only this one, and NumPy")


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        chosen = metafunc.config.getoption("--backend")
        metafunc.parametrize("backend", [chosen] if chosen else ["torch", "jax"])
