"""What the folder of a cell holds: a finished run, one that failed, or nothing that counts yet."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, cast, final

import yaml

from mlo._errors import MloError, NumericalError, UserError, explained
from mlo._run._files import write_json
from mlo._run._log import METRICS
from mlo._table._plan import Cell, Plan

FAILED = "failed.json"
NUMBERS = 3
"""The exit code of numbers that went wrong, which they would again."""
_NOT_COMPARED = ("name", "checkpoint", "start")
_SUMMARY = ("selected", "metrics", "counts", "versions", "git_commit", "spec_hash", "seconds")
"""What a table takes from the summary of a run."""
CLOCK = "seconds_per_iteration"
"""Of the summary: the median over iterations, without evaluations and pretraining; a run of an older version has none."""
_SHOWN = 5
"""Differences that are named; the rest is counted."""


@final
@dataclass(frozen=True)
class Finished:
    """A run that ended well."""

    folder: Path
    summary: Mapping[str, Any]

    @property
    def numbers(self) -> Mapping[str, Any]:
        """By name, all that may be compared: the metrics, and a clock."""
        clock = {CLOCK: self.summary[CLOCK]} if CLOCK in self.summary else {}
        return {**self.summary["metrics"], **clock}

    @cached_property
    def seconds(self) -> float:
        """From the end of its first iteration to that of its last: neither pretraining nor building is in it."""
        try:
            lines = (self.folder / METRICS).read_bytes().splitlines()
            return json.loads(lines[-1])["seconds"] - json.loads(lines[0])["seconds"]
        except (OSError, ValueError, IndexError, KeyError):
            return float(self.summary["seconds"])


@final
@dataclass(frozen=True, kw_only=True)
class Failure:
    """A run that failed by itself: the exit code it would have had, why, and for numbers where.

    - `details`: what else was said, of its files.
    """

    code: int
    reason: str
    level: str | None = None
    step: int | None = None
    term: str | None = None
    iteration: int | None = None
    details: Sequence[str] = ()

    @classmethod
    def of(cls, error: Exception) -> Failure:
        """What `run` raised."""
        known = error if isinstance(error, MloError) else explained(error)
        details = tuple(getattr(known or error, "__notes__", ()))
        if known is None:
            return cls(code=1, reason=f"{type(error).__name__}: {error}", details=details)
        if isinstance(known, NumericalError):
            return cls(
                code=known.exit_code,
                reason=str(known),
                level=known.level,
                step=known.step,
                term=known.term,
                iteration=known.iteration,
                details=details,
            )
        return cls(code=known.exit_code, reason=str(known), details=details)


def standing(cell: Cell) -> Finished | Failure | None:
    """What has become of `cell` so far. Raises `UserError` if its folder holds another specification."""
    identity = _identity(cell)
    if identity is not None and identity != cell.identity:
        lines = "\n  ".join(_differences(cell))
        raise UserError(
            f"{cell.folder}: holds another run than is asked for:\n  {lines}\n"
            "  Choose another folder with --out, or remove this one."
        )
    summary = _json(cell.folder / "summary.json", _SUMMARY)
    if summary is not None:
        return Finished(cell.folder, summary)
    failed = _json(cell.folder / FAILED, ("code", "reason"))
    if failed is not None:
        known = {each.name for each in fields(Failure)}
        given: dict[str, Any] = {key: each for key, each in failed.items() if key in known}
        return Failure(**given)
    return None


def keep_failure(cell: Cell, failure: Failure) -> None:
    """Remember in its folder why `cell` failed."""
    cell.folder.mkdir(parents=True, exist_ok=True)
    write_json(cell.folder / FAILED, {"spec_hash": cell.identity, **asdict(failure)})


def refuse_others(plan: Plan) -> None:
    """Raise one `UserError` if folders hold other specifications, with the differences of each graph's first one."""
    wrong: dict[str, list[str]] = {}
    for cell in plan.cells:
        try:
            standing(cell)
        except UserError as error:
            wrong.setdefault(cell.graph, []).append(str(error))
    if wrong:
        more = sum(map(len, wrong.values())) - len(wrong)
        rest = [f"{more} more {'folder holds' if more == 1 else 'folders hold'} other runs."] if more else []
        raise UserError("\n".join([*(errors[0] for errors in wrong.values()), *rest]))


def _identity(cell: Cell) -> str | None:
    """The hash of the specification that the folder was made for; None where nothing says it."""
    for name in ("summary.json", "run.json", FAILED):
        found = _json(cell.folder / name)
        if found is not None:
            return found.get("spec_hash")
    return None


def _differences(cell: Cell) -> Iterator[str]:
    """`levels.weights.steps: 20 there, 30 here`."""
    try:
        there = dict(_flat(yaml.safe_load((cell.folder / "spec.yaml").read_text(encoding="utf-8"))))
    except (OSError, yaml.YAMLError):
        yield "what it is cannot be read: spec.yaml is missing or damaged"
        return
    here = dict(_flat(yaml.safe_load(cell.spec.to_yaml())))
    keys = [key for key in {**there, **here} if key.split(".")[0] not in _NOT_COMPARED]
    lines = [
        f"{key}: {there.get(key, 'nothing')} there, {here.get(key, 'nothing')} here"
        for key in keys
        if there.get(key) != here.get(key)
    ]
    yield from lines[:_SHOWN]
    if len(lines) > _SHOWN:
        yield f"and {len(lines) - _SHOWN} more"
    if not lines:
        yield "what it starts from is another graph, or has changed since"


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        table: dict[Any, Any] = value
        for key, each in table.items():
            yield from _flat(each, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def _json(path: Path, keys: Sequence[str] = ()) -> dict[str, Any] | None:
    try:
        found: Any = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{path}: damaged: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: damaged: expected a mapping")
    table = cast("dict[str, Any]", found)
    for key in keys:
        if key not in table:
            raise UserError(f"{path}: damaged: '{key}' is missing")
    return table
