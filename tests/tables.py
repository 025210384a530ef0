"""A problem of six numbers that takes milliseconds, goes wrong where it is told to, and differs from seed to seed."""

from __future__ import annotations

from pathlib import Path

PROBLEM = """
import os, time, torch, mlo

class Wrong(mlo.Settings):
    seed: int = -1
    trouble: str = ""
    pause: float = 0.0
    scale: float = 1.0

def build(settings: Wrong, context: mlo.Context) -> mlo.Problem:
    def square(values, batch):
        time.sleep(settings.pause)
        return (values["lower"] - values["upper"] - batch).square().sum() + 0.1 * values["lower"].square().sum()

    def distance(values, batch, *, noted: bool = False):
        if noted:
            with open("noted", "a") as file:
                file.write(".")
        loss = (values["lower"] - 1).square().sum()
        if context.seed != settings.seed or os.path.exists("mended"):
            return loss
        if settings.trouble == "nan" and loss < 2:
            return loss * float("nan")
        if settings.trouble == "bug":
            [][0]
        if settings.trouble == "memory":
            torch.empty(10**15)
        return loss

    def evaluate(values, split, *, model, totals, complete):
        found = settings.scale * (values["lower"] - 1).square().sum() + (split == "test")
        unknown = torch.tensor(float("nan" if settings.trouble == "metric" and context.seed == settings.seed else "1"))
        return mlo.Evaluation(metrics={"gap": found, "distance": found / 2, "odd": unknown})

    return mlo.Problem(
        variables={"point": lambda: torch.zeros(3)},
        objectives={"square": square, "distance": distance},
        streams={"noise": mlo.stream.Noise(lambda generator: torch.randn(3, generator=generator) / 10)},
        evaluate=evaluate,
    )
"""
GRAPH = """
problem: six_numbers
iterations: 40
threads: 1
checkpoint: {every: 20}
levels:
  lower:
    {variables: point, objective: square, given: [upper], batch: noise, steps: 3, optimizer: {sgd: {learning_rate: 0.1}}}
  upper: {variables: point, objective: distance, subject_to: [lower], optimizer: {adam: {learning_rate: 0.1}}}
evaluation: {every: 10, select: validation.distance}
"""
OTHER = """
extends: plain.yaml
name: slower
levels: {lower: {steps: 2}}
"""

BASE = """
extends: plain.yaml
name: base
levels: {upper: {objective: {distance: {noted: true}}}}
"""
FROM_BASE = """
extends: plain.yaml
name: NAME
start: {lower: base.yaml, upper: base.yaml}
"""


def new_place(folder: Path) -> Path:
    """A folder with the problem and graphs: `plain` and `slower`, and two that start from `base`."""
    folder.mkdir(exist_ok=True)
    graphs = {"plain": GRAPH, "slower": OTHER, "base": BASE}
    graphs |= {name: FROM_BASE.replace("NAME", name) for name in ("first", "second")}
    (folder / "six_numbers.py").write_text(PROBLEM)
    for name, text in graphs.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder
