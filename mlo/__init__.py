"""Declarative multi-level optimization on `torch.func`.

Names are imported when they are first used, so that `import mlo` costs nothing and a wrong specification is answered
before torch is loaded.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlo import hypergradient as hypergradient
    from mlo import optimizer as optimizer
    from mlo import schedule as schedule
    from mlo import stream as stream
    from mlo import testing as testing
    from mlo._audit import Audit as Audit
    from mlo._audit import audit as audit
    from mlo._errors import GraphError as GraphError
    from mlo._errors import MachineError as MachineError
    from mlo._errors import MloError as MloError
    from mlo._errors import NumericalError as NumericalError
    from mlo._errors import SpecError as SpecError
    from mlo._errors import StoppedElsewhere as StoppedElsewhere
    from mlo._errors import UserError as UserError
    from mlo._graph import Graph as Graph
    from mlo._level import Level as Level
    from mlo._module import ModuleVariables as ModuleVariables
    from mlo._objective import Values as Values
    from mlo._problem import Context as Context
    from mlo._problem import Evaluate as Evaluate
    from mlo._problem import Evaluation as Evaluation
    from mlo._problem import Problem as Problem
    from mlo._problem import Settings as Settings
    from mlo._problem import Split as Split
    from mlo._problem import Table as Table
    from mlo._reduction import reduction as reduction
    from mlo._run import Run as Run
    from mlo._run import open_run as open_run
    from mlo._run import resume as resume
    from mlo._run import run as run
    from mlo._score_function import score_function as score_function
    from mlo._state import Batches as Batches
    from mlo._state import Metrics as Metrics
    from mlo._state import Norms as Norms
    from mlo._state import Parts as Parts
    from mlo._state import State as State
    from mlo.spec import Spec as Spec
    from mlo.spec import load as load

_HOMES = {
    "hypergradient": "mlo.hypergradient",
    "optimizer": "mlo.optimizer",
    "schedule": "mlo.schedule",
    "stream": "mlo.stream",
    "testing": "mlo.testing",
    "Audit": "mlo._audit",
    "audit": "mlo._audit",
    "GraphError": "mlo._errors",
    "MachineError": "mlo._errors",
    "MloError": "mlo._errors",
    "NumericalError": "mlo._errors",
    "SpecError": "mlo._errors",
    "StoppedElsewhere": "mlo._errors",
    "UserError": "mlo._errors",
    "Graph": "mlo._graph",
    "Level": "mlo._level",
    "ModuleVariables": "mlo._module",
    "Values": "mlo._objective",
    "Context": "mlo._problem",
    "Evaluate": "mlo._problem",
    "Evaluation": "mlo._problem",
    "Problem": "mlo._problem",
    "Settings": "mlo._problem",
    "Split": "mlo._problem",
    "Table": "mlo._problem",
    "reduction": "mlo._reduction",
    "Run": "mlo._run",
    "open_run": "mlo._run",
    "resume": "mlo._run",
    "run": "mlo._run",
    "Spec": "mlo.spec",
    "load": "mlo.spec",
    "score_function": "mlo._score_function",
    "Batches": "mlo._state",
    "Metrics": "mlo._state",
    "Norms": "mlo._state",
    "Parts": "mlo._state",
    "State": "mlo._state",
}

__all__ = sorted(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mlo' has no attribute '{name}'")
    home = import_module(_HOMES[name])
    return home if home.__name__ == f"mlo.{name}" else getattr(home, name)


def __dir__() -> list[str]:
    return sorted(_HOMES)
