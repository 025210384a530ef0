"""The players of a game, seen as one level: their gradients side by side, linearised where all of them ended."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, final

from mlo import _tree
from mlo._linearisation import Linearisation, dense_solution
from mlo._step import Position, joined
from mlo.hypergradient import AbstractLinearisation, AbstractResponse, AbstractStep

if TYPE_CHECKING:
    from torch import Tensor

    from mlo._response import Response
    from mlo._types import Tree, Upstream


@final
class JointResponse(AbstractResponse):
    """The responses of all players; trees of theirs are joined by the name of the player and of the tensor."""

    def __init__(self, players: Mapping[str, Response]) -> None:
        self._players = players

    @property
    def steps(self) -> int:
        """See `AbstractResponse`: of the player with the fewest."""
        return min(response.steps for response in self._players.values())

    @property
    def size(self) -> int:
        """See `AbstractResponse`."""
        return sum(response.size for response in self._players.values())

    @property
    def recorded(self) -> int:
        """None, of several levels."""
        return 0

    def pull_recorded(self, cotangent: Tree) -> Upstream:
        """Not of several levels."""
        raise TypeError("the steps of several players are not recorded together")

    def contract(self, cotangent: Tree) -> Upstream:
        """Not of several levels."""
        raise TypeError("no tangents of several players are carried along")

    def directions(self, count: int | None) -> Sequence[Upstream]:
        """Not of several levels."""
        raise TypeError("the steps of several players are not taken again together")

    def retaken(self, direction: Upstream, *, scale: float) -> Tree:
        """Not of several levels."""
        raise TypeError("the steps of several players are not taken again together")

    def taken(self) -> Sequence[AbstractStep]:
        """None: the steps of several players are not steps of one."""
        return ()

    def linearise(self, *, chunks: int = 1) -> JointLinearisation:
        """See `AbstractResponse`. In one piece."""
        assert chunks == 1, "Equilibrium refuses chunks"
        return JointLinearisation(self._players)


@final
class JointLinearisation(AbstractLinearisation):
    """See `AbstractLinearisation`, for J = ∂g/∂w of all players. One product of each is counted for one of these."""

    def __init__(self, players: Mapping[str, Response]) -> None:
        self._names = tuple(players)
        self._ends: dict[str, Tree] = {name: response.end.variables for name, response in players.items()}
        self._variables = joined(self._ends)
        self._players: dict[str, Linearisation] = {}
        for name, response in players.items():
            record, buffers = response.rest
            others = {other: end for other, end in self._ends.items() if other in response.level.against}
            live = (*response.around.live, *others)
            around = response.around._replace(values={**response.around.values, **others}, live=live)
            at = Position(response.end.variables, buffers, response.end.optimizer)
            self._players[name] = Linearisation(response.level, around, at, record)

    @property
    def variables(self) -> Tree:
        """See `AbstractLinearisation`."""
        return self._variables

    def hessian(self, direction: Tree) -> Tree:
        """Jᵀv."""
        found = self._pulled(direction)
        return joined({name: found.get(name, _tree.zeros(end)) for name, end in self._ends.items()})

    def cross(self, direction: Tree) -> Upstream:
        """See `AbstractLinearisation`."""
        return {name: tree for name, tree in self._pulled(direction).items() if name not in self._ends}

    def gradient_of_reads(self, variables: Tree) -> Upstream:
        """See `AbstractLinearisation`: the sum over the players, each moved by itself."""
        moved = self.separated(variables)
        each = (self._players[name].gradient_of_reads(tree) for name, tree in moved.items())
        return {name: tree for name, tree in _added(each).items() if name not in self._ends}

    def inverse(self, solve: Callable[[AbstractLinearisation, Tree], Tree], cotangent: Tree) -> Tree:
        """See `AbstractLinearisation`."""
        return solve(self, cotangent)

    def dense_solve(self, cotangent: Tree, *, damping: float) -> Tree:
        """See `AbstractLinearisation`."""
        return dense_solution(self.hessian, cotangent, damping=damping)

    def nystrom_solve(self, cotangent: Tree, *, rank: int, damping: float) -> Tree:
        """Not of a matrix that is not symmetric."""
        raise TypeError("the Jacobian of a game has no Nyström approximation")

    def pull_update(self, cotangent: Tree) -> Tree:
        """See `AbstractLinearisation`: of every player by itself."""
        return joined({name: self._players[name].pull_update(own) for name, own in self.separated(cotangent).items()})

    def normal(self, index: int) -> Tree:
        """See `AbstractLinearisation`."""
        return joined({name: player.normal(index) for name, player in self._players.items()})

    def recall(self, name: str) -> Tree | None:
        """Nothing: what is remembered belongs to a level."""
        return None

    def remember(self, name: str, tree: Tree) -> None:
        """Nothing."""

    def is_false(self, flag: Tensor) -> bool:
        """See `AbstractLinearisation`."""
        return self._players[self._names[0]].is_false(flag)

    def known(self, value: Tensor) -> float | None:
        """See `AbstractLinearisation`."""
        return self._players[self._names[0]].known(value)

    def report(self, name: str, value: Tensor) -> None:
        """See `AbstractLinearisation`: the same for every player."""
        for player in self._players.values():
            player.report(name, value)

    def separated(self, tree: Tree) -> dict[str, Tree]:
        """A tree of all players as theirs, by name."""
        assert isinstance(tree, Mapping)
        found: dict[str, Tree] = {}
        for name, end in self._ends.items():
            found[name] = _tree.rebuild(end, [tree[f"{name}/{key}"] for key in _tree.named(end)])
        return found

    def _pulled(self, direction: Tree) -> Upstream:
        return _added(self._players[name].pulled(tree) for name, tree in self.separated(direction).items())


def _added(trees: Iterable[Upstream]) -> dict[str, Tree]:
    """The sum of several upstreams, by name."""
    total: dict[str, Tree] = {}
    for each in trees:
        for name, tree in each.items():
            total[name] = _tree.add(total[name], tree) if name in total else tree
    return total
