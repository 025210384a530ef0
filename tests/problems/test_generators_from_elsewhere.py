"""Generators from files and from modules of the user's own: what arrives, and what is refused with which words."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

import mlo
from problems.blocks.generators import Signature, exported, imported, torchscript
from problems.blocks.generators._elsewhere import FromModule

SIGNATURE = Signature(latent=4, labels=3, channels=1, size=8, interval="unit")
Save = Callable[[nn.Module, Path], str]


class Small(nn.Module):
    """A conditional generator of 8×8 images with BatchNorm, smooth."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.embedding = nn.Embedding(3, 4)
        self.layers = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 64))

    def forward(self, latents: Tensor, labels: Tensor) -> Tensor:
        return self.layers(latents + self.embedding(labels)).sigmoid().reshape(-1, 1, 8, 8)


class Unconditional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.layers = nn.Linear(4, 64)

    def forward(self, latents: Tensor) -> Tensor:
        return self.layers(latents).tanh().reshape(-1, 1, 8, 8)


class Weighed(nn.Module):
    """One as BigGAN is published: it takes weights of its seven labels, and gives 12×12 images in [−1, 1], in colour."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.embedding = nn.Linear(7, 4, bias=False)
        self.layers = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3 * 144), nn.Tanh())

    def forward(self, latents: Tensor, weights: Tensor) -> Tensor:
        return self.layers(latents + self.embedding(weights)).reshape(-1, 3, 12, 12)


class Chosen(Weighed):
    """It takes weights and looks at the largest only."""

    def forward(self, latents: Tensor, weights: Tensor) -> Tensor:
        rows = self.embedding.weight.T[weights.argmax(1)]
        return self.layers(latents + rows).reshape(-1, 3, 12, 12)


class Flat(Small):
    def forward(self, latents: Tensor, labels: Tensor) -> Tensor:
        return self.layers(latents + self.embedding(labels)).sigmoid()


class Wide(Small):
    def forward(self, latents: Tensor, labels: Tensor) -> Tensor:
        return 255 * self.layers(latents + self.embedding(labels)).sigmoid().reshape(-1, 1, 8, 8)


class Random(Small):
    def forward(self, latents: Tensor, labels: Tensor) -> Tensor:
        latents = latents + 0.1 * torch.randn_like(latents)
        return self.layers(latents + self.embedding(labels)).sigmoid().reshape(-1, 1, 8, 8)


class Detached(Small):
    def forward(self, latents: Tensor, labels: Tensor) -> Tensor:
        return self.layers(latents.detach() + self.embedding(labels)).sigmoid().reshape(-1, 1, 8, 8)


class Steps(Small):
    """Differentiable in name: the derivative of rounding is zero."""

    def forward(self, latents: Tensor, labels: Tensor) -> Tensor:
        return self.layers(latents.round() + self.embedding(labels)).sigmoid().reshape(-1, 1, 8, 8)


def example(module: nn.Module) -> tuple[Tensor, ...]:
    if isinstance(module, Weighed):
        return torch.randn(2, 4), torch.rand(2, 7)
    return (torch.randn(2, 4),) if isinstance(module, Unconditional) else (torch.randn(2, 4), torch.tensor([0, 1]))


def scripted(module: nn.Module, folder: Path) -> str:
    path = folder / "generator.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.trace(module.eval(), example(module), check_trace=False), str(path))
    return str(path)


def program(module: nn.Module, folder: Path, *, free: bool = True) -> str:
    path = folder / "generator.pt2"
    dims = {0: torch.export.Dim("n", min=1, max=4096)} if free else None
    given = example(module)
    torch.export.save(torch.export.export(module.eval(), given, dynamic_shapes=(dims,) * len(given)), str(path))
    return str(path)


KINDS = [(scripted, torchscript), (program, exported)]
each_kind = pytest.mark.parametrize(("save", "load"), KINDS, ids=["torchscript", "exported"])


@each_kind
def test_a_file_gives_the_images_and_derivatives_of_the_module(save: Save, load: Any, tmp_path: Path):
    module = Small()
    module.train()(torch.randn(50, 4), torch.zeros(50, dtype=torch.int64))  # running statistics that are not 0 and 1
    generator = load(save(module, tmp_path), SIGNATURE)
    assert (generator.latent, generator.labels, generator.channels, generator.size) == (4, 3, 1, 8)
    assert not list(generator.parameters())
    latents, labels = torch.randn(5, 4, requires_grad=True), torch.arange(5) % 3
    for _ in range(3):  # TorchScript rewrites a program in its first calls
        found, right = generator(latents, labels), module.eval()(latents, labels)
        torch.testing.assert_close(found, right)
        one, two = (torch.autograd.grad(each.square().sum(), latents, create_graph=True)[0] for each in (found, right))
        torch.testing.assert_close(one, two)
        one, two = (torch.autograd.grad(each.square().sum(), latents)[0] for each in (one, two))
        torch.testing.assert_close(one, two)


@each_kind
def test_a_file_without_labels_in_the_other_interval(save: Save, load: Any, tmp_path: Path):
    module = Unconditional()
    generator = load(save(module, tmp_path), replace(SIGNATURE, labels=None, interval="symmetric"))
    latents = torch.randn(5, 4, dtype=torch.float64)
    found = generator(latents, torch.arange(5))
    assert found.dtype == torch.float64  # of the latents, whatever the file was saved in
    torch.testing.assert_close(found.float(), (module(latents.float()) + 1) / 2)


@each_kind
def test_a_level_searches_latents_of_a_file(save: Save, load: Any, tmp_path: Path):
    module, labels = Small().eval(), torch.tensor([0, 2])
    generator = load(save(module, tmp_path), SIGNATURE)

    def objective(values: mlo.Values, batch: object) -> Tensor:
        return values["generator"](values["latents"], labels, training=False).square().mean()

    start = torch.randn(2, 4)
    graph = mlo.Graph(
        [
            mlo.Level("generator", variables=generator, optimizer=None),
            mlo.Level(
                "latents",
                objective=objective,
                variables=start,
                given=("generator",),
                optimizer=mlo.optimizer.SGD(learning_rate=1.0),
            ),
        ]
    )
    after, _ = graph.step(graph.init(seed=0), {})
    at = start.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(module(at, labels).square().mean(), at)
    torch.testing.assert_close(after.values["latents"], start - gradient)


@each_kind
def test_another_file_under_a_checkpoint_is_refused(save: Save, load: Any, tmp_path: Path):
    generator = load(save(Small(), tmp_path), SIGNATURE)
    other = Small()
    with torch.no_grad():
        other.layers[0].weight += 1
    again = load(save(other, tmp_path), SIGNATURE)
    again.load_state_dict(generator.state_dict())
    with pytest.raises(mlo.UserError, match="not the one that this run began with"):
        again(torch.randn(2, 4), torch.arange(2))


@each_kind
def test_weights_of_labels_are_refused(save: Save, load: Any, tmp_path: Path):
    generator = load(save(Small(), tmp_path), SIGNATURE)
    with pytest.raises(mlo.UserError, match=r"whole numbers \[n\], .* not weights \[n, 3\]; say `weights: true` where"):
        generator(torch.randn(2, 4), torch.ones(2, 3))


WEIGHED = Signature(latent=4, labels=7, weights=True, channels=3, size=8, drawn=12, interval="symmetric")


@each_kind
def test_a_program_of_weights_with_labels_and_a_size_of_its_own(save: Save, load: Any, tmp_path: Path):
    """Images and both derivatives, in z and in the weights, are those of the module, resized by torch."""
    module = Weighed()
    generator = load(save(module, tmp_path), WEIGHED)
    assert (generator.labels, generator.size) == (7, 8)
    module = module.double()
    wide, narrow = torch.randn(5, 4, requires_grad=True), torch.randn(5, 7).softmax(1).requires_grad_()
    inputs = (wide.double(), narrow.double())
    for _ in range(3):  # TorchScript rewrites a program in its first calls
        found = generator(wide, narrow)
        right = interpolate((module(*inputs) + 1) / 2, size=(8, 8), mode="bilinear", antialias=True)
        assert found.shape == (5, 3, 8, 8)
        torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=1e-6)
        ones, twos = (
            torch.autograd.grad(each.pow(3).sum(), (wide, narrow), create_graph=True) for each in (found, right)
        )
        torch.testing.assert_close(ones, twos, rtol=1e-4, atol=1e-5)
        ones, twos = (
            torch.autograd.grad(sum(part.square().sum() for part in each), (wide, narrow)) for each in (ones, twos)
        )
        assert min(part.norm() for part in twos) > 0.01
        torch.testing.assert_close(ones, twos, rtol=1e-4, atol=1e-4)
    labels = torch.tensor([6, 0, 3, 3, 1])
    torch.testing.assert_close(generator(wide, labels), generator(wide, torch.eye(7)[labels]), rtol=0, atol=0)


def test_images_are_resized_by_averages_of_what_they_hold():
    """A linear ramp is a linear ramp at any size, and a constant stays."""
    module = nn.Linear(4, 1)

    class Ramp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.level = module

        def forward(self, latents: Tensor) -> Tensor:
            across = (torch.arange(24) + 0.5) / 24
            return self.level(latents).sigmoid()[:, :, None, None] * across.expand(1, 1, 24, 24)

    signature = Signature(latent=4, labels=None, channels=1, size=8, drawn=24, interval="unit")
    latents = torch.randn(3, 4)
    images = FromModule(Ramp(), signature)(latents)
    across = (torch.arange(8) + 0.5) / 8
    right = module(latents).sigmoid()[:, :, None, None] * across.expand(1, 1, 8, 8)
    torch.testing.assert_close(images[..., 1:-1], right[..., 1:-1])  # at the edges there is less to average


WEIGHED_REFUSED = [
    (Weighed, {"labels": 6}, r"called with latents \[2, 4\] and weights \[2, 6\] it fails"),
    (
        Weighed,
        {"drawn": None},
        r"it gives \[2, 3, 12, 12\], and images are \[2, 3, 8, 8\]; say `size: 12` and they are",
    ),
    (Weighed, {"drawn": 16}, r"it gives \[2, 3, 12, 12\], and images are \[2, 3, 16, 16\]; say `size: 12`"),
    (Weighed, {"interval": "unit"}, r"^interval is 'unit'; path '.*' so gives intensities from -"),
    (Weighed, {"weights": False}, r"called with latents \[2, 4\] and labels \[2\] it fails"),
    (Weighed, {"labels": None}, r"^weights is true, and there are no labels: conditional is false"),
    (Weighed, {"drawn": 0}, r"^size is 0; it must be at least 1 pixel"),
    (Chosen, {}, r"the derivative of its images in the weights of labels is zero"),
]


@each_kind
@pytest.mark.parametrize(("kind", "other", "message"), WEIGHED_REFUSED)
def test_what_a_program_of_weights_can_do_wrong(
    save: Save, load: Any, kind: type[nn.Module], other: dict[str, Any], message: str, tmp_path: Path
):
    path = save(kind(), tmp_path)
    with pytest.raises(ValueError, match=message):
        load(path, replace(WEIGHED, **other))


REFUSED = [
    (Small, {"latent": 5}, r"path is '.*'; called with latents \[2, 5\] and labels \[2\] it fails: \w+: .+"),
    (Unconditional, {}, r"path is '.*'; called with latents \[2, 4\] and labels \[2\] it fails: \w+: .+"),
    (Flat, {}, r"for latents \[n, 4\] and labels \[n\] with n = 2 it gives \[2, 64\], and images are \[2, 1, 8, 8\]"),
    (Small, {"channels": 3}, r"it gives \[2, 1, 8, 8\], and images are \[2, 3, 8, 8\]"),
    (Wide, {}, r"^interval is 'unit'; path '.*' so gives intensities from 41.9 to 198 and not from 0 to 1"),
    (Random, {}, "it draws random numbers of its own"),
    (Detached, {}, "its images are not differentiable in the latents"),
    (Steps, {}, "the derivative of its images in the latents is zero"),
]


@each_kind
@pytest.mark.parametrize(("kind", "other", "message"), REFUSED, ids=[f"{k.__name__}{o or ''}" for k, o, _ in REFUSED])
def test_what_a_file_can_do_wrong(
    save: Save, load: Any, kind: type[nn.Module], other: dict[str, Any], message: str, tmp_path: Path
):
    path = save(kind(), tmp_path)
    with pytest.raises(ValueError, match=message):
        load(path, replace(SIGNATURE, **other))


@each_kind
def test_files_that_are_none(save: Save, load: Any, tmp_path: Path):
    with pytest.raises(
        ValueError, match=r"^path is 'nowhere\.pt'; there is no such file seen from .*nothing is downloaded"
    ):
        load("nowhere.pt", SIGNATURE)
    broken = tmp_path / "broken.pt"
    broken.write_bytes(b"PK\x03\x04 not a zip file")
    with pytest.raises(ValueError, match=r"^path is '.*broken\.pt', which cannot be read as .* \w+: .+"):
        load(str(broken), SIGNATURE)
    with pytest.raises(ValueError, match="which cannot be read as"):
        load(str(Path(__file__)), SIGNATURE)


def test_an_exported_program_for_one_number_of_images_only(tmp_path: Path):
    path = program(Small(), tmp_path, free=False)
    with pytest.raises(ValueError, match=r"called with latents \[3, 4\] and labels \[3\] it fails"):
        exported(path, SIGNATURE)


OWN = """
import torch
from torch import nn

class Generator(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4 + 3, 64), nn.Sigmoid(), nn.Unflatten(1, (1, 8, 8)))
    def forward(self, latents, labels):
        return self.layers(torch.cat((latents, nn.functional.one_hot(labels, 3).to(latents.dtype)), 1))

def generator():
    return Generator()

def broken():
    raise RuntimeError("no such weights")

def nothing():
    return 3
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_generators.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "own_generators"


def test_a_module_of_the_users_own_can_be_trained(own: str):
    generator = imported(own, "generator", SIGNATURE)
    assert sum(parameter.numel() for parameter in generator.parameters()) == 8 * 64
    assert generator(torch.randn(2, 4), torch.arange(2)).shape == (2, 1, 8, 8)
    assert generator.training


OWN_REFUSED = [
    ("own_generatorz", "generator", "module is 'own_generatorz', and there is none; say `--import own_generatorz`"),
    (
        "own_generators",
        "genrator",
        "name is 'genrator', and 'own_generators' has no such function. Did you mean 'generator'?",
    ),
    (
        "own_generators",
        "broken",
        r"name is 'broken', and own_generators.broken\(\) fails: RuntimeError: no such weights",
    ),
    ("own_generators", "nothing", "gives a int, not an nn.Module"),
]


@pytest.mark.parametrize(("module", "name", "message"), OWN_REFUSED, ids=[name for _, name, _ in OWN_REFUSED])
def test_modules_that_are_refused(own: str, module: str, name: str, message: str):
    with pytest.raises(ValueError, match=message):
        imported(module, name, SIGNATURE)


def test_a_module_that_fits_other_images_is_refused(own: str):
    with pytest.raises(
        ValueError, match=r"name is 'generator'; called with latents \[2, 6\] and labels \[2\] it fails"
    ):
        imported(own, "generator", replace(SIGNATURE, latent=6))


GRAPH = """
problem: generation
iterations: 2
data: {{latent: 4}}
levels:
  generator:
    variables: {{torchscript: {{path: {path}}}}}
    optimizer: none
evaluation: {{model: [generator]}}
"""


def test_a_graph_names_the_file_at_its_place(tmp_path: Path):
    graph = tmp_path / "graph.yaml"
    graph.write_text(GRAPH.format(path="missing.pt"))
    with pytest.raises(
        mlo.SpecError, match=r"graph\.yaml:7:\d+: levels.generator.variables.torchscript.path: path is 'missing"
    ):
        mlo.load(graph).build()
    module = Small()
    module.embedding = nn.Embedding(10, 4)
    graph.write_text(GRAPH.format(path=scripted(module, tmp_path)))
    options = "{labels: 7, weights: true, size: 12, interval: symmetric}"
    spec = mlo.load(graph, f"levels.generator.variables.torchscript={options}")
    with pytest.raises(mlo.SpecError, match=r"called with latents \[2, 4\] and weights \[2, 7\] it fails"):
        spec.build()  # the file's labels are whole numbers
    with pytest.raises(mlo.SpecError, match=r"torchscript\.labels: labels is 7, and conditional is false"):
        mlo.load(graph, "levels.generator.variables.torchscript={labels: 7, conditional: false}").build()
    built, _ = mlo.load(graph).build()
    assert set(built.init(seed=0).buffers["generator"]) == {"fingerprint"}
