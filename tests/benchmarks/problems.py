"""What is timed, twice: as levels, and as functions of lists of tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from benchmarks.by_hand import Inner, Outer, Tensors
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import cross_entropy

import mlo
from problems.blocks.augmentation import Policy, draws_for
from problems.blocks.networks import WideResNet, normalised

RATE, DECAY, UPPER_RATE = 0.05, 0.9, 1e-3


@dataclass(frozen=True)
class Problem:
    """A level `w` under a level `u`: both objectives and both starts, for mlo and by hand."""

    lower: Callable[[Any, Any], Any]
    upper: Callable[[Any, Any], Any]
    inner: Inner
    outer: Outer
    w: Any
    u: Any
    tensors: tuple[Tensors, Tensors]

    def graph(self, method: Any, steps: int, *, compile: bool = False) -> mlo.Graph:
        sgd = mlo.optimizer.SGD(learning_rate=RATE, momentum=DECAY)
        levels = [
            mlo.Level("w", objective=self.lower, variables=self.w, given=("u",), optimizer=sgd, steps=steps,
                      hypergradient=method),
            mlo.Level("u", objective=self.upper, variables=self.u, subject_to=("w",),
                      optimizer=mlo.optimizer.Adam(learning_rate=UPPER_RATE)),
        ]  # fmt: skip
        return mlo.Graph(levels, compile=compile)


def digits(rows: slice) -> tuple[Tensor, Tensor]:
    x, y = load_digits(return_X_y=True)
    return torch.tensor(x[rows] / 16, dtype=torch.float32), torch.tensor(y[rows])


def mlp(width: int = 256) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
    return nn.Sequential(*layers)


def mlp_by_hand(w: Sequence[Tensor], x: Tensor) -> Tensor:
    one, a, two, b, three, c = w
    return functional.linear(functional.linear(functional.linear(x, one, a).relu(), two, b).relu(), three, c)


def tensors_of(module: nn.Module) -> Tensors:
    return [parameter.detach().clone() for parameter in module.parameters()]


def reweighting(width: int = 256) -> Problem:
    """Meta-Weight-Net (Shu et al. 2019): the weight of a sample is a network's answer to its loss."""
    x, y = digits(slice(0, 128))
    clean_x, clean_y = digits(slice(128, 256))
    network = mlp(width)
    weigher = nn.Sequential(nn.Linear(1, 100), nn.ReLU(), nn.Linear(100, 1), nn.Sigmoid())

    def lower(values: Any, batch: Any) -> Tensor:
        losses = cross_entropy(values["w"](x), y, reduction="none")
        return (values["u"](losses[:, None])[:, 0] * losses).mean()

    def upper(values: Any, batch: Any) -> Tensor:
        return cross_entropy(values["w"](clean_x), clean_y)

    def inner(w: Sequence[Tensor], u: Sequence[Tensor]) -> Tensor:
        losses = cross_entropy(mlp_by_hand(w, x), y, reduction="none")
        one, a, two, b = u
        weights = functional.linear(functional.linear(losses[:, None], one, a).relu(), two, b).sigmoid()
        return (weights[:, 0] * losses).mean()

    def outer(w: Sequence[Tensor]) -> Tensor:
        return cross_entropy(mlp_by_hand(w, clean_x), clean_y)

    return Problem(lower, upper, inner, outer, network, weigher, (tensors_of(network), tensors_of(weigher)))


def sample_weights() -> Problem:
    """One weight a sample, in front of the same network."""
    x, y = digits(slice(0, 128))
    clean_x, clean_y = digits(slice(128, 256))
    network = mlp()
    u = torch.zeros(128)

    def lower(values: Any, batch: Any) -> Tensor:
        return (values["u"].sigmoid() * cross_entropy(values["w"](x), y, reduction="none")).mean()

    def upper(values: Any, batch: Any) -> Tensor:
        return cross_entropy(values["w"](clean_x), clean_y)

    def inner(w: Sequence[Tensor], u: Sequence[Tensor]) -> Tensor:
        return (u[0].sigmoid() * cross_entropy(mlp_by_hand(w, x), y, reduction="none")).mean()

    def outer(w: Sequence[Tensor]) -> Tensor:
        return cross_entropy(mlp_by_hand(w, clean_x), clean_y)

    return Problem(lower, upper, inner, outer, network, u, (tensors_of(network), [u]))


def penalties() -> Problem:
    """Logistic regression with an L2 penalty for every parameter."""
    x, y = digits(slice(0, 512))
    clean_x, clean_y = digits(slice(512, 1024))
    w = {"weight": torch.zeros(64, 10), "bias": torch.zeros(10)}
    u = {"weight": torch.full((64, 10), -4.0), "bias": torch.full((10,), -4.0)}

    def lower(values: Any, batch: Any) -> Tensor:
        w, u = values["w"], values["u"]
        penalty = sum((u[name].exp() * w[name].square()).sum() for name in w)
        return cross_entropy(x @ w["weight"] + w["bias"], y) + 0.5 * penalty

    def upper(values: Any, batch: Any) -> Tensor:
        return cross_entropy(clean_x @ values["w"]["weight"] + values["w"]["bias"], clean_y)

    def inner(w: Sequence[Tensor], u: Sequence[Tensor]) -> Tensor:
        penalty = sum((log.exp() * own.square()).sum() for own, log in zip(w, u, strict=True))
        return cross_entropy(x @ w[0] + w[1], y) + 0.5 * penalty

    def outer(w: Sequence[Tensor]) -> Tensor:
        return cross_entropy(clean_x @ w[0] + w[1], clean_y)

    return Problem(lower, upper, inner, outer, w, u, (list(w.values()), list(u.values())))


class Block(nn.Module):
    """Two convolutions with batch statistics, around which the input goes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.first = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.two, self.second = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.second(self.two(self.first(self.one(x)).relu()))).relu()


class Pooled(nn.Module):
    """The mean over the image."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


def resnet() -> Problem:
    """A weight a sample for a small ResNet: three blocks, width 16, 32 × 32 images, 32 of them."""
    torch.manual_seed(0)
    stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
    network = nn.Sequential(stem, Block(16), Block(16), Block(16), Pooled(), nn.Linear(16, 10))
    x, y = torch.randn(32, 3, 32, 32), torch.randint(10, (32,))
    clean_x, clean_y = torch.randn(32, 3, 32, 32), torch.randint(10, (32,))
    u = torch.zeros(32)
    running = [torch.zeros(16), torch.ones(16)]

    def normalised(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        mean, variance = running
        return functional.batch_norm(x, mean.clone(), variance.clone(), scale, shift, training=True)

    def network_by_hand(w: Sequence[Tensor], x: Tensor) -> Tensor:
        x = functional.conv2d(x, w[0], padding=1)
        for start in (1, 7, 13):
            one, a, b, two, c, d = w[start : start + 6]
            inside = normalised(functional.conv2d(x, one, padding=1), a, b).relu()
            x = (x + normalised(functional.conv2d(inside, two, padding=1), c, d)).relu()
        return functional.linear(x.mean((2, 3)), w[19], w[20])

    def lower(values: Any, batch: Any) -> Tensor:
        return (values["u"].sigmoid() * cross_entropy(values["w"](x), y, reduction="none")).mean()

    def upper(values: Any, batch: Any) -> Tensor:
        return cross_entropy(values["w"](clean_x), clean_y)

    def inner(w: Sequence[Tensor], u: Sequence[Tensor]) -> Tensor:
        return (u[0].sigmoid() * cross_entropy(network_by_hand(w, x), y, reduction="none")).mean()

    def outer(w: Sequence[Tensor]) -> Tensor:
        return cross_entropy(network_by_hand(w, clean_x), clean_y)

    w = tensors_of(network)
    ordered = [dict(network.named_parameters())[name].detach().clone() for name in RESNET]
    assert len(ordered) == len(w)
    return Problem(lower, upper, inner, outer, network, u, (ordered, [u]))


RESNET = [
    "0.weight",
    *(f"{block}.{name}" for block in (1, 2, 3) for name in (
        "one.weight", "first.weight", "first.bias", "two.weight", "second.weight", "second.bias"
    )),
    "5.weight",
    "5.bias",
]  # fmt: skip
"""The tensors of the network by name, as `network_by_hand` unpacks them."""


@dataclass(frozen=True)
class Augmented:
    """WideResNet 28-2 under a policy of augmentation, as MADAO trains it, on 32 digits as coloured 32 × 32 images."""

    network: nn.Module
    policy: nn.Module
    batches: list[dict[str, Any]]

    def graph(self, method: Any) -> mlo.Graph:
        """The policy moves every 60 iterations; without a method it stays as it is, and augments all the same."""

        def augmented(values: Any, batch: Any) -> Tensor:
            return cross_entropy(values["classifier"](values["policy"](batch["x"], batch["draws"])), batch["y"])

        def plain(values: Any, batch: Any) -> Tensor:
            return cross_entropy(values["classifier"](batch["x"]), batch["y"])

        sgd = mlo.optimizer.SGD(learning_rate=RATE, momentum=DECAY, nesterov=True, weight_decay=5e-4)
        lower: dict[str, Any] = {
            "objective": augmented,
            "variables": self.network,
            "given": ("policy",),
            "optimizer": sgd,
        }
        if method is None:
            return mlo.Graph([mlo.Level("classifier", **lower), mlo.Level("policy", variables=self.policy)])
        classifier = mlo.Level("classifier", hypergradient=method, **lower)
        policy = mlo.Level("policy", objective=plain, variables=self.policy, subject_to=("classifier",), every=60,
                           optimizer=mlo.optimizer.RMSprop(learning_rate=1e-2))  # fmt: skip
        return mlo.Graph([classifier, policy])


def madao() -> Augmented:
    torch.manual_seed(0)
    network = normalised(WideResNet(depth=28, width=2), mean=(0.5, 0.5, 0.5), deviation=(0.5, 0.5, 0.5))

    def images(rows: slice) -> dict[str, Tensor]:
        x, y = digits(rows)
        grey = functional.interpolate(x.view(-1, 1, 8, 8), size=32, mode="bilinear")
        return {"x": grey * torch.rand(len(x), 3, 1, 1), "y": y}

    def batches(number: int) -> dict[str, Any]:
        draws = draws_for(32, stages=2, generator=torch.Generator().manual_seed(number))
        train, validation = (images(slice(begin, begin + 32)) for begin in (64 * number, 64 * number + 32))
        return {"classifier": {**train, "draws": draws}, "policy": validation}

    return Augmented(network, Policy(stages=2), [batches(number) for number in range(20)])


GRAPHS = Path(__file__).parents[2] / "graphs"


def mgr(width: int) -> tuple[dict[str, mlo.Graph], list[dict[str, Any]]]:
    """`graphs/mgr.yaml` and `graphs/mgr/second_order.yaml` with an untrained generator, and batches for both."""
    changes = ("start=null", f"levels.classifier.variables.smooth_cnn.width={width}")
    built = {name: mlo.load(GRAPHS / name, *changes).build() for name in ("mgr.yaml", "mgr/second_order.yaml")}
    streams = built["mgr.yaml"][1].streams

    def batches(iteration: int) -> dict[str, Any]:
        names = ("train", "validation", "noise")
        drawn = {name: streams[name].draw(mlo.stream.Draw(0, name, iteration)) for name in names}
        return {"classifier": drawn, "finder": drawn}

    return {name: graph for name, (graph, _) in built.items()}, [batches(number) for number in range(1, 11)]


def ladder(depth: int) -> tuple[mlo.Graph, Callable[[], Tensor]]:
    """Levels that each read the two below them, and a level above them all that the first two read.

    `depth` counts the uppermost level. Quadratics of 64 numbers, one step of SGD each. Also gives the hypergradient by
    hand: one reverse pass through all steps.
    """
    torch.manual_seed(0)
    size, names = 64, [f"level_{index:02}" for index in range(1, depth)]
    roots = torch.randn(depth, size, size) / size**0.5
    hessians = 0.3 * roots @ roots.mT + 0.5 * torch.eye(size)
    starts = torch.randn(depth, size)
    given = {name: ("u", *names[max(0, index - 2) : index])[-2:] for index, name in enumerate(names)}

    def loss(index: int, own: Tensor, read: Sequence[Tensor]) -> Tensor:
        return 0.5 * own @ hessians[index] @ own - own @ sum(read).tanh()

    def objective(index: int, name: str) -> Callable[[Any, Any], Tensor]:
        return lambda values, batch: loss(index, values[name], [values[read] for read in given[name]])

    def top(values: Any, batch: Any) -> Tensor:
        return 0.5 * (values[names[-1]] - 1).square().sum()

    sgd = mlo.optimizer.SGD(learning_rate=0.1)
    levels = [
        mlo.Level(name, objective=objective(index, name), variables=starts[index], given=given[name], optimizer=sgd)
        for index, name in enumerate(names)
    ]
    adam = mlo.optimizer.Adam(learning_rate=UPPER_RATE)
    upper = mlo.Level("u", objective=top, variables=starts[-1], subject_to=tuple(names), optimizer=adam)

    def by_hand() -> Tensor:
        values = {"u": starts[-1].detach().clone().requires_grad_()}
        for index, name in enumerate(names):
            own = starts[index].detach().requires_grad_()
            value = loss(index, own, [values[read] for read in given[name]])
            (gradient,) = torch.autograd.grad(value, own, create_graph=True)
            values[name] = own - 0.1 * gradient
        return torch.autograd.grad(top(values, None), values["u"])[0]

    return mlo.Graph([*levels, upper]), by_hand
