"""A wrong graph is answered before torch is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import sys
from mlo._errors import SpecError
from mlo.spec import hypergradient_of, load, optimizer_of
spec = load("graph.yaml", imports=["toy"])
optimizer_of(spec.levels["weights"].optimizer), hypergradient_of(spec.levels["weights"].hypergradient)
spec.hash, spec.to_yaml()
try:
    load("graph.yaml", "problem=blocks", "levels.weights.hypergradient=neuman", "levels.weights.given=x")
except SpecError as error:
    print(error)
loaded = {"torch", "numpy", "problems"} & set(sys.modules)
assert not loaded, loaded
"""


def test_spec_errors_come_without_torch(write):
    write()
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env={"PYTHONPATH": str(root)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "no method named 'neuman'" in done.stdout
    assert "no problem named 'blocks'" in done.stdout
