"""The exact loss of linear hierarchical VAEs equals the sampled one."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from elbo_problems import covariance
from jax.scipy.stats import multivariate_normal

from gradflow.initial import GaussianLike
from gradflow.models import (
    DiagonalCovariance,
    HierarchicalELBO,
    LinearHVAE,
    LinearMap,
    LinearVAE,
    NegativeELBO,
)
from gradflow.moments import Moments


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def posed(rng, kinds, data, latents=(3, 2), hidden=((), (), (), ())):
    fixed = [
        covariance(rng, "general", size) if kind is None else None
        for kind, size in zip(kinds, latents, strict=True)
    ]
    energy = HierarchicalELBO(
        Moments.from_data(data),
        beta_1=0.7,
        beta_2=1.2,
        decoder_std=0.8,
        prior_std=1.3,
        covariance_1=fixed[0],
        covariance_2=fixed[1],
    )
    like = LinearHVAE.zeros(
        data.shape[1],
        *latents,
        covariance_1=kinds[0],
        covariance_2=kinds[1],
        hidden=hidden,
    )
    return energy, GaussianLike(like, 0.6, 0.4)(jr.key(int(rng.integers(1000))))


def sigmas(energy, point) -> Any:
    return [
        own.matrix() if own is not None else fixed
        for own, fixed in (
            (point.covariance_1, energy.covariance_1),
            (point.covariance_2, energy.covariance_2),
        )
    ]


@eqx.filter_jit
def sampled_elbo(energy, point, data, key):
    sigma_1, sigma_2 = sigmas(energy, point)
    one, two = jr.split(key)
    normal = lambda key, means, sigma: (
        means + jr.normal(key, means.shape) @ jnp.linalg.cholesky(sigma).T
    )
    means_1 = data @ point.encoder_1.matrix().T
    z_1 = normal(one, means_1, sigma_1)
    means_2 = z_1 @ point.encoder_2.matrix().T
    z_2 = normal(two, means_2, sigma_2)
    density: Any = jax.vmap(multivariate_normal.logpdf, (0, 0, None))
    noise = lambda size, std: std**2 * jnp.eye(size)
    std, latents = energy.decoder_std, point.decoder_2.matrix().shape
    likelihood = density(
        data, z_1 @ point.decoder_1.matrix().T, noise(data.shape[1], std)
    )
    between = density(z_1, z_2 @ point.decoder_2.matrix().T, noise(latents[0], std))
    prior = density(z_2, jnp.zeros_like(z_2), noise(latents[1], energy.prior_std))
    return (
        likelihood
        - energy.beta_1 * (density(z_1, means_1, sigma_1) - between)
        - energy.beta_2 * (density(z_2, means_2, sigma_2) - prior)
    )


@pytest.mark.parametrize(
    "kinds", [(None, "full"), (None, None), ("full", "diagonal"), ("diagonal", None)]
)
def test_elbo_is_that_of_samples_within_their_error(rng, kinds):
    data = rng.normal(size=(12, 3))
    energy, point = posed(rng, kinds, data)
    rows = jnp.asarray(np.tile(data, (2000, 1)))
    draws = np.asarray(sampled_elbo(energy, point, rows, jr.key(1)))
    means = draws.reshape(2000, 12).mean(axis=1)
    error = means.std(ddof=1) / np.sqrt(len(means))
    assert abs(means.mean() - float(energy.elbo(point))) < 4 * error
    assert error < 0.02 * abs(float(energy.elbo(point)))


def test_loss_and_differential_are_the_expectation_over_the_data(rng):
    """Written with samples, for deep maps and singular data."""
    data = rng.normal(size=(9, 2)) @ rng.normal(size=(2, 4))
    hidden = ((3,), (2,), (5, 4), (2,))
    energy, point = posed(rng, ("full", "full"), data, hidden=hidden)

    def naive(point):
        sigma_1, sigma_2 = sigmas(energy, point)
        e_1, e_2 = point.encoder_1.matrix(), point.encoder_2.matrix()
        d_1, d_2 = point.decoder_1.matrix(), point.decoder_2.matrix()
        z = data @ e_1.T
        trace = lambda m, sigma: jnp.trace(m @ sigma @ m.T)
        mean = lambda rows: jnp.mean(jnp.sum(rows**2, axis=1))
        back = d_2 @ e_2 - jnp.eye(len(e_1))
        missed = mean(z @ d_1.T - data) + trace(d_1, sigma_1)
        between = mean(z @ back.T) + trace(back, sigma_1) + trace(d_2, sigma_2)
        prior = mean(z @ e_2.T) + trace(e_2, sigma_1) + jnp.trace(sigma_2)
        logs = [jnp.linalg.slogdet(sigma)[1] for sigma in (sigma_1, sigma_2)]
        return (
            (missed + energy.beta_1 * between) / energy.decoder_std**2
            + energy.beta_2 / energy.prior_std**2 * prior
            - energy.beta_1 * logs[0]
            - energy.beta_2 * logs[1]
        )

    value, gradient = jax.jit(jax.value_and_grad(naive))(point)
    np.testing.assert_allclose(energy(point), value, rtol=1e-12)
    ours = eqx.filter_jit(energy.differential)(point)
    for one, other in zip(
        jax.tree.leaves(ours), jax.tree.leaves(gradient), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-11)


def test_with_a_collapsed_second_level_it_is_a_vae(rng):
    """z_2 that says nothing of z_1: the VAE whose prior has the decoder's variance."""
    data = rng.normal(size=(8, 3))
    energy, point = posed(rng, ("full", "diagonal"), data)
    zero = lambda tree: jax.tree.map(jnp.zeros_like, tree)
    prior = DiagonalCovariance(jnp.full(2, 2 * np.log(1.3)))
    alone = eqx.tree_at(
        lambda p: (p.encoder_2, p.decoder_2, p.covariance_2),
        point,
        (zero(point.encoder_2), zero(point.decoder_2), prior),
    )
    vae = NegativeELBO(
        Moments.from_data(data), beta=0.7, decoder_std=0.8, prior_std=0.8
    )
    same = LinearVAE(point.encoder_1, point.decoder_1, point.covariance_1)
    np.testing.assert_allclose(energy.elbo(alone), vae.elbo(same), rtol=1e-13)


@pytest.mark.parametrize("name", ["beta_1", "beta_2", "decoder_std", "prior_std"])
@pytest.mark.parametrize("value", [-1.0, 0.0, float("nan"), float("inf")])
def test_numbers_out_of_range(name, value):
    moments = Moments.from_data(np.ones((2, 2)))
    with pytest.raises(Exception, match=f"{name} must be a"):
        HierarchicalELBO(moments, **{name: value})


def test_points_that_do_not_fit(rng):
    energy, point = posed(rng, ("full", None), rng.normal(size=(5, 3)))
    with pytest.raises(ValueError, match="decoder_2 maps 3 inputs to 3"):
        energy(eqx.tree_at(lambda p: p.decoder_2, point, LinearMap(jnp.ones((3, 3)))))
    with pytest.raises(ValueError, match="covariance_1 is either learned .* both"):
        again = HierarchicalELBO(
            energy.moments, covariance_1=jnp.eye(3), covariance_2=jnp.eye(2)
        )
        again(point)
