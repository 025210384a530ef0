"""What cannot be done is refused, with the level, the reason and the next move; and nothing is left half done."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as distributed
from helpers import normal, optimizers
from torch import Tensor, nn

import mlo
from mlo.hypergradient import ConjugateGradient, FiniteDifference, Unroll

RULE = optimizers["momentum"][0]


def total_of(*names: str) -> Callable[[Any, Any], Tensor]:
    """An objective that reads `names`."""
    return lambda values, batch: sum(values[name].sum() for name in names).square()


def level(name: str, **fields: Any) -> mlo.Level:
    """A level that reads all it lists, unless it is told otherwise."""
    listed = [*fields.get("given", ()), *fields.get("subject_to", ()), *fields.get("against", ())]
    defaults = {"objective": total_of(name, *listed), "variables": torch.ones(2), "optimizer": RULE}
    return mlo.Level(name, **{**defaults, **fields})


def constant(name: str, **fields: Any) -> mlo.Level:
    return level(name, optimizer=None, **fields)


wrong_graphs = [  # levels, and what is said about them
    ([level("w"), level("w")], "level 'w', name: declared twice"),
    ([level("w", given=["w"])], "level 'w', given: a level reads itself without listing itself"),
    (
        [level("weights", given=["penalti"]), level("penalty")],
        "level 'weights', given: no level named 'penalti'. Did you mean 'penalty'?\n  Known: penalty, weights.",
    ),
    ([level("w", subject_to=["v"])], "level 'w', subject_to: no level named 'v'"),
    ([level("w", against=["v"])], "level 'w', against: no level named 'v'"),
    (
        [level("w", against=["v"]), level("v")],
        "level 'w', against: 'v' does not list 'w' in its own `against`",
    ),
    (
        [level("w", given=["u"], against=["u"]), level("u", against=["w"])],
        "level 'w', given: 'u' is listed twice; one arrow says how it is read",
    ),
    ([level("w", given=["u", "u"]), level("u")], "level 'w', given: 'u' is listed twice"),
    (
        [level("w", given=["u"]), constant("u", subject_to=["w"])],
        "level 'u', subject_to: a level without an optimizer has nothing to differentiate for",
    ),
    ([level("w", steps=-1)], "level 'w', steps: expected a whole number of at least 0, got -1"),
    ([level("w", every=0)], "level 'w', every: expected a whole number of at least 1, got 0"),
    ([level("w", warm_up=-2)], "level 'w', warm_up: expected a whole number of at least 0, got -2"),
    ([level("w", lookahead=True)], "level 'w', lookahead: only a level that is subject to others can look ahead"),
    (
        [level("a", given=["b"]), level("b", given=["a"])],
        "level 'a', given: levels read each other in a cycle: a → b → a; one of these must be `subject_to` another, or "
        "both play `against` each other",
    ),
    (
        [level("c", given=["b"]), level("b", given=["a"]), level("a", given=["c"])],
        "levels read each other in a cycle: a → b → c → a",
    ),
    (
        [
            level("x", given=["v"]),
            level("y", given=["u"]),
            level("u", subject_to=["x"]),
            level("v", subject_to=["y"]),
        ],
        "levels read each other in a cycle: ",
    ),
    (
        [
            level("x", given=["y", "u"], hypergradient=ConjugateGradient(iterations=1)),
            level("y", given=["u"], subject_to=["x"], hypergradient=ConjugateGradient(iterations=9)),
            level("u", subject_to=["y"]),
        ],
        "level 'y', hypergradient: conjugate gradients need a symmetric Jacobian",
    ),
    (
        [
            level("x", given=["y", "u"], hypergradient=ConjugateGradient(iterations=9)),
            level("y", given=["u"], subject_to=["x"], hypergradient=FiniteDifference()),
            level("u", subject_to=["y"]),
        ],
        "level 'y', hypergradient: it compares gradients of 'y' at two places",
    ),
    (
        [
            level("x", given=["y", "z"]),
            level("y", given=["u"], subject_to=["x"]),
            level("z", given=["u"], subject_to=["x"]),
            level("u", subject_to=["y", "z"]),
        ],
        "level 'z', subject_to: 'y' and 'z' are both subject to 'x', and others are subject to them",
    ),
    ([level("w", nested="direct")], "level 'w', nested: only a level that is subject to others has a total gradient"),
    (
        [level("x", given=["y"]), level("y", subject_to=["x"], nested="whole")],
        "level 'y', nested: expected reduced or direct, got 'whole'",
    ),
    (
        [level("w"), level("u", subject_to=["w"])],
        "level 'u', subject_to: the response of 'w' does not depend on 'u', directly or through a listed level; list the "
        "missing arrow under `given`",
    ),
    (
        [level("x", given=["u"]), level("w", given=["x"]), level("u", subject_to=["w"])],
        "level 'u', subject_to: the response of 'w' does not depend on 'u'",
    ),
    (
        [level("w", given=["u"], every=2), level("u", subject_to=["w"], every=3)],
        "level 'u', every: 'u' is due at iteration 3 and 'w', which it is subject to, is not",
    ),
    (
        [level("w", given=["u"], every=2), level("u", subject_to=["w"], every=2, warm_up=1)],
        "'u' is due at iteration 3 and 'w'",
    ),
    (
        [level("w", given=["u"], warm_up=4), level("u", subject_to=["w"])],
        "'u' is due at iteration 1 and 'w'",
    ),
    (
        [
            level("w", given=["u", "v"]),
            level("v", subject_to=["w"], every=3, warm_up=1),
            level("u", subject_to=["w"], lookahead=True, every=2),
        ],
        "lookahead: 'v' and 'u' are due together and must agree on it",
    ),
]


@pytest.mark.parametrize(("levels", "message"), wrong_graphs)
def test_a_wrong_graph_is_refused(levels, message):
    with pytest.raises(mlo.GraphError, match=re.escape(message)) as caught:
        mlo.Graph(levels)
    assert all(mistake.level in {level.name for level in levels} for mistake in caught.value.mistakes)
    assert caught.value.exit_code == 2
    with pytest.raises(mlo.GraphError) as again:
        mlo.Graph(reversed(levels))
    assert len(again.value.mistakes) == len(caught.value.mistakes)


def test_all_mistakes_are_told_at_once():
    levels = [level("w", given=["x"], every=0), level("v", lookahead=True), level("v")]
    with pytest.raises(mlo.GraphError) as caught:
        mlo.Graph(levels)
    assert [(mistake.level, mistake.key) for mistake in caught.value.mistakes] == [
        ("v", "name"),
        ("w", "given"),
        ("w", "every"),
        ("v", "lookahead"),
    ]


def test_lookahead_may_differ_where_levels_are_never_due_together():
    graph = mlo.Graph(
        [
            level("w", given=["u", "v"]),
            level("u", subject_to=["w"], lookahead=True, every=2),
            level("v", subject_to=["w"], every=4, warm_up=1),
        ]
    )
    assert graph.order == ("w", "u", "v")


wrong_levels = [
    ({"given": "penalty"}, "level 'w', given: expected a tuple of names, got 'penalty'; write ('penalty',)"),
    ({"optimizer": torch.optim.SGD}, "level 'w', optimizer: expected one of mlo.optimizer, got"),
    ({"hypergradient": "unroll"}, "level 'w', hypergradient: expected one of mlo.hypergradient, got 'unroll'"),
    ({"objective": None}, "level 'w' has an optimizer and no objective"),
]


@pytest.mark.parametrize(("fields", "message"), wrong_levels)
def test_a_wrong_level_is_refused_where_it_is_written(fields, message):
    with pytest.raises(mlo.UserError, match=re.escape(message)):
        level("w", **fields)


wrong_variables = [
    (torch.arange(3), "level 'w', variables: expected floating-point numbers to optimise, got torch.int64"),
    (
        {"a": torch.ones(2), "b": torch.ones(2, dtype=torch.bool)},
        "level 'w', variables['b']: expected floating-point numbers",
    ),
    (3.0, "level 'w', variables: expected a tensor, got float"),
    ({"a": [1.0]}, "level 'w', variables['a']: expected a tensor, got list"),
    ({}, "level 'w' has an optimizer and no variables"),
    (nn.Linear(2, 2).requires_grad_(False), "level 'w' has an optimizer and no variables"),
    (nn.DataParallel(nn.Linear(2, 2)), "wrapped in DataParallel would run with gradients that are not reduced"),
    (nn.Sequential(nn.DataParallel(nn.Linear(2, 2))), "pass module.module"),
]


@pytest.mark.parametrize(("variables", "message"), wrong_variables, ids=lambda value: str(value)[:20])
def test_variables_that_cannot_be_optimised_are_refused(variables, message):
    with pytest.raises(mlo.UserError, match=re.escape(message)):
        mlo.Graph([level("w", variables=variables)]).init()


@pytest.mark.filterwarnings("ignore:.*NO_SHARD.*:FutureWarning")
def test_a_sharded_module_is_refused(tmp_path):
    """Its parameters are parts of tensors, and its forward pass gathers them where no transform can follow."""
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
    from torch.distributed.tensor import distribute_module, init_device_mesh

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        sharded = {
            "FSDPModule": fully_shard(nn.Linear(2, 2), mesh=mesh),
            "DTensor": distribute_module(nn.Linear(2, 2), mesh),
            "FullyShardedDataParallel": FullyShardedDataParallel(
                nn.Linear(2, 2), device_id=torch.device("cpu"), sharding_strategy=ShardingStrategy.NO_SHARD
            ),
        }
        for kind, module in sharded.items():
            with pytest.raises(mlo.UserError, match=rf"parameters are sharded \({kind}\) cannot be a level"):
                mlo.Graph([level("w", variables=module)])
    finally:
        distributed.destroy_process_group()


def test_a_data_parallel_module_is_refused(tmp_path):
    """`DistributedDataParallel` would reduce in its own backward pass, which is never called."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        module = nn.parallel.DistributedDataParallel(nn.Linear(2, 2))
        with pytest.raises(mlo.UserError, match=r"wrapped in DistributedDataParallel .* pass module.module"):
            mlo.Graph([level("w", variables=module)]).init()
    finally:
        distributed.destroy_process_group()


wrong_starts = [
    ({"v": torch.ones(2)}, "values: no level named 'v'"),
    ({"w": torch.ones(3)}, "level 'w', variables: '' has shape (2,), started with shape (3,)"),
    ({"w": {"a": torch.ones(2)}}, "started with a tensor in place of tensors by name, or the reverse"),
    ({"t": {"a": torch.ones(1)}}, "level 't', variables: 'b' has shape (), started with nothing"),
    (
        {"t": {"a": torch.ones(1), "b": torch.tensor(1.0), "c": torch.ones(1)}},
        "level 't', variables: started with unknown tensors: c",
    ),
    ({"w": torch.ones(2, dtype=torch.int32)}, "expected floating-point numbers"),
]


@pytest.mark.parametrize(("values", "message"), wrong_starts)
def test_a_start_that_does_not_fit_is_refused(values, message):
    tree = {"a": torch.ones(1), "b": torch.tensor(1.0)}
    graph = mlo.Graph([level("w"), constant("t", variables=tree)])
    with pytest.raises(mlo.UserError, match=re.escape(message)):
        graph.init(values=values)


# What is found when derivatives are taken.


def probe(*levels: mlo.Level, batches: Any = None) -> None:
    """Every way to find out must find the same."""
    graph = mlo.Graph(levels)
    state = graph.init()
    upper = graph.order[-1]
    ways = [lambda: graph.probe(state, batches), lambda: graph.step(state, batches)]
    if graph.levels[upper].subject_to:
        ways.append(lambda: graph.hypergradient(upper, state, batches))
    messages = []
    for way in ways:
        with pytest.raises(mlo.UserError) as caught:
            way()
        messages.append(str(caught.value))
    assert len(set(messages)) == 1
    raise caught.value


methods = pytest.mark.parametrize("method", [Unroll(), FiniteDifference()], ids=lambda value: type(value).__name__)


@methods
def test_a_level_that_is_listed_and_not_read(method):
    with pytest.raises(
        mlo.GraphError, match="level 'u', subject_to: 'v' is read neither by the objective nor by another"
    ):
        probe(
            level("v", given=["u"], hypergradient=method),
            level("w", given=["u"], hypergradient=method),
            level("u", subject_to=["v", "w"], objective=total_of("u", "w")),
        )


@methods
def test_a_level_that_is_read_without_its_derivative(method):
    with pytest.raises(mlo.GraphError, match="its part would be a silent zero"):
        probe(
            level("w", given=["u"], hypergradient=method),
            level("u", subject_to=["w"], objective=lambda v, b: v["u"].sum() * v["w"].detach().sum()),
        )


@methods
def test_a_response_that_does_not_reach_back(method):
    with pytest.raises(
        mlo.GraphError,
        match="level 'u', subject_to: the response of 'w' does not reach back to 'u': its objective does not",
    ):
        probe(level("w", given=["u"], objective=total_of("w"), hypergradient=method), level("u", subject_to=["w"]))


@methods
def test_an_objective_that_does_not_depend_on_its_own_variables(method):
    with pytest.raises(mlo.GraphError, match="level 'w', objective: it does not depend on the level's own variables"):
        probe(level("w", given=["u"], objective=total_of("u"), hypergradient=method), level("u", subject_to=["w"]))
    with pytest.raises(mlo.GraphError, match="level 'w', objective: it does not depend"):
        probe(level("w", objective=lambda values, batch: torch.tensor(1.0)))


def test_an_upper_objective_need_not_read_its_own_variables():
    graph = mlo.Graph([level("w", given=["u"]), level("u", subject_to=["w"], objective=total_of("w"))])
    parts = graph.parts("u", graph.init())
    assert parts.direct.eq(0).all()
    assert parts.total.ne(0).all()


@methods
def test_a_level_that_is_read_through_a_state_that_counts_as_its_solution(method):
    """`b` takes no step, so nothing arrives at `a`; that is no mistake."""
    graph = mlo.Graph(
        [
            level("a", given=["u"], hypergradient=method),
            level("b", given=["a"], hypergradient=method, steps=0),
            level("u", subject_to=["a", "b"], objective=total_of("u", "b")),
        ]
    )
    parts = graph.parts("u", graph.init())
    assert not parts.through
    assert torch.equal(parts.total, parts.direct)


def test_probing_tells_all_that_is_disconnected_at_once():
    graph = mlo.Graph(
        [
            level("w", given=["u"]),
            level("u", subject_to=["w"], objective=total_of("u")),
            level("x", objective=lambda values, batch: torch.tensor(1.0)),
        ]
    )
    with pytest.raises(mlo.GraphError) as caught:
        graph.probe(graph.init())
    assert {(mistake.level, mistake.key) for mistake in caught.value.mistakes} == {
        ("u", "subject_to"),
        ("x", "objective"),
    }


def test_reading_a_level_that_is_not_listed_names_the_key_to_add():
    message = "the objective of level 'w' reads 'u', which the level does not list; add 'u' to its `given` (held fixed)"
    with pytest.raises(mlo.UserError, match=re.escape(message)) as caught:
        probe(level("w", objective=total_of("w", "u")))
    assert isinstance(caught.value, KeyError)
    assert str(caught.value).endswith("Listed: w.")
    with pytest.raises(mlo.UserError, match="Did you mean 'meta'"):
        probe(level("meta"), level("w", given=["meta"], objective=total_of("w", "met")))


def test_too_few_batches():
    batches = {"w": mlo.Batches([torch.ones(2)])}
    with pytest.raises(mlo.UserError, match="level 'w' needs a batch for step 2 and was given 1"):
        probe(level("w", steps=3), batches=batches)


def test_batches_for_an_unknown_level():
    graph = mlo.Graph([level("weights")])
    with pytest.raises(mlo.UserError, match=r"batches: no level named 'weihgts'\. Did you mean 'weights'"):
        graph.step(graph.init(), {"weihgts": 1})


wrong_losses = [
    (lambda w: w, "a torch.float64 tensor of shape (2,)"),
    (lambda w: w.sum().reshape(1), "a torch.float64 tensor of shape (1,)"),
    (lambda w: w.sum().long(), "a torch.int64 tensor of shape ()"),
    (lambda w: 1.0, "1.0"),
    (lambda w: None, "None"),
    (lambda w: (w, {}), "a torch.float64 tensor of shape (2,)"),
]


@pytest.mark.parametrize(("loss", "shown"), wrong_losses)
def test_a_loss_that_is_not_one_number(loss, shown):
    with pytest.raises(
        mlo.UserError, match=re.escape(f"the objective of level 'w' must give a scalar loss, got {shown}")
    ):
        probe(level("w", objective=lambda values, batch: loss(values["w"])))


def test_questions_about_levels_that_cannot_answer():
    graph = mlo.Graph([level("weights"), mlo.Level("c", variables=torch.ones(1))])
    state = graph.init()
    with pytest.raises(mlo.UserError, match=r"no level named 'weight'\. Did you mean 'weights'"):
        graph.hypergradient("weight", state)
    with pytest.raises(mlo.UserError, match="level 'c' is a constant: it has no objective"):
        graph.hypergradient("c", state)
    with pytest.raises(mlo.UserError, match="level 'weights' holds tensors and no module"):
        graph.module("weights", state)


# Numbers that lie.


def run_until_it_breaks(graph: mlo.Graph, iterations: int, batches: Callable[[int], Any]) -> mlo.NumericalError:
    """The error, after it was made sure that the state it came from is as it was."""
    state = graph.init()
    for iteration in range(1, iterations):
        state, _ = graph.step(state, batches(iteration))
    before = {name: value.clone() for name, value in state.values.items()}
    moments = {name: memory.moments["momentum"].clone() for name, memory in state.optimizers.items()}
    generator = torch.get_rng_state()
    with pytest.raises(mlo.NumericalError) as caught:
        graph.step(state, batches(iterations))
    assert all(torch.equal(state.values[name], value) for name, value in before.items())
    assert all(torch.equal(state.optimizers[name].moments["momentum"], value) for name, value in moments.items())
    assert state.iteration == iterations - 1
    assert torch.equal(torch.get_rng_state(), generator)
    assert caught.value.exit_code == 3
    return caught.value


@methods
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite(bad, method):
    def inner(values: Any, batch: Any) -> Tensor:
        return (values["w"] * batch - values["u"]).square().sum()

    graph = mlo.Graph(
        [level("w", given=["u"], objective=inner, steps=3, hypergradient=method), level("u", subject_to=["w"])]
    )
    good, broken = torch.ones(2), torch.tensor([1.0, bad])

    def batches(iteration: int) -> dict[str, Any]:
        return {"w": mlo.Batches([good, broken if iteration == 4 else good, good])}

    error = run_until_it_breaks(graph, 4, batches)
    assert (error.level, error.step, error.term, error.iteration) == ("w", 2, "the loss", 4)
    assert str(error).startswith("iteration 4: level 'w', step 2: the loss is not finite; ")


@methods
def test_a_hypergradient_that_is_not_finite(method):
    """The losses are finite: √|u − c| has no derivative at u = c, in the part through `w` or in the direct one."""

    def inner(values: Any, batch: Any) -> Tensor:
        return (values["w"] - (values["u"] - batch).abs().sqrt()).square().sum()

    def outer(values: Any, batch: Any) -> Tensor:
        return values["w"].square().sum() + (values["u"] - batch).abs().sqrt().sum()

    start = torch.ones(2)
    levels = [
        level("w", given=["u"], objective=inner, hypergradient=method),
        level("u", subject_to=["w"], objective=outer, variables=start),
    ]
    error = run_until_it_breaks(mlo.Graph(levels), 1, lambda _: {"w": start, "u": 2 * start})
    assert (error.level, error.step, error.iteration) == ("u", 1, 1)
    assert error.term == "the part of the hypergradient through 'w'"
    error = run_until_it_breaks(mlo.Graph(levels), 1, lambda _: {"w": 2 * start, "u": start})
    assert error.term == "the direct part of the hypergradient"


def test_a_gradient_that_is_not_finite():
    """Where the loss is finite and nothing is above the level: √|w| at 0."""
    root = level("w", objective=lambda v, b: (v["w"] * b).abs().sqrt().sum(), steps=2)
    error = run_until_it_breaks(mlo.Graph([root]), 3, lambda iteration: {"w": torch.tensor([1.0, 3.0 - iteration])})
    assert (error.level, error.step, error.iteration) == ("w", 2, 3)


def test_a_step_that_is_retaken_counts_as_it_is_retaken():
    """The first response and the hypergradient are finite; `u` moves to ½, where the gradient of √|w(u − ½)| is not."""

    def inner(values: Any, batch: Any) -> Tensor:
        return (values["w"] * (values["u"] - 0.5)).abs().sqrt().sum()

    def outer(values: Any, batch: Any) -> Tensor:
        return values["u"].sum() + 0.0 * values["w"].sum()

    half = mlo.optimizer.SGD(learning_rate=0.5, momentum=0.9)
    graph = mlo.Graph(
        [
            level("w", given=["u"], objective=inner),
            level("u", subject_to=["w"], objective=outer, optimizer=half, lookahead=True),
        ]
    )
    error = run_until_it_breaks(graph, 1, lambda _: None)
    assert (error.level, error.step, error.term, error.iteration) == ("w", 1, "the new value", 1)


def test_a_run_that_diverges_stops():
    """Gradient descent far above its stable step size: an error, not a table of NaN."""
    graph = mlo.Graph(
        [
            level(
                "w",
                objective=lambda v, b: (v["w"] ** 4).sum(),
                variables=normal(2, seed=1),
                optimizer=mlo.optimizer.SGD(learning_rate=10.0, momentum=0.5),
            )
        ]
    )
    state = graph.init()

    def run() -> None:
        nonlocal state
        for _ in range(20):
            state, _ = graph.step(state)

    with pytest.raises(mlo.NumericalError, match="level 'w', step 1: the"):
        run()
    assert state.values["w"].isfinite().all()


def test_an_objective_that_stumbles_over_nan_is_not_blamed_for_it():
    def inner(values: Any, batch: Any) -> Tensor:
        return (values["w"] * values["u"]).sum() * float("nan")

    def outer(values: Any, batch: Any) -> Tensor:
        if not bool(values["w"].isfinite().all()):
            raise ValueError("expected finite parameters")
        return values["w"].sum()

    graph = mlo.Graph([level("w", given=["u"], objective=inner), level("u", subject_to=["w"], objective=outer)])
    with pytest.raises(mlo.NumericalError) as raised:
        graph.step(graph.init())
    assert (raised.value.level, raised.value.term) == ("w", "the loss")


def test_what_an_objective_raises_is_told_where_it_was():
    def objective(values: Any, batch: Any) -> Tensor:
        return values["w"] @ torch.ones(7)

    graph = mlo.Graph([level("w", objective=objective)])
    with pytest.raises(RuntimeError) as raised:
        graph.step(graph.init())
    (note,) = raised.value.__notes__
    assert note.startswith("In the objective of level 'w', iteration 1, test_errors.py:")


@pytest.mark.parametrize("measured", [3, {"a": "text"}])
def test_measurements_that_are_no_numbers_are_refused(measured):
    graph = mlo.Graph([level("w", objective=lambda values, batch: (values["w"].sum(), measured))])
    with pytest.raises(mlo.UserError, match=r"level 'w' (must measure a mapping|measured 'a')"):
        graph.step(graph.init())


def test_who_writes_infinity_in_place_is_told_so():
    def outer(values: Any, batch: Any) -> Tensor:
        values["w"].detach().fill_(float("-inf"))
        return values["u"].square().sum()

    graph = mlo.Graph(
        [
            level("w", objective=lambda values, batch: values["w"].square().sum()),
            level("u", objective=outer, given=["w"]),
        ]
    )
    with pytest.raises(mlo.UserError, match="the objective of level 'u' changed values or its batch in place"):
        graph.step(graph.init())
