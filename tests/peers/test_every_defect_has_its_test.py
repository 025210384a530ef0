"""Defects that were found in other libraries of this kind by running them, and the test that holds us to better.

Nested levels are held to theirs where nesting is tested.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
EVERY, SOLVERS = "tests/peers/test_every_method.py", "tests/peers/test_solvers_and_steps.py"
SHIPPED = "tests/testing/test_methods.py"

DEFECTS = {
    "every path is followed: cost grows as Fibonacci's numbers on ladders": [
        (EVERY, "test_the_cost_of_a_ladder_is_linear_in_its_levels"),
        ("tests/engine/test_unroll.py", "test_a_ladder_of_d_levels_takes_d_minus_1_pullbacks"),
    ],
    "unrolling is broken on current torch": [
        (SHIPPED, "test_a_shipped_method_has_the_properties_it_claims"),
        (SHIPPED, "test_every_shipped_method_is_in_the_table"),
        ("tests/engine/test_unroll.py", "test_every_optimizer_unrolled_equals_autograd_through_the_loop_written_out"),
    ],
    "defaults are 45 to 77 % off on a quadratic of condition 10": [
        (SOLVERS, "test_the_defaults_on_a_quadratic_of_condition_10"),
        (SOLVERS, "test_conjugate_gradients_with_their_default_tolerance_on_a_quadratic_of_condition_10"),
    ],
    "conjugate gradients are wrong unless their step setting is 1": [
        (SOLVERS, "test_conjugate_gradients_have_no_step_that_could_be_chosen_wrong"),
    ],
    "conjugate gradients give NaN at a residual of zero": [
        (SOLVERS, "test_conjugate_gradients_go_on_past_convergence_without_nan"),
        (SOLVERS, "test_conjugate_gradients_with_nothing_to_solve"),
    ],
    "conjugate gradients give zero, or NaN, on the identity": [
        (SOLVERS, "test_conjugate_gradients_on_a_multiple_of_the_identity"),
        (
            "tests/engine/test_implicit.py",
            "test_conjugate_gradient_solves_the_identity_in_one_iteration_and_reports_it",
        ),
    ],
    "conjugate gradients drop their last iterate": [
        (
            "tests/engine/test_implicit.py",
            "test_conjugate_gradient_keeps_its_last_iterate_the_best_in_its_krylov_space",
        ),
    ],
    "an inner loop of Adam is differentiated as descent: cosine −0.14 at 20 steps": [
        (SOLVERS, "test_twenty_steps_of_adam_are_differentiated_as_adam"),
        (SOLVERS, "test_finite_differences_pull_through_adam_and_not_through_plain_descent"),
    ],
    "dropout is redrawn between the two sides of a difference": [
        (EVERY, "test_dropout_is_drawn_once_for_all_evaluations_of_a_step"),
        ("tests/engine/test_purity.py", "test_every_evaluation_of_a_step_sees_the_same_noise"),
    ],
    "running statistics are updated by evaluations that are no training steps": [
        (EVERY, "test_running_statistics_count_each_training_step_once"),
        ("tests/engine/test_purity.py", "test_running_statistics_are_those_of_a_training_loop"),
    ],
    "weights are perturbed and not restored bit for bit": [
        (EVERY, "test_weights_and_buffers_are_what_they_were_bit_for_bit"),
    ],
    "a resumed run drifts": [
        (EVERY, "test_resuming_is_the_same_run_bit_for_bit"),
        ("tests/run/test_resume.py", "test_a_run_broken_off_at_any_iteration_ends_as_if_it_had_not_been"),
    ],
    "a misspelt method is found at the first outer step": [
        (SOLVERS, "test_a_misspelt_method_is_found_when_a_graph_is_checked"),
    ],
    "AdamW fails": [
        (EVERY, "test_adamw_is_differentiated_or_refused_with_its_reason"),
        ("tests/engine/test_optimizers.py", "test_unrolling_equals_autograd_and_zero_gradients_pass_nothing_on"),
    ],
    "parameter groups are flattened": [
        (SOLVERS, "test_parameter_groups_are_kept_and_differentiated"),
        ("tests/engine/test_clipping_groups.py", "test_groups_equal_those_of_torch"),
    ],
    "zero-dimensional tensors have a hypergradient of 0.0, and an error under torch.func": [
        (EVERY, "test_zero_dimensional_tensors_have_their_hypergradient"),
    ],
    "adaptive optimizers give NaN where a gradient is exactly zero": [
        (EVERY, "test_adaptive_steps_where_every_gradient_is_exactly_zero"),
        ("tests/engine/test_optimizers.py", "test_adam_where_a_gradient_is_exactly_zero"),
    ],
    "vmap fails": [
        (EVERY, "test_vmap_over_penalties"),
        ("tests/engine/test_transforms.py", "test_a_batch_of_whole_iterations"),
    ],
    "optimizers cannot be compiled as one graph": [
        (SOLVERS, "test_the_update_of_an_optimizer_is_one_graph_to_the_compiler"),
    ],
    "there are exactly two levels": [(EVERY, "test_a_graph_may_have_more_than_two_levels")],
    "gradients that are not a number become 0 without a word": [
        (EVERY, "test_a_derivative_that_is_not_a_number_stops_the_run_and_is_never_zero"),
        ("tests/engine/test_implicit.py", "test_conjugate_gradient_passes_on_what_is_not_a_number"),
    ],
    "momentum is lost between iterations": [
        (SOLVERS, "test_what_an_optimizer_remembers_is_kept_between_iterations"),
    ],
    "tests have a tolerance of 5e-2": [
        (EVERY, "test_exact_and_unrolled_answers_are_asked_for_to_eight_digits"),
        (SOLVERS, "test_central_differences_are_right_to_the_square_of_their_radius"),
    ],
    "memory grows over long runs": [
        ("tests/run/test_memory.py", "test_a_run_of_20_000_cheap_iterations_keeps_flat_memory"),
    ],
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_the_tests_are_there(defect):
    for path, name in DEFECTS[defect]:
        tree = ast.parse((ROOT / path).read_text())
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, (path, name)
