"""Runs with `compile: true`: resumed bit for bit, with the numbers of other runs, and refused before the first step."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch._inductor import config

import mlo
from mlo import _tree
from mlo._backend import NO_COMPILER
from mlo.spec._build import assemble

ROOT = Path(__file__).parent.parent.parent
DRAWING = """
import mlo, torch

def build(settings: mlo.Settings, context: mlo.Context) -> mlo.Problem:
    return mlo.Problem(variables={"number": lambda: torch.ones(())}, objectives={"noisy": noisy}, streams={})

def noisy(values, batch):
    return (values["w"] * torch.randn(())).square()
"""
NOISY = """
problem: drawing
iterations: 3
compile: true
levels: {w: {variables: number, objective: noisy, optimizer: {sgd: {learning_rate: 0.1}}}}
"""


@pytest.fixture(autouse=True)
def no_compiler() -> Iterator[None]:
    """Torch looks for a compiler that is not there, so that traced operations are run one by one."""
    with config.patch({"cpp.cxx": ("/there/is/none",)}):
        yield


def penalty(*overrides: str) -> mlo.Spec:
    settings = ("iterations=6", "checkpoint.every=2", "levels.penalty.every=2", *overrides)
    return mlo.load(ROOT / "graphs" / "penalty.yaml", *settings)


def tensors(run: mlo.Run) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run.folder / "checkpoint").glob("*.safetensors")}


def test_a_compiled_run_is_resumed_bit_for_bit_and_equals_another_up_to_rounding(tmp_path, monkeypatch):
    compiled = penalty("compile=true")
    whole = mlo.run(compiled, tmp_path / "whole", quiet=True)
    step = mlo.Graph.step

    def broken(graph: mlo.Graph, state: mlo.State, batches: object) -> object:
        if state.iteration == 4:
            raise KeyboardInterrupt
        return step(graph, state, batches)

    monkeypatch.setattr(mlo.Graph, "step", broken)
    with pytest.raises(KeyboardInterrupt):
        mlo.run(compiled, tmp_path / "broken", quiet=True)
    monkeypatch.setattr(mlo.Graph, "step", step)
    again = mlo.resume(tmp_path / "broken", quiet=True)
    assert tensors(again) == tensors(whole)
    plain = mlo.run(penalty(), tmp_path / "plain", quiet=True)
    for name in ("weights", "penalty"):
        found, right = (_tree.leaves(run.state().values[name]) for run in (whole, plain))
        for one, two in zip(found, right, strict=True):
            assert torch.allclose(one, two, rtol=1e-4, atol=1e-6), name


def test_without_a_compiler_a_notice_says_so():
    assert assemble(penalty("compile=true")).notices == (NO_COMPILER,)
    assert not assemble(penalty()).notices


def test_an_objective_that_draws_is_refused_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "drawing", raising=False)
    (tmp_path / "drawing.py").write_text(DRAWING)
    (tmp_path / "noisy.yaml").write_text(NOISY)
    spec = mlo.load(tmp_path / "noisy.yaml", imports=["drawing"])
    with pytest.raises(mlo.GraphError, match=r"level 'w', objective: it draws random numbers .*draw them in a stream"):
        mlo.run(spec, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run" / "checkpoint").exists()
