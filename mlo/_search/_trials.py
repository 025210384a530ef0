"""Which trials there are, which optuna decides.

The study lives in memory and is told again, with the same seed, what the folder of the search holds: the same folder gives
the same trials, however often the search was broken off.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import optuna

from mlo._search._asked import Asked, Sampler
from mlo._search._space import Choices, Dimension, Point

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler

_SEED = 0
_REPEATED = 20
"""Proposals for each trial, after which a sampler that proposes what is known has no more to say."""


def drawn(asked: Asked) -> tuple[Point, ...]:
    """The trials of a sampler that does not look at what came of others: a grid in its order, or random ones in theirs."""
    points = proposed(asked, lambda _: None)
    if asked.sampler is not Sampler.GRID:
        return points
    return tuple(sorted(points, key=lambda point: tuple(map(_position, asked.space, point))))


def proposed(asked: Asked, value: Callable[[Point], float | None]) -> tuple[Point, ...]:
    """The different points that the sampler proposes, in its order; fewer than were asked for if it repeats itself.

    - `value`: what came of a point; None if it failed, or nothing depends on it.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    direction = "maximize" if asked.maximise else "minimize"
    study = optuna.create_study(sampler=_sampler(asked), direction=direction)
    found: dict[Point, float | None] = {}
    for _ in range(_REPEATED * asked.trials):
        trial = study.ask()
        point = tuple(f"{each.key}={_suggested(trial, each)}" for each in asked.space)
        if point not in found:
            found[point] = value(point)
        if asked.sampler is Sampler.TPE:
            known = found[point]
            study.tell(trial, known, state=optuna.trial.TrialState.FAIL if known is None else None)
        if len(found) == asked.trials:
            break
    return tuple(found)


def _sampler(asked: Asked) -> BaseSampler:
    match asked.sampler:
        case Sampler.GRID:
            positions = {each.key: list(range(len(each.texts))) for each in asked.space if isinstance(each, Choices)}
            return optuna.samplers.GridSampler(positions, seed=_SEED)
        case Sampler.RANDOM:
            return optuna.samplers.RandomSampler(seed=_SEED)
        case Sampler.TPE:
            return optuna.samplers.TPESampler(seed=_SEED)


def _suggested(trial: optuna.Trial, dimension: Dimension) -> str:
    """A value as it is written. Of a list its position is drawn: values may be of any kind, and numbers stay exact."""
    if not isinstance(dimension, Choices):
        return dimension.text(trial.suggest_float(dimension.key, dimension.low, dimension.high, log=True))
    last = len(dimension.texts) - 1
    if dimension.ordered:
        return dimension.texts[trial.suggest_int(dimension.key, 0, last)]
    return dimension.texts[trial.suggest_categorical(dimension.key, list(range(last + 1)))]


def _position(dimension: Dimension, change: str) -> int:
    assert isinstance(dimension, Choices), "a continuous range has no grid"
    return dimension.texts.index(change.removeprefix(f"{dimension.key}="))
