"""Hold a method to every property."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, cast

try:
    import hypothesis
    from hypothesis import errors
    from hypothesis import strategies as st
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("mlo.testing needs hypothesis: pip install 'mlo[testing]'") from error

import torch

from mlo._errors import nearest
from mlo.testing._case import Case, Violation, counted
from mlo.testing._promise import Promise, promise
from mlo.testing._properties import PROPERTIES
from mlo.testing._strategies import problems as any_problems

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

    from mlo.hypergradient import AbstractHypergradient
    from mlo.testing._closed_form import ClosedForm
    from mlo.testing._promise import Answer

OPTIMIZERS = ("sgd", "momentum", "adam", "rmsprop")


def check_method(
    method: AbstractHypergradient,
    *,
    answer: Answer,
    tolerance: float = 1e-8,
    float32_tolerance: float = 1e-3,
    examples: int = 25,
    without: Iterable[str] = (),
    problems: SearchStrategy[ClosedForm] | None = None,
) -> None:
    """Hold `method` to every property of `PROPERTIES`, on random problems with known hypergradients.

    Raises `AssertionError` at the first property that does not hold. The message names the property, what is wrong, the
    smallest problem in words, and what was expected and found. The problems are the same at every call.

    - `answer`: what the method's theory promises, see `Answer`.
    - `tolerance`, `float32_tolerance`: relative errors, where the arithmetic is not the same bit for bit.
    - `examples`: of each property.
    - `without`: properties that the method does not claim.
    - `problems`: by default `mlo.testing.problems()`, two to five levels of condition 10.

    Raises ValueError for an unknown property or answer.
    """
    left_out = set(without)
    for name in left_out:
        if name not in PROPERTIES:
            raise ValueError(
                f"without: no property named '{name}'.{nearest(name, PROPERTIES)} Known: {', '.join(PROPERTIES)}."
            )
    promised = promise(answer)
    drawn = any_problems() if problems is None else problems
    for name, holds in PROPERTIES.items():
        if name not in left_out:
            _check(name, holds, method, promised, (tolerance, float32_tolerance), drawn, examples)


def _check(
    name: str,
    holds: Callable[[Case], None],
    method: AbstractHypergradient,
    promised: Promise,
    tolerances: tuple[float, float],
    problems: SearchStrategy[ClosedForm],
    examples: int,
) -> None:
    """One property. Hypothesis shrinks the problem, and what it found last is what is told."""
    last: list[tuple[Case, Violation]] = []

    @hypothesis.settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),
        suppress_health_check=cast("Any", tuple(hypothesis.HealthCheck)),
        verbosity=hypothesis.Verbosity.quiet,
    )
    @hypothesis.given(problem=problems, steps=st.integers(1, 3), optimizer=st.sampled_from(OPTIMIZERS))
    def run(problem: ClosedForm, steps: int, optimizer: str) -> None:
        case = Case(
            method=method,
            promise=promised,
            tolerance=tolerances[0],
            float32_tolerance=tolerances[1],
            problem=problem,
            steps=steps,
            optimizer=optimizer,
        )
        try:
            holds(case)
        except Violation as violation:
            last.append((case, violation))
            raise
        except Exception as error:
            raised = Violation(f"it raised {type(error).__name__}: {error}")
            last.append((case, raised))
            raise raised from error

    try:
        run()
    except (Violation, errors.Flaky) as error:
        if not last:
            raise
        case, violation = last[-1]
        unsteady = (
            "" if isinstance(error, Violation) else "\n  not every time: the method is not a function of its arguments"
        )
        raise AssertionError(_message(name, case, violation) + unsteady) from violation.__cause__


def _message(name: str, case: Case, violation: Violation) -> str:
    lines = [f"{case.method!r} fails '{name}': {violation.wrong}"]
    rest = f"{case.problem} ({counted(case.steps)} of {case.optimizer}, where the property asks for no other)"
    lines.append(f"smallest problem: {violation.on or rest}")
    if violation.expected is not None:
        pair = violation.expected, violation.found
        expected, found = (_shown(value, 5) for value in pair)
        if expected == found:  # they differ in the last bits
            expected, found = (_shown(value, 17) for value in pair)
        lines += [f"expected: {expected}", f"found:    {found}"]
    return "\n  ".join(lines)


def _shown(value: Any, digits: int) -> str:
    """Numbers with so many digits, whatever holds them."""
    if isinstance(value, torch.Tensor):
        return _shown(value.tolist(), digits)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_shown(part, digits)}" for key, part in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_shown(part, digits) for part in value) + "]"
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)
