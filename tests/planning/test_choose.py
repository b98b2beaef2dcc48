"""The search against closed forms, and what must hold whatever the law."""

import numpy as np
import pytest
from planted_laws import BASE, SURFACES
from scipy.optimize import minimize_scalar

from xlstm_scaling.fitting.loss_surface import LossSurface
from xlstm_scaling.planning.choose import (
    Candidates,
    allocate,
    choose,
    equal_loss,
    law_optimum,
    probability_less,
    smallest_budget,
)
from xlstm_scaling.planning.errors import PlanningError
from xlstm_scaling.planning.laws import ArchLaw, SurfaceLaw
from xlstm_scaling.planning.question import Question

FORMS = {
    "transformer": SURFACES["transformer"],
    "xlstm": SURFACES["xlstm"],
    "hoffmann": LossSurface(A=406.4, B=410.7, E=1.69, alpha=0.34, beta=0.28),  # Hoffmann et al. 2022, eq. 10
}


def law_of(surface: LossSurface) -> ArchLaw:
    params = np.array([[surface.A, surface.B, surface.E, surface.alpha, surface.beta, surface.gamma]])
    plain = SurfaceLaw(params, np.array([float(BASE)]), np.zeros((1, 1)))
    return ArchLaw("any", "all", "gamma_free", BASE, plain, {"num_params": (1e8, 1e10)})


def continuum(points: int = 20001) -> Candidates:
    """Sizes so close together that the search is the calculus: 6 N FLOPs a token in training, 2 N in serving."""
    sizes = np.geomspace(1e6, 1e13, points)
    times = {"ttft_s": sizes / 1e10, "step_time_s": sizes / 1e12, "serving_bytes": 2 * sizes}
    return Candidates([], sizes, 6 * sizes, 2 * sizes, times)


SIZES = continuum()
STEP = SIZES.num_params[1] / SIZES.num_params[0] - 1


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("flops", [1e18, 1e21, 5.8e23])
def test_optimum_of_a_budget_is_the_closed_form(name, flops):
    surface = FORMS[name]
    choice = choose(Question(BASE, flops=flops), law_of(surface), SIZES)
    size, tokens = surface.compute_optimal(flops)
    assert SIZES.num_params[choice.best] == pytest.approx(size, rel=STEP)
    assert choice.allocation.num_tokens[0, choice.best] == pytest.approx(tokens, rel=STEP)
    assert choice.value == pytest.approx(surface.optimal_loss(flops), rel=1e-7)
    assert choice.best == choice.free and not choice.binding


@pytest.mark.parametrize("name", FORMS)
def test_least_budget_of_a_loss_inverts_the_optimal_loss(name):
    surface = FORMS[name]
    loss = float(surface.optimal_loss(1e21))
    choice = choose(Question(BASE, loss=loss), law_of(surface), SIZES)
    assert choice.value == pytest.approx(1e21, rel=1e-6)
    assert choice.allocation.loss[0, choice.best] == pytest.approx(loss, rel=1e-12)
    assert SIZES.num_params[choice.best] == pytest.approx(surface.compute_optimal(1e21)[0], rel=STEP)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("served", [1e9, 1e12, 1e14])
def test_serving_is_minimised_as_by_calculus(name, served):
    """Against a scalar minimiser of 6 N D(N, L) + 2 N Q (Sardana et al. 2023, eq. 2) with its own inverse of L."""
    surface = FORMS[name]
    loss = float(surface.optimal_loss(1e21))

    def total(log_size: float) -> float:
        size = np.exp(log_size)
        room = (loss - surface.E) ** (1 / surface.gamma) - surface.A / size**surface.alpha
        if room <= 0:
            return 1e40
        return 6 * size * (surface.B / room) ** (1 / surface.beta) + 2 * size * served

    found = minimize_scalar(total, bounds=(np.log(1e8), np.log(1e11)), method="bounded", options={"xatol": 1e-10})
    choice = choose(Question(BASE, loss=loss, tokens_served=served), law_of(surface), SIZES)
    assert found.fun * (1 - 1e-9) <= choice.value <= found.fun * (1 + 1e-5)  # the continuum has steps
    assert SIZES.num_params[choice.best] == pytest.approx(np.exp(found.x), rel=1e-2)


def test_serving_nothing_is_the_optimum_of_training():
    law = law_of(FORMS["xlstm"])
    plain = choose(Question(BASE, flops=1e21), law, SIZES)
    total = choose(Question(BASE, total_flops=1e21), law, SIZES)
    same = choose(equal_loss(Question(BASE, flops=1e21), plain.value), law, SIZES)
    assert plain.best == total.best == same.best
    assert same.value == pytest.approx(1e21, rel=1e-9)


@pytest.mark.parametrize("kind", ["loss", "total_flops"])
@pytest.mark.parametrize("name", FORMS)
def test_more_served_tokens_never_a_larger_model(kind, name):
    target = {"loss": float(FORMS[name].optimal_loss(1e21)), "total_flops": 1e23}[kind]
    chosen = [
        choose(Question(BASE, **{kind: target}, tokens_served=served), law_of(FORMS[name]), SIZES)
        for served in (0, *np.geomspace(1e9, 1e13, 25))
    ]
    sizes = [SIZES.num_params[choice.best] for choice in chosen]
    values = [choice.value for choice in chosen]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > sizes[-1]
    assert values == sorted(values)  # serving more never makes it cheaper, or the loss lower


@pytest.mark.parametrize("limited", ["max_ttft_s", "max_step_time_s", "max_serving_bytes"])
def test_tighter_limits_never_lower_the_loss(limited):
    law, values = law_of(FORMS["transformer"]), []
    for limit in np.geomspace(1e-3, 1e3, 40) * {"max_serving_bytes": 1e10}.get(limited, 1.0):
        values.append(choose(Question(BASE, flops=1e22, **{limited: limit}), law, SIZES).value)
    assert values == sorted(values, reverse=True)
    assert values[0] > values[-1] and values[-1] == choose(Question(BASE, flops=1e22), law, SIZES).value


def test_larger_budgets_never_raise_the_loss():
    law = law_of(FORMS["xlstm"])
    for limits in ({}, {"max_ttft_s": 0.02}):
        values = [
            choose(Question(BASE, flops=flops, **limits), law, SIZES).value for flops in np.geomspace(1e17, 1e25, 40)
        ]
        assert values == sorted(values, reverse=True)


def test_binding_limits_are_those_that_cost():
    law = law_of(FORMS["xlstm"])
    free = choose(Question(BASE, flops=1e22), law, SIZES)
    size = float(SIZES.num_params[free.best])
    loose, tight = 2 * size / 1e10, 0.1 * size / 1e12
    choice = choose(Question(BASE, flops=1e22, max_ttft_s=loose, max_step_time_s=tight), law, SIZES)
    assert choice.binding == ("step_time_s",)
    assert SIZES.num_params[choice.best] <= tight * 1e12 * (1 + 1e-12)
    enough = smallest_budget(Question(BASE, flops=1e22), law, SIZES, choice.value)
    assert enough < 1e22  # what the limit wastes
    assert choose(Question(BASE, flops=enough), law, SIZES).value == pytest.approx(choice.value, rel=1e-6)


def test_infeasible_limits_name_the_nearest_point():
    law = law_of(FORMS["xlstm"])
    asked = {"max_ttft_s": 1e-9, "max_step_time_s": 1.0}
    choice = choose(Question(BASE, flops=1e21, **asked), law, SIZES)
    assert choice.best is None and choice.binding == ("ttft_s",)
    needed, index = choice.nearest["ttft_s"]
    assert SIZES.quantities["ttft_s"][index] == needed
    assert choose(Question(BASE, flops=1e21, **asked | {"max_ttft_s": needed}), law, SIZES).best is not None
    assert choose(Question(BASE, flops=1e21, **asked | {"max_ttft_s": needed * 0.999}), law, SIZES).best is None
    factor, _ = choice.jointly
    wider = {name: limit * factor * (1 + 1e-12) for name, limit in asked.items()}
    assert choose(Question(BASE, flops=1e21, **wider), law, SIZES).best is not None


def test_limits_that_only_together_leave_nothing():
    sizes = np.array([1e8, 1e9])
    pool = Candidates(
        [],
        sizes,
        6 * sizes,
        2 * sizes,
        {"ttft_s": np.array([1.0, 2.0]), "step_time_s": np.array([2.0, 1.0]), "serving_bytes": sizes},
    )
    choice = choose(Question(BASE, flops=1e21, max_ttft_s=1.5, max_step_time_s=1.5), law_of(FORMS["xlstm"]), pool)
    assert choice.best is None and set(choice.binding) == {"ttft_s", "step_time_s"}
    assert choice.nearest["ttft_s"][0] == 2.0 and choice.nearest["step_time_s"][0] == 2.0


def test_loss_below_what_can_be_reached_has_no_answer():
    surface = FORMS["hoffmann"]
    assert choose(Question(BASE, loss=surface.E * 0.99), law_of(surface), SIZES).free is None


def test_fixed_tokens_take_the_largest_size_of_the_budget():
    choice = choose(Question(BASE, flops=1e21, num_tokens=1e11), law_of(FORMS["xlstm"]), SIZES)
    assert SIZES.num_params[choice.best] == pytest.approx(1e21 / 6e11, rel=STEP)
    assert choice.allocation.training_flops[0, choice.best] <= 1e21


def test_fixed_size_takes_the_nearest_and_spends_the_budget():
    choice = choose(Question(BASE, flops=1e21, num_params=3e9), law_of(FORMS["xlstm"]), SIZES)
    assert choice.candidates.num_params[choice.best] == pytest.approx(3e9, rel=STEP)
    assert choice.allocation.num_tokens[0, choice.best] == pytest.approx(1e21 / 18e9, rel=STEP)


def test_limit_without_times_says_what_to_give():
    pool = Candidates([], *(np.array([value]) for value in (1e9, 6e9, 2e9)), {"ttft_s": np.array([np.nan])})
    with pytest.raises(PlanningError, match="--runtime"):
        choose(Question(BASE, flops=1e21, max_ttft_s=1.0), law_of(FORMS["xlstm"]), pool)


def test_optimum_of_resamples_follows_each_law(laws):
    """Every row of `law_optimum` is the optimum of that row's own surface."""
    law = laws.archs["xlstm"]
    found = law_optimum(Question(BASE, flops=1e21), law, continuum(3000))
    for row in (0, 1, 17):
        surface = LossSurface(*law.surface.params[row])
        assert found["num_params"][row] == pytest.approx(surface.compute_optimal(1e21)[0], rel=0.01)
        assert found["loss"][row] == pytest.approx(surface.optimal_loss(1e21), rel=1e-5)


def test_allocations_of_resamples_agree_with_the_surface(laws):
    law, pool = laws.archs["transformer"], continuum(50)
    many = allocate(Question(BASE, flops=1e21), law, pool, slice(None))
    for row in (0, 5):
        predicted = LossSurface(*law.surface.params[row]).predict(pool.num_params, 1e21 / pool.train)
        np.testing.assert_allclose(many.loss[row], predicted, rtol=1e-12)


def test_probability_counts_paired_resamples():
    a = np.array([1.0, 2.0, 3.0, np.nan, 5.0])
    b = np.array([2.0, 1.0, 3.0, 0.0, np.inf])
    share, pairs = probability_less(a, [b])
    assert pairs == 4 and share == pytest.approx((1 + 0 + 0.5 + 1) / 4)
    assert probability_less(np.array([np.nan]), [np.array([1.0])])[1] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "--flops"),
        ({"flops": 1e20, "loss": 2.5}, "one of"),
        ({"flops": -1.0}, "positive"),
        ({"flops": 1e20, "num_params": 1e9, "num_tokens": 1e10}, "nothing for"),
        ({"flops": 1e20, "tokens_served": -1}, "negative"),
        ({"flops": 1e20, "batch_size": 0}, "at least 1"),
        ({"flops": 1e20, "max_ttft_s": 0.0}, "positive"),
    ],
)
def test_questions_that_make_no_sense_are_refused(options, message):
    with pytest.raises(PlanningError, match=message):
        Question(BASE, **options)
