"""The problem that a specification names, built from its `data`."""

from __future__ import annotations

import importlib
import inspect
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch

from mlo._errors import SpecError, UserError
from mlo._problem import Context, Problem, Settings
from mlo.spec._faults import Fault, first_name, kind_of
from mlo.spec._options import construct
from mlo.spec._problems import problem_module
from mlo.stream import AbstractStream

if TYPE_CHECKING:
    from mlo.spec._models import Spec


def context_of(spec: Spec) -> Context:
    """What the problem is built for."""
    dtype: torch.dtype = torch.float32 if spec.dtype == "bfloat16" else getattr(torch, spec.dtype)
    return Context(seed=spec.seed, device=torch.device(spec.device), dtype=dtype)


def problem_of(spec: Spec, context: Context) -> Problem:
    """The problem that `spec` names, built from its `data`. Raises `SpecError` for what it refuses."""
    build = builder_of(spec)
    settings, faults = construct(settings_of(build), spec.data)
    spec.fail(fault.below(("data",)) for fault in faults)
    where = f"{build.__module__}.build"
    try:
        inspect.signature(build).bind(settings, context)
    except TypeError as error:
        spec.fail([Fault(("problem",), f"{where}: must be called build(settings, context): {error}.")])
    try:
        problem = build(settings, context)
    except SpecError:  # has its places
        raise
    except (ValueError, UserError) as error:  # what a problem says of its own settings
        key = first_name(error)
        spec.fail([Fault(("data", key) if key in spec.data else ("data",), str(error))])
        raise
    spec.fail(Fault(("problem",), f"{where}: {mistake}.") for mistake in _mistakes(problem))
    return problem


def device_faults(device: torch.device) -> Iterator[Fault]:
    """Whether the device is one of this machine."""
    cuda = [f"cuda:{number}" for number in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    metal = ["mps"] if torch.backends.mps.is_available() else []
    there = {"cpu": True, "mps": bool(metal), "cuda": (device.index or 0) < len(cuda)}
    if not there[device.type]:
        available = ", ".join(["cpu", *cuda, *metal])
        yield Fault(("device",), f"there is no {device} on this machine. Available: {available}.")


def _mistakes(problem: Any) -> Iterator[str]:
    """What a problem's `build` has got wrong before any of it is used."""
    if not isinstance(problem, Problem):
        yield f"must return an mlo.Problem, got {kind_of(problem)}"
        return
    giving = {
        "variables": "giving a module, tensors by name, or a tensor",
        "objectives": "of (values, batch) giving a loss",
        "streams": "",
    }
    for key, gives in giving.items():
        table: Any = getattr(problem, key)
        if not isinstance(table, Mapping):
            yield f"{key} must be a mapping from names, got {kind_of(table)}"
            continue
        for name, each in cast("Mapping[Any, Any]", table).items():
            if key != "streams" and not callable(each):
                gives = "giving a tensor" if isinstance(each, torch.Tensor) else gives
                yield f"{key}['{name}'] must be a function {gives}, got {kind_of(each)}"
            elif key == "streams" and not isinstance(each, AbstractStream | Iterable):
                yield f"streams['{name}'] must be a stream, or something to iterate over, got {kind_of(each)}"
    if problem.evaluate is not None and not callable(problem.evaluate):
        yield f"evaluate must be a function giving an mlo.Evaluation, got {kind_of(problem.evaluate)}"


def settings_of(build: Callable[[Any, Context], Problem]) -> Any:
    """What a problem's `data` becomes: the annotation of `settings`."""
    return typing.get_type_hints(build).get("settings", Settings)


def builder_of(spec: Spec) -> Callable[[Any, Context], Problem]:
    """The function `build` of the problem that `spec` names; imports its module."""
    module = problem_module(spec.problem, spec.imports)
    try:
        build = getattr(importlib.import_module(module), "build", None)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # a module that the problem needs
        spec.fail([Fault(("problem",), f"there is no module '{module}' to import it from.")])
        raise
    if build is None:
        spec.fail([Fault(("problem",), f"module '{module}' has no function `build(settings, context)`.")])
    assert build is not None
    return build
