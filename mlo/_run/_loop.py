"""The loop over iterations."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from mlo._run import _checkpoint, _generators
from mlo._run._evaluate import evaluate
from mlo._run._files import finite
from mlo._run._log import Log, plain
from mlo._run._pictures import write_pictures
from mlo._run._processes import Processes, Word
from mlo._run._progress import Progress

if TYPE_CHECKING:
    from rich.console import Console

    from mlo._run._batches import Source
    from mlo._run._interrupt import Stop
    from mlo._run._standing import Standing
    from mlo._state import Metrics, State
    from mlo.spec._build import Assembly


@final
@dataclass(frozen=True)
class Verdict:
    """What the last evaluation found: of which iteration's state, its metrics, its tables."""

    iteration: int
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])
    tables: tuple[Any, ...] = ()


@final
@dataclass(eq=False, kw_only=True)
class Loop:
    """What changes while a run goes.

    - `identity`: the hash of the specification the run was started with, which its checkpoints carry.
    - `began`: on the monotonic clock; what earlier lives of the run have taken is before it.
    - `selected`: the record of the best state on the disk.
    - `processes`: the others, of which this is the first.
    """

    assembly: Assembly
    folder: Path
    identity: str
    source: Source
    console: Console
    stop: Stop
    began: float
    standing: Standing
    processes: Processes
    selected: _checkpoint.Record | None = None

    def run(self) -> Verdict:
        """Every iteration that is left, then the last evaluation."""
        iterations, done = self.assembly.iterations, self.standing.state.iteration
        log = Log(self.folder, purge=done + 1 if done else None)
        progress = Progress(self.console, self.assembly.spec.name, iterations, done=done)
        try:
            with self.stop.iterating():
                for iteration in range(done + 1, iterations + 1):
                    self._iterate(iteration, log, progress)
                    if self.processes.agree(Word.STOP if self.stop.asked else Word.GO_ON) is Word.STOP:
                        raise KeyboardInterrupt
            self._save(log)
        except BaseException as error:
            self._save_after(error, log)
            raise
        finally:
            progress.close()
            log.close()
        return self._finish()

    def _iterate(self, iteration: int, log: Log, progress: Progress) -> None:
        """One iteration, in which other processes take part, and then what comes of it, in which they do not."""
        levels = self.assembly.graph.levels
        began = time.perf_counter()
        state, metrics = self.assembly.graph.step(self.standing.state, self.source.batches(levels, iteration))
        if iteration % self.assembly.checkpoint_every == 0:
            self.processes.compare(state)
        try:
            self._account(iteration, state, metrics, log, progress, began)
        except BaseException:
            self.processes.agree(Word.FAILED)
            raise

    def _account(
        self, iteration: int, state: State, metrics: Metrics, log: Log, progress: Progress, began: float
    ) -> None:
        """First everything that can be broken off, then everything that cannot."""
        levels = self.assembly.graph.levels
        entry = plain(metrics)  # numbers are waited for here, which ends the step on an accelerator
        took = time.perf_counter() - began
        standing = self.standing.after(state, metrics, entry, levels)
        found = None
        if self._evaluates(iteration):
            found = evaluate(self.assembly, state, standing.totals, "validation", complete=False).metrics
            standing = standing.judged(found)
        if iteration in self.assembly.pictures_at and self._judges:
            drawn = evaluate(self.assembly, state, standing.totals, "test", complete=True).pictures
            write_pictures(
                self.folder / "pictures" / f"at_{iteration}", drawn
            )  # before a checkpoint can be beyond them
        warned = standing.warned_since(self.standing)
        with self.stop.keeping():
            self.standing = standing
            log.write(iteration, entry, seconds=self._seconds(), step=took)
            if found is not None:
                log.write(iteration, {"evaluation": finite(found)}, seconds=self._seconds())
            if iteration % self.assembly.checkpoint_every == 0:
                self._save(log)
        for text in warned:
            progress.say(f"warning: {text}")
        progress.update(iteration, entry)
        if found is not None:
            where = f"{self.assembly.spec.name} {iteration}/{self.assembly.iterations}"
            progress.say(f"{where}  {standing.selection.line(found)}")

    def _save(self, log: Log) -> None:
        """The best state if it is new, then the latest, which points to it; only then older ones go."""
        best = self.standing.best
        if best is not None and (self.selected is None or self.selected["iteration"] != best.state.iteration):
            self.selected = self._write("selected", best)
        latest = self.standing.checkpoint(
            _generators.capture(), metrics_bytes=log.keep(), seconds=round(self._seconds(), 4)
        )
        record = self._write("latest", latest, selected=self.selected)
        _checkpoint.remove_all_but(self.folder / "checkpoint", record, self.selected)

    def _save_after(self, error: BaseException, log: Log) -> None:
        """Keep the last finished iteration when the next has gone wrong, and say so; a full disk is full again."""
        with suppress(MemoryError), self.stop.keeping():  # where no memory is left, an earlier checkpoint stands
            self._save(log)
        folder = self.folder / "checkpoint"
        if (iteration := _checkpoint.iteration_of(folder)) is not None:
            kept = f"The last good checkpoint is {folder / 'latest.json'}, iteration {iteration}."
            error.add_note(kept if iteration else "Nothing was trained.")

    def _write(
        self, name: str, checkpoint: _checkpoint.Checkpoint, selected: _checkpoint.Record | None = None
    ) -> _checkpoint.Record:
        return _checkpoint.save(
            self.folder / "checkpoint", name, checkpoint, spec_hash=self.identity, selected=selected
        )

    def _finish(self) -> Verdict:
        """Judge the best state; where nothing selects, the last one is the best."""
        best = self.standing.best
        if best is None:
            best = _checkpoint.Checkpoint(state=self.standing.state, totals=self.standing.totals)
            self._write("selected", best)
        iteration = best.state.iteration
        if not self._judges:
            return Verdict(iteration)
        validation = evaluate(self.assembly, best.state, best.totals, "validation", complete=False)
        test = evaluate(self.assembly, best.state, best.totals, "test", complete=True)
        write_pictures(self.folder / "pictures", test.pictures)
        return Verdict(iteration, {**validation.metrics, **test.metrics}, test.tables)

    @property
    def _judges(self) -> bool:
        return self.assembly.problem.evaluate is not None and self.assembly.spec.evaluation is not None

    def _evaluates(self, iteration: int) -> bool:
        every = self.assembly.evaluate_every
        if not self._judges:
            return False
        return iteration == self.assembly.iterations or (every is not None and iteration % every == 0)

    def _seconds(self) -> float:
        return time.monotonic() - self.began
