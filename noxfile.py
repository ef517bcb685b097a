"""One command an intent, the same here and in continuous integration.

``nox -s quick`` while writing; ``nox -s tests`` (the core on each supported Python found, and each
framework on this one), ``lint``, ``docs``, ``package``, ``soak``, ``bench``, ``study``. Only the
Pythons that are missing are skipped, and said to be; a framework that cannot be installed is an
error.
"""

import os
import shutil
import sys
from pathlib import Path

import nox

ROOT = Path(__file__).parent
PROJECT = nox.project.load_toml(ROOT / "pyproject.toml")
GROUPS = PROJECT["dependency-groups"]
PYTHONS = nox.project.python_versions(PROJECT)
THIS = f"{sys.version_info.major}.{sys.version_info.minor}"
FRAMEWORKS = ("torch", "jax", "tensorflow")
EXAMPLES = PROJECT["project"]["optional-dependencies"]["examples"]
# The oldest release of a framework that is supported, tested beside the newest.
OLDEST = {"jax": "jax==0.8.0"}

nox.options.default_venv_backend = "virtualenv"
nox.options.download_python = "never"
nox.options.error_on_missing_interpreters = False
nox.options.sessions = ["tests", "lint", "docs", "package"]


def interpreter(version: str) -> str:
    """Return what nox is to look for; pyenv keeps Pythons that are not active off the path."""
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    found = sorted(root.glob(f"versions/{version}.*/bin/python{version}"))
    return str(found[-1]) if found else version


def install(session: nox.Session, *requirements: str, groups: tuple[str, ...] = ()) -> None:
    """Install what is asked for, in the versions that the constraints file pins."""
    wanted = nox.project.dependency_groups(PROJECT, *groups) if groups else ()
    constraints = ("--constraint", str(ROOT / "constraints.txt"))
    session.install("--no-compile", *constraints, *requirements, *wanted)
    # Compiled where it is imported, once for all processes, also where the caller forbids that.
    session.env["PYTHONDONTWRITEBYTECODE"] = ""


def test_groups(target: str) -> tuple[str, ...]:
    """Return the dependency groups that the tests of a framework need."""
    return ("test", f"test-{target}") if f"test-{target}" in GROUPS else ("test",)


def of_adapter(target: str) -> tuple[str, ...]:
    """Return where the tests of an adapter are: its own, and those that all adapters pass."""
    return f"tests/{target}", "tests/conformance", "--backend", target


def run_tests(session: nox.Session, *sources: str) -> None:
    """Run tests, and the examples in the docstrings of packages, in a process for each core."""
    # A process for each core has one thread, or all of them wait for each other.
    for pool in ("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS"):
        session.env[pool] = "1"
    # To compile a test's program takes longer than to run it; the package's tests are optimized.
    flags = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
    session.env.setdefault("XLA_FLAGS", flags)
    # A file runs in one process: some of its tests ask what others of them have seen. Files run in
    # the order of tests/conftest.py.
    parallel = ("--numprocesses=auto", "--dist=loadfile", "--no-loadscope-reorder")
    session.run("pytest", *parallel, "--doctest-modules", *sources, *session.posargs)


@nox.session
@nox.parametrize(
    "python,target",
    [(interpreter(version), "core") for version in PYTHONS] + [(None, name) for name in FRAMEWORKS],
    ids=[f"core-{version}" for version in PYTHONS] + list(FRAMEWORKS),
)
def tests(session: nox.Session, target: str) -> None:
    """Run the tests of the core, or of one framework's adapter and the examples with it."""
    if target == "core":
        install(session, "-e", ".[plot]", groups=("test",))
        # What is arithmetic, and takes seconds, on this Python alone, where it is one of them.
        is_other = THIS in PYTHONS and session.python != interpreter(THIS)
        run_tests(session, "tests/core", "cabs", *(("-m", "not once") if is_other else ()))
        return
    # With another framework, the examples need no PyTorch.
    examples = [one for one in EXAMPLES if target == "torch" or not one.startswith("torch")]
    install(session, "-e", f".[{target}]", *examples, groups=test_groups(target))
    run_tests(session, *of_adapter(target), f"backends/cabs_{target}")
    # In processes of their own, where a framework is loaded as a user loads it.
    run_tests(session, "tests/examples", "--backend", target)
    if target in OLDEST:
        # Against the newest versions that the constraints pin, and then without them.
        session.install(OLDEST[target])
        libraries = f"--ignore=tests/{target}/test_libraries.py"
        run_tests(session, *of_adapter(target), libraries, "-m", "not slow")


@nox.session(reuse_venv=True)
def quick(session: nox.Session) -> None:
    """Run what is fast of the core's tests and of one adapter's: torch, or ``-- jax``."""
    named = session.posargs[:1]
    target = session.posargs.pop(0) if named and named[0] in FRAMEWORKS else "torch"
    install(session, "-e", f".[{target},plot]", groups=test_groups(target))
    sources = ("tests/core", *of_adapter(target), "cabs", f"backends/cabs_{target}")
    run_tests(session, *sources, "-m", "not slow")


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and types."""
    install(session, "-e", ".[jax,tensorflow,torch,plot]", groups=("lint", "test"))
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation with warnings as errors, and run its examples."""
    install(session, "-e", ".[jax,tensorflow,torch,plot]", groups=("docs",))
    for builder in ("html", "doctest"):
        target = f"docs/_build/{builder}"
        session.run("sphinx-build", "-W", "--keep-going", "-q", "-b", builder, "docs", target)


@nox.session
def package(session: nox.Session) -> None:
    """Build the wheel, install it alone, and run the tests against it, far from the sources."""
    install(session, groups=("package",))
    built = Path(session.create_tmp()) / "dist"
    shutil.rmtree(built, ignore_errors=True)
    session.run("python", "-m", "build", "--outdir", str(built), str(ROOT), silent=True)
    (wheel,) = built.glob("*.whl")
    session.run("python", "-m", "pip", "uninstall", "-qy", "build")
    install(session, f"{wheel}[jax,tensorflow,torch,plot]", groups=("test",))
    away = Path(session.create_tmp()) / "away"
    shutil.rmtree(away, ignore_errors=True)
    # Tests read pages of the documentation, and its tables.
    for needed in ("tests", "docs"):
        shutil.copytree(ROOT / needed, away / needed, ignore=shutil.ignore_patterns("_build"))
    shutil.copy(ROOT / "pyproject.toml", away)
    session.chdir(away)
    session.env["XLA_FLAGS"] = ""
    session.run("python", "-c", PROVE_INSTALLED)
    run_tests(session, "tests/core")
    for target in FRAMEWORKS:
        # Each in processes of its own, as users have them.
        run_tests(session, *of_adapter(target), f"--ignore=tests/{target}/test_libraries.py")


PROVE_INSTALLED = """
import cabs, cabs_jax, cabs_tensorflow, cabs_torch, pathlib, sysconfig
site = pathlib.Path(sysconfig.get_path("purelib"))
for module in (cabs, cabs_jax, cabs_tensorflow, cabs_torch):
    assert pathlib.Path(module.__file__).is_relative_to(site), module.__file__
    assert pathlib.Path(module.__file__).with_name("py.typed").exists()
"""


@nox.session
def soak(session: nox.Session) -> None:
    """Prove at length what the tests prove in short: a million updates, and runs killed often."""
    install(session, "-e", ".[torch]", groups=("test",))
    session.env.update(CABS_UPDATES="1000000", CABS_KILLS="40")
    long = ("tests/core/test_soak.py", "tests/torch/test_survival.py")
    # Says what was done to each run, too.
    session.run("pytest", "-s", "-o", "faulthandler_timeout=0", *long, *session.posargs)


BENCHMARKS = (
    *("core", "loader_torch", "growth_torch", "kernels_torch", "kernels_jax", "collectives"),
    *(f"steps_{name}" for name in FRAMEWORKS),
    *(f"peers_{name}" for name in FRAMEWORKS),
)


@nox.session
def bench(session: nox.Session) -> None:
    """Measure everything, or what is named, and write the documentation's tables and figures.

    Nothing else should run meanwhile.
    """
    install(session, "-e", ".[jax,tensorflow,torch,plot]")
    # Without what they depend on: they would replace PyTorch.
    install(session, "--no-deps", groups=("peers",))
    results = ROOT / "docs" / "benchmarks"
    for name in session.posargs or BENCHMARKS:
        script = f"tests/benchmarks/{name}.py"
        session.run("python", script, "--json", str(results / f"{name}.json"))
    session.run("python", "tests/benchmarks/report.py", str(results))


@nox.session
def study(session: nox.Session) -> None:
    """Make the runs of the paper's study that are missing, and its tables: ``-- DATA_DIR``.

    Takes hours on two cores where none is there; nothing else should run meanwhile.
    """
    (data,) = session.posargs
    install(session, "-e", ".[examples]")
    # Run beside the library and never part of it, for its licence is another.
    session.install("mice==1.0.5")
    results = str(ROOT / "docs" / "study" / "results")
    for script in ("study", "convex", "seconds", "wall_clock"):
        command = ("python", f"examples/paper/{script}.py", "--data-dir", data, "--out", results)
        session.run(*command, *(("--jobs", "2") if script == "study" else ()))
    session.run("python", "examples/paper/report.py", results)
