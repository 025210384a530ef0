"""Peak memory is the run's own."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from mlo._run._peak import peak_memory

MEGABYTE = 1 << 20
CHILD = """
import torch
from mlo._run._peak import peak_memory
before = peak_memory(torch.device("cpu"))["resident"]
torch.ones(50_000_000)
print(before, peak_memory(torch.device("cpu"))["resident"])
"""
PARENT = """
import subprocess, sys
held = bytearray(b"1") * (1500 * 2**20)
print(subprocess.run([sys.executable, "-c", sys.argv[1]], capture_output=True, text=True, check=True).stdout)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a process does not begin with its parent's peak")
def test_a_process_does_not_inherit_the_peak_of_the_one_that_started_it() -> None:
    found = subprocess.run([sys.executable, "-c", PARENT, CHILD], capture_output=True, text=True, check=True)
    before, after = (int(number) / MEGABYTE for number in found.stdout.split())
    assert 0 < before < 1200
    assert after - before > 150  # of 191 MB that were held in between


def test_tensors_on_the_processor_are_in_main_memory_alone() -> None:
    found = peak_memory(torch.device("cpu"))
    assert found["device"] is None
    assert found["resident"] is None or found["resident"] > 10 * MEGABYTE
