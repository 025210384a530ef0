"""Pictures on the way: those that a run which ends there makes, at no cost in numbers, and whole after an interrupt."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import Tensor

import mlo

OWN = """
import torch
import mlo

def build(settings: mlo.Settings, context: mlo.Context) -> mlo.Problem:
    def weights() -> torch.Tensor:
        return torch.randn(3)

    def fit(values, batch):
        return (values["w"] - batch["point"]).square().sum()

    def evaluate(values, split, *, model, totals, complete):
        loss = values["w"].square().sum() + 0.1 * torch.rand(())
        if not complete:
            return mlo.Evaluation(metrics={"loss": loss})
        shades = torch.cat([values["w"], torch.rand(3), torch.tensor([float(split == "test")])])
        return mlo.Evaluation(metrics={"loss": loss, "more": loss}, pictures={"own": (100 * shades.abs()).byte()[None]})

    points = {"point": torch.linspace(0, 1, 20)[:, None].expand(-1, 3)}
    streams = {"train": mlo.stream.Shuffled(points, size=4)}
    return mlo.Problem(variables={"weights": weights}, objectives={"fit": fit}, streams=streams, evaluate=evaluate)
"""
GRAPH = """
problem: own_pictures
iterations: 7
seed: 3
checkpoint: {every: 3}
levels: {w: {variables: weights, objective: fit, batch: train, optimizer: {sgd: {learning_rate: 0.1}}}}
evaluation: {every: 2, select: validation.loss}
"""
AT = "evaluation.pictures_at=[2, {epochs: 1}, 7, 9]"  # an epoch has five iterations


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "own_pictures.py").write_text(OWN)
    (tmp_path / "graph.yaml").write_text(GRAPH)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def loaded(own: Path, *overrides: str) -> mlo.Spec:
    return mlo.load(own / "graph.yaml", *overrides, imports=["own_pictures"])


def drawn(run: mlo.Run) -> dict[str, bytes]:
    folder = run.folder / "pictures"
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.png"))}


def numbers(run: mlo.Run) -> tuple[object, ...]:
    lines = [{key: value for key, value in line.items() if not key.startswith("seconds")} for line in run.metrics]
    clocks = ("seconds", "peak_memory")
    summary = {key: value for key, value in run.summary.items() if not key.startswith(clocks)}
    return lines, summary, [path.read_bytes() for path in sorted(run.folder.glob("checkpoint/*.safetensors"))]


def test_they_are_those_with_which_a_run_to_there_ends_byte_for_byte(own: Path) -> None:
    found = drawn(mlo.run(loaded(own, AT), own / "run", quiet=True))
    assert list(found) == ["at_2/own.png", "at_5/own.png", "at_7/own.png", "own.png"]
    for iteration in (2, 5, 7):
        ended = mlo.run(
            loaded(own, f"iterations={iteration}", "evaluation.select=null"), own / f"to{iteration}", quiet=True
        )
        assert drawn(ended) == {"own.png": found[f"at_{iteration}/own.png"]}
    assert len(set(found.values())) >= 3


def test_they_change_no_number(own: Path) -> None:
    with_them, without = loaded(own, AT), loaded(own)
    assert with_them.hash == without.hash
    one, other = mlo.run(with_them, own / "one", quiet=True), mlo.run(without, own / "other", quiet=True)
    assert numbers(one) == numbers(other)
    assert set(drawn(other)) == {"own.png"}


@pytest.mark.parametrize("at", [*range(7), "a picture"])
def test_a_run_broken_off_and_resumed_has_all_of_them(own: Path, at: object, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = mlo.run(loaded(own, AT), own / "whole", quiet=True)
    step = mlo.Graph.step

    def broken(graph: mlo.Graph, state: mlo.State, batches: object) -> object:
        if state.iteration == at:
            raise KeyboardInterrupt
        return step(graph, state, batches)

    def torn(folder: Path, pictures: dict[str, Tensor]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "own.png").write_bytes(b"half a picture")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(mlo.Graph, "step", broken)
        if at == "a picture":
            patch.setattr("mlo._run._loop.write_pictures", torn)
        with pytest.raises(KeyboardInterrupt):
            mlo.run(loaded(own, AT), own / "run", quiet=True)
    resumed = mlo.resume(own / "run", quiet=True)
    assert drawn(resumed) == drawn(whole)
    assert numbers(resumed) == numbers(whole)


def test_iterations_that_do_not_come_are_told(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mlo.run(loaded(own, AT), own / "run")
    assert "notice: evaluation.pictures_at: there is no iteration 9, for the run ends at 7" in capsys.readouterr().out


def test_an_unknown_stream_is_told_at_its_place(own: Path) -> None:
    graph = GRAPH.replace("select: validation.loss", "pictures_at: [2, {epochs: 1, of: trian}]")
    (own / "graph.yaml").write_text(graph)
    place = r"graph\.yaml:7:57: evaluation\.pictures_at\[1\]\.of: no stream named 'trian'\. Did you mean 'train'\?"
    with pytest.raises(mlo.SpecError, match=place):
        loaded(own).build()
