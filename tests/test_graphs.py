"""Every shipped graph runs, up to its top."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from image_files import WRITERS, biggan, write

import mlo

ROOT = Path(__file__).parent.parent
GRAPHS = sorted((ROOT / "graphs").rglob("*.yaml"))
SMALLER = {  # networks in their quickest sizes; `test_networks_as_large_as_the_graphs_have_them` keeps theirs
    "wide_resnet": {"depth": 10, "width": 1},
    "densenet": {"depth": 10, "growth": 4},
    "resnet": {"depth": 18},
    "biggan": {"width": 2},
}
Files = Callable[[str], Path]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("start")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """A tiny set of images by its name, or a tiny BigGAN, written in its own format when it is first asked for."""
    places: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in places:
            places[name] = tmp_path_factory.mktemp(name)
            if name == "biggan":
                biggan(places[name] / "generator.pt", latent=140)
            else:
                write(name, places[name], train=150 if name == "imagenet" else 10, patches=True)
        return places[name]

    return of


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT / "graphs"))


def shortened(path: Path, *overrides: str) -> mlo.Spec:
    """Two iterations in which every level moves, after two of whatever it starts from."""
    spec = mlo.load(path, *overrides)
    timing = [f"levels.{name}.{key}" for name in spec.levels for key in ("every=1", "warm_up=0")]
    starts = [f"start.{name}.with.iterations=2" for name in spec.start]
    return spec.replaced("iterations=2", *timing, *starts)


def with_starts(spec: mlo.Spec, overrides: Callable[[mlo.Spec], list[str]]) -> list[str]:
    """`overrides` of a graph, and those of the graphs it starts from."""
    below = [(name, with_starts(start, overrides)) for name, start in spec.starts.items()]
    return overrides(spec) + [f"start.{name}.with.{override}" for name, those in below for override in those]


def on_files(spec: mlo.Spec, files: Files) -> list[str]:
    """What a graph at paper scale is told, to run on few and small generated images."""
    if spec.data.get("source") not in WRITERS:
        return []
    few = [f"data.root={files(str(spec.data['source']))}", "data.complete=false", "data.batch_size=4", "threads=1"]
    made = [name for name, level in spec.levels.items() if level.variables and level.variables.name == "torchscript"]
    few += [f"levels.{name}.variables.torchscript.path={files('biggan')}/generator.pt" for name in made]
    return few + ([f"data.size={32 if made else 64}", "data.workers=2"] if "workers" in spec.data else [])


def smaller(spec: mlo.Spec) -> list[str]:
    """Its networks in their quickest sizes, where they are those of the paper."""
    found = {name: level.variables.name for name, level in spec.levels.items() if level.variables}
    return [
        f"levels.{name}.variables.{network}.{option}={value}"
        for name, network in found.items()
        for option, value in SMALLER.get(network.removesuffix("_critic"), {}).items()
    ]


def initial(spec: mlo.Spec, run: mlo.Run) -> dict[str, object]:
    values = dict(spec.build()[0].init(seed=spec.seed).values)
    for level, folder in run.summary["starts"].items():
        values[level] = mlo.open_run(folder).state().values[level]
    return values


def differs(before: object, after: object) -> bool:
    if isinstance(before, torch.Tensor):
        return not torch.equal(before, after)
    return any(not torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.parametrize("path", GRAPHS, ids=relative)
def test_every_level_moves_and_every_part_arrives(path: Path, files: Files, cache: Path, tmp_path: Path) -> None:
    spec = mlo.load(path)
    told = with_starts(spec, partial(on_files, files=files)) + with_starts(spec, smaller)
    two_iterations(shortened(path, *told), cache, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in GRAPHS if smaller(mlo.load(path))], ids=relative)
def test_networks_as_large_as_the_graphs_have_them(path: Path, files: Files, cache: Path, tmp_path: Path) -> None:
    told = with_starts(mlo.load(path), partial(on_files, files=files))
    two_iterations(shortened(path, *told), cache, tmp_path)


def cosines(options: object) -> Iterator[Mapping[str, Any]]:
    """All schedules of that name among an optimizer's options."""
    for name, option in options.items() if isinstance(options, Mapping) else ():
        if name == "cosine":
            yield option
        else:
            yield from cosines(option)


def in_one_unit(duration: object) -> float:
    """Iterations, or passes over a stream."""
    return getattr(duration, "epochs", None) or (duration["epochs"] if isinstance(duration, Mapping) else duration)


@pytest.mark.parametrize("path", GRAPHS, ids=relative)
def test_no_learning_rate_is_zero_before_the_run_ends(path: Path) -> None:
    """A cosine to nothing lasts as long as its run, also where a graph that starts from another one makes that longer."""
    spec = mlo.load(path)
    for each in (spec, *spec.starts.values()):
        for name, level in each.levels.items():
            for cosine in cosines(level.optimizer.options if level.optimizer else {}):
                assert "end" in cosine or in_one_unit(cosine["over"]) >= in_one_unit(each.iterations), (each.name, name)


def two_iterations(spec: mlo.Spec, cache: Path, tmp_path: Path) -> None:
    """Run `spec`: every level that is trained has moved, and every part of every hypergradient has arrived."""
    run = mlo.run(spec, tmp_path / "run", cache=cache, quiet=True)
    before, after = initial(spec, run), run.state("latest").values
    for name, level in spec.levels.items():
        assert differs(before[name], after[name]) != level.frozen, name

    uppers = [name for name, level in spec.levels.items() if level.subject_to]
    lines = [line for line in run.metrics if "losses" in line]
    assert len(lines) == 2
    for line in lines:
        assert set(line["norms"]) == set(uppers)
        for norms in line["norms"].values():
            assert math.isfinite(norms["total"])
            assert norms["indirect"] > 0
            assert all(norm > 0 for norm in norms["through"].values()), norms
    counts, predicted = run.summary["counts"], run.summary["predicted_counts"]
    if any(level.hypergradient.may_stop for level in spec.build()[0].levels.values()):
        assert 0 < counts["products"] <= predicted["products"]  # an upper bound
        counts = {**counts, "products": predicted["products"]}
    assert counts == predicted
