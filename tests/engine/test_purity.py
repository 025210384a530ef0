"""A hypergradient changes nothing; every evaluation that belongs to one step sees the same draw; modules stay the user's."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import pytest
import torch
from helpers import flat, named, normal, optimizers, relative_error, respond_by_hand, same_bits, sgd_by_hand
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

import mlo

UNROLL, DIFFERENCE = mlo.hypergradient.Unroll(), mlo.hypergradient.FiniteDifference(radius=1e-3)
both_methods = pytest.mark.parametrize("method", [UNROLL, DIFFERENCE], ids=lambda value: type(value).__name__)


class Attention(nn.Module):
    """Self-attention over three tokens, by `nn.MultiheadAttention`."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        mixed, _ = self.attend(x, x, x, need_weights=False)
        return self.head(torch.tanh(mixed).mean(1))


class Flash(nn.Module):
    """Causal attention by the fused function, whose default kernel has no second derivative on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(4, 12)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unsqueeze(1) for part in self.project(x).chunk(3, dim=-1))
        return self.head(torch.tanh(scaled_dot_product_attention(q, k, v, is_causal=True)).squeeze(1).mean(1))


class Everything(nn.Module):
    """Attention, batch normalization and dropout in one network."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(4, 2, dropout=0.2, batch_first=True)
        self.normalize = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        mixed, _ = self.attend(x, x, x, need_weights=False)
        return self.head(self.drop(torch.tanh(self.normalize(mixed.mean(1)))))


class Tied(nn.Module):
    """One matrix embeds and reads out; one layer is used under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.read_out = nn.Linear(3, 5, bias=False)
        self.read_out.weight = self.embed.weight
        self.first = self.second = nn.Linear(3, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.read_out(self.second(torch.tanh(self.first(self.embed(tokens)))))


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


LABELS = torch.arange(8) % 3


def weighted(logits: Tensor, labels: Tensor, u: Tensor) -> Tensor:
    """Cross-entropy with a learned weight for every sample."""
    return (torch.sigmoid(u) * cross_entropy(logits, labels, reduction="none")).mean()


def reweighting(
    module: nn.Module,
    method: Any = UNROLL,
    *,
    steps: int = 2,
    above: Mapping[str, Any] | None = None,
    watch: Callable[[str], None] | None = None,
    more: Sequence[mlo.Level] = (),
) -> mlo.Graph:
    """A network `w` trained on weighted samples, and the weights `u` above it."""

    def inner(values: Any, batch: Any) -> Tensor:
        if watch:
            watch("w")
        inputs, labels = batch
        return weighted(values["w"](inputs), labels, values["u"])

    def outer(values: Any, batch: Any) -> Tensor:
        if watch:
            watch("u")
        inputs, labels = batch
        return cross_entropy(values["w"](inputs), labels) + 1e-2 * values["u"].square().sum()

    rule = optimizers["momentum"][0]
    w = mlo.Level(
        "w", objective=inner, variables=module, given=["u"], optimizer=rule, steps=steps, hypergradient=method
    )
    u = mlo.Level(
        "u",
        objective=outer,
        variables=normal(8, seed=1),
        subject_to=["w"],
        optimizer=mlo.optimizer.SGD(learning_rate=0.1),
        **(above or {}),
    )
    return mlo.Graph([w, u, *more])


def images(iteration: int) -> dict[str, Any]:
    """Batches of three tokens of four numbers: one for each step of `w`, and one for `u`."""
    first, second, third = ((draw, LABELS) for draw in normal(3, 8, 3, 4, seed=50 + iteration))
    return {"w": mlo.Batches([first, second]), "u": third}


def words(iteration: int) -> dict[str, Any]:
    """The same for `Tied`: tokens, and the tokens to be read out."""
    source = torch.Generator().manual_seed(80 + iteration)
    first, second, third = ((tokens, tokens.flip(0)) for tokens in torch.randint(5, (3, 8), generator=source))
    return {"w": mlo.Batches([first, second]), "u": third}


draws = {Tied: words}


def tensors_of(state: mlo.State) -> dict[str, Tensor]:
    """All of them, by where they stand."""
    found = {
        f"values {level} {key}": tensor for level, tree in state.values.items() for key, tensor in named(tree).items()
    }
    found |= {f"buffers {level} {key}": tensor for level, tree in state.buffers.items() for key, tensor in tree.items()}
    for level, memory in state.optimizers.items():
        for moment, tree in memory.moments.items():
            found |= {f"{moment} {level} {key}": tensor for key, tensor in named(tree).items()}
    return found


class Untouched:
    """Remembers tensors and torch's generator, and whether anyone has written to them since."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = dict(tensors)
        self.copies = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        self.versions = {name: tensor._version for name, tensor in tensors.items()}
        self.generator = torch.get_rng_state()

    def check(self) -> None:
        for name, tensor in self.tensors.items():
            assert torch.equal(tensor.detach(), self.copies[name]), name
            assert tensor._version == self.versions[name], f"{name} was written to in place"
            assert tensor.grad is None, name
        assert torch.equal(torch.get_rng_state(), self.generator)


# Nothing is changed.


@both_methods
@pytest.mark.parametrize("make", [Everything, Attention, Tied])
def test_nothing_of_the_callers_is_changed(make, method):
    module = seeded(make).eval()
    graph, batches = reweighting(module, method), draws.get(make, images)(0)
    state, _ = graph.step(graph.init(seed=3), batches)
    caller = Untouched(dict(module.named_parameters()) | dict(module.named_buffers()))
    held = Untouched(tensors_of(state))
    for act in (
        lambda: graph.hypergradient("u", state, batches),
        lambda: graph.parts("u", state, batches),
        lambda: graph.probe(state, batches),
        lambda: graph.step(state, batches),
        lambda: graph.values(state, ["w"])["w"](batches["u"][0], training=False),
        lambda: graph.module("w", state),
    ):
        act()
        held.check()
        caller.check()
    assert not any(part.training for part in module.modules())
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_what_init_gives_shares_no_memory_with_the_caller():
    module, weights = seeded(Everything), normal(8, seed=1)
    graph = reweighting(module)
    state = graph.init(values={"u": weights})
    with torch.no_grad():
        weights.zero_()
        for tensor in [*module.parameters(), *module.buffers()]:
            tensor.zero_()
    other = reweighting(seeded(Everything)).init()
    assert all(same_bits(state.values[name], other.values[name]) for name in state.values)
    assert same_bits(state.buffers["w"], other.buffers["w"])


def test_a_start_elsewhere_is_a_module_or_its_parameters():
    """A module brings its buffers; parameters alone leave the buffers of the module that the level declares."""
    module, other = seeded(Normalized), seeded(Normalized, seed=1)
    other(normal(8, 12, seed=1))
    graph = reweighting(module)
    from_module = graph.init(values={"w": other})
    assert same_bits(from_module.values["w"], {name: tensor.detach() for name, tensor in other.named_parameters()})
    assert same_bits(from_module.buffers["w"], dict(other.named_buffers()))
    from_tensors = graph.init(values={"w": dict(from_module.values["w"])})
    assert same_bits(from_tensors.values["w"], from_module.values["w"])
    assert same_bits(from_tensors.buffers["w"], dict(module.named_buffers()))


def test_an_error_inside_an_objective_leaves_the_generator_as_it_was():
    def fails(values: Any, batch: Any) -> Tensor:
        torch.rand(3)
        raise RuntimeError("from inside")

    level = mlo.Level("w", objective=fails, variables=torch.ones(2), optimizer=optimizers["sgd"][0])
    graph = mlo.Graph([level])
    before = torch.get_rng_state()
    for act in (graph.step, graph.probe, lambda state: graph.hypergradient("w", state)):
        with pytest.raises(RuntimeError, match="from inside"):
            act(graph.init())
        assert torch.equal(torch.get_rng_state(), before)


def test_a_state_can_be_stored_and_taken_up_again():
    graph = reweighting(seeded(Everything))
    state, _ = graph.step(graph.init(seed=5), images(0))
    again = pickle.loads(pickle.dumps(state))
    one, two = graph.step(state, images(1))[0], graph.step(again, images(1))[0]
    assert same_bits(tensors_of(one), tensors_of(two))


# Batch normalization.


class Normalized(nn.Module):
    """Two layers with batch normalization between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 5)
        self.normalize = nn.BatchNorm1d(5)
        self.second = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.normalize(self.first(x.flatten(1)))))


@both_methods
@pytest.mark.parametrize("above", [{}, {"lookahead": True}, {"steps": 3}, {"steps": 3, "lookahead": True}])
def test_batch_normalization_counts_one_update_a_real_step(method, above):
    """However often a step is evaluated, taken back, or seen by the level above."""
    graph = reweighting(seeded(Everything), method, above=above)
    state = graph.init(seed=1)
    for iteration in range(3):
        graph.hypergradient("u", state, images(iteration))
        state, _ = graph.step(state, images(iteration))
        assert state.buffers["w"]["normalize.num_batches_tracked"] == 2 * (iteration + 1)


@both_methods
@pytest.mark.parametrize("lookahead", [False, True])
def test_running_statistics_are_those_of_a_training_loop(method, lookahead):
    """The level above uses batch statistics and leaves no trace; a step that is retaken counts where it ends."""
    module = seeded(Normalized)
    twin = deepcopy(module)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.05, momentum=0.9)
    graph = reweighting(module, method, above={"lookahead": lookahead})
    state = graph.init()
    for iteration in range(4):
        before = state
        state, _ = graph.step(state, images(iteration))
        seen = state if lookahead else before  # the weights under which the kept steps were taken
        for inputs, labels in images(iteration)["w"].batches:
            optimizer.zero_grad()
            weighted(twin(inputs), labels, seen.values["u"]).backward()
            optimizer.step()
    assert (
        relative_error(state.values["w"], {name: tensor.detach() for name, tensor in twin.named_parameters()}) <= 1e-13
    )
    buffers = {name: tensor.double() for name, tensor in state.buffers["w"].items()}
    assert relative_error(buffers, {name: tensor.double() for name, tensor in twin.named_buffers()}) <= 1e-13
    assert relative_error(dict(graph.module("w", state).state_dict()), dict(twin.state_dict())) <= 1e-13


@pytest.mark.parametrize("steps", [1, 3])
def test_an_upper_level_updates_its_own_statistics_once_a_step(steps):
    inner = mlo.Level(
        "w",
        objective=lambda values, batch: (values["net"](batch) * values["w"]).square().sum(),
        variables=normal(3, seed=1),
        given=["net"],
        optimizer=optimizers["sgd"][0],
    )
    upper = mlo.Level(
        "net",
        objective=lambda values, batch: values["net"](batch).square().sum() + values["w"].square().sum(),
        variables=seeded(Normalized),
        subject_to=["w"],
        optimizer=optimizers["momentum"][0],
        steps=steps,
    )
    graph = mlo.Graph([inner, upper])
    state = graph.init()
    for iteration in range(2):
        inputs = normal(8, 12, seed=iteration)
        state, _ = graph.step(state, {"w": inputs, "net": inputs})
        assert state.buffers["net"]["normalize.num_batches_tracked"] == steps * (iteration + 1)


def test_evaluation_mode_uses_the_running_statistics_and_keeps_them():
    graph = reweighting(seeded(Normalized))
    state, _ = graph.step(graph.init(), images(0))
    seen = graph.values(state)["w"]
    inputs, _ = images(1)["u"]
    expected = graph.module("w", state).eval()(inputs)
    assert torch.equal(seen(inputs, training=False), expected)
    assert same_bits(dict(seen.buffers), state.buffers["w"])
    seen(inputs)
    assert seen.buffers["normalize.num_batches_tracked"] == 3
    assert state.buffers["w"]["normalize.num_batches_tracked"] == 2


class Counting(nn.Module):
    """A buffer that is no part of the state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2))
        self.register_buffer("calls", torch.zeros(()), persistent=False)

    def forward(self) -> Tensor:
        self.calls.add_(1)
        return self.scale.square().sum()


def test_a_trained_module_has_the_buffers_that_are_not_saved_too():
    level = mlo.Level(
        "w", objective=lambda values, batch: values["w"](), variables=Counting(), optimizer=optimizers["sgd"][0]
    )
    graph = mlo.Graph([level])
    state, _ = graph.step(graph.init())
    assert state.buffers["w"]["calls"] == 1
    assert graph.module("w", state).calls == 1


class Drifting(nn.Module):
    """Its output depends on how often it was called in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.8))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self) -> Tensor:
        self.calls.add_(1)
        return self.scale * self.calls


@both_methods
def test_every_evaluation_of_a_step_sees_the_buffers_the_step_saw(method):
    """Step i has the loss ½(i·w − u)²; the hypergradient is that of its own i, and moves no buffer."""
    rate, steps = 0.05, 3
    w = mlo.Level(
        "w",
        objective=lambda values, batch: 0.5 * (values["w"]() - values["u"]).square(),
        variables=Drifting(),
        given=["u"],
        optimizer=mlo.optimizer.SGD(learning_rate=rate),
        steps=steps,
        hypergradient=method,
    )
    u = mlo.Level(
        "u",
        objective=lambda values, batch: 0.5 * values["w"]["scale"].square(),
        variables=torch.tensor(0.3),
        subject_to=["w"],
        optimizer=optimizers["sgd"][0],
    )
    graph = mlo.Graph([w, u])
    state, _ = graph.step(graph.init())
    value, leaf, response = state.values["w"]["scale"].item(), state.values["u"].item(), 0.0
    for i in range(steps + 1, 2 * steps + 1):
        value -= rate * i * (i * value - leaf)
        last = rate * i
        response = (1 - rate * i * i) * response + last
    expected = torch.tensor(value * (response if method == UNROLL else last))
    assert relative_error(graph.hypergradient("u", state), expected) <= 1e-10
    assert state.buffers["w"]["calls"] == steps


# One draw.


@both_methods
def test_every_evaluation_of_a_step_sees_the_same_noise(method):
    """And no two steps, levels, iterations or seeds see the same."""
    seen: dict[str, list[tuple[float, ...]]] = {"w": [], "u": []}
    graph = reweighting(seeded(Everything), method, watch=lambda name: seen[name].append(tuple(torch.rand(3).tolist())))
    state = graph.init(seed=0)
    graph.hypergradient("u", state, images(0))
    assert len(seen["u"]) == 1
    first, second, *again = seen["w"]
    assert again == ([second, second] if method == DIFFERENCE else [])
    assert len({first, second, *seen["u"]}) == 3
    count = len(seen["w"])
    after, _ = graph.step(state, images(0))
    assert seen["w"][count:] == seen["w"][:count], "a step draws what its hypergradient drew"
    graph.hypergradient("u", after, images(0))
    graph.hypergradient("u", graph.init(seed=1), images(0))
    assert len({draw for draws in seen.values() for draw in draws}) == 9


@both_methods
def test_classes_are_drawn_once(method):
    """p moves in a perturbed evaluation, and the class drawn by it does not."""
    drawn: list[int] = []
    used: list[tuple[float, int]] = []

    def inner(values: Any, batch: Any) -> Tensor:
        p = torch.softmax(values["w"] + values["u"], 0)

        def choose() -> Tensor:
            drawn.append(int(torch.multinomial(p, 1)))
            return torch.tensor(drawn[-1])

        chosen = values.once("class", choose)
        used.append((p[0].item(), int(chosen)))
        return p[chosen] / p[chosen].detach() * (values["w"][chosen] - 1.0).square() + values["w"].square().sum()

    w = mlo.Level(
        "w",
        objective=inner,
        variables=torch.zeros(50),
        given=["u"],
        optimizer=optimizers["sgd"][0],
        hypergradient=method,
        steps=2,
    )
    u = mlo.Level(
        "u",
        objective=lambda values, batch: values["w"].square().sum(),
        variables=normal(50, seed=4),
        subject_to=["w"],
        optimizer=optimizers["sgd"][0],
    )
    graph = mlo.Graph([w, u])
    for seed in range(3):
        drawn.clear()
        used.clear()
        graph.hypergradient("u", graph.init(seed=seed))
        assert len(drawn) == 2
        assert [chosen for _, chosen in used[:2]] == drawn
        assert {chosen for _, chosen in used[1:]} == {drawn[1]}
        assert len({p for p, _ in used}) == len(used), "p was another in every evaluation"


@both_methods
@pytest.mark.parametrize("reads", ["w", "u"])
def test_choices_are_constants_whatever_they_are_made_of(method, reads):
    """Tensors that `once` is given are detached, in tuples and mappings too, even where they are the variables."""

    def inner(values: Any, batch: Any) -> Tensor:
        alone = values.once("alone", lambda: values[reads])
        pair = values.once("pair", lambda: (values[reads], {"inside": [values[reads]]}))
        scale = alone * pair[0] * pair[1]["inside"][0]
        return (scale * (values["w"] - values["u"]).square()).sum()

    w = mlo.Level(
        "w",
        objective=inner,
        variables=torch.tensor([0.7, 1.1]),
        given=["u"],
        optimizer=mlo.optimizer.SGD(learning_rate=0.1),
        hypergradient=method,
    )
    u = mlo.Level(
        "u",
        objective=lambda values, batch: values["w"].square().sum(),
        variables=torch.tensor([0.4, 0.5]),
        subject_to=["w"],
        optimizer=optimizers["sgd"][0],
    )
    graph = mlo.Graph([w, u])
    at = {"w": torch.tensor([0.7, 1.1]), "u": torch.tensor([0.4, 0.5])}
    scale = at[reads] ** 3
    end = at["w"] - 0.1 * scale * 2 * (at["w"] - at["u"])
    assert relative_error(graph.hypergradient("u", graph.init()), 2 * end * 0.1 * scale * 2) <= 1e-9


def test_a_choice_made_in_a_reevaluation_only_is_an_error():
    calls = []

    def inner(values: Any, batch: Any) -> Tensor:
        calls.append(1)
        if len(calls) > 1:
            values.once("late", lambda: torch.tensor(1.0))
        return (values["w"] - values["u"]).square()

    w = mlo.Level(
        "w",
        objective=inner,
        variables=torch.tensor(1.0),
        given=["u"],
        optimizer=optimizers["sgd"][0],
        hypergradient=DIFFERENCE,
    )
    u = mlo.Level(
        "u",
        objective=lambda values, batch: values["w"].square(),
        variables=torch.tensor(0.5),
        subject_to=["w"],
        optimizer=optimizers["sgd"][0],
    )
    graph = mlo.Graph([w, u])
    with pytest.raises(mlo.UserError, match="'w' made the choice 'late' in a re-evaluation only"):
        graph.hypergradient("u", graph.init())


@both_methods
def test_the_same_seed_gives_the_same_bits(method):
    def run(seed: int) -> dict[str, Tensor]:
        graph = reweighting(seeded(Everything), method, above={"lookahead": True})
        state = graph.init(seed=seed)
        torch.manual_seed(len(str(seed)))  # what the caller does with torch's generator changes nothing
        for iteration in range(3):
            state, _ = graph.step(state, images(iteration))
            torch.rand(1)
        return tensors_of(state)

    assert same_bits(run(0), run(0))
    assert not same_bits(run(0), run(1))


@both_methods
def test_another_level_changes_no_draw(method):
    """Levels before, after and above: the losses and weights of the others stay as they are, bit for bit."""

    def noisy(name: str) -> Callable[[Any, Any], Tensor]:
        return lambda values, batch: (values[name] - torch.rand(2)).square().sum()

    rule = optimizers["adam"][0]
    more = [
        mlo.Level("a", objective=noisy("a"), variables=torch.zeros(2), optimizer=rule, steps=3),
        mlo.Level("v", objective=noisy("v"), variables=torch.zeros(2), given=["u"], optimizer=rule),
        mlo.Level("x", objective=noisy("x"), variables=torch.zeros(2), subject_to=["y"], optimizer=rule, every=2),
        mlo.Level("y", objective=_pulled, variables=torch.zeros(2), given=["x"], optimizer=rule),
        mlo.Level("z", variables=torch.zeros(2)),
    ]
    more[2] = mlo.Level("x", objective=_above, variables=torch.ones(2), subject_to=["y"], optimizer=rule, every=2)
    alone, together = reweighting(seeded(Everything), method), reweighting(seeded(Everything), method, more=more)
    one, two = alone.init(seed=7), together.init(seed=7)
    for iteration in range(3):
        one, measured = alone.step(one, images(iteration))
        two, also = together.step(two, images(iteration))
        for name in ("w", "u"):
            assert torch.equal(measured.losses[name], also.losses[name])
            assert same_bits(one.values[name], two.values[name])
        assert same_bits(one.buffers["w"], two.buffers["w"])


def _pulled(values: Any, batch: Any) -> Tensor:
    return (values["y"] - values["x"] * torch.rand(2)).square().sum()


def _above(values: Any, batch: Any) -> Tensor:
    return (values["y"] - torch.rand(2)).square().sum()


# Modules of every kind.


def gradient_by_hand(module: nn.Module, batches: Mapping[str, Any], generators: Mapping[str, list[Tensor]]) -> Tensor:
    """Through two steps of momentum on the module itself, with torch's generator set as each evaluation found it."""
    twin, u = deepcopy(module).train(), normal(8, seed=1).requires_grad_()
    start = {name: tensor for name, tensor in twin.named_parameters() if tensor.requires_grad}
    fixed = {name: tensor for name, tensor in twin.named_parameters() if not tensor.requires_grad}

    def output(w: Mapping[str, Tensor], inputs: Tensor, generator: Tensor) -> Tensor:
        torch.set_rng_state(generator)
        return torch.func.functional_call(twin, {**fixed, **w}, (inputs,))

    def loss(w: Mapping[str, Tensor], step: int) -> Tensor:
        inputs, labels = batches["w"][step]
        return weighted(output(w, inputs, generators["w"][step]), labels, u)

    with torch.random.fork_rng(devices=[]), sdpa_kernel(SDPBackend.MATH):
        end = respond_by_hand(loss, start, sgd_by_hand(0.05, 0.9), 2)
        inputs, labels = batches["u"]
        value = cross_entropy(output(end, inputs, generators["u"][0]), labels) + 1e-2 * u.square().sum()
        return torch.autograd.grad(value, u)[0]


def frozen_attention() -> nn.Module:
    network = Everything()
    network.attend.requires_grad_(False)
    return network


@pytest.mark.parametrize("make", [Normalized, Attention, Flash, Everything, frozen_attention, Tied])
def test_unroll_through_modules_equals_autograd_on_the_module(make):
    """BatchNorm in training mode, fused attention, dropout with the engine's own masks, ties, frozen parts."""
    module, batches = seeded(make), draws.get(make, images)(0)
    generators: dict[str, list[Tensor]] = {"w": [], "u": []}
    graph = reweighting(module, watch=lambda name: generators[name].append(torch.get_rng_state()))
    found = graph.hypergradient("u", graph.init(seed=2), batches)
    assert relative_error(found, gradient_by_hand(module, batches, generators)) <= 1e-10


@pytest.mark.parametrize("make", [Normalized, Attention, Everything, Tied])
def test_finite_differences_through_modules_approach_one_unrolled_step(make):
    batches = draws.get(make, images)(0)
    batches = {"w": batches["w"][0], "u": batches["u"]}
    state, _ = reweighting(seeded(make)).step(reweighting(seeded(make)).init(seed=2), batches)

    def indirect(method: Any) -> Tensor:
        graph = reweighting(seeded(make), method, steps=1)
        return graph.parts("u", state, batches).indirect

    assert relative_error(indirect(mlo.hypergradient.FiniteDifference(radius=1e-4)), indirect(UNROLL)) <= 1e-6


def test_frozen_parameters_count_as_buffers_and_do_not_move():
    module = seeded(frozen_attention)
    graph = reweighting(module)
    state = graph.init()
    assert not [name for name in state.values["w"] if name.startswith("attend")]
    later, _ = graph.step(state, images(0))
    for name, parameter in module.attend.named_parameters(prefix="attend"):
        assert torch.equal(later.buffers["w"][name], parameter)
        assert torch.equal(dict(graph.module("w", later).named_parameters())[name], parameter)
    assert all((later.values["w"][name] != state.values["w"][name]).any() for name in ("head.weight", "normalize.bias"))


def test_tied_weights_stay_tied():
    module = seeded(Tied)
    graph = reweighting(module)
    state = graph.init()
    assert sorted(state.values["w"]) == ["embed.weight", "first.bias", "first.weight"]
    tokens = torch.arange(5)
    assert torch.allclose(graph.values(state)["w"](tokens), module(tokens), rtol=1e-15)
    later, _ = graph.step(state, words(0))
    trained = graph.module("w", later)
    assert trained.read_out.weight is trained.embed.weight
    assert torch.allclose(graph.values(later)["w"](tokens), trained(tokens), rtol=1e-15)
    assert (flat(later.values["w"]) != flat(state.values["w"])).any()


class TiedBuffers(nn.Module):
    """Two parts that share a buffer, and no parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.one, self.two = nn.Module(), nn.Module()
        count = torch.zeros(())
        self.one.register_buffer("count", count)
        self.two.register_buffer("count", count)

    def forward(self, x: Tensor) -> Tensor:
        self.one.count.add_(1)
        return self.layer(x.mean(1)) * self.two.count


def test_tied_buffers_stay_tied():
    graph = reweighting(seeded(TiedBuffers))
    state, _ = graph.step(graph.init(), images(0))
    assert {name: tensor.item() for name, tensor in state.buffers["w"].items()} == {"one.count": 2.0}
    inputs, _ = images(0)["u"]
    assert torch.equal(graph.values(state)["w"](inputs), graph.module("w", state)(inputs))


def test_a_buffer_that_is_assigned_and_not_written_to_is_kept_too():
    class Counting(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(2))
            self.register_buffer("calls", torch.zeros(()))

        def forward(self) -> Tensor:
            self.calls = self.calls + 1
            return self.weight.square().sum()

    level = mlo.Level(
        "w",
        objective=lambda values, batch: values["w"](),
        variables=Counting(),
        optimizer=mlo.optimizer.SGD(learning_rate=0.1),
    )
    graph = mlo.Graph([level])
    state = graph.init()
    for _ in range(3):
        state, _ = graph.step(state)
    assert state.buffers["w"]["calls"] == 3
    assert graph.module("w", state).calls == 3


@pytest.mark.parametrize("what", ["values", "batch"])
def test_an_objective_that_changes_what_it_is_given_in_place_is_an_error(what):
    def objective(values: Any, batch: Any) -> Tensor:
        with torch.no_grad():
            (values["w"] if what == "values" else batch["x"][0]).clamp_(max=0.5)
        return (values["w"] * batch["x"][0]).sum()

    level = mlo.Level("w", objective=objective, variables=torch.ones(2), optimizer=mlo.optimizer.SGD(learning_rate=0.1))
    graph = mlo.Graph([level])
    with pytest.raises(mlo.UserError, match="changed values or its batch in place"):
        graph.step(graph.init(), {"w": {"x": [torch.ones(2)]}})
