"""The likelihood of Gaussian latent variables, against its definition."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import mpmath
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from latents import (
    covariance_of,
    energy_of,
    largest,
    MODELS,
    moments_of,
    naive,
    noise_of,
    point_of,
)

from gradflow.flow import GradientFlow
from gradflow.models import (
    battery_pattern,
    Block,
    Diagonal,
    Full,
    Isotropic,
    LatentGaussian,
    NegativeLogLikelihood,
)
from gradflow.moments import Moments


EXAMPLE = [[2, 0.6, 0.4, 0.1], [0.6, 1.5, 0.3, 0.2], [0.4, 0.3, 1, 0.1]]
EXAMPLE = np.array([*EXAMPLE, [0.1, 0.2, 0.1, 0.7]])


def _size(model):
    return sum(MODELS[model][0])


@pytest.mark.parametrize("model", MODELS)
def test_energy_and_differential_are_those_of_the_definition(getkey, model):
    """For more samples than variables, and fewer."""
    for samples in (20, 3):
        covariance = covariance_of(getkey(), _size(model), samples)
        energy, point = energy_of(model, covariance), point_of(model, getkey())
        value, slope = jax.jit(jax.value_and_grad(naive))(point, covariance)
        own, found = eqx.filter_jit(lambda e, p: (e(p), e.differential(p)))(
            energy, point
        )
        np.testing.assert_allclose(own, value, rtol=1e-13)
        if energy.pattern is not None:
            free = jnp.asarray(energy.pattern)
            slope = eqx.tree_at(
                lambda p: p.loadings, slope, jnp.where(free, slope.loadings, 0)
            )
        off = jax.tree.map(jnp.subtract, found, slope)
        assert largest(off) <= 1e-12 * largest(slope)


def test_one_em_step_by_hand():
    """Worked numbers for factor analysis."""
    energy = NegativeLogLikelihood(moments_of(EXAMPLE))
    loadings = jnp.array([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0], [0.2, -0.3]])
    point = LatentGaussian(loadings, Diagonal.of([1.0, 0.8, 0.9, 0.7]))
    np.testing.assert_allclose(energy(point), 6.101577255117149, rtol=1e-14)
    after: Any = energy.m_step(point, energy.e_step(point))
    np.testing.assert_allclose(energy(after), 5.949950559031267, rtol=1e-14)
    np.testing.assert_allclose(
        jnp.exp(after.noise.log_variances),
        [1.018126493567289, 0.9459200283705822, 0.660935885889141, 0.6609101911438201],
        rtol=1e-13,
    )


def test_one_em_step_of_a_battery_by_hand():
    """Worked numbers for inter-battery factor analysis."""
    shared = np.array([1.1, 0.6, -0.3, 0.3, 1.0, 0.4, -0.5])
    covariance = np.array(
        [
            [1.39, 0.8, -0.25, -0.01, 0.9, 0.3, -0.6],
            [0.8, 1.55, 0.3, -0.6, 0.45, 0.15, -0.3],
            [-0.25, 0.3, 0.71, -0.43, -0.36, -0.12, 0.24],
            [-0.01, -0.6, -0.43, 0.83, 0.18, 0.06, -0.12],
            [0.9, 0.45, -0.36, 0.18, 1.95, -0.13, -0.22],
            [0.3, 0.15, -0.12, 0.06, -0.13, 0.84, -0.38],
            [-0.6, -0.3, 0.24, -0.12, -0.22, -0.38, 1.02],
        ]
    )
    loadings = np.zeros((7, 3))
    loadings[:, 0] = shared + 0.2
    loadings[:4, 1] = [0.1, 0.8, 0.3, -0.9]
    loadings[4:, 2] = [0.9, -0.4, 0.5]
    energy = energy_of("ibfa", covariance)
    point = LatentGaussian(
        jnp.asarray(loadings), Block((Isotropic.of(1.0, 4), Isotropic.of(1.0, 3)))
    )
    np.testing.assert_allclose(energy(point), 10.083532537350665, rtol=1e-13)
    after: Any = energy.m_step(point, energy.e_step(point))
    np.testing.assert_allclose(energy(after), 9.315010215759996, rtol=1e-13)
    np.testing.assert_allclose(
        [jnp.exp(block.log_variance) for block in after.noise.blocks],
        [0.5513884189725721, 0.6936381062894889],
        rtol=1e-12,
    )
    np.testing.assert_allclose(
        after.loadings[:4, 1],
        [0.16559253685709582, 0.7990949420106195, 0.4229029422094154, -0.64749237],
        rtol=1e-8,
    )
    assert np.all(np.asarray(after.loadings)[~np.asarray(energy.pattern)] == 0)


def test_small_noise_costs_no_digits(getkey):
    """Against 50 digits, for a variance of 1e-9."""
    covariance = covariance_of(getkey(), 4, 40)
    logs = jnp.log(jnp.array([1e-9, 1.0, 0.5, 1e-6]))
    point = LatentGaussian(jr.normal(getkey(), (4, 2)), Diagonal(logs))
    with mpmath.workdps(50):
        loadings = mpmath.matrix(np.asarray(point.loadings).tolist())
        noise = mpmath.diag([mpmath.exp(mpmath.mpf(float(x))) for x in logs])
        model = loadings * loadings.T + noise
        # Of the covariance that fits, so that no term is large.
        solved = mpmath.inverse(model) * model
        exact = 0.5 * (
            4 * mpmath.log(2 * mpmath.pi)
            + mpmath.log(mpmath.det(model))
            + sum(solved[i, i] for i in range(4))
        )
    fitting = jnp.asarray(point.loadings @ point.loadings.T + point.noise.matrix())
    energy = NegativeLogLikelihood(moments_of(fitting))
    np.testing.assert_allclose(energy(point), float(exact), atol=3e-10)
    other = NegativeLogLikelihood(moments_of(covariance))
    assert jnp.isfinite(other(point))


def test_density_posterior_and_samples(getkey):
    """By brute force, from the joint covariance of x and z."""
    for model in ("fa", "pcca"):
        point = point_of(model, getkey())
        rows, latents = point.loadings.shape
        x = jr.normal(getkey(), (5, rows))
        covariance = point.covariance()
        gain = jnp.linalg.solve(covariance, point.loadings)
        means, spread = point.posterior(x)
        np.testing.assert_allclose(means, x @ gain, rtol=1e-10, atol=1e-12)
        rest = jnp.eye(latents) - point.loadings.T @ gain
        np.testing.assert_allclose(spread, rest, rtol=1e-10, atol=1e-12)
        square = jnp.sum(x * jnp.linalg.solve(covariance, x.T).T, axis=1)
        normalizer = rows * np.log(2 * np.pi) + jnp.linalg.slogdet(covariance)[1]
        found = point.log_density(x)
        np.testing.assert_allclose(found, -0.5 * (normalizer + square), rtol=1e-10)
        mean = -jnp.mean(found)
        np.testing.assert_allclose(naive(point, x.T @ x / 5), mean, rtol=1e-12)
        draws = point.sample(getkey(), 40_000)
        seen = draws.T @ draws / len(draws)
        assert draws.shape == (40_000, rows)
        assert jnp.max(jnp.abs(seen - covariance)) < 0.06 * jnp.max(covariance)


@pytest.mark.parametrize("model", MODELS)
def test_parameters_are_the_rank_of_the_covariances_jacobian(getkey, model):
    point = point_of(model, getkey())
    energy = energy_of(model, covariance_of(getkey(), _size(model), 30))
    flat, restore = ravel_pytree(point)
    cover = lambda x: energy.held(restore(x)).covariance().ravel()
    rank = np.linalg.matrix_rank(jax.jacobian(cover)(flat), tol=1e-9)
    assert energy.parameters(point) == rank


def test_bic(getkey):
    covariance = covariance_of(getkey(), 6, 30)
    energy, point = energy_of("fa", covariance), point_of("fa", getkey())
    free = 6 * 2 - 1 + 6 + 6  # loadings less a rotation, noise, means
    expected = 2 * 100 * energy(point) + free * np.log(100)
    np.testing.assert_allclose(energy.bic(point), expected, rtol=1e-14)


@pytest.mark.slow
def test_held_loadings_do_not_matter_and_do_not_move(getkey):
    energy = energy_of("ibfa", covariance_of(getkey(), 7, 30))
    free = jnp.asarray(energy.pattern)
    point = point_of("ibfa", getkey())
    filled = eqx.tree_at(
        lambda p: p.loadings, point, jnp.where(free, point.loadings, 5.0)
    )
    assert energy(filled) == energy(point)
    velocity = GradientFlow(energy).velocity(filled)
    assert jnp.all(jnp.where(free, 0, velocity.loadings) == 0)
    after = energy.m_step(filled, energy.e_step(filled))
    assert jnp.all(jnp.where(free, 0, after.loadings) == 0)


def test_views_of_moments_are_stacked(getkey):
    x, y = (np.asarray(jr.normal(getkey(), (9, n))) for n in (2, 3))
    two = NegativeLogLikelihood(Moments.from_data(x, y, center=True))
    joint = np.concatenate([x, y], axis=1)
    one = NegativeLogLikelihood(Moments.from_data(joint, center=True))
    np.testing.assert_allclose(two.covariance, one.covariance, atol=1e-15)
    assert two.size == one.size == 5


def test_battery_patterns():
    pattern = battery_pattern((2, 1, 2), 1, (1, 0, 2))
    expected = [[1, 1, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0], [1, 0, 1, 1], [1, 0, 1, 1]]
    np.testing.assert_array_equal(pattern, np.array(expected, bool))
    groups = NegativeLogLikelihood(moments_of(np.eye(5)), pattern).groups(4)
    assert sorted(tuple(group) for group in groups) == [(0,), (1,), (2, 3)]
    for arguments, text in (
        (((2, 2), 1, (1,)), "must have one number for each view"),
        (((2, 0), 1, (1, 1)), "sizes must be whole numbers >= 1, got 0"),
        (((2, 2), -1, (1, 1)), "shared must be whole numbers >= 0, got -1"),
        (((2, 2), 1, (1, -1)), "private must be whole numbers >= 0, got -1"),
        (((2, 2), 0, (0, 0)), "give a latent variable"),
    ):
        with pytest.raises(ValueError, match=text):
            battery_pattern(*arguments)


def test_points_refuse():
    noise = Diagonal.of([1.0, 1.0])
    with pytest.raises(ValueError, match=r"loadings has shape \(2, 0\): it must be"):
        LatentGaussian(jnp.ones((2, 0)), noise)
    with pytest.raises(ValueError, match="loadings has 3 rows and noise has size 2"):
        LatentGaussian(jnp.ones((3, 1)), noise)


def test_energies_refuse(getkey):
    good = moments_of(np.eye(3))
    for bad in (0.0, 1.0, -1.0, np.nan):
        with pytest.raises(ValueError, match=r"floor must be a number in \(0, 1\)"):
            NegativeLogLikelihood(good, None, bad)
    with pytest.raises(ValueError, match="pattern has 2 rows but the data have 3"):
        NegativeLogLikelihood(good, np.ones((2, 1), bool))
    for bad in (np.ones((3, 1)), np.ones(3, bool)):
        with pytest.raises(ValueError, match="pattern has shape .* truth values"):
            NegativeLogLikelihood(good, bad)
    with pytest.raises(ValueError, match=r"x\[1\] never moves: its likelihood is unb"):
        NegativeLogLikelihood(moments_of(np.diag([1.0, 0, 2])))
    with pytest.raises(ValueError, match="x has 1 non-finite value"):
        Moments.from_data(np.array([[1.0, np.nan], [0, 1]]), center=True)
    energy = NegativeLogLikelihood(good)
    with pytest.raises(ValueError, match="point has 6 variables but the data have 3"):
        energy(point_of("fa", getkey()))
    held = NegativeLogLikelihood(good, np.ones((3, 2), bool))
    one = LatentGaussian(jnp.ones((3, 1)), Diagonal.of(np.ones(3)))
    with pytest.raises(ValueError, match="1 latent variables but pattern has 2 col"):
        held(one)


@pytest.mark.slow
def test_patterns_within_a_full_block_have_no_m_step(getkey):
    energy = energy_of("ibfa", covariance_of(getkey(), 7, 30))
    point = LatentGaussian(point_of("ibfa", getkey()).loadings, Full.of(np.eye(7)))
    with pytest.raises(ValueError, match="variables 0 to 6 have different patterns"):
        energy.m_step(point, energy.e_step(point))
    # One full block per view is fine.
    blocks = Block((Full.of(np.eye(4)), Full.of(np.eye(3))))
    fine = LatentGaussian(point.loadings, blocks)
    assert energy(energy.m_step(fine, energy.e_step(fine))) < energy(fine)


@pytest.mark.slow
def test_points_are_trees(getkey):
    points = jax.vmap(lambda key: point_of("pcca", key))(jr.split(getkey(), 3))
    assert points.loadings.shape == (3, 6, 2)
    energy = energy_of("pcca", covariance_of(getkey(), 6, 30))
    assert jax.vmap(energy)(points).shape == (3,)
    assert noise_of("pcca", getkey()).size == 6
