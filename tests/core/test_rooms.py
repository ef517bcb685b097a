"""Each package imports what its place in the house allows, and nothing else."""

import ast
from importlib.util import find_spec
from pathlib import Path

import pytest

# From a package to those that it may import; modules of the core's front door may import all of it.
CORE = {
    "cabs.values": set(),
    "cabs.control": {"cabs.values"},
    "cabs.gradients": {"cabs.values"},
    "cabs.data": {"cabs.values"},
    "cabs.runs": {"cabs.control", "cabs.values"},
    "cabs.plot": {"cabs.runs"},
    "cabs.__main__": {"cabs.plot", "cabs.runs"},
}
# The same for each adapter, without its name; whatever else it has, joins these.
ADAPTER = {
    "errors": set(),
    "graph": {"errors"},
    "tracing": set(),
    "norms": {"tracing"},
    "rules": {"errors", "graph", "norms", "ranks", "tracing"},
    "data": set(),
    "ranks": {"errors", "norms"},
    # Of the walk, no more than which leaves are behind some losses.
    "microbatches": {
        *("errors", "graph", "norms", "ranks", "tracing"),
        *("optimizers", "options", "statistics", "totals", "walk"),
    },
}
MEASURING = {"cabs", "cabs.gradients", "cabs.values"}
FEEDING = {"cabs", "cabs.data", "cabs.values"}


def sources(package):
    spec = find_spec(package)
    assert spec is not None
    (folder,) = map(Path, spec.submodule_search_locations)
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        yield ".".join((package, *parts)), path


def imported(path):
    """Yield the modules of the project that a file imports, as far as their second name."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            module = str(node.module)
            is_whole = "." not in module
            names = [f"{module}.{one.name}" for one in node.names] if is_whole else [module]
            # A class of the front door.
            names = ["cabs" if n.startswith("cabs.") and n[5:6].isupper() else n for n in names]
        yield from (".".join(name.split(".")[:2]) for name in names if name.startswith("cabs"))


@pytest.mark.parametrize("package", CORE)
def test_the_core_imports_downwards(package):
    allowed = {package, *CORE[package]}
    files = [(name, path) for name, path in sources("cabs") if f"{name}.".startswith(f"{package}.")]
    assert files
    for name, path in files:
        assert set(imported(path)) <= allowed, name


@pytest.mark.parametrize("adapter", ["cabs_torch", "cabs_jax", "cabs_tensorflow"])
def test_adapters_import_downwards_and_none_imports_another(adapter):
    for name, path in sources(adapter):
        found, room = set(imported(path)), name.split(".")[1]
        others = {one for one in found if not one.startswith((f"{adapter}.", "cabs."))} - {"cabs"}
        assert not others, name
        if room in ADAPTER:
            inner = {f"{adapter}.{one}" for one in {room, *ADAPTER[room]}}
            core = FEEDING if room == "data" else MEASURING
            assert found <= inner | core, name


@pytest.mark.parametrize("adapter", ["cabs_torch", "cabs_tensorflow"])
def test_where_the_examples_lie_is_found_without_arithmetic(adapter):
    (path,) = (path for name, path in sources(adapter) if name.endswith(".rules.batch_axis"))
    assert f"{adapter}.norms" not in set(imported(path))


def test_measuring_does_not_know_what_feeds():
    for adapter in ("cabs_torch", "cabs_jax", "cabs_tensorflow"):
        for name, path in sources(adapter):
            if name.split(".")[1] not in ("__init__", "data", "keras", "padding"):
                assert not {"cabs.data", f"{adapter}.data"} & set(imported(path)), name


def test_a_package_says_what_lives_there_and_what_it_imports():
    for package in ("cabs", "cabs_torch", "cabs_jax", "cabs_tensorflow"):
        for name, path in sources(package):
            if name.count(".") == 2 and name.endswith("__init__"):
                doc = ast.get_docstring(ast.parse(path.read_text())) or ""
                assert "import" in doc.lower(), name
