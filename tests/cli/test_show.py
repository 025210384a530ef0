"""`mlo show`: text, Mermaid, SVG."""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from itertools import combinations, pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlo._draw import mermaid, svg
from mlo._draw._layout import layout
from mlo.spec import LevelSpec, load, shipped_graphs

ROOT = Path(__file__).parent.parent.parent
SVG = "{http://www.w3.org/2000/svg}"


def test_text_says_what_each_level_reads_and_when_it_moves(mlo_command):
    code, out, err = mlo_command("show", "needs_aware", "levels.meta.warm_up=200", "levels.classifier.steps=3")
    assert (code, err) == (0, "")
    assert out.splitlines()[:2] == [
        "needs_aware: 5 levels of problem needs_aware, 1,000 iterations",
        "run order: classifier → discriminator → generator → refined → meta",
    ]
    words = [" ".join(line.split()) for line in out.splitlines()]
    assert "⇐ subject to refined, generator, classifier" in words
    assert "← given meta, classifier, generator" in words
    assert "↔ against discriminator" in words
    assert "moves every iteration, 3 steps of sgd {learning_rate: 0.05, momentum: 0.9}" in words
    assert "moves every 8 iterations, after 200 iterations, 1 step of adam {learning_rate: 0.001}" in words
    assert "holds fixed meta → discriminator → generator" in words
    assert "pulled back by finite_difference {radius: 0.01}" in words
    assert "starts from needs_aware_gan" in words


def test_text_says_what_an_optimizer_reads(mlo_command):
    code, out, err = mlo_command("show", "learned_rates")
    assert (code, err) == (0, "")
    words = [" ".join(line.split()) for line in out.splitlines()]
    assert "← given rates" in words
    assert "its optimizer reads learning_rate ← rates.learning_rate, weight_decay ← rates.weight_decay" in words


def test_mermaid_has_every_level_and_every_arrow():
    drawn = mermaid(load("needs_aware"))
    assert drawn.startswith("flowchart BT\n")
    assert "  level_classifier ==>|subject to| level_meta" in drawn
    assert "  level_meta -->|given| level_refined" in drawn
    assert drawn.count("<-.->") == 1
    assert drawn.count("==>") == 3


@pytest.mark.parametrize("name", shipped_graphs())
def test_svg_is_a_picture_of_every_level_and_arrow(name):
    spec = load(name)
    picture = ElementTree.fromstring(svg(spec))
    names = [text.text for text in picture.iter(f"{SVG}text") if text.get("class") == "name"]
    assert sorted(names) == sorted(spec.levels)
    said = [title.text or "" for path in picture.iter(f"{SVG}path") for title in path.iter(f"{SVG}title")]
    for level in spec.levels.values():
        assert {f"{level.name} given {read}" for read in level.given} <= set(said)
        assert {f"{level.name} subject to {read}" for read in level.subject_to} <= set(said)
    players = sum(len(level.against) for level in spec.levels.values()) // 2
    assert sum(" against " in each for each in said) == players
    width, height = float(picture.get("width", 0)), float(picture.get("height", 0))
    for box in picture.iter(f"{SVG}g"):
        (rect,) = box.iter(f"{SVG}rect")
        left, top, wide, high = (float(rect.get(key, -1)) for key in ("x", "y", "width", "height"))
        assert left >= 0
        assert top >= 0
        assert left + wide <= width
        assert top + high <= height


@st.composite
def level_tables(draw) -> dict[str, LevelSpec]:
    """Random levels that read those before them, some of them back up from theirs."""
    count = draw(st.integers(1, 7))
    names = [f"l{number}" for number in range(count)]
    table: dict[str, LevelSpec] = {}
    for number, name in enumerate(names):
        lower = draw(st.lists(st.sampled_from(names[:number]), unique=True, max_size=3)) if number else []
        table[name] = LevelSpec(name=name, given=tuple(lower))
    return table


@settings(max_examples=60)
@given(level_tables())
def test_boxes_never_overlap_and_arrows_follow_the_layers(levels):
    plan = layout(levels, box=100, lane=20, gap=10)
    assert sorted(place for row in plan.layers for place in row if isinstance(place, str)) == sorted(levels)
    width = {place: 100 if isinstance(place, str) else 20 for row in plan.layers for place in row}
    for row in plan.layers:
        for one, two in pairwise(row):
            assert plan.x[two] - plan.x[one] >= (width[one] + width[two]) / 2 + 10 - 1e-6
        for one, two in combinations(row, 2):
            assert plan.x[one] < plan.x[two]
    at = {place: number for number, row in enumerate(plan.layers) for place in row}
    for (one, two), path in plan.paths.items():
        assert (path[0], path[-1]) == (one, two)
        assert all(abs(at[low] - at[high]) <= 1 for low, high in pairwise(path))
    for level in levels.values():
        assert all(at[read] < at[level.name] for read in level.given)
    assert layout(dict(reversed(levels.items())), box=100, lane=20, gap=10) == plan


def test_every_form_comes_without_torch_and_goes_to_a_file(tmp_path):
    program = (
        "import sys\nfrom mlo.cli import main\n"
        "for form in ('text', 'mermaid', 'svg'):\n"
        "    try:\n        main(['show', 'needs_aware', '--format', form, '--out', form])\n"
        "    except SystemExit as exited:\n        print(exited.code, 'torch' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "0 False\n" * 3, done.stderr
    assert (tmp_path / "svg").read_text(encoding="utf-8").startswith("<svg ")


def test_a_form_that_is_not_there_is_refused(mlo_command):
    code, _, err = mlo_command("show", "penalty", "--format", "pdf")
    assert code == 2
    assert "'pdf'" in err
