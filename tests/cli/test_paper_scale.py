"""The graphs at paper scale: they hold what the papers state, and `check` accepts them on files of each set."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from image_files import WRITERS, biggan, write

import mlo
from mlo.spec import Epochs

FOLDER = Path(mlo.__file__).parents[1] / "graphs" / "madao"
ROWS = {  # Tables 2, 3 and 4: set, network, its options, epochs, share of the training images that validates
    "cifar10": ("cifar10", "wide_resnet", {"depth": 28, "width": 2}, 300, 0.1),
    "cifar10_wide_resnet_40_2": ("cifar10", "wide_resnet", {"depth": 40, "width": 2}, 300, 0.1),
    "cifar10_wide_resnet_28_10": ("cifar10", "wide_resnet", {"depth": 28, "width": 10}, 300, 0.1),
    "cifar10_densenet": ("cifar10", "densenet", {"depth": 40, "growth": 12}, 300, 0.1),
    "cifar100": ("cifar100", "wide_resnet", {"depth": 28, "width": 2}, 300, 0.1),
    "cifar100_wide_resnet_40_2": ("cifar100", "wide_resnet", {"depth": 40, "width": 2}, 300, 0.1),
    "svhn": ("svhn", "wide_resnet", {"depth": 28, "width": 2}, 160, 0.1),
    "svhn_wide_resnet_40_2": ("svhn", "wide_resnet", {"depth": 40, "width": 2}, 160, 0.1),
    "imagenet": ("imagenet", "resnet", {"depth": 50}, 180, 0.01),
    "flowers": ("flowers", "resnet", {"depth": 18}, 200, 0.1),
    "pets": ("pets", "resnet", {"depth": 18}, 200, 0.1),
    "aircraft": ("aircraft_families", "resnet", {"depth": 18}, 200, 0.1),
    "cars": ("cars", "resnet", {"depth": 18}, 200, 0.1),
}


def test_every_policy_learned_on_images_from_disk_is_in_the_table():
    specs = [mlo.load(path) for path in FOLDER.glob("*.yaml")]
    learned = [spec for spec in specs if any(level.subject_to for level in spec.levels.values())]
    assert {spec.name for spec in learned if spec.data.get("source") in WRITERS} == {f"madao_{name}" for name in ROWS}


@pytest.mark.parametrize("name", ROWS)
def test_a_graph_holds_what_the_paper_states(name: str):
    source, network, options, epochs, validation = ROWS[name]
    spec = mlo.load(FOLDER / f"{name}.yaml")
    classifier, policy = spec.levels["classifier"], spec.levels["policy"]
    assert (spec.name, spec.data["source"], spec.data["validation"]) == (f"madao_{name}", source, validation)
    assert spec.data["fraction"] == 1.0
    assert classifier.variables is not None
    assert (classifier.variables.name, dict(classifier.variables.options)) == (network, options)
    assert spec.iterations == Epochs(epochs=epochs)
    assert classifier.optimizer is not None
    cosine = classifier.optimizer.options["learning_rate"]["cosine"]
    assert cosine["over"] == {"epochs": epochs}
    assert classifier.hypergradient is not None
    series = {"terms": 5, "step_size": 1e-3, "compare": "first_order", "measure_curvature": True}
    # J, α, and what is recorded beside
    assert classifier.hypergradient.yaml() == {"neumann": series}
    assert (policy.every, policy.warm_up) == (60, Epochs(epochs=30, of="train"))
    assert policy.variables is not None
    assert policy.variables.yaml() == {"policy": {"stages": 2, "temperature": 0.1, "initial": 0.5}}
    assert policy.optimizer is not None
    assert policy.optimizer.yaml() == {"rmsprop": {"learning_rate": 1e-2}}


@pytest.mark.parametrize("name", ["cifar10", "cifar10_densenet", "cifar100", "svhn", "flowers", "imagenet"])
def test_check_accepts_a_graph_and_counts_its_epochs(name: str, mlo_command, tmp_path: Path):
    source, _, _, epochs, validation = ROWS[name]
    images = 200 if name == "imagenet" else 80
    write(source, tmp_path / "images", train=images // 2)
    overrides = ["data.root=images", "data.complete=false", "data.batch_size=4"]
    if ROWS[name][1] == "wide_resnet":
        overrides.append("levels.classifier.variables.wide_resnet={depth: 10, width: 1}")
    elif ROWS[name][1] == "densenet":
        overrides.append("levels.classifier.variables.densenet.depth=10")
    else:
        overrides += ["data.size=64", "levels.classifier.variables.resnet.depth=18"]
    code, out, err = mlo_command("check", str(FOLDER / f"{name}.yaml"), *overrides)
    assert (code, err) == (0, "")
    passes = (1 - validation) * images / 4  # iterations that an epoch of the classifier has
    assert f"2 levels, {round(epochs * passes):,} iterations\n" in out
    assert f" {math.floor((epochs - 30) * passes / 60)} pullbacks\n" in out


@pytest.mark.parametrize("name", ROWS)
def test_without_images_the_answer_is_where_they_should_be(name: str, mlo_command):
    code, _, err = mlo_command("check", str(FOLDER / f"{name}.yaml"))
    assert code == 2
    assert f"data: root is not given; {ROWS[name][0]} is read from a folder that holds" in err


MGR = FOLDER.parent / "mgr"


@pytest.mark.parametrize("source", ["cars", "aircraft", "birds", "dtd", "flowers", "pets"])
def test_a_graph_of_mgr_holds_what_the_paper_states(source: str, mlo_command):
    spec = mlo.load(MGR / f"{source}.yaml")
    assert (spec.name, spec.data["source"], spec.data["validation"]) == (f"mgr_{source}", source, 0.1)
    assert (spec.data["fraction"], spec.data["strongest"]) == (1.0, 1.0)
    assert spec.iterations == Epochs(epochs=200)
    classifier, finder, start = spec.levels["classifier"], spec.levels["finder"], spec.starts["generator"]
    assert classifier.variables is not None
    assert classifier.variables.yaml() == {"resnet": {"depth": 18}}
    assert classifier.optimizer is not None
    schedule = classifier.optimizer.options["learning_rate"]["multi_step"]
    assert (schedule["start"], schedule["factor"], tuple(schedule["at"]["epochs"])) == (0.01, 0.1, (60, 120, 160))
    assert finder.optimizer is not None
    assert finder.optimizer.yaml() == {"adam": {"learning_rate": 1e-4}}
    assert {key: start.data[key] for key in ("source", "validation", "latent")} == {
        "source": source,
        "validation": 0.1,
        "latent": 128,
    }  # G is trained on the same D
    code, _, err = mlo_command("check", str(MGR / f"{source}.yaml"))
    assert code == 2
    assert f"data: root is not given; {source} is read from a folder that holds" in err


MP_SSL = FOLDER.parent / "mp_ssl"


@pytest.mark.parametrize("source", ["cars", "aircraft", "birds", "dtd", "flowers", "pets"])
def test_a_graph_of_mp_ssl_holds_what_the_paper_states(source: str, mlo_command):
    spec = mlo.load(MP_SSL / f"{source}.yaml")
    assert (spec.name, spec.data["source"]) == (f"mp_ssl_{source}", source)
    assert (spec.data["fraction"], spec.data["validation"], spec.data["foundation"]) == (0.5, 0.1, 0.0)
    assert (spec.data["strongest"], spec.data["flip"], spec.data["foundation_labels"]) == (1.0, True, 1000)
    assert spec.data.get("batch_size", 64) == 64
    assert spec.iterations == Epochs(epochs=200)
    classifier, sampler, foundation = (spec.levels[name] for name in ("classifier", "sampler", "foundation"))
    assert classifier.variables is not None
    assert classifier.variables.yaml() == {"resnet": {"depth": 18}}
    assert classifier.optimizer is not None
    schedule = classifier.optimizer.options["learning_rate"]["multi_step"]
    assert (schedule["start"], schedule["factor"], tuple(schedule["at"]["epochs"])) == (0.01, 0.1, (60, 120, 160))
    assert (classifier.optimizer.options["momentum"], classifier.optimizer.options["nesterov"]) == (0.9, True)
    assert classifier.hypergradient is not None
    assert classifier.hypergradient.yaml() == "unroll"
    assert sampler.lookahead
    assert sampler.optimizer is not None
    assert sampler.optimizer.yaml() == {"adam": {"learning_rate": 1e-4}}
    assert sampler.objective is not None
    assert sampler.objective.options["gap_weight"] == 10
    assert sampler.variables is not None
    assert sampler.variables.options["temperature"] == 0.1
    assert foundation.frozen
    assert not spec.starts
    code, _, err = mlo_command("check", str(MP_SSL / f"{source}.yaml"))
    assert code == 2
    assert f"data: root is not given; {source} is read from a folder that holds" in err


def test_check_asks_mp_ssl_for_the_generator_and_takes_resnets_of_other_depths(mlo_command, tmp_path: Path):
    graph = str(MP_SSL / "pets.yaml")
    write("pets", tmp_path / "images", train=40)
    biggan(tmp_path / "biggan.pt", latent=140)
    told = ["data.root=images", "data.complete=false", "data.batch_size=4", "data.size=32", "data.workers=0"]
    code, _, err = mlo_command("check", graph, *told)
    assert code == 2
    assert "cars.yaml:" in err
    assert "levels.foundation.variables.torchscript.path: path is 'biggan-256.pt'; there is no such file" in err
    told += ["levels.foundation.variables.torchscript.path=biggan.pt", "levels.classifier.variables.resnet.depth=50"]
    code, out, err = mlo_command("check", graph, *told)
    assert (code, err) == (0, "")
    assert (
        "3 levels, 1,800 iterations\n" in out
    )  # 80 images, half of them labelled, nine tenths of these, 9 batches of 4
