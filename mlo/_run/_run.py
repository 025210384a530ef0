"""Run a specification from its first iteration, or go on with a run that was broken off."""

from __future__ import annotations

import shutil
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import torch
from rich.console import Console

from mlo._run import _checkpoint, _generators
from mlo._run._batches import Source
from mlo._run._evaluate import Selection, try_evaluation
from mlo._run._files import LOCK, Held, Refused, remove_parts, run_folder, write_atomically, write_json
from mlo._run._follow import follow
from mlo._run._interrupt import stoppable
from mlo._run._lock import alone
from mlo._run._log import METRICS, cut_metrics, seconds_per_iteration
from mlo._run._loop import Loop
from mlo._run._open import Run, open_run
from mlo._run._processes import Processes, together
from mlo._run._progress import progress_line
from mlo._run._record import RunRecord, place_of, versions
from mlo._run._resumable import fitting, unlike
from mlo._run._session import accounted, session
from mlo._run._standing import Standing
from mlo._run._start import CACHE, lasting, start_folders, start_runs, start_values
from mlo._run._summary import print_summary, summarise
from mlo.spec._build import Assembly, assemble

if TYPE_CHECKING:
    from mlo._state import State
    from mlo.spec import Spec


def run(
    spec: Spec,
    out: str | Path | None = None,
    *,
    cache: str | Path = CACHE,
    console: Console | None = None,
    quiet: bool = False,
) -> Run:
    """Run `spec` from its first iteration to its last, in the new run folder `out`.

    Under torchrun all processes call this; each computes a part of every batch, and the first one keeps the run.

    - `out`: default `runs/<name>-<seed>-<time>`; one that is not empty is refused.
    - `cache`: where the runs that levels start from are kept.

    Raises `SpecError` and `GraphError` before the first step, `NumericalError` with the last good state in the
    checkpoint, `MachineError` if the machine cannot write or has too little memory. An interrupt, too, leaves a
    checkpoint; `resume` goes on from there.
    """
    began = time.monotonic()
    kept = Path(cache).absolute()
    with together(spec.device) as processes:
        if not processes.first:
            return open_run(follow(spec, processes))
        folder = Path(out) if out is not None else default_folder(spec)
        with session(spec.seed, spec.threads), accounted(folder, kept):
            assembly = assemble(spec)
            with alone(run_folder(folder) / LOCK, busy=lambda who: _refuse(folder, who)):
                record = RunRecord(
                    spec_hash=spec.hash,
                    imports={module: place_of(module) for module in spec.imports},
                    threads=torch.get_num_threads(),
                    cache=str(kept),
                    versions=versions(),
                    processes=processes.size,
                )
                record.write(folder)
                write_atomically(folder / "spec.yaml", spec.to_yaml().encode())
                life = _Life(folder, assembly, spec.hash, kept, _console(console, quiet), began, processes)
                found = life.from_the_start()
        processes.part_ways(folder)
        return found


def resume(
    folder: str | Path, *, device: str | None = None, console: Console | None = None, quiet: bool = False
) -> Run:
    """Go on with the run in `folder` from its last checkpoint, or from its start if there is none.

    A run that was broken off at any moment ends with the weights and metrics of one that was not, bit for bit, on the
    same machine and versions, if its streams are keyed. A finished run is left as it is.

    - `device`: go on there; the numbers of another device differ in their last bits.

    Raises `UserError` if there is no run, if another process is running it, or if its checkpoint is damaged or belongs to
    another specification; and what `run` raises.
    """
    folder, found = Path(folder), open_run(folder)
    began = time.monotonic()
    spec = found.spec if device is None or found.finished else found.spec.replaced(f"device={device}")
    with together(spec.device) as processes:
        if not processes.first:
            return open_run(follow(spec, processes))
        found = _resumed(found, spec, processes, _console(console, quiet), began)
        processes.part_ways(folder)
        return found


def _resumed(found: Run, spec: Spec, processes: Processes, shown: Console, began: float) -> Run:
    """`resume` in the first process; `spec` may name another device than that of `found`."""
    folder = found.folder
    if found.finished:
        progress_line(shown)(f"finished: {folder}")
        return found
    record = RunRecord.read(folder)
    if found.spec.hash != record.spec_hash:
        raise Refused(f"{folder / 'spec.yaml'}: it, or a graph that it starts from, has changed since the run began")
    cache = Path(record.cache)
    with (
        session(spec.seed, spec.threads or record.threads),
        accounted(folder, cache),
        alone(folder / LOCK, busy=lambda who: _refuse(folder, who)),
    ):
        if (folder / "summary.json").is_file():
            return found
        life = _Life(folder, assemble(spec), record.spec_hash, cache, shown, began, processes)
        return life.from_checkpoint(record)


def default_folder(spec: Spec) -> Path:
    """`runs/<name>-<seed>-<time>`."""
    return Path("runs") / f"{spec.name}-{spec.seed}-{datetime.now():%Y%m%d-%H%M%S}"


@final
@dataclass(frozen=True)
class _Life:
    """A run between two deaths of the process."""

    folder: Path
    assembly: Assembly
    identity: str
    cache: Path
    console: Console
    began: float
    processes: Processes

    def from_the_start(self) -> Run:
        """From the first iteration; what an earlier life has left is removed."""
        (self.folder / METRICS).unlink(missing_ok=True)
        for left in ("tensorboard", "checkpoint", "pictures"):
            shutil.rmtree(self.folder / left, ignore_errors=True)
        spec, graph = self.assembly.spec, self.assembly.graph
        say = progress_line(self.console)
        for notice in self.assembly.notices:
            say(f"notice: {notice}")
        state = fresh_state(self.assembly, self.cache, self.console, self.processes)
        self.processes.lead("probe", state)
        self._source.probe(graph, state)
        try_evaluation(self.assembly, state)
        selection = Selection(spec.evaluation and spec.evaluation.select)
        return self._go_on(Standing(state=state, selection=selection), None, self.began)

    def from_checkpoint(self, record: RunRecord) -> Run:
        """From the last checkpoint, if there is one."""
        spec, kept = self.assembly.spec, self.folder / "checkpoint"
        say = progress_line(self.console)
        remove_parts(self.folder)
        (self.folder / "traceback.txt").unlink(missing_ok=True)
        if not (kept / "latest.json").exists():
            say(f"resumed from the start, for there is no checkpoint: {self.folder}")
            return self.from_the_start()
        latest = _checkpoint.read_record(kept, "latest", spec_hash=self.identity)
        checkpoint = _checkpoint.restored(kept, latest, device=spec.device)
        fitting(self.assembly.graph.init(seed=spec.seed), checkpoint.state, kept / "latest.json")
        selected = latest["selected"]
        best = selected and _checkpoint.restored(kept, selected, device=spec.device)
        iteration = checkpoint.state.iteration
        cut_metrics(self.folder, length=checkpoint.gathered["metrics_bytes"], iteration=iteration)
        if selected is not None:  # what was selected after the last checkpoint is selected again
            _checkpoint.write_record(kept, "selected", selected)
        _checkpoint.remove_all_but(kept, latest, selected)
        say(f"resumed from iteration {iteration}: {self.folder}")
        reasons = list(unlike(self.assembly, record, open_run(self.folder).spec.device, self.processes.size))
        for reason in reasons:
            say(f"notice: {reason}")
        now = {"iteration": iteration, "device": spec.device, "exact": not reasons, "versions": versions()}
        replace(record, resumed=[*record.resumed, now]).write(self.folder)
        _generators.restore(checkpoint.generators)
        metric = spec.evaluation and spec.evaluation.select
        standing = Standing.restored(checkpoint, best or None, metric)
        return self._go_on(standing, selected, self.began - checkpoint.gathered["seconds"])

    @property
    def _source(self) -> Source:
        return source_of(self.assembly, self.processes)

    def _go_on(self, standing: Standing, selected: _checkpoint.Record | None, began: float) -> Run:
        self.processes.lead("iterate", standing.state)
        with stoppable(patient=self.processes.size > 1) as stop:
            loop = Loop(
                assembly=self.assembly,
                folder=self.folder,
                identity=self.identity,
                source=self._source,
                console=self.console,
                stop=stop,
                began=began,
                standing=standing,
                processes=self.processes,
                selected=selected,
            )
            verdict = loop.run()
        summary = summarise(
            self.assembly,
            spec_hash=self.identity,
            selected=verdict.iteration,
            metrics=verdict.metrics,
            counts=loop.standing.counts,
            norms=loop.standing.mean_norms(),
            tables=verdict.tables,
            starts=start_folders(self.assembly.spec, self.cache),
            negative_curvature=loop.standing.negative_curvature(),
            warnings=loop.standing.warnings,
            seconds=time.monotonic() - began,
            seconds_per_iteration=seconds_per_iteration(self.folder),
            processes=self.processes.size,
        )
        write_json(self.folder / "summary.json", summary)
        selection = loop.standing.selection
        unselected = selection.metric if selection.best is None else None
        print_summary(self.console, summary, lasting(self.folder, self.cache), unselected=unselected)
        return open_run(self.folder)


def fresh_state(assembly: Assembly, cache: Path, console: Console, processes: Processes | None = None) -> State:
    """The state before the first iteration. Runs the graphs that levels start from where `cache` does not have them."""
    others = processes or Processes()

    def run_start(start: Spec, inside: Path) -> Any:
        """Run a graph that levels start from, or go on with it."""
        level = next(level for level, each in assembly.spec.starts.items() if each.hash == start.hash)
        others.tell(do="start", level=level)
        if (inside / "spec.yaml").is_file():
            with suppress(Refused):
                return resume(inside, console=console)
        if any(inside.iterdir()):  # from a process that died before it began, or damaged
            shutil.rmtree(inside)
        return run(start, inside, cache=cache, console=console)

    starts = start_runs(assembly.spec, cache, run_start, progress_line(console))
    return assembly.graph.init(values=start_values(starts), seed=assembly.spec.seed)


def source_of(assembly: Assembly, processes: Processes | None = None) -> Source:
    """What draws the batches of a run."""
    return Source.of(assembly, processes or Processes())


def _console(console: Console | None, quiet: bool) -> Console:
    return Console(quiet=True) if quiet else console or Console()


def _refuse(folder: Path, who: str) -> None:
    raise Held(f"{folder}: this run is still going on, in {who}", who)
