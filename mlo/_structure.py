"""What levels declare about each other, judged before anything runs: run order, due times, what is held fixed.

Everything here works on names and whole numbers, without torch, so that a wrong graph is answered in under a second. It
serves `mlo.Level` and the levels of a specification alike: both are `Declared`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from math import gcd
from typing import TYPE_CHECKING, Protocol

from mlo._errors import Mistake, nearest

if TYPE_CHECKING:
    import networkx as nx


class Declared(Protocol):
    """The arrows and the timing of a level."""

    @property
    def name(self) -> str: ...
    @property
    def given(self) -> tuple[str, ...]: ...
    @property
    def subject_to(self) -> tuple[str, ...]: ...
    @property
    def against(self) -> tuple[str, ...]: ...
    @property
    def frozen(self) -> bool: ...
    @property
    def steps(self) -> int: ...
    @property
    def every(self) -> int: ...
    @property
    def warm_up(self) -> int: ...
    @property
    def lookahead(self) -> bool: ...
    @property
    def nested(self) -> str: ...
    @property
    def is_joint(self) -> bool: ...


ARROWS = ("given", "subject_to", "against")


def reads(level: Declared) -> tuple[str, ...]:
    """All levels that the objective of `level` may read, itself first."""
    return (level.name, *level.given, *level.subject_to, *level.against)


def is_due(level: Declared, iteration: int) -> bool:
    """Whether `level` moves at `iteration` (counted from 1): after its warm-up, at every multiple of `every`."""
    elapsed = iteration - level.warm_up
    return not level.frozen and elapsed > 0 and elapsed % level.every == 0


def times_due(level: Declared, iterations: int) -> int:
    """How many of the first `iterations` find `level` due."""
    return 0 if level.frozen else max(0, iterations - level.warm_up) // level.every


def network(levels: Iterable[Declared]) -> nx.DiGraph[str]:
    """The graph of reads: an edge from the level that is read to its reader, with the arrow's `kind`."""
    import networkx as nx

    graph: nx.DiGraph[str] = nx.DiGraph()
    for level in levels:
        graph.add_node(level.name, frozen=level.frozen)
        for kind in ARROWS:
            graph.add_edges_from(((name, level.name) for name in getattr(level, kind)), kind=kind)
    return graph


def run_order(levels: Iterable[Declared]) -> tuple[str, ...]:
    """Level names in the order they run; ties are broken by name, so the order of declaration changes nothing.

    A level runs after every level it is subject to, with what these rest on, and after every level it is given that does
    not itself rest on it. An upper level thus moves last, listed or not: a level that reads it sees where it stood. Below a
    nested level, responses are taken anew once it stands, so others that read them run after it.
    Raises `networkx.NetworkXUnfeasible` on a cycle, which `mistakes` reports with its path.
    """
    import networkx as nx

    return tuple(nx.lexicographical_topological_sort(_precedence(levels)))


def mistakes(levels: Sequence[Declared], *, running: bool = True) -> list[Mistake]:
    """Everything that keeps `levels` from being a graph; with `running`, also what only forbids taking steps."""
    known = {level.name: level for level in levels}
    found = [Mistake(name, "name", "declared twice") for name in sorted(_repeated(level.name for level in levels))]
    for level in levels:
        found += _arrow_mistakes(level, known)
        found += _time_mistakes(level, running=running)
    if found:
        return found  # the checks below follow arrows and need them to lead somewhere
    found += _shared_mistakes(known) or _cycle_mistakes(levels)
    found += [] if found else _mutual_mistakes(known)
    for level in levels:
        found += _response_mistakes(level, known)
        found += _due_mistakes(level, known)
    return found + _lookahead_mistakes(levels)


def differentiated(upper: Declared, known: Mapping[str, Declared]) -> tuple[str, ...]:
    """The levels whose responses `upper` differentiates through: those it is subject to, frozen ones left out."""
    return tuple(name for name in upper.subject_to if not known[name].frozen)


def nested(known: Mapping[str, Declared]) -> frozenset[str]:
    """The levels in the middle: subject to others, and differentiated through by others."""
    below = {lower for level in known.values() for lower in differentiated(level, known)}
    return frozenset(name for name in below if differentiated(known[name], known))


def depends_on(level: Declared, known: Mapping[str, Declared], above: frozenset[str] = frozenset()) -> tuple[str, ...]:
    """What the response of `level` depends on besides itself: what it is given, and what the responses below it depend on.

    A level in the middle of a nest depends on what the levels below it are given, listed by itself or not, unless it is
    differentiated with these held fixed.
    """
    below = differentiated(level, known) if level.nested == "reduced" else ()
    found = dict.fromkeys(level.given)
    for name in below:
        if name not in above:  # a cycle is a mistake of its own
            found |= dict.fromkeys(depends_on(known[name], known, above | {level.name}))
    return tuple(name for name in found if name != level.name and name not in below)


def surroundings(level: Declared, known: Mapping[str, Declared]) -> tuple[str, ...]:
    """The levels whose values a response of `level` is computed from, itself first, with those that the ones below need."""
    found = dict.fromkeys(reads(level))
    waiting, seen = list(differentiated(level, known)), {level.name}
    while waiting:
        lower = known[waiting.pop()]
        if lower.name not in seen:
            seen.add(lower.name)
            found |= dict.fromkeys(reads(lower))
            waiting += differentiated(lower, known)
    return tuple(found)


def response_order(upper: Declared, known: Mapping[str, Declared]) -> tuple[str, ...]:
    """The levels whose responses `upper` differentiates through, each after all that its response depends on.

    That is the order in which the program that is differentiated takes them, and in reverse the order of the sweep. It
    is the run order but for nests: below the level in their middle levels run first, and are taken anew once it stands.
    """
    import networkx as nx

    below = set(differentiated(upper, known))
    ranks = {name: rank for rank, name in enumerate(run_order(known.values()))}
    graph: nx.DiGraph[str] = nx.DiGraph()
    graph.add_nodes_from(below)
    graph.add_edges_from((read, name) for name in below for read in depends_on(known[name], known) if read in below)
    return tuple(nx.lexicographical_topological_sort(graph, key=lambda name: ranks[name]))


def held_fixed(upper: Declared, known: Mapping[str, Declared]) -> tuple[tuple[str, ...], ...]:
    """Paths from `upper` back to itself along which it has influence that its hypergradient leaves out.

    Each path starts at `upper`, passes through a level that is not differentiated (or along an `against` arrow), and
    ends at the first level that is: `("meta", "discriminator", "generator")`. Only the shortest path to each such last
    arrow is given.
    """
    import networkx as nx

    live = {upper.name, *differentiated(upper, known)}
    reached = nx.single_source_shortest_path(_influence(known, upper.name), upper.name)
    paths: set[tuple[str, ...]] = set()
    for reader in live:
        level = known[reader]
        for read in (*level.given, *level.against):
            together = level.is_joint and known[read].is_joint
            fixed = read not in live or (read in level.against and read != upper.name and not together)
            if fixed and not known[read].frozen and read in reached:
                paths.add((*reached[read], reader))
    return tuple(sorted(paths))


def _influence(known: Mapping[str, Declared], source: str) -> nx.DiGraph[str]:
    """The reads of all levels that move, without the arrows back into `source`, and without the levels above it."""
    graph = network(known.values())
    fixed = [name for name, level in known.items() if level.frozen or source in _under(level, known)]
    graph.remove_nodes_from([name for name in fixed if name != source])
    graph.remove_edges_from(list(graph.in_edges(source)))
    return graph


def _precedence(levels: Iterable[Declared]) -> nx.DiGraph[str]:
    import networkx as nx

    known = {level.name: level for level in levels}
    below = {name: _rests_on(level, known) for name, level in known.items()}
    graph: nx.DiGraph[str] = nx.DiGraph()
    graph.add_nodes_from(known)
    for level in known.values():
        graph.add_edges_from((name, level.name) for name in below[level.name])
        graph.add_edges_from((name, level.name) for name in level.given if level.name not in below[name])
    for middle in nested(known):
        kept = set(differentiated(known[middle], known))
        inside = {middle, *kept, *below[middle]}
        graph.add_edges_from((middle, name) for name in known if name not in inside and kept & set(reads(known[name])))
    return graph


def _rests_on(upper: Declared, known: Mapping[str, Declared]) -> set[str]:
    """What moves before `upper` does: the levels it is subject to, and what these read but for their own upper levels."""
    found: set[str] = set()
    waiting = list(upper.subject_to)
    while waiting:
        name = waiting.pop()
        if name != upper.name and name not in found:
            found.add(name)
            waiting += [read for read in reads(known[name])[1:] if name not in _under(known[read], known)]
    return found


def _under(upper: Declared, known: Mapping[str, Declared]) -> set[str]:
    """The levels that `upper` is subject to, and those that these are subject to in turn."""
    found: set[str] = set()
    waiting = list(upper.subject_to)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += known[name].subject_to
    return found


def _repeated(names: Iterable[str]) -> set[str]:
    seen: set[str] = set()
    return {name for name in names if name in seen or seen.add(name)}


def _arrow_mistakes(level: Declared, known: Mapping[str, Declared]) -> list[Mistake]:
    found: list[Mistake] = []
    for kind in ARROWS:
        names: tuple[str, ...] = getattr(level, kind)
        for name in names:
            if name == level.name:
                found.append(Mistake(level.name, kind, "a level reads itself without listing itself"))
            elif name not in known:
                listed = ", ".join(sorted(known))
                found.append(
                    Mistake(level.name, kind, f"no level named '{name}'.{nearest(name, known)}\n  Known: {listed}.")
                )
            elif kind == "against" and not known[name].frozen and level.name not in known[name].against:
                found.append(Mistake(level.name, kind, f"'{name}' does not list '{level.name}' in its own `against`"))
    for name in sorted(_repeated(reads(level)[1:])):
        found.append(Mistake(level.name, "given", f"'{name}' is listed twice; one arrow says how it is read"))
    if level.frozen and level.subject_to:
        found.append(Mistake(level.name, "subject_to", "a level without an optimizer has nothing to differentiate for"))
    return found


def _time_mistakes(level: Declared, *, running: bool) -> list[Mistake]:
    found: list[Mistake] = []
    for key, least in (("steps", 1 if running and not level.frozen else 0), ("every", 1), ("warm_up", 0)):
        value = getattr(level, key)
        if value < least:
            found.append(Mistake(level.name, key, f"expected a whole number of at least {least}, got {value}"))
    if level.lookahead and not level.subject_to:
        found.append(Mistake(level.name, "lookahead", "only a level that is subject to others can look ahead"))
    if level.nested not in ("reduced", "direct"):
        found.append(Mistake(level.name, "nested", f"expected reduced or direct, got {level.nested!r}"))
    elif level.nested == "direct" and not level.subject_to:
        found.append(Mistake(level.name, "nested", "only a level that is subject to others has a total gradient"))
    return found


def _cycle_mistakes(levels: Sequence[Declared]) -> list[Mistake]:
    import networkx as nx

    precedence = _precedence(levels)
    if nx.is_directed_acyclic_graph(precedence):
        return []
    start = min(min(part) for part in nx.strongly_connected_components(precedence) if len(part) > 1)
    names = [edge[0] for edge in nx.find_cycle(precedence, source=start)]
    path = " → ".join([*names, names[0]])
    advice = "one of these must be `subject_to` another, or both play `against` each other"
    return [Mistake(names[0], "given", f"levels read each other in a cycle: {path}; {advice}")]


def _shared_mistakes(known: Mapping[str, Declared]) -> list[Mistake]:
    """Two levels in the middle above one and the same level, neither of which rests on the other."""
    middle = sorted(nested(known))
    found: list[Mistake] = []
    for one, two in combinations(middle, 2):
        shared = sorted(set(differentiated(known[one], known)) & set(differentiated(known[two], known)))
        if shared and one not in _rests_on(known[two], known) and two not in _rests_on(known[one], known):
            reason = (
                f"'{one}' and '{two}' are both subject to '{shared[0]}', and others are subject to them: each one's "
                "response would depend on the other's; make them one level, or one of them subject to the other"
            )
            found.append(Mistake(two, "subject_to", reason))
    return found


def _mutual_mistakes(known: Mapping[str, Declared]) -> list[Mistake]:
    """Levels below one and the same upper level whose responses depend on each other, one of them through a nest."""
    import networkx as nx

    found: list[Mistake] = []
    for upper in known.values():
        below = set(differentiated(upper, known))
        edges = [(read, name) for name in below for read in depends_on(known[name], known) if read in below]
        graph: nx.DiGraph[str] = nx.DiGraph(edges)
        if not nx.is_directed_acyclic_graph(graph):
            names = sorted({name for edge in nx.find_cycle(graph) for name in edge[:2]})
            found.append(
                Mistake(
                    upper.name,
                    "subject_to",
                    f"the responses of {', '.join(names)} depend on each other: no order gives them",
                )
            )
    return found


def _response_mistakes(upper: Declared, known: Mapping[str, Declared]) -> list[Mistake]:
    found: list[Mistake] = []
    listed = differentiated(upper, known)
    for name in listed:
        if not _reaches(upper.name, name, known, set(listed)):
            reason = f"the response of '{name}' does not depend on '{upper.name}', directly or through a listed level"
            found.append(Mistake(upper.name, "subject_to", f"{reason}; list the missing arrow under `given`"))
    return found


def _reaches(upper: str, lower: str, known: Mapping[str, Declared], listed: set[str]) -> bool:
    """Whether the response of `lower` depends on `upper`, or on a listed level whose response does."""
    seen, waiting = {lower}, [lower]
    while waiting:
        name = waiting.pop()
        opponents = known[name].against if known[name].is_joint else ()
        given = (*depends_on(known[name], known), *opponents)
        if upper in given:
            return True
        waiting += [name for name in given if name in listed and name not in seen]
        seen.update(given)
    return False


def _due_mistakes(upper: Declared, known: Mapping[str, Declared]) -> list[Mistake]:
    found: list[Mistake] = []
    for name in () if upper.frozen else differentiated(upper, known):
        lower = known[name]
        times = (upper.warm_up + upper.every * count for count in range(1, lower.every + 1))
        first = next((time for time in times if not is_due(lower, time)), None)
        if first is not None:
            reason = f"'{upper.name}' is due at iteration {first} and '{name}', which it is subject to, is not"
            found.append(Mistake(upper.name, "every", reason))
    return found


def _lookahead_mistakes(levels: Sequence[Declared]) -> list[Mistake]:
    middle = nested({level.name: level for level in levels})  # responses below these are taken anew in any case
    uppers = [level for level in levels if level.subject_to and not level.frozen and level.name not in middle]
    return [
        Mistake(one.name, "lookahead", f"'{one.name}' and '{two.name}' are due together and must agree on it")
        for one, two in combinations(uppers, 2)
        if one.lookahead != two.lookahead and (one.warm_up - two.warm_up) % gcd(one.every, two.every) == 0
    ]
