"""The total gradient of a level in the middle of a nest: its objective with the responses below it put in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import torch

from mlo import _tree
from mlo._objective import Record
from mlo._partials import partials
from mlo._response import Response, respond
from mlo._state import Parts
from mlo._step import AbstractNest, Position, Surroundings
from mlo._sweep import sweep

if TYPE_CHECKING:
    from torch import Tensor

    from mlo._level import Level
    from mlo._module import Skeleton
    from mlo._objective import Aftermath
    from mlo._state import Tally
    from mlo._types import Tree, Upstream


@final
@dataclass(frozen=True, eq=False)
class Below:
    """A level that the one in the middle is subject to, as it stood when the iteration began.

    - `depends_on`: the levels its response depends on.
    - `opponents`: the values of those it plays against, as they stood then too.
    - `records`: one for each of its steps.
    - `nest`: of a level that is itself in the middle.
    """

    level: Level
    start: Position
    depends_on: tuple[str, ...]
    opponents: Mapping[str, Position]
    records: tuple[Record, ...]
    nest: AbstractNest | None


@final
@dataclass(frozen=True, eq=False)
class Nest(AbstractNest):
    r"""F(w, u) = f(w, x*(w, u), u) for the responses x* of the levels below, and its gradient by a sweep over them:

        dF/dw = ∂f/∂w + Σ (∂x*/∂w)ᵀ ∂f/∂x

    Every response starts from where its level stood when the iteration began, whatever w is, so that F is a function.
    Where it is recorded, all of it is, and the derivative of dF/dw is exact: through the pullbacks, and through x*. With
    `direct`, x* and what came through it are constants there.

    - `below`: in the order in which they respond.
    """

    level: Level
    skeletons: Mapping[str, Skeleton]
    below: Sequence[Below]

    def partials(
        self,
        values: Mapping[str, Tree],
        buffers: Mapping[str, Mapping[str, Tensor]],
        record: Record,
        towards: tuple[str, ...],
        tally: Tally,
    ) -> tuple[Upstream, Tensor, Aftermath]:
        """See `AbstractNest`."""
        first = record.choices is None
        counted = tally if first else None
        direct = self.level.nested == "direct" and torch.is_grad_enabled()
        with torch.no_grad() if direct else nullcontext():
            seen = {name: _tree.detach(tree) for name, tree in values.items()} if direct else values
            responses, choices = self.respond(seen, buffers, record, towards, tally)
        inner = {**values, **{name: response.end.variables for name, response in responses.items()}}
        around = {**buffers, **{name: response.end.buffers for name, response in responses.items()}}
        asked = (*towards, *responses)
        found, loss, aftermath = partials(self.level, self.skeletons, inner, around, record, asked)
        cotangents = {name: found[name] for name in responses if name in found}
        with torch.no_grad() if direct else nullcontext():
            if direct:
                cotangents = {name: _tree.detach(tree) for name, tree in cotangents.items()}
            through = sweep(self.level.name, responses, cotangents, counted, towards)
        total = {
            name: _tree.total(parts)
            for name in towards
            if (parts := [*([found[name]] if name in found else []), *(t[name] for t in through.values() if name in t)])
        }
        own = self.level.name
        if own in total:
            partial = _tree.detach(found[own]) if own in found else None
            arrived = {name: _tree.detach(trees[own]) for name, trees in through.items() if own in trees}
            aftermath = aftermath._replace(
                parts=(Parts(partial=partial, through=arrived, like=_tree.detach(values[own])),)
            )
        return total, loss, aftermath._replace(choices={**aftermath.choices, **choices})

    def partials_of_step(
        self,
        values: Mapping[str, Tree],
        buffers: Mapping[str, Mapping[str, Tensor]],
        record: Record,
        towards: tuple[str, ...],
        tally: Tally,
        start: Tree,
    ) -> Upstream:
        """See `AbstractNest`. With `direct` the responses are those to `start`, and nothing comes through them."""
        if self.level.nested == "reduced":
            return self.partials(values, buffers, record, towards, tally)[0]
        with torch.no_grad():
            stood = {name: _tree.detach(tree) for name, tree in {**values, self.level.name: start}.items()}
            responses, _ = self.respond(stood, buffers, record, (), tally)
        inner = {**values, **{name: response.end.variables for name, response in responses.items()}}
        around = {**buffers, **{name: response.end.buffers for name, response in responses.items()}}
        return partials(self.level, self.skeletons, inner, around, record, towards)[0]

    def respond(
        self,
        values: Mapping[str, Tree],
        buffers: Mapping[str, Mapping[str, Tensor]],
        record: Record,
        towards: tuple[str, ...],
        tally: Tally,
    ) -> tuple[dict[str, Response], dict[Any, object]]:
        """The responses of all levels below to `values`, and the choices made at their steps, by level and step."""
        inner, around = dict(values), dict(buffers)
        responses: dict[str, Response] = {}
        choices: dict[Any, object] = {}
        listed = {each.level.name for each in self.below}
        for each in self.below:
            name = each.level.name
            live = tuple(read for read in each.depends_on if read in towards or read in listed)
            surroundings = Surroundings(
                self.skeletons,
                {**inner, **{other: at.variables for other, at in each.opponents.items()}},
                {**around, **{other: at.buffers for other, at in each.opponents.items()}, name: each.start.buffers},
                live,
                tally,
                each.nest,
                self.level.name,
            )
            records = [_closed(own, record, (name, step)) for step, own in enumerate(each.records)]
            response = respond(each.level, each.start, surroundings, records, steps=each.level.steps)
            responses[name] = response
            inner[name], around[name] = response.end.variables, response.end.buffers
            choices |= {(name, step): left.choices for step, left in enumerate(response.aftermaths)}
        return responses, choices


def _closed(own: Record, above: Record, key: tuple[str, int]) -> Record:
    """The record of a step below, with the choices it made where the step above is evaluated again."""
    if above.choices is None or key not in above.choices:
        return own
    return own.with_choices(above.choices[key])
