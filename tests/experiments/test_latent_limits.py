"""Where runs go that stop on the way, by kind."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from latents import moments_of

from gradflow.em import ExpectationMaximization
from gradflow.experiments.em_versus_flow import Config, run
from gradflow.experiments.latent_limits import judge, limits, told_of
from gradflow.iterate import iterate, Iterator
from gradflow.models import Diagonal, LatentGaussian, NegativeLogLikelihood


def stopped(loadings, noise, steps):
    """EM on the covariance of one factor, stopped after so many steps; one run."""
    covariance = np.outer(loadings, loadings) + np.diag(noise)
    energy = NegativeLogLikelihood(moments_of(covariance))
    start = LatentGaussian(jnp.full((4, 1), 0.5), Diagonal(jnp.log(jnp.full(4, 0.5))))
    em = ExpectationMaximization(energy)
    end = Iterator(em, 1e-9, max_steps=steps)(start)
    return energy, jax.tree.map(lambda leaf: leaf[None], jax.device_get(end))


def test_a_run_on_its_way_to_a_heywood_case():
    """Named, with the value in closed form and EM's gap there."""
    energy, end = stopped(
        np.array([1.0, 0.8, 0.7, 0.6]), np.array([-0.2, 0.5, 0.6, 0.7]), 4000
    )
    found = limits(energy, end, 1e-9, None)
    judge(found, found[0].energy)
    (limit,) = found
    assert limit.kind == "optimum" and limit.variables == (0,) and limit.late
    # x[0] alone and the others given it, without correlation.
    covariance = np.asarray(energy.covariance)
    own = covariance[0, 0]
    left = np.diag(covariance)[1:] - covariance[0, 1:] ** 2 / own
    least = 0.5 * (np.log(2 * np.pi) * 4 + 4 + np.log(own) + np.log(left).sum())
    np.testing.assert_allclose(limit.energy, least, rtol=1e-12)
    np.testing.assert_allclose(end.energy[0] - least, 1 / (2 * 4000), rtol=0.02)
    (line,) = told_of(found, end, limit.energy, "em")
    assert "1 of 1 runs: optimum, the noise of x[0] goes to 0 (a Heywood case)" in line
    assert "as theory has it (0.000125): 1e-08 above after 5e+07 steps" in line


@pytest.mark.slow
def test_a_slow_run():
    """Far from 0 noise a stopped run is on its way, for as long as EM's rate says."""
    loadings, noise = np.array([0.5, 0.4, 0.6, 0.3]), np.full(4, 0.8)
    energy, end = stopped(loadings, noise, 20)
    found = limits(energy, end, 1e-10, None)
    exact = LatentGaussian(
        jnp.asarray(loadings)[:, None], Diagonal(jnp.log(jnp.asarray(noise)))
    )
    least = float(energy(exact))
    judge(found, least)
    assert found[0].kind == "optimum" and found[0].late and not found[0].variables
    np.testing.assert_allclose(found[0].energy, least, rtol=1e-12)
    (line,) = told_of(found, end, least, "em")
    more = float(line.split(", ")[-1].removesuffix(" more steps"))
    em = ExpectationMaximization(energy)
    point = jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), end.point)
    later = iterate(em, point, tolerance=1e-12, max_steps=int(more), throw=False)
    assert 0.3e-8 < float(later.energy) - least < 3e-8


@pytest.mark.slow
def test_wine():
    """Three runs of EM, and of Squarem, go to a Heywood case that the flow avoids."""
    report = run(Config(data="wine", models=("fa",)), progress=False)
    rows = {row["method"]: row for row in report.rows}
    assert rows["flow"]["optimum"] == 200
    for method in ("em", "squarem"):
        row = rows[method]
        assert row["other Heywood"] == row["apart from flow"] == 200 - row["optimum"]
        assert row["undecided"] == 0
    assert any("the noise of x[3] goes to 0" in note for note in report.notes)
