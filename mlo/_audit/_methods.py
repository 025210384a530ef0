"""The methods an audit tries, and how a method is written."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, cast, final

from mlo import hypergradient
from mlo.hypergradient import AbstractHypergradient
from mlo.spec._names import is_built, snake

if TYPE_CHECKING:
    from mlo._audit._report import Spectrum

LONG = 1_000
"""Terms of the longest series, for levels that are small enough to be written out."""


@final
@dataclass(frozen=True, kw_only=True)
class Circumstances:
    """What a choice of settings depends on: the level's size and spectrum, and up to which size a matrix is written out."""

    size: int
    dense: int
    spectrum: Spectrum | None

    @property
    def step_size(self) -> float:
        """1/max |λ|."""
        if self.spectrum is None:
            raise Unfit("λ_max is not known")
        largest = max(abs(self.spectrum.lambda_max), abs(self.spectrum.lambda_min))
        if not largest > 0:
            raise Unfit("the Hessian is zero")
        return rounded(1 / largest)

    @property
    def damping(self) -> float:
        """δ for which H + δI ≻ 0, with a tenth to spare; raises where H is not indefinite."""
        if self.spectrum is None or self.spectrum.sign >= 0:
            raise Unfit("")
        return damping_of(self.spectrum)


class Unfit(Exception):
    """Why a method is not tried; without a reason it goes without saying."""


Maker: TypeAlias = "Callable[[Callable[..., AbstractHypergradient], Circumstances], AbstractHypergradient]"


def _with(**options: Any) -> Maker:
    return lambda make, _: make(**options)


def _small(make: Callable[..., AbstractHypergradient], at: Circumstances) -> AbstractHypergradient:
    if at.size > at.dense:
        raise Unfit(f"{at.size:,} numbers are more than {at.dense:,}")
    return make()


def _series(terms: int, *, small: bool = False) -> Maker:
    def made(make: Callable[..., AbstractHypergradient], at: Circumstances) -> AbstractHypergradient:
        if small and at.size > at.dense:
            raise Unfit("")
        return make(terms=terms, step_size=at.step_size)

    return made


def _auto(make: Callable[..., AbstractHypergradient], at: Circumstances) -> AbstractHypergradient:
    if "power_iterations" not in {field.name for field in dataclasses.fields(cast("Any", make))}:
        raise Unfit("")
    return make(terms=20, step_size="auto")


def _damped_series(make: Callable[..., AbstractHypergradient], at: Circumstances) -> AbstractHypergradient:
    damping = at.damping
    assert at.spectrum is not None
    return make(terms=20, step_size=rounded(1 / (at.spectrum.lambda_max + damping)), damping=damping)


TRIED: Sequence[tuple[str, str, Maker]] = (
    ("first_order", "FirstOrder", _with()),
    ("finite_difference", "FiniteDifference", _with()),
    ("neumann", "Neumann", _series(5)),
    ("neumann", "Neumann", _series(20)),
    ("neumann", "Neumann", _series(100)),
    ("neumann", "Neumann", _series(LONG, small=True)),
    ("neumann", "Neumann", _auto),
    ("neumann", "Neumann", _damped_series),
    ("conjugate_gradient", "ConjugateGradient", _with(iterations=10)),
    ("conjugate_gradient", "ConjugateGradient", _with(iterations=100)),
    ("conjugate_gradient", "ConjugateGradient", lambda make, at: make(iterations=100, damping=at.damping)),
    ("gmres", "GMRES", _with(iterations=50)),
    ("nystrom", "Nystrom", lambda make, at: make(rank=min(20, at.size), damping=rounded(0.01 / at.step_size))),
    ("preconditioned", "Preconditioned", _with()),
    ("unroll", "Unroll", _with(last=1)),
    ("unroll", "Unroll", _with()),
    ("exact", "Exact", _small),
)
"""What is tried at every level: the name in YAML, the class, which need not be there, and its settings."""


def tried(at: Circumstances) -> Iterator[tuple[str, AbstractHypergradient | str]]:
    """Each method as it is written, and the method or the reason why it is not tried."""
    for name, kind, maker in TRIED:
        make: Any = getattr(hypergradient, kind, None)
        if make is None:
            continue
        try:
            method = maker(make, at)
        except Unfit as reason:
            if str(reason):
                yield name, str(reason)
        except (TypeError, ValueError) as error:  # other settings than are known here
            yield name, str(error)
        else:
            yield written(method), method


def written(value: Any) -> str:
    """A method as YAML writes it, options that have their default left out: `neumann {terms: 5, step_size: 0.001}`."""
    options = _options(value)
    return f"{snake(type(value).__name__)} {{{options}}}" if options else snake(type(value).__name__)


def _options(value: Any) -> str:
    if not dataclasses.is_dataclass(value):
        return ""
    pairs: list[str] = []
    for field in dataclasses.fields(value):
        option = getattr(value, field.name)
        default = field.default_factory() if callable(field.default_factory) else field.default
        if field.init and option != default:
            pairs.append(f"{field.name}: {_option(option)}")
    return ", ".join(pairs)


def _option(option: Any) -> str:
    match option:
        case bool():
            return str(option).lower()
        case float():
            return f"{option:g}" if float(f"{option:g}") == option else repr(option)
        case Mapping():
            pairs = cast("Mapping[Any, Any]", option)
            return "{" + ", ".join(f"{key}: {_option(each)}" for key, each in pairs.items()) + "}"
        case None:
            return "null"
        case _ if is_built(type(option)):
            inner = _options(option)
            name = snake(type(option).__name__)
            return f"{{{name}: {{{inner}}}}}" if inner else name
        case _:
            return str(option)


def rounded(number: float, digits: int = 3, *, up: bool = False) -> float:
    """To so many digits, or to the next such number above: settings that can be read and copied."""
    near = float(f"{number:.{digits - 1}e}")
    if not up or near >= number:
        return near
    step = 10.0 ** (int(f"{number:.{digits - 1}e}".partition("e")[2]) - digits + 1)
    return float(f"{near + step:.{digits - 1}e}")


def damping_of(spectrum: Spectrum) -> float:
    """δ for which H + δI ≻ 0, with a tenth to spare, in two digits."""
    return rounded(1.1 * (spectrum.lambda_min_error - spectrum.lambda_min), 2, up=True)
