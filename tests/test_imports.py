"""Imports point one way, the public door is documented, and opening it costs no torch."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest

import mlo

ROOT = Path(mlo.__file__).parents[1]

# From the ground up: a module imports from the layers below its own, and a package from itself.
LAYERS = [
    {"mlo._errors", "mlo._modes", "mlo._types"},
    {"mlo._scalar"},
    {"mlo._late"},
    {"mlo._patterns", "mlo._random", "mlo._score_function", "mlo._structure", "mlo._tree", "mlo.schedule"},
    {"mlo._backend", "mlo._chain", "mlo._constraint", "mlo._dense", "mlo._reduction", "mlo.optimizer"},
    {"mlo._autodiff", "mlo._module", "mlo.hypergradient", "mlo.stream"},
    {"mlo._factored", "mlo._finite", "mlo._level", "mlo._reading", "mlo._shared", "mlo._state"},
    {"mlo._flat", "mlo._objective", "mlo._plan"},
    {"mlo._partials"},
    {"mlo._step"},
    {"mlo._chunks"},
    {"mlo._linearisation", "mlo._retaken", "mlo._tangent"},
    {"mlo._response"},
    {"mlo._joint"},
    {"mlo._sweep"},
    {"mlo._nest"},
    {"mlo._engine"},
    {"mlo._compiled", "mlo._cost"},
    {"mlo._graph", "mlo._problem"},
    {"mlo.spec", "mlo.testing"},
    {"mlo._run"},
    {"mlo._audit", "mlo._doctor", "mlo._draw", "mlo._export", "mlo._new", "mlo._table"},
    {"mlo._search"},
    {"mlo.cli"},
    {"mlo.__main__"},
]
HEIGHT = {name: height for height, layer in enumerate(LAYERS) for name in layer}


def files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_module(name: str) -> bool:
    place = ROOT.joinpath(*name.split("."))
    return place.with_suffix(".py").exists() or (place / "__init__.py").exists()


def imported_by(path: Path) -> set[str]:
    """The modules that a file imports anywhere in it, for type checking too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            source = node.module or ""
            found |= {
                f"{source}.{alias.name}" if is_module(f"{source}.{alias.name}") else source for alias in node.names
            }
    return found


def unit(module: str) -> str:
    """A private module at the top of `mlo`, or a package of it."""
    return ".".join(module.split(".")[:2])


@pytest.mark.parametrize("path", [path for path in files("mlo") if path != ROOT / "mlo" / "__init__.py"], ids=module_of)
def test_imports_point_down(path):
    own = unit(module_of(path))
    assert own in HEIGHT, f"{own} has no place yet: give it one in LAYERS"
    for module in imported_by(path):
        top = module.split(".")[0]
        assert top != "problems", f"{path.name} imports {module}: mlo never imports problems"
        if top == "mlo" and unit(module) != own and module != "mlo":
            assert HEIGHT[unit(module)] < HEIGHT[own], f"{path.name} imports {module}, which does not lie below it"


def test_layers_name_only_what_exists():
    assert set(HEIGHT) == {unit(module_of(path)) for path in files("mlo")} - {"mlo"}


@pytest.mark.parametrize("path", files("problems"), ids=module_of)
def test_problems_use_public_names_only(path):
    for module in imported_by(path):
        if module.split(".")[0] == "mlo":
            assert not any(part.startswith("_") for part in module.split(".")), f"{path.name} imports {module}"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    used = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    private = [
        ast.unparse(node)
        for node in used
        if node.attr.startswith("_") and not node.attr.startswith("__") and ast.unparse(node).startswith("mlo.")
    ]
    assert not private


@pytest.mark.parametrize("package", ["optimizer", "hypergradient", "schedule"])
def test_methods_and_optimizers_do_not_import_torch(package):
    """A specification is checked against their settings before torch is loaded."""
    for path in files(f"mlo/{package}"):
        running = [node for node in ast.parse(path.read_text(encoding="utf-8")).body if not isinstance(node, ast.If)]
        for node in ast.walk(ast.Module(body=running, type_ignores=[])):
            if isinstance(node, ast.Import | ast.ImportFrom):
                assert "torch" not in ast.unparse(node), path.name


DOORS = ["mlo", "mlo.optimizer", "mlo.hypergradient", "mlo.schedule", "mlo.stream"]


def public_names(door: str) -> list[str]:
    module = import_module(door)
    return [name for name in (dir(module) if door == "mlo" else vars(module)) if not name.startswith("_")]


def documented_assignments(module: ModuleType) -> set[str]:
    """Names of constants and type aliases that a string below them explains."""
    body = ast.parse(inspect.getsource(module)).body
    found: set[str] = set()
    for node, below in pairwise(body):
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        explained = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
        if isinstance(target, ast.Name) and explained and isinstance(below.value.value, str):
            found.add(target.id)
    return found


@pytest.mark.parametrize(("door", "name"), [(door, name) for door in DOORS for name in public_names(door)])
def test_every_public_name_is_documented(door, name):
    found = getattr(import_module(door), name)
    if isinstance(found, ModuleType):
        assert found.__doc__
    elif inspect.isclass(found) or inspect.isfunction(found):
        assert found.__doc__, name
        assert not found.__doc__.startswith(f"{name}("), "a signature is no docstring"
        for member, value in vars(found).items():
            if not member.startswith("_") and (inspect.isfunction(value) or isinstance(value, property)):
                assert inspect.getdoc(getattr(found, member)), f"{name}.{member}"
    else:
        home = import_module(mlo._HOMES[name])
        assert name in documented_assignments(home), f"{name}: say below its definition what it is"


def test_the_door_knows_its_names():
    with pytest.raises(AttributeError, match="module 'mlo' has no attribute 'grpah'"):
        _ = mlo.grpah
    assert set(mlo.__all__) == set(dir(mlo))


PROGRAM = """
import sys
import mlo
mlo.optimizer.SGD(learning_rate=mlo.schedule.Cosine(start=0.1, over=9), momentum=0.9), mlo.optimizer.Adam()
mlo.hypergradient.Unroll(), mlo.hypergradient.FiniteDifference().cost(3, 1)
mlo.GraphError, mlo.NumericalError
loaded = {"torch", "numpy", "networkx", "hypothesis", "optuna", "problems"} & set(sys.modules)
assert not loaded, loaded
"""


def test_importing_mlo_does_not_import_torch():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
