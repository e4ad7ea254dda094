"""Where Gaussian latent-variable models have a closed form, and what is true where they
have none."""

import itertools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from latents import energy_of, moments_of, planted_covariance, point_of
from scipy.optimize import minimize

from gradflow.em import (
    AlternatingMaximization,
    ExpandedMaximization,
    ExpectationMaximization,
    Squarem,
)
from gradflow.iterate import iterate, Iterator
from gradflow.models import (
    battery_pattern,
    Block,
    Diagonal,
    Full,
    LatentGaussian,
    NegativeLogLikelihood,
)
from gradflow.moments import Moments
from gradflow.theory import battery_optimum, PCCATheory, PPCATheory, theory_of


def test_theories_of_kinds_of_points(getkey):
    covariance = planted_covariance(getkey(), 6, 2)
    ppca = theory_of(energy_of("ppca", covariance), point_of("ppca", getkey()))
    assert isinstance(ppca, PPCATheory) and ppca.latents == 2
    pcca = theory_of(energy_of("pcca", covariance), point_of("pcca", getkey()))
    assert isinstance(pcca, PCCATheory) and pcca.sizes == (3, 3)
    with pytest.raises(ValueError, match="^factor analysis with Diagonal noise has no"):
        theory_of(energy_of("fa", covariance), point_of("fa", getkey()))
    wide = energy_of("ibfa", planted_covariance(getkey(), 7, 2))
    with pytest.raises(ValueError, match="^inter-battery factor analysis with Block n"):
        theory_of(wide, point_of("ibfa", getkey()))
    three = Block(tuple(Full.of(np.eye(2)) for _ in range(3)))
    with pytest.raises(ValueError, match="with Block noise has no closed form"):
        theory_of(energy_of("fa", covariance), LatentGaussian(jnp.ones((6, 1)), three))


@pytest.mark.slow
def test_a_battery_with_enough_private_latents_is_pcca(getkey):
    """B B' + s^2 I is then any positive definite matrix."""
    sizes = (3, 2)
    covariance = planted_covariance(getkey(), 5, 2)
    energy = NegativeLogLikelihood(
        moments_of(covariance), battery_pattern(sizes, 1, (2, 1))
    )
    free = NegativeLogLikelihood(energy.moments)
    point = battery_optimum(energy, sizes)
    best = PCCATheory(free, 1, sizes).optimal_energy()
    np.testing.assert_allclose(energy(point), best, rtol=1e-12)
    pattern = np.asarray(energy.pattern)
    assert np.all(np.asarray(point.loadings)[~pattern] == 0)
    fewer = NegativeLogLikelihood(energy.moments, battery_pattern(sizes, 1, (1, 1)))
    with pytest.raises(ValueError, match="are 1 and 1: with fewer than 2 and 1 inter-"):
        battery_optimum(fewer, sizes)
    with pytest.raises(ValueError, match="must be two, of the rows of the energy's"):
        battery_optimum(free, sizes)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", [ExpectationMaximization, AlternatingMaximization])
def test_both_schemes_reach_the_optimum_of_a_battery(getkey, scheme):
    """And no further."""
    sizes, key = (3, 2), getkey()
    energy = NegativeLogLikelihood(
        moments_of(planted_covariance(key, 5, 2)), battery_pattern(sizes, 1, (2, 1))
    )
    point = battery_optimum(energy, sizes)
    start = energy.held(
        LatentGaussian(
            jr.normal(jr.fold_in(key, 1), point.loadings.shape),
            jax.tree.map(jnp.zeros_like, point.noise),
        )
    )
    end = iterate(Squarem(scheme(energy)), start, tolerance=1e-9, max_steps=10**5)
    np.testing.assert_allclose(end.energy, energy(point), atol=1e-8)


def _factor_problem(key, size=7, latents=2):
    covariance = planted_covariance(key, size, latents)
    energy = NegativeLogLikelihood(moments_of(covariance))
    start = LatentGaussian(
        jr.normal(jr.fold_in(key, 1), (size, latents)), Diagonal(jnp.zeros(size))
    )
    return energy, start


def test_factor_analysis_against_scipy(getkey):
    """Quasi-Newton on the definition from six starts finds the same optimum."""
    energy, start = _factor_problem(getkey())
    end = iterate(Squarem(ExpectationMaximization(energy)), start, tolerance=1e-11)
    flat, restore = ravel_pytree(start)

    def cost(x):
        model = restore(x).covariance()
        trace = jnp.trace(jnp.linalg.solve(model, energy.covariance))
        constant = len(model) * jnp.log(2 * jnp.pi)
        return 0.5 * (constant + jnp.linalg.slogdet(model)[1] + trace)

    both = jax.jit(jax.value_and_grad(cost))
    rng = np.random.default_rng(0)
    ends = [
        minimize(
            lambda x: [np.asarray(a) for a in both(x)],
            rng.normal(size=flat.shape),
            jac=True,
            options={"gtol": 1e-9, "maxiter": 2000},
        )
        for _ in range(6)
    ]
    best = min(ends, key=lambda found: found.fun)
    np.testing.assert_allclose(end.energy, best.fun, atol=1e-10)
    np.testing.assert_allclose(
        end.point.covariance(), restore(jnp.asarray(best.x)).covariance(), atol=1e-6
    )
    # A known property of the optimum.
    np.testing.assert_allclose(
        jnp.diagonal(end.point.covariance()),
        jnp.diagonal(energy.covariance),
        rtol=1e-9,
    )


def test_factor_analysis_against_scikit_learn(getkey):
    """1e-7 in covariance. (At their tolerance 1e-12 they stop where rounding hides what
    the likelihood still gains, 3e-7 away; so they are taken up again.)"""
    decomposition = pytest.importorskip("sklearn.decomposition")
    rng = np.random.default_rng(4)
    for size, latents in ((7, 2), (10, 3)):
        mixing = rng.normal(size=(latents, size))
        x = rng.normal(size=(300, latents)) @ mixing + rng.normal(size=(300, size))
        theirs = decomposition.FactorAnalysis(
            latents, tol=1e-12, max_iter=100_000, svd_method="lapack"
        ).fit(x)
        for _ in range(100):
            theirs.set_params(noise_variance_init=theirs.noise_variance_).fit(x)
        energy = NegativeLogLikelihood(Moments.from_data(x, center=True))
        start = LatentGaussian(
            jr.normal(getkey(), (size, latents)), Diagonal(jnp.zeros(size))
        )
        ours = iterate(Squarem(ExpectationMaximization(energy)), start, tolerance=1e-10)
        np.testing.assert_allclose(
            ours.point.covariance(), theirs.get_covariance(), atol=1e-7
        )
        np.testing.assert_allclose(
            -ours.energy, theirs.score(x), rtol=1e-12, atol=1e-11
        )


def test_the_optimum_does_not_depend_on_the_start():
    """Factor analysis with much to explain: 30 starts, one value."""
    energy, _ = _factor_problem(jr.key(6))
    iterator = Iterator(Squarem(ExpectationMaximization(energy)))

    def one(key):
        return iterator(LatentGaussian(jr.normal(key, (7, 2)), Diagonal(jnp.zeros(7))))

    ends = eqx.filter_jit(jax.vmap(one))(jr.split(jr.key(1), 30))
    np.testing.assert_allclose(ends.energy, np.min(ends.energy), atol=1e-9)


def test_heywood_cases_are_named():
    """One factor whose best loading on x[0] would explain more than all of it."""
    correlations = np.array([[1, 0.9, 0.9], [0.9, 1, 0.65], [0.9, 0.65, 1]])
    energy = NegativeLogLikelihood(moments_of(correlations))
    start = LatentGaussian(jnp.full((3, 1), 0.5), Diagonal(jnp.zeros(3)))
    # Where noise is small EM itself is slow without end, but for the larger model.
    end = iterate(Squarem(ExpandedMaximization(energy)), start)
    noise: Any = end.point.noise
    assert end.stats["steps"] < 100
    np.testing.assert_array_equal(end.stats["heywood"], [True, False, False])
    variances = jnp.exp(noise.log_variances)
    np.testing.assert_allclose(variances[0], 1e-6, rtol=1e-9)
    assert end.stats["increase"] <= 1e-10
    # No other sign or order of magnitude does better.
    best = min(
        float(energy(LatentGaussian(jnp.asarray([[a], [b], [c]]), end.point.noise)))
        for a, b, c in itertools.product(
            (0.99, 1, 1.01), (0.85, 0.9, 0.95), (0.85, 0.9)
        )
    )
    assert end.energy < best + 1e-9
