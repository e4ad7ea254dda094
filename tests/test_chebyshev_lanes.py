"""RKC2 whose lanes go through their stages at their own pace."""

# Points of several kinds share one energy.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from gradflow.descent import Descent
from gradflow.ensemble import descend, lanes_of
from gradflow.flow import GradientFlow
from gradflow.initial import GaussianInit
from gradflow.lanes.chebyshev import ChebyshevLanes
from gradflow.layout import Columns, Rows, WIDEST
from gradflow.models.base import AbstractEnergy, EnergyBelow
from gradflow.models.linear import SquaredLoss
from gradflow.moments import Moments
from gradflow.solution import RESULTS
from gradflow.solve import Integrator
from gradflow.solvers.chebyshev import RKC2
from gradflow.theory.linear import LinearTheory
from gradflow.types import names_of


METHOD = RKC2()
KINDS = [((6, 2, 4, 6), Columns), ((6, WIDEST + 1, 6), Rows)]


class Valleys(AbstractEnergy):
    """Any curvatures, over points that are pairs of arrays."""

    rates: jnp.ndarray

    def __call__(self, point):
        return jnp.sum(self.rates * point["x"] ** 2) / 2 + jnp.sum(point["y"] ** 2) / 2


class Pairs(eqx.Module):
    def __call__(self, key):
        return {"x": 1 + jr.uniform(key, (3,)), "y": jr.normal(key, (2, 2))}


def loss(widths, condition=100.0):
    scales = jnp.geomspace(1, condition**-0.5, widths[0])[None]
    return SquaredLoss(
        Moments.from_data(jr.normal(jr.key(1), (40, widths[0])) * scales)
    )


def never(energy):
    return EnergyBelow(energy, jnp.asarray(-jnp.inf), jnp.zeros(()), jnp.zeros(()))


def until(energy, horizon, rtol, **settings):
    """All the way to a time."""
    return Integrator(
        GradientFlow(energy),
        horizon=horizon,
        rtol=rtol,
        tolerance=1e3 * rtol,
        stop=never(energy),
        **settings,
    )


def ends(integrator, start, draws, lanes):
    ((solution, _),) = descend(integrator, start, jr.key(0), [range(draws)], lanes)
    return solution


def difference(one, other):
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return max(np.max(np.abs(a - b)) for a, b in pairs)


@pytest.mark.parametrize(
    ("widths", "layout"),
    [pytest.param(*KINDS[0], marks=pytest.mark.slow), KINDS[1]],
)
@pytest.mark.slow
def test_trajectories_converge_with_order_2(widths, layout):
    """An eighth of the tolerance, of an error of order 3, is a quarter of the error."""
    energy, start = loss(widths), GaussianInit(widths, 0.4)
    exact = ends(until(energy, 30.0, 1e-11, method=diffrax.Dopri8()), start, 6, 6)
    errors = []
    for rtol in (8e-6, 1e-6):
        integrator = until(energy, 30.0, rtol, method=METHOD)
        (descent,) = integrator.descents(start(jr.key(0)))
        lanes = lanes_of(descent, start(jr.key(0)))
        assert isinstance(lanes, ChebyshevLanes) and type(lanes.layout) is layout
        found = ends(integrator, start, 6, 6)
        assert np.all(names_of(RESULTS, found.result) == "horizon_reached")
        assert np.all(found.time == 30)
        errors.append(difference(found.point, exact.point))
    assert errors[0] < 2e-4 and 2 < errors[0] / errors[1] < 8


@pytest.mark.parametrize(("widths", "layout"), KINDS)
@pytest.mark.slow
def test_steps_are_as_many_as_those_of_the_solver(widths, layout):
    energy, start = loss(widths), GaussianInit(widths, 0.4)
    integrator = until(energy, 300.0, 1e-4, method=METHOD)
    ours = ends(integrator, start, 8, 8)
    alone = jax.jit(jax.vmap(integrator))(
        jax.vmap(lambda i: start(jr.fold_in(jr.key(0), i)))(jnp.arange(8))
    )
    counts = {name: np.asarray(alone.stats[name]) for name in ("steps", "velocities")}
    assert np.allclose(ours.stats["steps"], counts["steps"], rtol=0.1, atol=3)
    assert np.all(ours.stats["velocities"] < 1.2 * counts["velocities"])
    assert difference(ours.point, alone.point) < 1e-3
    # Stages far beyond those of an explicit method's steps.
    assert np.mean(ours.stats["velocities"]) > 4 * np.mean(ours.stats["steps"])


@pytest.mark.slow
def test_company_changes_no_bit():
    widths = KINDS[0][0]
    energy, start = loss(widths), GaussianInit(widths, 0.2)
    theory = LinearTheory(energy, 2)
    integrator = Integrator(
        GradientFlow(energy),
        stop=theory.certificate,
        method=METHOD,
        rtol=1e-4,
        tolerance=1e-1,
    )
    few, many = (ends(integrator, start, draws, 16) for draws in (20, 100))
    for one, other in zip(jax.tree.leaves(few), jax.tree.leaves(many), strict=True):
        assert np.array_equal(one, other[:20])
    assert np.all(names_of(RESULTS, many.result) == "rule_met")
    other = ends(integrator, start, 20, 5)
    assert np.array_equal(few.stats["steps"], other.stats["steps"])
    assert np.allclose(few.time, other.time, rtol=1e-10)
    assert difference(few.point, other.point) < 1e-10


@pytest.mark.slow
def test_points_of_any_kind():
    energy = Valleys(jnp.array([1e5, 1e2, 0.1]))
    solution = ends(until(energy, 2.0, 1e-5, method=METHOD), Pairs(), 5, 3)
    starts = jax.vmap(lambda i: Pairs()(jr.fold_in(jr.key(0), i)))(jnp.arange(5))
    decayed = np.exp(-2 * np.asarray(energy.rates)) * np.asarray(starts["x"])
    assert np.allclose(solution.point["x"], decayed, atol=1e-4)
    assert np.allclose(solution.point["y"], np.exp(-2) * starts["y"], atol=1e-4)
    # Tsit5, stable to 3.5 fastest times in 6 velocities, would take 3e5.
    assert np.all(solution.stats["velocities"] < 8000)


@pytest.mark.slow
def test_the_spectral_radius_is_found():
    energy = Valleys(jnp.array([700.0, 30.0, 2.0]))
    integrator = until(energy, 1e9, 1e-4, method=METHOD)
    points = jax.vmap(Pairs())(jr.split(jr.key(3), 4))
    like = jax.tree.map(lambda leaf: leaf[0], points)
    lanes = lanes_of(integrator.descents(like)[0], like)
    states = lanes.begin(points, jnp.zeros(4))
    step = eqx.filter_jit(lanes.step)
    for _ in range(12):
        states = step(states, jnp.asarray(1e9))
    assert np.allclose(states.solver_state.radius, 700, rtol=0.02)


@pytest.mark.slow
def test_no_step_needs_more_than_the_most_stages():
    """A solver of diffrax must reject such a step; here it is shortened."""
    energy = Valleys(jnp.array([1e5, 1e2, 0.1]))
    integrator = until(energy, 2.0, 1e-4, method=RKC2(max_stages=20))
    solution = ends(integrator, Pairs(), 5, 5)
    assert np.all(names_of(RESULTS, solution.result) == "horizon_reached")
    # 2e5 fastest times in steps of 20 stages.
    assert np.all(solution.stats["steps"] > 2e5 / (0.653 * 400))
    assert np.all(solution.stats["rejected"] < 0.1 * solution.stats["steps"])


@pytest.mark.slow
def test_starts_that_are_bad_harm_no_other():
    """Not finite, at rest, and from so far out that first steps overflow."""
    widths = (5, 4, 5)
    energy = loss(widths)
    points = jax.vmap(GaussianInit(widths, 0.4))(jr.split(jr.key(3), 6))
    first = points.weights[0]
    first = first.at[1].set(jnp.nan).at[2].set(0.0).at[3].multiply(1e4)
    second = points.weights[1].at[2].set(0.0).at[3].multiply(1e4)
    mixed = eqx.tree_at(lambda p: p.weights, points, (first, second))
    (descent,) = until(energy, 20.0, 1e-4, method=METHOD).descents(points)
    like = jax.tree.map(lambda leaf: leaf[0], points)
    lanes = lanes_of(descent, like)

    @eqx.filter_jit
    def run(lanes, points):
        states = lanes.begin(points, jnp.zeros(6))
        states = eqx.tree_at(lambda s: s.step_size, states, jnp.full(6, 1e3))
        return jax.lax.fori_loop(
            0, 4000, lambda _, s: lanes.step(s, jnp.asarray(20.0)), states
        )

    states, clean = run(lanes, mixed), run(lanes, points)
    results = names_of(RESULTS, states.result)
    assert results[1] == "not_finite"
    assert np.all(results[[0, 2, 4, 5]] == "horizon_reached")
    assert np.all(states.point[:, 2] == 0)
    assert states.rejected[3] > 0 and states.steps[3] > 100
    assert np.all(np.isfinite(states.point[:, 3]))
    for lane in (0, 4, 5):
        assert np.array_equal(states.point[:, lane], clean.point[:, lane])


@pytest.mark.slow
def test_float32():
    widths = (6, 2, 6)
    energy = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), loss(widths))
    start = lambda key: jax.tree.map(
        lambda leaf: leaf.astype(jnp.float32), GaussianInit(widths, 0.4)(key)
    )
    theory = LinearTheory(energy, 2)
    integrator = Integrator(
        GradientFlow(energy), stop=theory.certificate, method=METHOD, rtol=1e-4
    )
    solution = ends(integrator, start, 8, 4)
    assert solution.point.weights[0].dtype == np.float32
    assert np.all(names_of(RESULTS, solution.result) == "rule_met")


def test_descents_that_are_audited_are_vmapped():
    like = GaussianInit((6, 2, 6), 0.4)(jr.key(0))
    integrator = until(loss((6, 2, 6)), 1.0, 1e-4, method=METHOD)
    (descent,) = integrator.descents(like)
    audited = Descent(
        *(getattr(descent, name) for name in ("flow", "solver", "control")),
        *(getattr(descent, name) for name in ("tolerance", "stop", "max_steps")),
        audit=lambda start: lambda point: {},
    )
    assert not isinstance(lanes_of(audited, like), ChebyshevLanes)
