"""What the other processes of a run do: every derivative with the first one, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlo._errors import StoppedElsewhere
from mlo._run._batches import Source
from mlo._run._interrupt import stoppable
from mlo._run._processes import Processes, Word
from mlo._run._session import session
from mlo.spec._build import Assembly, assemble

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mlo._state import State
    from mlo.spec import Spec


def follow(spec: Spec, processes: Processes) -> Path:
    """Do what the first process says of the run of `spec` until it says that this is over; the run's folder.

    Raises what all processes raise, `StoppedElsewhere` where the first one fails alone, and KeyboardInterrupt with it.
    """
    with session(spec.seed, spec.threads):
        assembly = assemble(spec)
        graph = assembly.graph
        source = Source.of(assembly, processes)
        while True:
            order: Mapping[str, Any] = processes.told()
            match order["do"]:
                case "start":
                    follow(spec.starts[order["level"]], processes)
                case "probe":
                    state = processes.follow(order)
                    source.probe(graph, state)
                case "iterate":
                    _iterate(assembly, source, processes, processes.follow(order))
                case "fail" if order["code"] == 130:
                    raise KeyboardInterrupt
                case "fail":
                    raise StoppedElsewhere(order["what"], order["code"])
                case _:
                    processes.agree(Word.GO_ON)
                    return Path(order["folder"])


def _iterate(assembly: Assembly, source: Source, processes: Processes, state: State) -> None:
    """Every iteration that is left, or as many as the first process takes."""
    graph = assembly.graph
    with stoppable(patient=True) as stop, stop.iterating():
        for iteration in range(state.iteration + 1, assembly.iterations + 1):
            state, _ = graph.step(state, source.batches(graph.levels, iteration))
            if iteration % assembly.checkpoint_every == 0:
                processes.compare(state)
            word = processes.agree(Word.STOP if stop.asked else Word.GO_ON)
            if word is Word.STOP:
                raise KeyboardInterrupt
            if word is Word.FAILED:  # the first process is about to say how
                return
