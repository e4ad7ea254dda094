"""The exact loss of linear VAEs: equal to the sampled one, cheap, and well guarded."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from elbo_problems import autoencoding, covariance, minimized, Problem, second_moment
from jax.scipy.stats import multivariate_normal

from gradflow.initial import GaussianLike
from gradflow.models import (
    CholeskyCovariance,
    DeepLinear,
    DiagonalCovariance,
    LinearMap,
    LinearVAE,
    NegativeELBO,
    RootCovariance,
)
from gradflow.models.base import AbstractEnergy
from gradflow.moments import Moments
from gradflow.theory import VAETheory


KINDS = ("full", "diagonal", "root", None)


@pytest.fixture
def rng():
    return np.random.default_rng(5)


def posed(rng, kind, learn_decoder, x, latent, data, hidden=((), ())):
    energy = NegativeELBO(
        Moments.from_data(data),
        beta=0.7,
        decoder_std=None if learn_decoder else 0.8,
        prior_std=1.3,
        covariance=covariance(rng, "general", latent) if kind is None else None,
    )
    like = LinearVAE.zeros(
        x, latent, covariance=kind, learn_decoder=learn_decoder, hidden=hidden
    )
    return energy, GaussianLike(like, 0.6, 0.4)(jr.key(int(rng.integers(1000))))


@eqx.filter_jit
def sampled_elbo(energy, point, data, key):
    """One draw of z per row: log p(x|z) - beta (log q(z|x) - log p(z))."""
    encoder, decoder = point.encoder.matrix(), point.decoder.matrix()
    sigma = energy.covariance if point.covariance is None else point.covariance.matrix()
    variance = (
        energy.decoder_std**2
        if point.log_decoder_variance is None
        else jnp.exp(point.log_decoder_variance)
    )
    means = data @ encoder.T
    noise = jr.normal(key, means.shape) @ jnp.linalg.cholesky(sigma).T
    latents = means + noise
    density: Any = jax.vmap(multivariate_normal.logpdf, (0, 0, None))
    likelihood = density(data, latents @ decoder.T, variance * jnp.eye(data.shape[1]))
    zero = jnp.zeros_like(latents)
    prior = density(latents, zero, energy.prior_std**2 * jnp.eye(latents.shape[1]))
    posterior = density(latents, means, sigma)
    return likelihood - energy.beta * (posterior - prior)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("learn_decoder", [False, True])
def test_elbo_is_that_of_samples_within_their_error(rng, kind, learn_decoder):
    data = rng.normal(size=(12, 3)) @ rng.normal(size=(3, 3))
    energy, point = posed(rng, kind, learn_decoder, 3, 2, data)
    rows = np.tile(data, (2000, 1))
    draws = np.asarray(sampled_elbo(energy, point, jnp.asarray(rows), jr.key(1)))
    # Rows are the same 12 again and again: the mean varies by z alone.
    means = draws.reshape(2000, 12).mean(axis=1)
    error = means.std(ddof=1) / np.sqrt(len(means))
    assert abs(means.mean() - float(energy.elbo(point))) < 4 * error
    assert error < 0.02 * abs(float(energy.elbo(point)))


def test_loss_and_differential_are_the_expectation_over_the_data(rng):
    """Written with samples, as on paper; and deep maps only enter by their product."""
    data = rng.normal(size=(9, 4))
    energy, point = posed(rng, "full", True, 4, 3, data, hidden=((5,), (2, 6)))
    assert isinstance(point.encoder, DeepLinear) and isinstance(
        point.decoder, DeepLinear
    )

    def naive(point):
        encoder, decoder = point.encoder.matrix(), point.decoder.matrix()
        sigma = point.covariance.matrix()
        variance = jnp.exp(point.log_decoder_variance)
        means = data @ encoder.T
        missed = jnp.mean(jnp.sum((means @ decoder.T - data) ** 2, axis=1))
        return (
            (missed + jnp.trace(decoder @ sigma @ decoder.T)) / variance
            + energy.beta
            / energy.prior_std**2
            * (jnp.mean(jnp.sum(means**2, axis=1)) + jnp.trace(sigma))
            - energy.beta * jnp.linalg.slogdet(sigma)[1]
            + 4 * jnp.log(variance)
        )

    value, gradient = jax.jit(jax.value_and_grad(naive))(point)
    np.testing.assert_allclose(energy(point), value, rtol=1e-12)
    ours = eqx.filter_jit(energy.differential)(point)
    for one, other in zip(
        jax.tree.leaves(ours), jax.tree.leaves(gradient), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-11)


class PerSample(AbstractEnergy):
    """A VAE whose encoder has a covariance of its own for each sample."""

    energy: NegativeELBO
    data: jax.Array

    def __call__(self, point):
        encoder, decoder, logs = point

        def one(row, log):
            xx = row[:, None] * row[None, :]
            moments = Moments(xx, xx, xx, 1, autoencoding=True)
            return eqx.tree_at(lambda e: e.moments, self.energy, moments)(
                LinearVAE(
                    LinearMap(encoder), LinearMap(decoder), DiagonalCovariance(log)
                )
            )

        return jnp.mean(jax.vmap(one)(self.data, logs))


def test_covariances_per_sample_are_all_equal_at_the_minimum(rng):
    data = jnp.asarray(rng.normal(size=(5, 3)) * np.array([2.0, 1.2, 0.6]))
    energy = NegativeELBO(Moments.from_data(data), beta=0.8, decoder_std=0.7)
    like = (jnp.zeros((2, 3)), jnp.zeros((3, 2)), jnp.zeros((5, 2)))
    problem = Problem(PerSample(energy, data), like, None)
    best, _, point = minimized(problem, rng, starts=4)
    known = VAETheory(energy, 2, diagonal=True)
    assert abs(best - float(known.optimal_energy())) < 1e-9
    variances = np.exp(np.asarray(point[2]))
    np.testing.assert_allclose(variances, variances[:1].repeat(5, 0), rtol=1e-5)
    np.testing.assert_allclose(
        np.sort(variances[0]), np.sort(known.spectra()["covariance"]), rtol=1e-5
    )


def test_singular_moments_and_constant_columns(rng):
    data = np.zeros((7, 5))
    data[:, :2] = rng.normal(size=(7, 2))
    energy, point = posed(rng, "full", False, 5, 3, data)
    assert np.isfinite(energy(point))
    for leaf in jax.tree.leaves(energy.differential(point)):
        assert np.all(np.isfinite(leaf))


def test_coordinates_of_a_covariance(rng):
    matrix = second_moment(rng, [2.0, 1.0, 0.3], 3)
    for cls in (CholeskyCovariance, RootCovariance, DiagonalCovariance):
        wanted = matrix if cls is not DiagonalCovariance else jnp.diag(jnp.diag(matrix))
        covariance = cls.of(wanted)
        np.testing.assert_allclose(covariance.matrix(), wanted, rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(
            covariance.log_determinant(), jnp.linalg.slogdet(wanted)[1], rtol=1e-12
        )


def test_the_path_depends_on_the_coordinates(rng):
    """The same Sigma and the same energy, and another velocity of Sigma."""
    energy = NegativeELBO(autoencoding(second_moment(rng, [2.0, 1.0], 2)))
    matrix = second_moment(rng, [0.8, 0.3], 2)
    maps = [LinearMap(jnp.asarray(rng.normal(size=(2, 2)))) for _ in range(2)]
    speeds = []
    for cls in (CholeskyCovariance, RootCovariance):
        point = LinearVAE(maps[0], maps[1], cls.of(matrix))
        slope = energy.differential(point).covariance
        _, moved = jax.jvp(lambda c: c.matrix(), (point.covariance,), (slope,))
        speeds.append(np.asarray(moved))
    assert np.abs(speeds[0] - speeds[1]).max() > 0.1


def test_float32(rng):
    with jax.enable_x64(False):
        data = jnp.asarray(rng.normal(size=(6, 3)), jnp.float32)
        energy = NegativeELBO(Moments.from_data(data), beta=0.5)
        point = LinearVAE.zeros(3, 2)
        assert energy(point).dtype == jnp.float32


def refused(text, call):
    """By us, or (for a string, say) by the run-time type checker of these tests."""
    with pytest.raises(Exception, match=text):
        call()


@pytest.mark.parametrize("name", ["beta", "decoder_std", "prior_std"])
@pytest.mark.parametrize("value", [-1.0, 0.0, float("nan"), float("inf"), True])
def test_numbers_out_of_range(name, value):
    moments = Moments.from_data(np.ones((2, 2)))
    refused(f"{name} must be a", lambda: NegativeELBO(moments, **{name: value}))


def test_points_and_covariances_that_do_not_fit(rng):
    moments = Moments.from_data(rng.normal(size=(6, 3)))
    energy = NegativeELBO(moments)
    eye = jnp.eye(2)
    refused("neither has one", lambda: energy(LinearVAE.zeros(3, 2, covariance=None)))
    fixed = NegativeELBO(moments, covariance=eye)
    refused("both have one", lambda: fixed(LinearVAE.zeros(3, 2)))
    refused("both have one", lambda: energy(LinearVAE.zeros(3, 2, learn_decoder=True)))
    refused("encoder maps 4 inputs", lambda: energy(LinearVAE.zeros(4, 2)))
    three = LinearVAE.zeros(3, 3, covariance=None)
    refused("there are 3 latents", lambda: fixed(three))
    refused("isn't symmetric", lambda: NegativeELBO(
        moments, covariance=jnp.array([[1.0, 0.5], [0.0, 1.0]])
    ))  # fmt: skip
    refused("must be positive definite", lambda: NegativeELBO(
        moments, covariance=jnp.array([[1.0, 2.0], [2.0, 1.0]])
    ))  # fmt: skip
    refused("non-finite value at \\[0, 1\\]", lambda: NegativeELBO(
        moments, covariance=eye.at[0, 1].set(jnp.nan)
    ))  # fmt: skip
    refused("must be one of full", lambda: LinearVAE.zeros(3, 2, covariance="round"))
    refused("below have shapes", lambda: CholeskyCovariance(jnp.ones(3), jnp.ones(2)))
