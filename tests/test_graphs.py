"""Every shipped graph runs, up to its top."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import mlo

ROOT = Path(__file__).parent.parent
GRAPHS = sorted((ROOT / "graphs").rglob("*.yaml"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("start")


def shortened(path: Path) -> mlo.Spec:
    """Two iterations in which every level moves, after two of whatever it starts from."""
    spec = mlo.load(path)
    timing = [f"levels.{name}.{key}" for name in spec.levels for key in ("every=1", "warm_up=0")]
    starts = [f"start.{name}.with.iterations=2" for name in spec.start]
    return spec.replaced("iterations=2", *timing, *starts)


def initial(spec: mlo.Spec, run: mlo.Run) -> dict[str, object]:
    values = dict(spec.build()[0].init(seed=spec.seed).values)
    for level, folder in run.summary["starts"].items():
        values[level] = mlo.open_run(folder).state().values[level]
    return values


def differs(before: object, after: object) -> bool:
    if isinstance(before, torch.Tensor):
        return not torch.equal(before, after)
    return any(not torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.parametrize("path", GRAPHS, ids=lambda path: str(path.relative_to(ROOT / "graphs")))
def test_every_level_moves_and_every_part_arrives(path: Path, cache: Path, tmp_path: Path) -> None:
    spec = shortened(path)
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
