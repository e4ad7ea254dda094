"""Factor analysis where noise is gone: what is left, and how slowly runs get there."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from latents import energy_of, moments_of, planted_covariance, point_of

from gradflow.em import ExpectationMaximization
from gradflow.flow import GradientFlow
from gradflow.iterate import iterate
from gradflow.models import Diagonal, LatentGaussian, NegativeLogLikelihood
from gradflow.solve import integrate
from gradflow.theory.heywood import HeywoodCase


SLOW = pytest.mark.slow


def likelihood(model, covariance):
    """The definition, of a covariance."""
    trace = np.trace(np.linalg.solve(model, covariance))
    return 0.5 * (np.linalg.slogdet(2 * np.pi * model)[1] + trace)


def whole(case, rest, covariance):
    """The covariance of all variables, from that of the others."""
    chosen, kept = list(case.variables), case.kept
    slopes, model = np.asarray(case.coefficients), covariance.copy()
    model[np.ix_(kept, kept)] = np.asarray(case.rest.held(rest).covariance()) + (
        slopes @ covariance[np.ix_(chosen, chosen)] @ slopes.T
    )
    return model


def improper():
    """One factor that would need noise of variance -0.2 in x[0]."""
    loadings = np.array([1.0, 0.8, 0.7, 0.6])
    noise = np.array([-0.2, 0.5, 0.6, 0.7])
    energy = NegativeLogLikelihood(
        moments_of(np.outer(loadings, loadings) + np.diag(noise))
    )
    start = LatentGaussian(jnp.full((4, 1), 0.5), Diagonal(jnp.log(jnp.full(4, 0.5))))
    return energy, start


@pytest.mark.parametrize("variables", [(3,), pytest.param((1, 4), marks=SLOW)])
def test_energy_and_slopes(variables):
    """Those of the covariance of all; slopes by differences."""
    rng = np.random.default_rng(0)
    data = rng.normal(size=(40, 6)) @ rng.normal(size=(6, 6))
    covariance = data.T @ data / 40
    case = HeywoodCase(energy_of("fa", covariance), 2, variables)
    noise = Diagonal(jnp.asarray(rng.normal(size=6)))
    rest = case.reduced(LatentGaussian(jnp.asarray(rng.normal(size=(6, 2))), noise))
    assert rest.loadings.shape == (6 - len(variables), 1)
    model = whole(case, rest, covariance)
    least = likelihood(model, covariance)
    np.testing.assert_allclose(float(case.energy(rest)), least, rtol=1e-13)
    for j, slope in zip(variables, case.slopes(rest), strict=True):
        changed = []
        for by in (1e-4, -1e-4):
            moved = model.copy()
            moved[j, j] += by
            changed.append(likelihood(moved, covariance))
        seen = (changed[0] - changed[1]) / 2e-4
        np.testing.assert_allclose(float(slope), seen, rtol=1e-5, atol=1e-8)


def test_reduced_point(getkey):
    """It is the conditional covariance of a point with next to no noise there."""
    variances = jnp.ones(6).at[2].set(1e-12)
    point = LatentGaussian(
        point_of("fa", getkey()).loadings, Diagonal(jnp.log(variances))
    )
    case = HeywoodCase(energy_of("fa", jnp.eye(6)), 2, (2,))
    model, kept = np.asarray(point.covariance()), case.kept
    left = model[np.ix_(kept, kept)] - (
        np.outer(model[kept, 2], model[2, kept]) / model[2, 2]
    )
    np.testing.assert_allclose(case.reduced(point).covariance(), left, atol=1e-10)


@pytest.mark.slow
def test_em_is_one_over_twice_its_steps_above():
    energy, start = improper()
    case = HeywoodCase(energy, 1, (0,))
    end = iterate(ExpectationMaximization(energy), start, max_steps=4000, throw=False)
    # All loadings go with x[0]: what is left are the conditional variances.
    variances = jnp.diagonal(case.rest.covariance)
    left = LatentGaussian(jnp.zeros((3, 1)), Diagonal(jnp.log(variances)))
    assert case.slopes(left)[0] > 0
    gap = float(end.energy - case.energy(left))
    np.testing.assert_allclose(gap, 1 / (2 * 4000), rtol=0.02)
    noise = float(end.point.noise.matrix()[0, 0])
    np.testing.assert_allclose(noise * float(case.slopes(left)[0]), gap, rtol=0.02)


@pytest.mark.slow
def test_the_flow_is_one_over_its_time_above():
    energy, start = improper()
    case = HeywoodCase(energy, 1, (0,))
    variances = jnp.diagonal(case.rest.covariance)
    left = LatentGaussian(jnp.zeros((3, 1)), Diagonal(jnp.log(variances)))
    end = integrate(
        GradientFlow(energy), start, horizon=1e4, method="auto", throw=False
    )
    gap = float(end.energy - case.energy(left))
    np.testing.assert_allclose(gap, 1e-4, rtol=0.02)


@pytest.mark.parametrize(
    ("variables", "text"),
    [
        ((), r"variables=\(\) must be some, not all, of 0 to 5"),
        ((6,), r"variables=\(6,\) must be some, not all, of 0 to 5"),
        ((0, 1, 2), r"variables=\(0, 1, 2\) are more than latents=2"),
    ],
)
def test_refuses(variables, text):
    with pytest.raises(ValueError, match=text):
        HeywoodCase(energy_of("fa", jnp.eye(6)), 2, variables)


def test_refuses_other_models(getkey):
    with pytest.raises(ValueError, match="^latents must be"):
        HeywoodCase(energy_of("fa", jnp.eye(6)), -1, (0,))
    energy = energy_of("ibfa", planted_covariance(getkey(), 7, 2))
    with pytest.raises(ValueError, match="^the energy has a pattern: the reduction is"):
        HeywoodCase(energy, 2, (0,))
    case = HeywoodCase(energy_of("fa", jnp.eye(6)), 2, (0,))
    with pytest.raises(ValueError, match="^the noise is Isotropic: the reduction is a"):
        case.reduced(point_of("ppca", jr.key(0)))
    assert jax.tree.leaves(case)
