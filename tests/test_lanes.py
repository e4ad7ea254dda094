"""Lanes last is the same descent: the same velocities, energies, steps and ends."""

# Points of several kinds share one energy.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from gradflow import datasets
from gradflow.audit import Audit
from gradflow.ensemble import descend, lanes_of
from gradflow.flow import GradientFlow
from gradflow.initial import GaussianInit
from gradflow.lanes.base import Lanes
from gradflow.lanes.explicit import ExplicitLanes
from gradflow.layout import WIDEST
from gradflow.models.linear import DeepLinear, SquaredLoss
from gradflow.moments import Moments
from gradflow.solution import RESULTS
from gradflow.solve import Integrator
from gradflow.theory.linear import LinearTheory
from gradflow.types import names_of


# Widths, and whether y is x: the narrowest layer first, last, in the middle, outside.
CASES = [
    ((6, 2, 4, 6), True),
    ((6, 5, 3, 6), True),
    ((5, 7, 5), True),
    ((4, 3, 2, 5, 7), False),
    ((3, 8, 2), False),
    ((2, 6, 5, 6), False),
    ((35, 2, 36), False),
]


def problem(widths, autoencoding):
    data = jr.normal(jr.key(1), (40, widths[0])) * jnp.linspace(0.5, 2, widths[0])[None]
    if autoencoding:
        return SquaredLoss(Moments.from_data(data))
    return SquaredLoss(Moments.from_data(data, jr.normal(jr.key(2), (40, widths[-1]))))


def both(widths, autoencoding, lanes=6, **settings):
    energy = problem(widths, autoencoding)
    start = GaussianInit(widths, 0.4)
    points = jax.vmap(start)(jr.split(jr.key(3), lanes))
    settings = {"method": diffrax.Tsit5(), **settings}
    integrator = Integrator(GradientFlow(energy), **settings)
    (descent,) = integrator.descents(start(jr.key(0)))
    ours = lanes_of(descent, start(jr.key(0)))
    assert isinstance(ours, ExplicitLanes)
    return energy, points, ours, Lanes(descent)


def differences(one, other):
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return max(float(jnp.max(jnp.abs(a - b))) for a, b in pairs)


@pytest.mark.parametrize(
    ("widths", "autoencoding"),
    [
        pytest.param(*case, marks=pytest.mark.slow if i else ())
        for i, case in enumerate(CASES)
    ],
)
def test_velocity_and_energy_are_those_of_the_model(widths, autoencoding):
    energy, points, ours, _ = both(widths, autoencoding)
    states = eqx.filter_jit(ours.begin)(points, jnp.zeros(6))
    assert differences(ours.points(states.point, 6), points) < 1e-14
    velocities = jax.vmap(ours.descent.flow.velocity)(points)
    assert differences(ours.points(states.solver_state, 6), velocities) < 1e-13
    energies = jax.vmap(energy)(points)
    assert np.allclose(ours.layout.energy(states.point), energies, rtol=1e-13)


@pytest.mark.parametrize(
    "method", [diffrax.Tsit5(), pytest.param(diffrax.Bosh3(), marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(("widths", "autoencoding"), [CASES[0], CASES[3]])
@pytest.mark.slow
def test_steps_are_those_of_the_descent(widths, autoencoding, method):
    """Times and counts to the last bit, points to rounding, for 40 steps."""
    _, points, ours, plain = both(
        widths, autoencoding, method=method, rtol=1e-6, tolerance=1e-3
    )
    horizon = jnp.asarray(30.0)

    @eqx.filter_jit
    def run(lanes):
        states = lanes.begin(points, jnp.zeros(6))
        for_all = lambda _, s: lanes.step(s, horizon)
        states = jax.lax.fori_loop(0, 40, for_all, states)
        return states, lanes.points(states.point, 6)

    (a, one), (b, other) = run(ours), run(plain)
    for name in ("time", "steps", "rejected", "step_size"):
        assert np.array_equal(getattr(a, name), getattr(b, name)), name
    assert differences(one, other) < 1e-11


@pytest.mark.parametrize("settings", [{}, {"horizon": 2.0}])
def test_ends_are_those_of_the_descent(settings):
    """At rest, and at a horizon: result and time."""
    _, points, ours, plain = both((5, 3, 5), True, tolerance=1e-4, **settings)
    end = jnp.asarray(settings.get("horizon", 1e100))

    @eqx.filter_jit
    def run(lanes):
        states = lanes.begin(points, jnp.zeros(6))
        one = lambda s: jax.tree.map(
            lambda old, new: jnp.where(
                s.finished.reshape(
                    [-1 if i == lanes.axis % old.ndim else 1 for i in range(old.ndim)]
                ),
                old,
                new,
            ),
            s,
            lanes.step(s, end),
        )
        return jax.lax.while_loop(lambda s: ~jnp.all(s.finished), one, states)

    a, b = run(ours), run(plain)
    results = names_of(RESULTS, a.result)
    assert np.array_equal(results, names_of(RESULTS, b.result))
    assert set(results) == {"horizon_reached" if settings else "successful"}
    assert np.allclose(a.time, b.time, rtol=1e-10)


@pytest.mark.slow
def test_company_changes_no_bit_where_y_is_not_x():
    """There a matrix all lanes share multiplies them, in one call."""
    energy = problem((4, 3, 2, 5, 7), False)
    theory = LinearTheory(energy, 2)
    integrator = Integrator(
        GradientFlow(energy), stop=theory.certificate, rtol=1e-6, tolerance=1e-3
    )
    start = GaussianInit((4, 3, 2, 5, 7), 0.3)
    run = lambda draws: [
        solution
        for solution, _ in descend(integrator, start, jr.key(5), [range(draws)], 16)
    ][0]
    few, many = run(20), run(100)
    for one, other in zip(jax.tree.leaves(few), jax.tree.leaves(many), strict=True):
        assert np.array_equal(one, other[:20])


@pytest.mark.slow
def test_float32():
    moments = datasets.gaussian(jr.key(9), 6, 20)
    moments = jax.tree.map(lambda x: x.astype(jnp.float32), moments)
    start = GaussianInit((6, 2, 6), 0.3)
    points = jax.tree.map(
        lambda x: x.astype(jnp.float32), jax.vmap(start)(jr.split(jr.key(0), 4))
    )
    integrator = Integrator(GradientFlow(SquaredLoss(moments)))
    like = jax.tree.map(lambda x: x[0], points)
    lanes = lanes_of(integrator.descents(like)[0], like)
    states = lanes.begin(points, jnp.zeros(4, jnp.float32))
    states = eqx.filter_jit(lanes.step)(states, jnp.asarray(10.0, jnp.float32))
    assert isinstance(lanes, ExplicitLanes)
    assert states.point.dtype == states.step_size.dtype == jnp.float32
    assert np.all(states.steps + states.rejected == 1)


def test_a_start_that_is_not_finite_is_told():
    _, points, ours, _ = both((5, 3, 5), True)
    weights = (
        points.weights[0].at[2].set(jnp.nan),
        points.weights[1].at[4].set(jnp.inf),
    )
    points = eqx.tree_at(lambda p: p.weights, points, weights)
    states = ours.begin(points, jnp.zeros(6))
    bad = names_of(RESULTS, states.result) == "not_finite"
    assert np.array_equal(np.flatnonzero(bad), [2, 4])
    assert np.array_equal(states.finished, bad)


def test_an_overflowing_trial_step_is_rejected():
    """From far out, where the first step may overshoot to infinity."""
    _, points, ours, plain = both((5, 5, 5, 5, 5), True)
    points = jax.tree.map(lambda w: 40 * w, points)
    far = jnp.asarray(1e3)

    @eqx.filter_jit
    def run(lanes):
        states = lanes.begin(points, jnp.zeros(6))
        states = eqx.tree_at(lambda s: s.step_size, states, jnp.full(6, 1e3))
        return jax.lax.fori_loop(0, 60, lambda _, s: lanes.step(s, far), states)

    states, others = run(ours), run(plain)
    assert np.all(states.rejected > 3) and np.all(states.steps > 3)
    assert np.array_equal(states.steps, others.steps)
    assert np.all(np.isfinite(states.point))


def test_other_descents_are_vmapped():
    energy = problem((5, 3, 5), True)
    flow = GradientFlow(energy)
    like = GaussianInit((5, 3, 5), 0.3)(jr.key(0))
    wide = GaussianInit((5, WIDEST + 1, 5), 0.3)(jr.key(0))

    def kind(like=like, **settings):
        return type(lanes_of(Integrator(flow, **settings).descents(like)[0], like))

    assert kind() is ExplicitLanes
    assert kind(method=diffrax.Dopri5()) is ExplicitLanes
    assert kind(method=diffrax.Dopri8()) is Lanes
    assert kind(audit=Audit) is Lanes
    assert kind(stop=lambda point: jnp.array(False)) is Lanes
    assert kind(wide) is Lanes
    assert kind(DeepLinear((like.weights[0],))) is Lanes
