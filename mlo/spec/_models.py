"""What a graph file may hold: strict, frozen models. Their docstrings are the reference of the YAML surface."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, final

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, PrivateAttr

from mlo._errors import UserError
from mlo.spec._dump import spec_hash, to_yaml
from mlo.spec._faults import Fault, Line, fail
from mlo.spec._forms import Also, Form
from mlo.spec._frozen import Frozen, freeze
from mlo.spec._levels import CONFIG, Duration, Durations, LevelSpec, listed
from mlo.spec._nodes import KeyPath, Place, Table, locate

if TYPE_CHECKING:
    from mlo._graph import Graph
    from mlo._problem import Problem

_V = TypeVar("_V")
_A_START = "the path of a graph, or {graph: path, with: {…}}"


def _frozen(value: Mapping[str, _V]) -> Frozen[_V]:
    return Frozen(value)


def _start(value: object) -> object:
    return {"graph": value} if isinstance(value, str) else value


class Start(BaseModel):
    """Where a level's initial values come from: the level of the same name in another graph, run first.

    - `graph`: its file; an absolute path once loaded.
    - `overrides`: written `with`: what this graph changes there, by the rules of `extends`.
    """

    model_config = CONFIG

    graph: Annotated[str, Form(_A_START)]
    overrides: Annotated[
        Mapping[str, Any], AfterValidator(freeze), Form("a mapping of changes, such as {iterations: 100}")
    ] = Field(default=Frozen[Any](), alias="with")


class EvaluationSpec(BaseModel):
    """When the model is evaluated, on what, and which checkpoint counts as best.

    - `model`: the levels that are evaluated; None leaves it to the problem.
    - `every`: evaluated every so many iterations, and at the end; None: at the end only.
    - `select`: the metric by which the best checkpoint is kept; None keeps the last.
    - `pictures_at`: iterations after which pictures are made, besides those at the end; they change no number.
    """

    model_config = CONFIG

    model: Annotated[
        tuple[str, ...] | None, BeforeValidator(listed), Also(str), Form("a level or a list of levels")
    ] = None
    every: Annotated[Duration | None, Form("a whole number of at least 1, or {epochs: n}", whole=True)] = None
    select: Annotated[str | None, Field(min_length=1), Form("the name of a metric, such as validation.accuracy")] = None
    pictures_at: Durations = ()


class CheckpointSpec(BaseModel):
    """How often a run saves what it needs to resume.

    - `every`: every so many iterations, and at the end; default, ten times a run.
    """

    model_config = CONFIG

    every: Duration


@final
@dataclass(frozen=True)
class Origin:
    """Where a spec comes from; two specs are equal wherever they were written, if they start from equal graphs."""

    starts: Mapping[str, Spec] = field(default_factory=Frozen[Any])
    imports: tuple[str, ...] = field(default=(), compare=False)
    tree: Table = field(default=Table(Place("<python>"), {}), compare=False)
    reload: Callable[[tuple[str, ...]], Spec] | None = field(default=None, compare=False)


@final
class Spec(BaseModel):
    """A graph file, resolved: what it extends and the overrides are merged in, and every name it uses is known.

    - `extends`: another graph, merged below this one key by key. A choice that names another name replaces the old one,
      the same name merges options; lists replace; `null` removes.
    - `name`: default, the file's name without its ending.
    - `problem`: a module of `problems`, an entry point of `mlo.problems`, or one that was imported.
    - `data`: settings of the problem, which validates them.
    - `seed`: of every stream, start value and split.
    - `iterations`: how long it runs.
    - `inherits`: settings under `data` that this graph takes over from one of another problem that starts from it. From a
      graph of the same problem it takes all.
    - `start`: where levels take their initial values from: the level of the same name in another graph, run first.
    - `levels`: the levels by name; the order in which they are listed changes nothing.
    - `evaluation`: when and on what the model is judged.
    - `checkpoint`: how often a run saves what it needs to resume.
    - `device`: where numbers are kept: `cpu`, `cuda`, `cuda:1`, `mps`.
    - `dtype`: their floating-point format. With `bfloat16` they are kept in float32, and objectives are evaluated under
      autocast.
    - `threads`: CPU threads of one operation; default, torch's own choice. Small networks are often fastest with one, and
      one makes the numbers independent of how many cores a machine has.
    - `compile`: whole iterations by `torch.compile`: the same numbers up to rounding, after a minute or more at the start.
      What cannot be compiled is refused before the first step.
    """

    model_config = CONFIG

    name: Annotated[str, Field(min_length=1), Form("a name")]
    problem: Annotated[str, Field(min_length=1), Form("the name of a problem")]
    seed: Annotated[int, Field(ge=0), Form("a whole number of at least 0")] = 0
    iterations: Duration
    data: Annotated[Mapping[str, Any], AfterValidator(freeze), Form("a mapping of settings")] = Frozen[Any]()
    inherits: Annotated[
        tuple[str, ...], BeforeValidator(listed), Also(str), Form("a setting or a list of settings")
    ] = ()
    start: Annotated[
        Mapping[str, Annotated[Start, BeforeValidator(_start), Also(str), Form(_A_START)]],
        AfterValidator(_frozen),
        Form("a mapping from level names to paths of graphs"),
    ] = Frozen[Start]()
    levels: Annotated[Mapping[str, LevelSpec], AfterValidator(_frozen), Form("a mapping from level names to levels")]
    evaluation: Annotated[EvaluationSpec | None, Form("a mapping, such as {every: 100}")] = None
    checkpoint: Annotated[CheckpointSpec | None, Form("a mapping, such as {every: 100}")] = None
    device: Annotated[
        str, Field(pattern=r"^(cpu|mps|cuda)(:[0-9]+)?$"), Form("a device, such as cpu, cuda or cuda:1")
    ] = "cpu"
    dtype: Annotated[Literal["float32", "float64", "bfloat16"], Form("float32, float64 or bfloat16")] = "float32"
    threads: Annotated[int | None, Field(ge=1), Form("a whole number of at least 1")] = None
    compile: Annotated[bool, Form("true or false")] = False

    _origin: Origin = PrivateAttr(default_factory=Origin)

    @classmethod
    def of(cls, data: Mapping[str, Any], origin: Origin) -> Spec:
        """Validate plain values; raises pydantic's error. `load` is the way in for everybody else."""
        spec = cls.model_validate(data)
        spec._origin = origin
        return spec

    @property
    def starts(self) -> Mapping[str, Spec]:
        """By level, the graph that its initial values come from. Levels that start from the same graph share it."""
        return self._origin.starts

    @property
    def imports(self) -> tuple[str, ...]:
        """The modules a problem could come from besides the known ones."""
        return self._origin.imports

    @property
    def hash(self) -> str:
        """SHA-256 of what decides the numbers: equal specs, and only those that compute the same, have equal ones.

        `name`, `checkpoint`, `evaluation.pictures_at` and the paths of files do not count; a start counts as the hash of its
        own spec.
        """
        return spec_hash(self)

    def to_yaml(self) -> str:
        """The resolved spec as a file: nothing is extended, paths are absolute. `load` gives an equal spec back."""
        return to_yaml(self)

    def build(self) -> tuple[Graph, Problem]:
        """The graph and its problem; imports torch. Raises `SpecError` for what only the problem can know is wrong."""
        from mlo.spec._build import assemble

        assembly = assemble(self)
        return assembly.graph, assembly.problem

    def replaced(self, *overrides: str) -> Spec:
        """The spec with `key=value` overrides, checked like a file. Raises `SpecError`."""
        if self._origin.reload is None:
            raise UserError("only a spec that `mlo.load` read from a graph can be changed by overrides")
        return self._origin.reload(overrides)

    def place(self, path: KeyPath, *, key: bool = False) -> Place:
        """Where the value at `path` was written (its key with `key`), or the closest thing around it that was."""
        return locate(self._origin.tree, path, key=key)

    def mistake(self, path: KeyPath, message: str, *, key: bool = False) -> str:
        """`file:line:column: dotted.path: message`."""
        return str(Line(self.place(path, key=key), message, path))

    def fail(self, mistakes: Iterable[Fault | tuple[KeyPath, str]]) -> None:
        """Raise one `SpecError` with all of `mistakes`; do nothing if there are none."""
        faults = [each if isinstance(each, Fault) else Fault(*each) for each in mistakes]
        if faults:
            fail(Line(self.place(each.path, key=each.on_key), each.message, each.path) for each in faults)
