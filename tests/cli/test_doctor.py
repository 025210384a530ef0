"""`mlo doctor`."""

from __future__ import annotations

import errno
import importlib
import os
from pathlib import Path

import pytest

import mlo._doctor
from mlo._doctor import Blame, exit_code, findings


def test_a_sound_installation_is_well(mlo_command):
    code, out, err = mlo_command("doctor")
    assert (code, err) == (0, ""), out
    told = {line[2:].split()[0]: line for line in out.splitlines() if line[:2] in ("  ", "? ")}
    assert {"mlo", "python", "packages", "torch", "devices", "cores", "problems", "graphs", "runs"} <= set(told)
    assert "penalty" in told["problems"]
    assert "needs_aware/gan" in told["graphs"]
    assert "GiB free" in told["runs"]
    assert out.splitlines()[-1] == "all is well"


def broken(name: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    true = importlib.import_module

    def imported(module: str, package: str | None = None):
        if module == name:
            raise RuntimeError(message)
        return true(module, package)

    monkeypatch.setattr(importlib, "import_module", imported)


def test_a_torchvision_without_its_operators_is_worth_knowing_and_nothing_more(mlo_command, monkeypatch):
    broken("torchvision", "operator torchvision::nms does not exist", monkeypatch)
    code, out, _ = mlo_command("doctor")
    assert code == 0
    assert "? torchvision  " in out
    assert "without its operators" in out
    assert out.splitlines()[-1] == "all is well"


def test_a_torchvision_that_is_not_there_is_the_installation(mlo_command, monkeypatch):
    true = mlo._doctor._version
    monkeypatch.setattr(mlo._doctor, "_version", lambda name: None if name == "torchvision" else true(name))
    code, out, _ = mlo_command("doctor")
    assert code == 2
    assert "! torchvision  not installed; images from disk need it" in out


def test_a_broken_torchvision_is_the_installation(mlo_command, monkeypatch):
    true = mlo._doctor._version
    monkeypatch.setattr(mlo._doctor, "_version", lambda name: "0.28.0" if name == "torchvision" else true(name))
    broken("torchvision", "_C.so: undefined symbol: _ZN5torch3jit17parseSchema", monkeypatch)
    code, out, _ = mlo_command("doctor")
    assert code == 2
    assert "! torchvision  0.28.0 cannot be imported: RuntimeError: _C.so: undefined symbol" in out
    assert "it was built for another torch" in out
    assert out.splitlines()[-1] == "1 thing is wrong, marked with !"


def test_a_problem_that_cannot_be_imported_has_a_line(monkeypatch, tmp_path):
    broken("problems.penalty", "no digits here", monkeypatch)
    found = list(findings(tmp_path / "runs"))
    assert any(
        each.blame is Blame.INSTALLATION and each.found == "penalty (problems.penalty): RuntimeError: no digits here"
        for each in found
    )
    assert exit_code(found) == 2


def test_a_graph_that_does_not_load_has_a_line(monkeypatch, tmp_path):
    (tmp_path / "wrong.yaml").write_text("problem: penalty\n")
    monkeypatch.setattr(mlo._doctor, "shipped_graphs", lambda: {"wrong": tmp_path / "wrong.yaml"})
    found = list(findings(tmp_path / "runs"))
    assert any(each.what == "graphs" and "'levels' is missing" in each.found for each in found)
    assert exit_code(found) == 2


def test_a_folder_that_cannot_be_written_is_the_machine(monkeypatch, tmp_path):
    def refused(path: Path, data: bytes) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "write_bytes", refused)
    found = list(findings(tmp_path / "runs"))
    assert any(each.blame is Blame.MACHINE and "Read-only file system" in each.found for each in found)
    assert exit_code(found) == 4


def test_a_full_disk_and_a_file_in_the_way_are_the_machine(monkeypatch, tmp_path):
    monkeypatch.setattr(mlo._doctor, "_ROOM", 2**62)
    assert exit_code(list(findings(tmp_path / "runs"))) == 4
    (tmp_path / "runs").write_text("")
    assert exit_code(list(findings(tmp_path / "runs"))) == 4


def test_more_threads_than_cores_is_a_notice_and_no_fault(monkeypatch, tmp_path):
    monkeypatch.setattr(mlo._doctor, "usable_cores", lambda: 0.5)
    found = list(findings(tmp_path / "runs"))
    assert any(each.blame is Blame.NOTICE and "1 threads on 0.5 cores" in each.found for each in found)
    assert exit_code(found) == 0
