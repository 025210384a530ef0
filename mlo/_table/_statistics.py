"""Means over seeds and paired differences: the same seed means the same data and the same draws."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final


@final
@dataclass(frozen=True)
class Spread:
    """A mean over `n` seeds and the standard deviation around it, None for a single one."""

    n: int
    mean: float
    deviation: float | None


@final
@dataclass(frozen=True)
class Paired:
    """The mean of `n` differences, its standard error and t; None where they are not defined.

    `t` is infinite where all differences are the same and not 0.
    """

    n: int
    mean: float
    error: float | None
    t: float | None


def spread(values: Mapping[int, float]) -> Spread | None:
    """x̄ = Σ x_s / n and s = √(Σ (x_s − x̄)² / (n − 1)) over seeds; None where there are none.

    - `values`: by seed, finite.
    """
    if not values:
        return None
    sample = list(values.values())
    return Spread(len(sample), float(statistics.mean(sample)), statistics.stdev(sample) if len(sample) > 1 else None)


def paired(values: Mapping[int, float], control: Mapping[int, float]) -> Paired | None:
    """The differences d_s = x_s − c_s over the seeds that both have; None where there are none.

    d̄ = Σ d_s / n, its standard error e = √(Σ (d_s − d̄)² / (n (n − 1))), and t = d̄ / e with n − 1 degrees of freedom. A split
    that is hard for one method is hard for the other: e leaves that out, as two separate deviations would not.
    """
    differences = {seed: values[seed] - control[seed] for seed in values if seed in control}
    found = spread(differences)
    if found is None:
        return None
    if found.deviation is None:
        return Paired(found.n, found.mean, None, None)
    error = found.deviation / math.sqrt(found.n)
    if error == 0:
        return Paired(found.n, found.mean, error, math.copysign(math.inf, found.mean) if found.mean else None)
    return Paired(found.n, found.mean, error, found.mean / error)
