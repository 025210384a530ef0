"""MADAO: its hypergradient against dense linear algebra on the program written out, and what its graphs promise."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

import mlo
from mlo.hypergradient import ConjugateGradient, Exact, FirstOrder, Neumann
from problems import madao
from problems.blocks.augmentation import OPERATIONS, Policy, draws_for

ROOT = Path(__file__).parent.parent.parent
MADAO = ROOT / "graphs" / "madao.yaml"
RATE, IMAGES, STAGES = 0.1, 24, 2
DECAY = 0.05


@pytest.fixture(autouse=True)
def in_double_precision() -> object:
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(dtype)


class Tiny(nn.Module):
    """A smooth classifier of 64 · 2 + 2 + 2 · 4 + 4 = 142 numbers, small enough for a dense Hessian."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 2), nn.Tanh(), nn.Linear(2, 4))

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images - 0.5)


def images(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    smooth = nn.functional.interpolate(torch.rand(IMAGES, 1, 3, 3, generator=generator), size=(8, 8), mode="bilinear")
    return {"images": smooth.clamp(0.02, 0.98), "labels": torch.arange(IMAGES) % 4}


def scene(seed: int = 0) -> tuple[Tiny, Policy, dict[str, object]]:
    """A classifier, a policy that is not where it starts, and one draw of everything."""
    torch.manual_seed(seed)
    network, policy = Tiny(), Policy(stages=STAGES)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.5 * torch.randn_like(parameter)
    noise = draws_for(IMAGES, stages=STAGES, generator=torch.Generator().manual_seed(seed))
    noise = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in noise.items()}
    batch = {"classifier": {"train": images(1), "augmentation_noise": noise}, "policy": images(2)}
    return network, policy, batch


def graph_of(network: nn.Module, policy: nn.Module, method: object, *, decay: float = DECAY) -> mlo.Graph:
    return mlo.Graph(
        [
            mlo.Level(
                "classifier",
                objective=partial(madao.augmented_classification, weight_decay=decay),
                variables=network,
                given=("policy",),
                optimizer=mlo.optimizer.SGD(learning_rate=RATE),
                hypergradient=method,
            ),
            mlo.Level(
                "policy",
                objective=madao.classification,
                variables=policy,
                subject_to=("classifier",),
                optimizer=mlo.optimizer.RMSprop(learning_rate=1e-2),
            ),
        ]
    )


def found(method: object, *, decay: float = DECAY) -> Tensor:
    """The hypergradient that the engine takes after one step of the classifier, [3 · K · 14]."""
    network, policy, batch = scene()
    graph = graph_of(network, policy, method, decay=decay)
    tree = graph.hypergradient("policy", graph.init(), batch)
    return torch.cat([tree[name].flatten() for name, _ in policy.named_parameters()])


class Dense:
    """f and g written out on flat vectors: H, ∂²f/∂θ∂φ and ∇g at the response θ' = θ − η ∂f/∂θ, same draws throughout."""

    def __init__(self, *, decay: float = DECAY) -> None:
        self.network, self.policy, self.batch = scene()
        self.decay = decay
        theta, phi = (self.flat(module) for module in (self.network, self.policy))
        theta = (theta - RATE * self.gradient(theta, phi)).detach()
        self.hessian = torch.autograd.functional.jacobian(lambda t: self.gradient(t, phi), theta)
        self.cross = torch.autograd.functional.jacobian(lambda p: self.gradient(theta, p), phi)  # [M, N]
        leaf = theta.clone().requires_grad_()
        validation = self.batch["policy"]
        logits = functional_call(self.network, self.named(self.network, leaf), validation["images"])
        (self.upper,) = torch.autograd.grad(cross_entropy(logits, validation["labels"]), leaf)

    def gradient(self, theta: Tensor, phi: Tensor) -> Tensor:
        """∂f/∂θ, differentiable."""
        theta = theta if theta.requires_grad else theta.clone().requires_grad_()
        train = self.batch["classifier"]["train"]
        draws = self.batch["classifier"]["augmentation_noise"]
        augmented = functional_call(self.policy, self.named(self.policy, phi), (train["images"], draws))
        logits = functional_call(self.network, self.named(self.network, theta), augmented)
        f = cross_entropy(logits, train["labels"]) + self.decay / 2 * theta @ theta
        return torch.autograd.grad(f, theta, create_graph=True)[0]

    def implicit(self) -> Tensor:
        """−(∂²f/∂φ∂θ) H⁻¹ ∇g, Eq. 5."""
        return -self.cross.T @ torch.linalg.solve(self.hessian, self.upper)

    @staticmethod
    def flat(module: nn.Module) -> Tensor:
        return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])

    @staticmethod
    def named(module: nn.Module, vector: Tensor) -> dict[str, Tensor]:
        sizes = [parameter.numel() for parameter in module.parameters()]
        parts = vector.split(sizes)
        return {name: part.view_as(p) for (name, p), part in zip(module.named_parameters(), parts, strict=True)}


def close(one: Tensor, other: Tensor, tolerance: float) -> None:
    assert other.norm() > 1e-6
    assert (one - other).norm() <= tolerance * other.norm(), ((one - other).norm() / other.norm()).item()


def test_the_exact_hypergradient_is_the_dense_implicit_one_eq_5() -> None:
    close(found(Exact()), Dense().implicit(), 1e-6)


def test_converged_conjugate_gradients_are_the_dense_implicit_one() -> None:
    strong = 1.0  # H ≻ 0, as conjugate gradients need it
    assert torch.linalg.eigvalsh(Dense(decay=strong).hessian).min() > 0
    close(found(ConjugateGradient(iterations=300), decay=strong), Dense(decay=strong).implicit(), 1e-6)


@pytest.mark.parametrize(("terms", "step_size"), [(5, 1e-3), (5, 0.3), (0, 1e-3)])
def test_the_papers_neumann_is_its_own_partial_sum_eqs_6_and_7(terms: int, step_size: float) -> None:
    dense = Dense()
    power = torch.eye(len(dense.hessian)) - step_size * dense.hessian
    total = sum(torch.linalg.matrix_power(power, j) for j in range(terms + 1))
    expected = -dense.cross.T @ (step_size * total @ dense.upper)
    close(found(Neumann(terms=terms, step_size=step_size)), expected, 1e-10)


def test_at_the_papers_setting_the_series_is_first_order() -> None:
    series, first = found(Neumann(terms=5, step_size=1e-3)), found(FirstOrder())
    assert torch.cosine_similarity(series, first, dim=0) > 0.9999
    close(series, 6e-3 * first, 2e-2)


def test_weight_decay_is_part_of_f_and_of_its_hessian() -> None:
    weak, strong = Dense(decay=0.0), Dense(decay=0.5)
    assert torch.linalg.eigvalsh(strong.hessian).min() > torch.linalg.eigvalsh(weak.hessian).min() + 0.4
    close(found(Exact(), decay=0.5), strong.implicit(), 1e-6)
    network = dict(Tiny().named_parameters())
    squares = sum(tensor.square().sum() for tensor in network.values())
    torch.testing.assert_close(madao.decay(network, 0.5), 0.25 * squares)


def test_validation_is_not_augmented_and_the_policy_moves_by_its_response_alone() -> None:
    network, policy, batch = scene()
    graph = graph_of(network, policy, Exact())
    state = graph.init()
    parts = graph.parts("policy", state, batch)
    assert all(not tensor.any() for tensor in parts.direct.values())
    _, metrics = graph.step(state, batch)
    train = batch["classifier"]["train"]
    theta = Dense.flat(network) - RATE * Dense().gradient(Dense.flat(network), Dense.flat(policy))
    logits = functional_call(network, Dense.named(network, theta.detach()), batch["policy"]["images"])
    torch.testing.assert_close(metrics.losses["policy"], cross_entropy(logits, batch["policy"]["labels"]))
    augmented = policy(train["images"], batch["classifier"]["augmentation_noise"])
    assert not torch.allclose(augmented, train["images"])


def test_the_trace_names_everything_and_selections_sum_to_one() -> None:
    _, policy, _ = scene()
    traced = madao.trace(dict(policy.named_parameters()))
    assert len(traced) == 3 * STAGES * len(OPERATIONS) == 84
    for stage in (1, 2):
        total = sum(traced[f"selection.{stage}.{name}"] for name in OPERATIONS)
        torch.testing.assert_close(total, torch.ones(()))
        for k, name in enumerate(OPERATIONS):
            assert traced[f"selection.{stage}.{name}"] == policy.selections()[stage - 1, k]
            assert traced[f"magnitude.{stage}.{name}"] == policy.magnitudes()[stage - 1, k]
            assert traced[f"probability.{stage}.{name}"] == policy.probabilities()[stage - 1, k]
