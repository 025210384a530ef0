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
from problems.blocks.image_sets import image_sets, in_order
from problems.blocks.scores import classification_scores

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


def test_magnitudes_that_do_nothing_get_nothing_and_straight_through_ones_get_something() -> None:
    """Invert, autocontrast and equalize have no magnitude, colour does nothing on grey images; solarize and posterize change
    in steps, and what arrives at their magnitudes is a straight-through estimate."""
    _, magnitude, _ = found(Exact()).abs().view(3, STAGES, len(OPERATIONS))  # probability, magnitude, selection
    arrived = dict(zip(OPERATIONS, magnitude.sum(0).tolist(), strict=True))
    assert {name for name, size in arrived.items() if size == 0} == {"invert", "autocontrast", "equalize", "color"}
    assert min(arrived["solarize"], arrived["posterize"]) > 0


def test_the_policy_waits_for_w_iterations_and_then_moves_in_every_s_th(tmp_path: Path) -> None:
    spec = mlo.load(MADAO, "iterations=35", "levels.policy.warm_up=10", "evaluation.every=35")
    run = mlo.run(spec, tmp_path / "run", quiet=True)
    measured = {
        line["iteration"]: line["measured"]["policy"] for line in run.metrics if "policy" in line.get("norms", {})
    }
    assert list(measured) == [20, 30]  # w = 10, s = 10
    assert all(len(each) == 84 for each in measured.values())
    assert {round(value, 6) for name, value in measured[20].items() if name.startswith("selection")} == {
        round(1 / 14, 6)
    }
    assert {value for name, value in measured[20].items() if not name.startswith("selection")} == {0.5}
    assert measured[30] != measured[20]
    for stage in (1, 2):
        total = sum(value for name, value in measured[30].items() if name.startswith(f"selection.{stage}"))
        assert abs(total - 1) < 1e-5
    (table,) = run.summary["tables"]
    assert table["columns"] == ["operation", "π 1", "π 2", "μ 1", "μ 2", "p 1", "p 2"]
    assert [row[0] for row in table["rows"]] == list(OPERATIONS)
    assert (run.folder / "pictures" / "augmented_by_policy.png").is_file()
    assert run.summary["counts"] == {
        "gradients": 39,
        "products": 23,
        "pullbacks": 2,
    }  # 35 + 2·2; 2·(J + 2), one of them to compare, and 8 + 1 to measure the curvature


@pytest.mark.parametrize("part", ["selection", "magnitude", "probability"])
def test_a_policy_of_which_a_part_is_frozen_is_traced_whole(tmp_path: Path, part: str) -> None:
    changes = ("iterations=2", "levels.policy.warm_up=0", "levels.policy.every=1", f"levels.policy.freeze=[{part}]")
    run = mlo.run(mlo.load(MADAO, *changes, "evaluation.every=2"), tmp_path / "run", quiet=True)
    first, second = (line["measured"]["policy"] for line in run.metrics if "losses" in line)
    assert len(first) == 84
    moved = {name.partition(".")[0] for name in first if first[name] != second[name]}
    assert moved == {"selection", "magnitude", "probability"} - {part}
    assert len(run.summary["tables"][0]["columns"]) == 7


@pytest.mark.parametrize("model", ["[policy]", "[classifier, policy]", "null"])
def test_a_policy_is_no_model_to_evaluate(tmp_path: Path, model: str) -> None:
    spec = mlo.load(MADAO, "iterations=1", f"evaluation.model={model}")
    with pytest.raises(mlo.UserError, match=r"evaluation\.model: level 'policy' is a policy and classifies nothing"):
        mlo.run(spec, tmp_path / "run", quiet=True)


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ("data.batch_size=0", "data.batch_size: batch_size is 0; it must be at least 1"),
        ("data.stages=0", "data.stages: stages is 0; it must be at least 1"),
        (
            "levels.policy.variables.policy.stages=3",
            "levels.policy.variables.policy.stages: stages=3, and noise is drawn for 2",
        ),
        (
            "levels.policy.variables.policy.initial=1",
            "levels.policy.variables.policy.initial: initial=1.0: probabilities",
        ),
    ],
)
def test_what_cannot_be_built_is_told_at_its_place(change: str, place: str) -> None:
    with pytest.raises(mlo.SpecError) as caught:
        mlo.load(MADAO, change).build()
    assert f"{place}" in str(caught.value)


def test_a_class_that_no_sample_has_does_not_count_as_one_that_is_always_mistaken() -> None:
    logits = torch.eye(10)[torch.tensor([0, 0, 1, 3])]
    metrics = classification_scores(logits, torch.tensor([0, 0, 1, 2])).metrics
    assert metrics["balanced_accuracy"] == pytest.approx(200 / 3)
    assert metrics["class_deviation"] == pytest.approx(100 * (2 / 9) ** 0.5)


def test_a_trial_of_randaugment_has_one_magnitude_of_thirty_chosen_by_seed_and_level() -> None:
    chosen = []
    for seed in (0, 0, 1, 2):
        graph, _ = mlo.load(MADAO.parent / "madao" / "randaugment.yaml", f"seed={seed}", "dtype=float64").build()
        values = graph.init(seed=seed).values
        for name in ("policy", "second_policy"):
            magnitudes = values[name]["magnitude"].sigmoid()
            number = 30 * magnitudes[0, 0].item() - 0.5
            assert abs(number - round(number)) < 1e-6
            torch.testing.assert_close(magnitudes, magnitudes[0, 0].expand_as(magnitudes))
            torch.testing.assert_close(values[name]["probability"].sigmoid(), torch.full_like(magnitudes, 0.5))
            chosen.append(round(number))
    assert chosen[:2] == chosen[2:4]
    assert len(set(chosen)) > 2
    assert set(chosen) <= set(range(30))


def test_of_two_trials_the_one_that_is_better_on_validation_images_is_judged() -> None:
    graph, problem = mlo.load(MADAO.parent / "madao" / "randaugment.yaml", "dtype=float64").build()
    values, both = graph.values(graph.init()), ("classifier", "second_classifier")
    assert problem.evaluate is not None

    def judged(split: str, *model: str) -> dict[str, float]:
        with torch.no_grad():
            return dict(problem.evaluate(values, split, model=model, totals={}, complete=False).metrics)

    alone = {name: judged("validation", name)["top1"] for name in both}
    assert alone["classifier"] != alone["second_classifier"]
    best = max(alone, key=lambda name: alone[name])
    together = judged("test", *both)
    assert together.pop("chosen") == both.index(best) + 1
    assert together == judged("test", best)


def test_the_critics_loss_in_closed_form() -> None:
    """For linear scores c(x) = a·x the slope is a everywhere: the penalty is (‖a‖ − 1)², whatever the mixture."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 64, generator=generator)  # four classes and c
    images_of = lambda seed: images(seed)  # noqa: E731
    dark = lambda shown, draws: 0.5 * shown  # noqa: E731
    batch = {
        "train": images_of(1),
        "real": images_of(2),
        "augmentation_noise": {},
        "mixing": torch.rand(IMAGES, generator=generator),
    }
    values = {"critic": lambda shown: shown.flatten(1) @ weight.T, "policy": dark}
    loss, measured = madao.criticism(values, batch, penalty=3.0)
    score = lambda part, factor: (factor * part["images"].flatten(1) @ weight[4]).mean()  # noqa: E731
    distance = score(batch["real"], 1.0) - score(batch["train"], 0.5)
    recognised = cross_entropy(batch["real"]["images"].flatten(1) @ weight[:4].T, batch["real"]["labels"])
    torch.testing.assert_close(measured["distance"], distance)
    torch.testing.assert_close(loss, 3.0 * (weight[4].norm() - 1) ** 2 + recognised - distance)


def test_the_policys_loss_beside_a_critic_in_closed_form() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 64, generator=generator)  # four classes and c
    values = {"critic": lambda shown: shown.flatten(1) @ weight.T, "policy": _Dark()}
    batch = {"train": images(1), "augmentation_noise": {}}
    loss, measured = madao.imitation(values, batch, weight=0.3)
    outputs = 0.5 * batch["train"]["images"].flatten(1) @ weight.T
    recognised = cross_entropy(outputs[:, :4], batch["train"]["labels"])
    torch.testing.assert_close(loss, 0.3 * recognised - outputs[:, 4].mean())
    torch.testing.assert_close(measured["recognition"], recognised)


class _Dark(dict[str, Tensor]):
    """Stands for a policy that halves every image."""

    def __init__(self) -> None:
        super().__init__(Policy(stages=STAGES).named_parameters())

    def __call__(self, shown: Tensor, draws: object) -> Tensor:
        return 0.5 * shown


SETTINGS = {"fraction": 0.35, "validation": 0.3}


@pytest.mark.parametrize("name", ["train", "real", "validation"])
def test_a_stream_draws_every_image_of_its_own_part_and_no_other(name: str) -> None:
    _, problem = mlo.load(MADAO, "dtype=float64", "seed=3").build()
    parts = image_sets("digits", seed=3, **SETTINGS)
    stream = problem.streams[name]
    assert isinstance(stream, mlo.stream.AbstractStream)
    drawn = [stream.draw(mlo.stream.Draw(3, name, iteration)) for iteration in range(1, 12)]
    seen = {row for batch in drawn for row in rows(batch["images"])}
    wanted = parts.validation if name == "validation" else parts.train
    (everything,) = in_order(wanted, size=1000, device=torch.device("cpu"), dtype=torch.float64)
    assert seen == set(rows(everything["images"]))


def test_a_network_is_judged_on_running_statistics_on_the_images_that_the_split_names() -> None:
    _, problem = mlo.load(MADAO, "dtype=float64", "seed=3").build()
    parts = image_sets("digits", seed=3, **SETTINGS)
    assert problem.evaluate is not None
    for split, part in (("validation", parts.validation), ("test", parts.test)):
        network = _Watched()
        problem.evaluate({"classifier": network}, split, model=("classifier",), totals={}, complete=False)
        (everything,) = in_order(part, size=1000, device=torch.device("cpu"), dtype=torch.float64)
        assert torch.equal(torch.cat(network.shown), everything["images"])
        assert network.training == {False}


def rows(shown: Tensor) -> list[bytes]:
    return [image.numpy().tobytes() for image in shown]


class _Watched(dict[str, Tensor]):
    """Stands for a network, and remembers what it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.shown, self.training = list[Tensor](), set[bool]()

    def __call__(self, shown: Tensor, *, training: bool) -> Tensor:
        self.shown.append(shown)
        self.training.add(training)
        return shown.flatten(1)[:, :10]
