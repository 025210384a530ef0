"""Compare runs over seeds: `python examples/compare_runs.py runs/results --against needs_aware`.

Reads the folders `<name>-<seed>` and prints, for one metric, the mean and standard deviation over seeds, and the paired
difference from one of them with its standard error and t: the same seed means the same data and the same draws.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import mlo


def scores(folder: Path, metric: str) -> dict[str, dict[int, float]]:
    """By name and seed, the metric of every finished run in `folder`."""
    found: dict[str, dict[int, float]] = {}
    for path in sorted(folder.iterdir()):
        if (path / "summary.json").exists():
            summary = mlo.open_run(path).summary
            found.setdefault(path.name.rpartition("-")[0], {})[summary["seed"]] = summary["metrics"][metric]
    return found


def row(name: str, own: dict[int, float], other: dict[int, float]) -> str:
    """One line of the table."""
    values = list(own.values())
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    text = f"| {name} | {len(values)} | {statistics.mean(values):.1f} ± {spread:.1f} |"
    differences = [own[seed] - other[seed] for seed in own if seed in other]
    if own is other or len(differences) < 2:
        return f"{text} | |"
    error = statistics.stdev(differences) / len(differences) ** 0.5
    mean = statistics.mean(differences)
    return f"{text} {mean:+.1f} ± {error:.1f} | {mean / error if error else float('inf'):+.1f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--against", required=True, help="the name whose runs the others are paired with")
    parser.add_argument("--metric", default="test.balanced_accuracy")
    arguments = parser.parse_args()
    found = scores(arguments.folder, arguments.metric)
    print(f"| {arguments.metric} | seeds | mean ± deviation | difference ± error | t |\n|---|---|---|---|---|")
    for name in sorted(found, key=lambda name: -statistics.mean(found[name].values())):
        print(row(name, found[name], found[arguments.against]))


if __name__ == "__main__":
    main()
