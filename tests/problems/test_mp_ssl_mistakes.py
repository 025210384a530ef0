"""What users of MP-SSL can get wrong: refused with the place, before anything is trained."""

from __future__ import annotations

from pathlib import Path

import pytest

import mlo

GRAPH = Path(__file__).parents[2] / "graphs" / "mp_ssl.yaml"
QUICK = (
    "iterations=1",
    "start.foundation={graph: mp_ssl/foundation.yaml, with: {iterations: 1}}",
    "evaluation.every=1",
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("start")


def test_what_is_judged_is_the_classifier_where_the_graph_does_not_say(cache: Path, tmp_path: Path) -> None:
    runs = [
        mlo.run(mlo.load(GRAPH, *QUICK, change), tmp_path / change[-4:], cache=cache, quiet=True)
        for change in ("evaluation.model=null", "evaluation.model=classifier")
    ]
    assert runs[0].summary["metrics"] == runs[1].summary["metrics"]


@pytest.mark.parametrize("level", ["sampler", "foundation"])
def test_a_level_that_classifies_nothing_is_not_judged(level: str, cache: Path, tmp_path: Path) -> None:
    spec = mlo.load(GRAPH, *QUICK, f"evaluation.model={level}")
    with pytest.raises(mlo.UserError, match=rf"evaluation\.model: level '{level}' is no network .* 'classifier'"):
        mlo.run(spec, tmp_path / "run", cache=cache, quiet=True)


@pytest.mark.parametrize("latent", [0, -3])
def test_latents_have_a_number_at_least(latent: int) -> None:
    with pytest.raises(mlo.SpecError, match=rf"data\.latent: latent is {latent}; it must be at least 1"):
        mlo.load(GRAPH, f"data.latent={latent}").build()


@pytest.mark.parametrize("option", ["layers", "hidden"])
def test_a_mapper_has_a_layer_and_a_unit_at_least(option: str) -> None:
    change = f"levels.sampler.variables.mapper_and_converter.{option}=0"
    with pytest.raises(mlo.SpecError, match=rf"override {change}>: .*\.{option}: {option} is 0; it must be at least 1"):
        mlo.load(GRAPH, change).build()
