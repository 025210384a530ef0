"""`mlo export`: what a run has trained, for plain PyTorch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import mlo
from problems.penalty import linear


@pytest.fixture
def trained(tmp_path: Path) -> mlo.Run:
    changes = ("iterations=6", "evaluation.every=2", "checkpoint={every: 2}")
    return mlo.run(mlo.load("penalty", *changes), tmp_path / "run", quiet=True)


def test_a_module_loads_into_the_problems_own_class_and_tensors_stand_alone(mlo_command, trained):
    code, out, err = mlo_command("export", "run", "--which", "latest")
    assert (code, err) == (0, "")
    assert out == "wrote 2 levels and export.json to run/export\n"
    folder = trained.folder / "export"
    record = json.loads((folder / "export.json").read_text())
    assert record["checkpoint"] == "latest"
    assert record["iteration"] == 6
    assert set(record["levels"]) == {"weights", "penalty"}
    told = record["levels"]["weights"]
    assert told["module"] == "torch.nn.modules.linear.Linear"
    assert told["tensors"]["weight"] == {"shape": [10, 64], "dtype": "float32"}
    module = linear()
    module.load_state_dict(load_file(folder / told["file"]))
    images = torch.rand(5, 64)
    torch.testing.assert_close(module(images), trained.module("weights", "latest")(images), rtol=0, atol=0)
    (penalty,) = load_file(folder / record["levels"]["penalty"]["file"]).values()
    torch.testing.assert_close(penalty, trained.state("latest").values["penalty"], rtol=0, atol=0)


def test_networks_with_buffers_options_and_frozen_parts(mlo_command, tmp_path, trained):
    from problems.blocks.networks import Classifier, Encoder

    spec = mlo.load("needs_aware/vanilla", "iterations=2", "evaluation=null")
    run = mlo.run(spec, tmp_path / "vanilla", quiet=True)
    assert mlo_command("export", "vanilla", "--out", "out")[0] == 0
    record = json.loads((tmp_path / "out" / "export.json").read_text())
    for level, told in record["levels"].items():
        found = load_file(tmp_path / "out" / told["file"])
        kinds = {"encoder": Encoder, "classifier": Classifier}
        choice = told["variables"]
        ((name, options),) = (choice if isinstance(choice, dict) else {choice: {}}).items()
        module = kinds[name](**options).eval()
        module.load_state_dict(found)
        images = torch.rand(3, 1, 8, 8)
        torch.testing.assert_close(module(images), run.module(level)(images), rtol=0, atol=0)
        assert any("running_mean" in key for key in found)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere",), "nowhere: not a run folder, spec.yaml is missing"),
        (("run", "--out", "run"), "run: an export folder must be new or empty"),
        (("run", "--which", "best"), "'best'"),
    ],
)
def test_what_cannot_be_exported_is_refused(mlo_command, trained, arguments, message):
    code, _, err = mlo_command("export", *arguments)
    assert code == 2
    assert message in err


def test_an_export_that_is_there_is_kept(mlo_command, trained):
    assert mlo_command("export", "run")[0] == 0
    code, _, err = mlo_command("export", "run")
    assert code == 2
    assert "run/export" in err
