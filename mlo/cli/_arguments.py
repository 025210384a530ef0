"""What several commands are given, and how it is said in `--help`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

GraphArgument = Annotated[
    str, typer.Argument(metavar="GRAPH", help="A YAML file, or the name of a shipped graph such as needs_aware.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Changes to the graph: seed=1 levels.meta.every=4."),
]
Imports = Annotated[
    list[str] | None, typer.Option("--import", metavar="MODULE", help="A module of your own that is a problem.")
]
Seed = Annotated[int | None, typer.Option(help="The same as seed=N.")]
Device = Annotated[str | None, typer.Option(help="The same as device=D.")]


def with_options(overrides: list[str] | None, seed: int | None = None, device: str | None = None) -> list[str]:
    """All changes to the graph, in the order in which they apply."""
    found = list(overrides or ())
    found += [] if seed is None else [f"seed={seed}"]
    return found + ([] if device is None else [f"device={device}"])


def modules(imports: Sequence[str] | None) -> tuple[str, ...]:
    """The modules of `--import`, which may lie in the working directory however `mlo` was started."""
    if imports and not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())
    return tuple(imports or ())
