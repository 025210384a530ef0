"""The papers' networks: their sizes, their derivatives, and what the engine makes of their buffers."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import mlo
from problems.blocks.networks import DenseNet, Normalise, SmallCNN, SmoothCNN, WideResNet, normalised, resnet

Build = Callable[..., nn.Module]

PUBLISHED = [  # in millions; by the papers' own tables, the residual networks by torchvision's
    (partial(WideResNet, depth=28, width=10), 36.5),
    (partial(WideResNet, depth=40, width=4), 8.9),
    (partial(WideResNet, depth=16, width=8), 11.0),
    (partial(WideResNet, depth=40, width=2), 2.2),
    (partial(WideResNet, depth=28, width=2), 1.5),
    (partial(DenseNet, depth=100, growth=12), 0.8),
    (partial(DenseNet, depth=250, growth=24), 15.3),
    (partial(DenseNet, depth=190, growth=40), 25.6),
    (partial(DenseNet, depth=40, growth=12, bottleneck=False, compression=1.0), 1.0),
    (partial(DenseNet, depth=100, growth=12, bottleneck=False, compression=1.0), 7.0),
    (partial(DenseNet, depth=100, growth=24, bottleneck=False, compression=1.0), 27.2),
    (partial(resnet, depth=18, classes=1000), 11.7),
    (partial(resnet, depth=50, classes=1000), 25.6),
]
SMALL = [  # of each kind, with the smallest images that are worth it
    (partial(WideResNet, depth=10, width=1), 8),
    (partial(DenseNet, depth=10, growth=4), 8),
    (partial(DenseNet, depth=7, growth=4, bottleneck=False, compression=1.0), 8),
    (partial(SmallCNN, width=4, channels=3), 8),
    (partial(resnet, depth=18), 32),
]


def name_of(build: partial[nn.Module]) -> str:
    return "-".join([build.func.__name__, *(str(value) for value in build.keywords.values())])


def batch_of(size: int, *, channels: int = 3, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(4, channels, size, size, generator=generator, dtype=torch.float64)
    return {"images": images, "labels": torch.tensor([0, 1, 2, 0])}


def smooth(network: nn.Module) -> nn.Module:
    """Its ReLU modules replaced by softplus, so that central differences see what autograd sees."""
    for part in list(network.modules()):
        for name, child in part.named_children():
            if isinstance(child, nn.ReLU):
                setattr(part, name, nn.Softplus(beta=5))
    return network


@pytest.mark.parametrize(("build", "millions"), PUBLISHED, ids=[name_of(build) for build, _ in PUBLISHED])
def test_parameter_counts_are_those_published(build: Build, millions: float):
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in build().parameters())
    assert round(count / 1e6, 1) == millions


def test_densenet_bc_40_has_six_bottlenecks_a_block():
    with torch.device("meta"):
        network = DenseNet()
    convolutions = [part for part in network.modules() if isinstance(part, nn.Conv2d)]
    assert len(convolutions) + 1 == 40  # and the linear layer
    assert sum(parameter.numel() for parameter in network.parameters()) == 176_122


@pytest.mark.parametrize(("build", "size"), SMALL, ids=[name_of(build) for build, _ in SMALL])
@pytest.mark.parametrize("channels", [1, 3])
def test_output_shapes(build: Build, size: int, channels: int):
    network = build(classes=7, channels=channels).double().eval()
    assert network(batch_of(size, channels=channels)["images"]).shape == (4, 7)


@pytest.mark.parametrize(("build", "size"), SMALL[:-1], ids=[name_of(build) for build, _ in SMALL[:-1]])
def test_second_derivatives_are_those_of_central_differences(build: Build, size: int, monkeypatch: pytest.MonkeyPatch):
    softplus = partial(nn.functional.softplus, beta=5)
    for module in ("_wide_resnet", "_densenet"):
        monkeypatch.setattr(f"problems.blocks.networks.{module}.relu", softplus)
    torch.manual_seed(0)
    network = smooth(build(classes=3)).double()
    batch = batch_of(size)
    parameters = {name: tensor.detach().requires_grad_() for name, tensor in network.named_parameters()}
    direction = {name: torch.randn_like(tensor) for name, tensor in parameters.items()}

    def gradient(shift: float, *, create: bool = False) -> tuple[Tensor, ...]:
        at = {name: tensor + shift * direction[name] for name, tensor in parameters.items()}
        buffers = {name: tensor.clone() for name, tensor in network.named_buffers()}
        loss = cross_entropy(torch.func.functional_call(network, {**at, **buffers}, batch["images"]), batch["labels"])
        return torch.autograd.grad(loss, tuple(parameters.values()), create_graph=create)

    products = torch.autograd.grad(gradient(0.0, create=True), tuple(parameters.values()), tuple(direction.values()))
    radius = 1e-6
    for exact, plus, minus in zip(products, gradient(radius), gradient(-radius), strict=True):
        torch.testing.assert_close((plus - minus) / (2 * radius), exact, rtol=1e-5, atol=1e-6 * _largest(products))


def test_second_derivatives_of_a_resnet_are_symmetric():
    """uᵀHv = vᵀHu: at 32×32 pixels its last blocks normalise four numbers, too steep for central differences."""
    torch.manual_seed(0)
    network = resnet(depth=18, classes=3).double()
    batch = batch_of(32)
    parameters = list(network.parameters())
    loss = cross_entropy(network(batch["images"]), batch["labels"])
    gradients = torch.autograd.grad(loss, parameters, create_graph=True)
    u, v = ([torch.randn_like(tensor) for tensor in parameters] for _ in range(2))
    one, two = (torch.autograd.grad(gradients, parameters, way, retain_graph=True) for way in (u, v))
    product = sum((a * b).sum() for a, b in zip(one, v, strict=True))
    torch.testing.assert_close(product, sum((a * b).sum() for a, b in zip(two, u, strict=True)), rtol=1e-9, atol=0)
    assert product.abs() > 0


def _largest(tensors: tuple[Tensor, ...]) -> float:
    return max(tensor.abs().max().item() for tensor in tensors)


@pytest.mark.parametrize("build", [SMALL[0][0], SMALL[1][0], SMALL[3][0]], ids=["wide", "dense", "small"])
def test_a_step_of_the_engine_is_a_step_of_plain_torch_and_a_hypergradient_leaves_no_trace(build: Build):
    torch.manual_seed(0)
    mean, deviation = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    network = normalised(build(classes=3), mean=mean, deviation=deviation).double()

    def train(values: mlo.Values, batch: dict[str, Tensor]) -> Tensor:
        return cross_entropy(values["scale"] * values["network"](batch["images"]), batch["labels"])

    def judge(values: mlo.Values, batch: dict[str, Tensor]) -> Tensor:
        return cross_entropy(values["network"](batch["images"]), batch["labels"])

    method = mlo.hypergradient.Neumann(terms=2, step_size=1e-2)
    sgd = mlo.optimizer.SGD(learning_rate=0.1)
    lower = mlo.Level(
        "network", objective=train, variables=network, given=("scale",), optimizer=sgd, hypergradient=method
    )
    scale = torch.ones((), dtype=torch.float64)
    upper = mlo.Level("scale", objective=judge, variables=scale, subject_to=("network",), optimizer=sgd)
    graph = mlo.Graph([lower, upper])
    state = graph.init(seed=0)
    batches = {"network": batch_of(8), "scale": batch_of(8, seed=1)}

    assert "normalise.mean" in state.buffers["network"]
    assert "normalise.mean" not in state.values["network"]
    before = deepcopy(dict(state.buffers["network"]))
    assert graph.hypergradient("scale", state, batches).abs() > 0
    for name, tensor in state.buffers["network"].items():
        assert torch.equal(tensor, before[name])

    state, _ = graph.step(state, batches)
    loss = cross_entropy(network(batches["network"]["images"]), batches["network"]["labels"])
    loss.backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None
        expected = parameter.detach() - 0.1 * parameter.grad
        torch.testing.assert_close(state.values["network"][name], expected, rtol=1e-10, atol=1e-12)
    after = dict(network.named_buffers())
    assert any("running_mean" in name for name in after)
    for name, tensor in after.items():  # one real step: the lower level's; the upper one's statistics are not kept
        torch.testing.assert_close(state.buffers["network"][name], tensor, rtol=1e-12, atol=1e-14)


def test_normalise_centres_and_scales_each_channel():
    images = batch_of(5)["images"]
    mean, deviation = images.mean(dim=(0, 2, 3)), images.std(dim=(0, 2, 3))
    out = Normalise(mean=mean.tolist(), deviation=deviation.tolist()).double()(images)
    torch.testing.assert_close(out.mean(dim=(0, 2, 3)), torch.zeros(3).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(out.std(dim=(0, 2, 3)), torch.ones(3).double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (partial(WideResNet, depth=30), r"depth is 30; a wide residual network has 6n \+ 4 layers"),
        (partial(DenseNet, depth=41), r"depth is 41; it must be 6n \+ 4"),
        (partial(DenseNet, depth=41, bottleneck=False), r"depth is 41; it must be 3n \+ 4"),
        (partial(DenseNet, compression=0.0), r"compression is 0.0; it must be above 0"),
        (partial(WideResNet, width=0), r"width is 0; it must be at least 1"),
        (partial(SmallCNN, width=-1), r"width is -1; it must be at least 1"),
        (partial(SmoothCNN, width=0), r"width is 0; it must be at least 1"),
        (partial(DenseNet, growth=0), r"growth is 0; it must be at least 1"),
        (partial(Normalise, mean=(0.5,), deviation=(0.5, 0.5)), r"a mean and a positive deviation for each channel"),
        (partial(Normalise, mean=(0.5,), deviation=(0.0,)), r"a mean and a positive deviation for each channel"),
    ],
)
def test_impossible_networks_are_refused(build: Build, message: str):
    with pytest.raises(ValueError, match=message):
        build()


# weights from a file


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    torch.manual_seed(5)
    return resnet(depth=18, classes=4)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_come_from_a_file(trained: nn.Module, suffix: str, tmp_path: Path):
    path = tmp_path / f"resnet{suffix}"
    save_file(trained.state_dict(), path) if suffix == ".safetensors" else torch.save(trained.state_dict(), path)
    same, other = (resnet(depth=18, classes=classes, weights=str(path)) for classes in (4, 6))
    for name, tensor in trained.state_dict().items():
        assert torch.equal(same.state_dict()[name], tensor)
        assert torch.equal(other.state_dict()[name], tensor) != name.startswith("fc.")


def test_weights_that_do_not_fit_are_refused_with_what_is_wrong(trained: nn.Module, tmp_path: Path):
    tensors = trained.state_dict()
    renamed = {name.replace("layer4.", "stage4."): tensor for name, tensor in tensors.items()}
    torch.save(renamed, tmp_path / "renamed.pth")
    torch.save(nn.Sequential, tmp_path / "code.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "text.pth").write_text("no weights")
    (tmp_path / "text.safetensors").write_text("no weights")
    for file, message in (
        ("none.pth", r"none.pth'; there is no such file .*nothing is downloaded"),
        ("renamed.pth", r"30 missing: layer4.0.conv1.weight, .*, …; 30 unknown: stage4.0.conv1.weight"),
        ("code.pth", r"code.pth', which cannot be read as saved tensors"),
        ("list.pth", r"list.pth', which holds no tensors by name but a list"),
        ("text.pth", r"text.pth', which cannot be read as saved tensors"),
        ("text.safetensors", r"text.safetensors', which cannot be read as saved tensors"),
    ):
        with pytest.raises(ValueError, match=message):
            resnet(depth=18, classes=4, weights=str(tmp_path / file))
    torch.save(tensors, tmp_path / "eighteen.pth")
    with pytest.raises(ValueError, match=r"does not hold a ResNet-50 of torchvision: 198 missing: .*of another shape"):
        resnet(depth=50, classes=4, weights=str(tmp_path / "eighteen.pth"))
