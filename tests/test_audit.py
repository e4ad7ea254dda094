"""Runs that rest on rounding are found out, and no others."""

# Points of several kinds share one energy, and what was asked for is there.
# pyright: reportArgumentType=false, reportOptionalSubscript=false
# pyright: reportOptionalMemberAccess=false

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from gradflow.audit import Audit
from gradflow.critical import classify, describe, KIND
from gradflow.flow import GradientFlow
from gradflow.initial import GaussianInit, LowRankInit
from gradflow.models.linear import DeepLinear, SquaredLoss
from gradflow.moments import Moments
from gradflow.solve import integrate
from gradflow.theory.linear import LinearTheory
from gradflow.types import names_of


def autoencoder(*spectrum):
    values = jnp.diag(jnp.asarray(spectrum))
    return SquaredLoss(Moments(values, values, values, 1, autoencoding=True))


ENERGY = autoencoder(3.0, 2.0, 1.0)
FLOW = GradientFlow(ENERGY)
THEORY = LinearTheory(ENERGY, 3)


@eqx.filter_jit
def audited(points):
    def one(point):
        solution = integrate(
            FLOW, point, stop=THEORY.certificate, audit=Audit, throw=False
        )
        return solution, classify(FLOW, THEORY, solution)

    return jax.vmap(one)(points)


def test_every_escaped_draw_is_limited_and_no_other():
    """Depth 2, square: the draws of the wrong sign, which exactly end at a saddle."""
    keys = jax.vmap(lambda draw: jr.fold_in(jr.key(3), draw))(jnp.arange(60))
    starts = jax.vmap(lambda key: LowRankInit((3, 3), 3, 1.0)(key).balanced(2))(keys)
    wrong = np.linalg.det(jax.vmap(DeepLinear.matrix)(starts)) < 0
    solution, finding = audited(starts)
    assert np.all(names_of(KIND, finding.kind) == "global_minimum")
    assert np.array_equal(np.asarray(finding.precision_limited), wrong)
    assert np.all(np.isinf(np.asarray(finding.limited_at)[~wrong]))
    broken = {name: np.asarray(t) for name, t in solution.broken.items()}
    assert np.array_equal(np.isfinite(broken["sign"]), wrong)
    # The drift decides before the sign changes, and both before the run ends.
    assert np.all(broken["balance"][wrong] <= broken["sign"][wrong])
    assert np.all(broken["sign"][wrong] <= np.asarray(solution.time)[wrong])
    text = describe(jax.tree.map(lambda leaf: leaf[np.argmax(wrong)], finding))
    assert "precision_limited: the run left the exact flow at t=" in text


def test_unbalanced_starts_are_not_limited():
    """Gaussian factors: nothing keeps the sign, and crossing 0 is dynamics."""
    starts = jax.vmap(GaussianInit((3, 3, 3), 1.0))(jr.split(jr.key(4), 60))
    solution, _ = audited(starts)
    before = np.sign(np.linalg.det(jax.vmap(DeepLinear.matrix)(starts)))
    after = np.sign(np.linalg.det(jax.vmap(DeepLinear.matrix)(solution.point)))
    assert np.any(before != after)
    for name, moment in solution.broken.items():
        assert not np.any(np.isfinite(moment)), name


@pytest.mark.slow
def test_a_rank_that_rounding_lifts():
    """A start of rank 1 in layers of width 2 exactly keeps rank 1. In a basis where
    the missing part is rounding and not 0.0, the numbers learn the second mode."""
    theory = LinearTheory(ENERGY, 2)
    rotation = jnp.linalg.qr(jr.normal(jr.key(0), (2, 2)))[0]
    turn = jnp.linalg.qr(jr.normal(jr.key(1), (3, 3)))[0]
    first = jnp.outer(rotation[:, 0], turn[:, 0])
    second = jnp.outer(turn[:, 1], rotation[:, 0])
    start = DeepLinear((0.5 * first, 0.5 * second))
    solution = integrate(
        FLOW, start, stop=theory.certificate, audit=Audit, throw=False, horizon=200.0
    )
    finding = classify(FLOW, theory, solution)
    assert finding.kind == KIND.global_minimum  # for the flow from the end of the run
    assert bool(finding.precision_limited)
    assert np.isfinite(solution.broken["rank"])


def test_without_an_audit_nothing_is_said():
    start = GaussianInit((3, 2, 3), 0.5)(jr.key(0))
    solution = integrate(FLOW, start, horizon=1.0, throw=False)
    assert solution.broken is None
    finding = classify(FLOW, LinearTheory(ENERGY, 2), solution)
    assert np.isnan(finding.limited_at) and not finding.precision_limited


@pytest.mark.slow
def test_a_relay_keeps_the_first_time():
    """The audit goes on from solver to solver, from the same start."""
    start = LowRankInit((3, 3), 3, 1.0)(jr.key(0)).balanced(2)
    if jnp.linalg.det(start.matrix()) > 0:
        start = DeepLinear((start.weights[0], start.weights[1].at[0].multiply(-1)))
    settings = {"stop": THEORY.certificate, "audit": Audit, "throw": False}
    one = integrate(FLOW, start, **settings)
    relay = integrate(
        FLOW, start, method=(diffrax.Tsit5(),) * 3, max_steps=100, **settings
    )
    for solution in (one, relay):
        assert np.isfinite(solution.broken["sign"])
        assert float(solution.broken["sign"]) <= float(solution.time)
    assert np.isclose(one.broken["balance"], relay.broken["balance"], rtol=0.3)


def test_a_start_breaks_nothing():
    for depth in (2, 3, 5):
        start = LowRankInit((4, 4), 4, 1.0)(jr.key(depth)).balanced(depth)
        assert not any(Audit(start)(start).values())
