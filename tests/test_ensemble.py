"""Lanes that begin anew: the same runs, whatever the company, and little wasted."""

# Points of several kinds share one energy, and what was asked for is there.
# pyright: reportArgumentType=false, reportOptionalSubscript=false
# pyright: reportOptionalMemberAccess=false

import dataclasses

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from gradflow import datasets
from gradflow.audit import Audit
from gradflow.critical import classify, KIND
from gradflow.ensemble import descend, QUEUE
from gradflow.flow import GradientFlow
from gradflow.initial import GaussianInit, section7_widths
from gradflow.models.linear import SquaredLoss
from gradflow.solution import RESULTS
from gradflow.solve import integrate, Integrator
from gradflow.statistics import fraction
from gradflow.study import run_study, Study
from gradflow.theory.linear import LinearTheory
from gradflow.types import names_of


# Saddle to saddle, very unequal lanes.
WIDTHS = section7_widths(10, 3, 2)
INITIALIZE = GaussianInit(WIDTHS, 0.02 / np.sqrt(10))


@pytest.fixture(scope="module")
def energy():
    return SquaredLoss(datasets.gaussian(jr.key(9), 10, 30))


@pytest.fixture(scope="module")
def theory(energy):
    return LinearTheory(energy, 2)


@pytest.fixture(scope="module")
def integrator(energy, theory):
    return Integrator(
        GradientFlow(energy), stop=theory.certificate, rtol=1e-6, tolerance=1e-3
    )


def everything(integrator, draws, lanes, initialize=INITIALIZE):
    blocks = list(descend(integrator, initialize, jr.key(0), [range(draws)], lanes))
    solution = jax.tree.map(lambda *x: np.concatenate(x), *[b for b, _ in blocks])
    return solution, [steps for _, steps in blocks]


def equal(one, other):
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.array_equal(a, b, equal_nan=True) for a, b in pairs)


@pytest.fixture(scope="module")
def reference(integrator):
    return everything(integrator, 300, 32)[0]


@pytest.fixture(scope="module")
def tsit5(integrator):
    return eqx.tree_at(lambda i: i.method, integrator, (diffrax.Tsit5(),))


def test_company_changes_no_bit(integrator, reference):
    """As many lanes, other draws: the first 40 are the same to the last bit."""
    few, _ = everything(integrator, 40, 32)
    assert equal(few, jax.tree.map(lambda leaf: leaf[:40], reference))


def nearly(one, other):
    """Other widths of vectors and lengths of queues are other programs, which round
    differently; steps of 8 bits absorb it."""
    assert np.array_equal(one.stats["steps"], other.stats["steps"])
    assert np.allclose(one.time, other.time, rtol=1e-10)
    assert np.allclose(one.energy, other.energy, rtol=1e-10)
    for a, b in zip(one.point.weights, other.point.weights, strict=True):
        assert np.allclose(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("lanes", [pytest.param(1, marks=pytest.mark.slow), 7])
@pytest.mark.slow
def test_number_of_lanes_changes_nothing_to_speak_of(integrator, reference, lanes):
    other, _ = everything(integrator, 30, lanes)
    nearly(other, jax.tree.map(lambda leaf: leaf[:30], reference))


def test_a_draw_alone_is_integrate(integrator, reference):
    for draw in (0, 3):
        point = INITIALIZE(jr.fold_in(jr.key(0), draw))
        alone = integrate(
            integrator.flow, point, stop=integrator.stop, rtol=1e-6, tolerance=1e-3
        )
        assert int(alone.stats["steps"]) == reference.stats["steps"][draw]
        assert np.isclose(alone.time, reference.time[draw], rtol=1e-10)
        assert np.isclose(alone.distance, reference.distance[draw], rtol=1e-9)


@pytest.mark.slow
def test_little_is_wasted(tsit5):
    """With a queue of 32 draws per lane few velocities are idle; one vmapped loop over
    all wastes what its slowest lane makes the others wait."""
    solution, (steps,) = everything(tsit5, 32 * 32, 32)
    taken = solution.stats["steps"] + solution.stats["rejected"]
    assert steps["used"] == 6 * taken.sum()
    assert np.array_equal(solution.stats["velocities"], 2 + 6 * taken)
    assert steps["used"] >= 0.92 * steps["all"]
    assert taken.mean() < 0.6 * taken.max()


@pytest.mark.slow
def test_blocks_follow_each_other(integrator):
    """More draws than one block holds."""
    lanes = 4
    draws = lanes * QUEUE + 9
    solution, blocks = everything(integrator, draws, lanes)
    assert len(blocks) == 2 and len(solution.time) == draws
    short, _ = everything(integrator, 12, lanes)
    assert equal(short, jax.tree.map(lambda leaf: leaf[:12], solution))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_what_else_is_in_a_call_changes_no_bit(energy, theory, layout):
    """Parts together, in any order, come out as each alone; those that a second method
    takes over, too."""
    relay = Integrator(
        GradientFlow(energy),
        stop=theory.certificate,
        rtol=1e-6,
        tolerance=1e-3,
        max_steps=100,
        layout=layout,
    )

    def run(*parts, **options):
        blocks = descend(relay, INITIALIZE, jr.key(0), parts, 16, **options)
        found = [solution for solution, _ in blocks]
        return jax.tree.map(lambda *x: np.concatenate(x), *found), len(found)

    parts = [range(80, 120), range(40, 80), range(200, 213)]
    together, blocks = run(*parts)
    assert blocks == 1
    taken = together.stats["steps"] + together.stats["rejected"]
    assert (taken > 100).sum() > 5
    alone = [run(part, whole=40)[0] for part in parts]
    assert equal(together, jax.tree.map(lambda *x: np.concatenate(x), *alone))
    # A long call to come does not change a short one.
    assert equal(run(parts[0], most=500)[0], alone[0])


@pytest.mark.slow
def test_large_points_make_short_queues(integrator, reference, monkeypatch):
    """Memory is bounded, and what a draw is does not depend on it."""
    monkeypatch.setattr("gradflow.ensemble.MEMORY", 1)
    solution, blocks = everything(integrator, 300, 32)
    assert len(blocks) == 10
    nearly(solution, reference)


@pytest.mark.slow
def test_layouts_agree(integrator, reference):
    """Where the numbers lie changes the last bits, and through a rounded step size
    now and then as much as the tolerance lets it."""
    asked = lambda layout: dataclasses.replace(integrator, layout=layout)
    rows, _ = everything(asked("rows"), 20, 32)
    first = jax.tree.map(lambda leaf: leaf[:20], reference)
    assert np.array_equal(rows.stats["steps"], first.stats["steps"])
    assert np.allclose(rows.time, first.time, rtol=1e-4)
    columns, _ = everything(asked("columns"), 20, 32)
    assert equal(columns, first)
    with pytest.raises(ValueError, match="layout='lanes' must be one of auto, rows"):
        asked("lanes")
    with pytest.raises(ValueError, match="layout='columns' needs the plain gradient"):
        everything(asked("columns"), 2, 2, GaussianInit((10, 10), 0.1))


class _Sometimes(eqx.Module):
    """Gaussian, but for every fifth draw, which is not finite."""

    def __call__(self, key):
        network = INITIALIZE(key)
        bad = jr.uniform(key) < 0.2
        return jax.tree.map(lambda w: jnp.where(bad, jnp.nan, w), network)


def test_a_lane_that_is_not_finite_harms_no_other(integrator):
    clean, (allowed,) = everything(integrator, 300, 32)
    solution, (steps,) = everything(integrator, 300, 32, _Sometimes())
    results = names_of(RESULTS, solution.result)
    bad = results == "not_finite"
    assert 20 < bad.sum() < 120
    fine = np.flatnonzero(~bad)
    for name in ("time", "energy"):
        assert np.array_equal(getattr(solution, name)[fine], getattr(clean, name)[fine])
    assert steps["all"] < 1.5 * allowed["all"]


@pytest.mark.slow
def test_relay_in_lanes(energy, theory):
    """What runs out of steps goes on by the next method, from its place and time."""
    flow = GradientFlow(energy)
    settings = {"stop": theory.certificate, "rtol": 1e-6, "tolerance": 1e-3}
    tsit5 = diffrax.Tsit5()
    relay = Integrator(flow, method=(tsit5, tsit5), max_steps=100, **settings)
    whole = Integrator(flow, max_steps=200, **settings)
    one, _ = everything(relay, 50, 16)
    other, _ = everything(whole, 50, 16)
    took_over = (other.stats["steps"] + other.stats["rejected"]) > 100
    assert 0 < took_over.sum() < 50
    assert equal(
        jax.tree.map(lambda leaf: leaf[~took_over], one),
        jax.tree.map(lambda leaf: leaf[~took_over], other),
    )
    # Beginning anew costs a few steps, and the end is where it was.
    decided = names_of(RESULTS, one.result) == "rule_met"
    assert decided.sum() > 40
    assert np.allclose(one.time[decided], other.time[decided], rtol=0.05)
    point = INITIALIZE(jr.fold_in(jr.key(0), int(np.flatnonzero(took_over)[0])))
    alone = integrate(
        flow, point, method=(tsit5, tsit5), max_steps=100, throw=False, **settings
    )
    assert np.isclose(alone.time, one.time[np.flatnonzero(took_over)[0]], rtol=1e-8)


@pytest.mark.slow
def test_audit_in_lanes(energy, theory):
    """Each lane is audited from its own start."""
    flow = GradientFlow(energy)
    audited = Integrator(
        flow, stop=theory.certificate, rtol=1e-6, tolerance=1e-3, audit=Audit
    )
    solution, _ = everything(audited, 40, 8)
    assert set(solution.broken) == {"sign", "rank", "balance"}
    assert all(moment.shape == (40,) for moment in solution.broken.values())
    assert all(np.all(np.isinf(moment)) for moment in solution.broken.values())


@pytest.mark.slow
def test_horizon_in_lanes(energy):
    flow = GradientFlow(energy)
    solution, _ = everything(Integrator(flow, horizon=0.5, tolerance=1e-9), 20, 8)
    assert np.all(names_of(RESULTS, solution.result) == "horizon_reached")
    assert np.array_equal(solution.time, np.full(20, 0.5))


@pytest.mark.slow
def test_in_a_study(integrator, theory):
    study = Study(
        INITIALIZE,
        integrator,
        eqx.Partial(classify, integrator.flow, theory),
        draws=100,
        batch=32,
    )
    outcome = run_study(study, jr.key(0))
    share = fraction(outcome.finding.kind == KIND.global_minimum)
    assert share.count == 100
    again = run_study(study, jr.key(0))
    assert equal(outcome.solution, again.solution)


BAD = [
    ({"max_steps": 0}, "max_steps must be > 0, got 0"),
    ({"horizon": -1.0}, "horizon must be > 0, got -1.0"),
    ({"method": ()}, "method is empty: give at least one diffrax solver"),
]


@pytest.mark.parametrize(("settings", "message"), BAD)
def test_bad_input(energy, settings, message):
    with pytest.raises(ValueError, match=message):
        Integrator(GradientFlow(energy), **settings)
