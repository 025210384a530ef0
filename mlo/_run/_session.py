"""The process around a run: how a run wants it, and what becomes of an error that ends one."""

from __future__ import annotations

import traceback
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch

from mlo._errors import MachineError, MloError, explained
from mlo._run import _checkpoint, _generators
from mlo._run._interrupt import stoppable


@contextmanager
def session(seed: int, threads: int | None) -> Generator[None]:
    """The process as a run wants it: threads, generators, signals; afterwards as it was."""
    before = torch.get_num_threads()
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, before)
        if threads is not None:
            torch.set_num_threads(threads)
        stack.enter_context(_generators.seeded(seed))
        stack.enter_context(stoppable())
        yield


@contextmanager
def accounted(folder: Path, cache: Path) -> Generator[None]:
    """What goes wrong, in words that help; the traceback of a bug lies in `folder`."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_how_to_go_on(folder)) from None
    except MloError:
        raise
    except Exception as error:
        known = explained(error, folder, cache)
        if known is not None:
            iteration = _checkpoint.iteration_of(folder / "checkpoint")
            if isinstance(known, MachineError) and iteration is not None:
                known.add_note(f"The last checkpoint, iteration {iteration}, is whole: python -m mlo resume {folder}")
            raise known from error
        if folder.is_dir():
            path = folder / "traceback.txt"
            with suppress(OSError):
                path.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
                error.add_note(f"The traceback is in {path}.")
        raise


def _how_to_go_on(folder: Path) -> str:
    if not (folder / "spec.yaml").is_file():
        return "interrupted before the run began"
    iteration = _checkpoint.iteration_of(folder / "checkpoint")
    where = "before the first iteration" if iteration is None else f"after iteration {iteration}"
    return f"interrupted {where}; go on with: python -m mlo resume {folder}"
