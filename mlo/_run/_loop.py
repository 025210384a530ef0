"""The loop over iterations."""

from __future__ import annotations

import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import torch
from rich.console import Console

from mlo._errors import MloError, NumericalError
from mlo._graph import Cost
from mlo._run import _checkpoint
from mlo._run._batches import Source
from mlo._run._evaluate import Selection, evaluate
from mlo._run._files import new_folder, write_atomically, write_json
from mlo._run._log import Log, plain
from mlo._run._open import Run, open_run
from mlo._run._pictures import write_pictures
from mlo._run._progress import Progress, progress_line
from mlo._run._start import CACHE, start_runs, start_values
from mlo._run._summary import print_summary, summarise
from mlo.spec._build import Assembly, assemble

if TYPE_CHECKING:
    from torch import Tensor

    from mlo._state import Metrics, State
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

    - `out`: default `runs/<name>-<seed>-<time>`; one that is not empty is refused.
    - `cache`: where the runs that levels start from are kept.

    Raises `SpecError` and `GraphError` before the first step, `NumericalError` with the last good state in the
    checkpoint, OSError if the machine cannot write. An interrupt leaves a checkpoint, too.
    """
    console = Console(quiet=True) if quiet else console or Console()
    before = torch.get_num_threads()
    if spec.threads is not None:
        torch.set_num_threads(spec.threads)
    try:
        return _run(spec, out, Path(cache), console)
    finally:
        torch.set_num_threads(before)


def _run(spec: Spec, out: str | Path | None, cache: Path, console: Console) -> Run:
    began = time.monotonic()
    assembly = assemble(spec)
    folder = new_folder(Path(out) if out is not None else default_folder(spec))
    try:
        return _run_into(folder, assembly, cache, console, began)
    except (MloError, OSError, MemoryError):
        raise
    except Exception as error:
        path = folder / "traceback.txt"
        path.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
        error.add_note(f"The traceback is in {path}.")
        raise


def _run_into(folder: Path, assembly: Assembly, cache: Path, console: Console, began: float) -> Run:
    spec = assembly.spec
    write_atomically(folder / "spec.yaml", spec.to_yaml().encode())
    for notice in assembly.notices:
        progress_line(console)(f"notice: {notice}")
    starts = start_runs(
        spec, cache, lambda start, inside: run(start, inside, cache=cache, console=console), progress_line(console)
    )
    graph = assembly.graph
    source = Source(streams=assembly.streams, names=assembly.batches, seed=spec.seed, device=torch.device(spec.device))
    state = graph.init(values=start_values(starts), seed=spec.seed)
    graph.probe(state, source.all_batches(graph.levels, 1))
    loop = _Loop(assembly, folder, source, console, began, state, Selection(spec.evaluation and spec.evaluation.select))
    loop.run()
    summary = summarise(
        assembly,
        selected=loop.selection.iteration,
        metrics=loop.judged,
        counts=loop.counts,
        norms=loop.mean_norms(),
        tables=loop.tables,
        starts={level: str(start.folder) for level, start in starts.items()},
        seconds=time.monotonic() - began,
    )
    write_json(folder / "summary.json", summary)
    print_summary(console, summary, folder)
    return open_run(folder)


def default_folder(spec: Spec) -> Path:
    """`runs/<name>-<seed>-<time>`."""
    return Path("runs") / f"{spec.name}-{spec.seed}-{datetime.now():%Y%m%d-%H%M%S}"


@final
@dataclass(eq=False)
class _Loop:
    """What changes while a run goes."""

    assembly: Assembly
    folder: Path
    source: Source
    console: Console
    began: float
    state: State
    selection: Selection
    totals: dict[str, dict[str, Tensor]] = field(default_factory=dict[str, "dict[str, Tensor]"])
    counts: Cost = field(default_factory=lambda: Cost(0, 0, 0))
    norms: dict[str, dict[str, Any]] = field(default_factory=dict[str, "dict[str, Any]"])
    judged: dict[str, float] = field(default_factory=dict[str, float])
    tables: tuple[Any, ...] = ()

    def run(self) -> None:
        """Every iteration, then the last evaluation."""
        iterations, levels = self.assembly.iterations, self.assembly.graph.levels
        log = Log(self.folder)
        progress = Progress(self.console, self.assembly.spec.name, iterations)
        best = self._checkpoint()
        try:
            for iteration in range(1, iterations + 1):
                batches = self.source.batches(levels, iteration)
                self.state, metrics = self.assembly.graph.step(self.state, batches)
                self._gather(metrics)
                log.write(iteration, plain(metrics), seconds=time.monotonic() - self.began)
                progress.update(iteration, metrics)
                if self._evaluates(iteration):
                    found = evaluate(self.assembly, self.state, self.totals, "validation", complete=False).metrics
                    log.write(iteration, {"evaluation": found}, seconds=time.monotonic() - self.began)
                    if self.selection.takes(found, iteration):
                        best = self._checkpoint()
                        self._save("selected", best)
                    progress.say(f"{self.assembly.spec.name} {iteration}/{iterations}  {self.selection.line(found)}")
                if self._keeps(iteration):
                    log.flush()
                    self._save("latest", self._checkpoint())
        except (KeyboardInterrupt, NumericalError):
            self._save("latest", self._checkpoint())
            raise
        finally:
            progress.close()
            log.close()
        self._finish(best if self.selection.iteration else self._checkpoint())

    def _finish(self, selected: _checkpoint.Checkpoint) -> None:
        self._save("latest", self._checkpoint())
        self._save("selected", selected)
        if self.selection.iteration == 0:
            self.selection.iteration = self.assembly.iterations
        if self.assembly.problem.evaluate is None or self.assembly.spec.evaluation is None:
            return
        validation = evaluate(self.assembly, selected.state, selected.totals, "validation", complete=False)
        test = evaluate(self.assembly, selected.state, selected.totals, "test", complete=True)
        self.judged = {**validation.metrics, **test.metrics}
        self.tables = test.tables
        write_pictures(self.folder / "pictures", test.pictures)

    def _gather(self, metrics: Metrics) -> None:
        """Add up what objectives measure, what the iteration cost, and the norms of its hypergradients."""
        for level, measured in metrics.measured.items():
            sums = self.totals.setdefault(level, {})
            for name, value in measured.items():
                added = value.double() * self.assembly.graph.levels[level].steps
                sums[name] = sums[name] + added if name in sums else added
        done = (metrics.gradients, metrics.products, len(metrics.pullbacks))
        self.counts = Cost(*(before + now for before, now in zip(self.counts, done, strict=True)))
        for upper, norms in metrics.norms.items():
            sums = self.norms.setdefault(upper, {"times": 0, "direct": 0.0, "through": {}})
            sums["times"] += 1
            sums["direct"] += norms.direct.item()
            for lower, norm in norms.through.items():
                sums["through"][lower] = sums["through"].get(lower, 0.0) + norm.item()

    def mean_norms(self) -> Mapping[str, Any]:
        """For each upper level, the norms of the parts of its hypergradient, averaged over its updates."""
        return {
            upper: {
                "updates": sums["times"],
                "direct": sums["direct"] / sums["times"],
                "through": {lower: norm / sums["times"] for lower, norm in sorted(sums["through"].items())},
            }
            for upper, sums in self.norms.items()
        }

    def _evaluates(self, iteration: int) -> bool:
        every = self.assembly.evaluate_every
        if self.assembly.spec.evaluation is None or self.assembly.problem.evaluate is None:
            return False
        return iteration == self.assembly.iterations or (every is not None and iteration % every == 0)

    def _keeps(self, iteration: int) -> bool:
        return iteration % self.assembly.checkpoint_every == 0

    def _checkpoint(self) -> _checkpoint.Checkpoint:
        totals = {level: dict(measured) for level, measured in self.totals.items()}
        return _checkpoint.Checkpoint(state=self.state, totals=totals)

    def _save(self, name: str, checkpoint: _checkpoint.Checkpoint) -> None:
        _checkpoint.save(self.folder / "checkpoint", name, checkpoint, spec_hash=self.assembly.spec.hash)
