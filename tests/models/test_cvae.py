"""The exact loss of linear conditional VAEs equals the sampled one."""

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
    ConditionalELBO,
    LinearCVAE,
    LinearMap,
    LinearVAE,
    NegativeELBO,
)
from gradflow.moments import Moments


@pytest.fixture
def rng():
    return np.random.default_rng(6)


def posed(rng, kind, learn_decoder, data, latent=2, hidden=((), (), (), ())):
    energy = ConditionalELBO(
        Moments.from_data(*data),
        beta=0.7,
        decoder_std=None if learn_decoder else 0.8,
        prior_std=1.3,
        covariance=covariance(rng, "general", latent) if kind is None else None,
    )
    like = LinearCVAE.zeros(
        data[0].shape[1],
        data[1].shape[1],
        latent,
        covariance=kind,
        learn_decoder=learn_decoder,
        hidden=hidden,
    )
    return energy, GaussianLike(like, 0.6, 0.4)(jr.key(int(rng.integers(1000))))


@eqx.filter_jit
def sampled_elbo(energy, point, x, y, key):
    """One draw of z per row: log p(y|z,x) - beta (log q(z|x,y) - log p(z))."""
    sigma = energy.covariance if point.covariance is None else point.covariance.matrix()
    variance = (
        energy.decoder_std**2
        if point.log_decoder_variance is None
        else jnp.exp(point.log_decoder_variance)
    )
    means = x @ point.encoder_x.matrix().T + y @ point.encoder_y.matrix().T
    latents = means + jr.normal(key, means.shape) @ jnp.linalg.cholesky(sigma).T
    decoded = latents @ point.decoder.matrix().T + x @ point.skip.matrix().T
    density: Any = jax.vmap(multivariate_normal.logpdf, (0, 0, None))
    likelihood = density(y, decoded, variance * jnp.eye(y.shape[1]))
    zero = jnp.zeros_like(latents)
    prior = density(latents, zero, energy.prior_std**2 * jnp.eye(latents.shape[1]))
    return likelihood - energy.beta * (density(latents, means, sigma) - prior)


@pytest.mark.parametrize(
    "kind, learn_decoder", [("full", False), ("diagonal", True), (None, False)]
)
def test_elbo_is_that_of_samples_within_their_error(rng, kind, learn_decoder):
    data = rng.normal(size=(12, 2)), rng.normal(size=(12, 3))
    energy, point = posed(rng, kind, learn_decoder, data)
    x, y = (jnp.asarray(np.tile(rows, (2000, 1))) for rows in data)
    draws = np.asarray(sampled_elbo(energy, point, x, y, jr.key(1)))
    means = draws.reshape(2000, 12).mean(axis=1)
    error = means.std(ddof=1) / np.sqrt(len(means))
    assert abs(means.mean() - float(energy.elbo(point))) < 4 * error
    assert error < 0.02 * abs(float(energy.elbo(point)))


def test_loss_and_differential_are_the_expectation_over_the_data(rng):
    """Written with samples, for deep maps and a singular second moment of x."""
    x = np.concatenate([rng.normal(size=(9, 2)), np.zeros((9, 1))], axis=1)
    y = rng.normal(size=(9, 4))
    hidden = ((3,), (5, 2), (2,), (3,))
    energy, point = posed(rng, "full", True, (x, y), hidden=hidden)

    def naive(point):
        sigma = point.covariance.matrix()
        variance = jnp.exp(point.log_decoder_variance)
        decoder = point.decoder.matrix()
        means = x @ point.encoder_x.matrix().T + y @ point.encoder_y.matrix().T
        missed = means @ decoder.T + x @ point.skip.matrix().T - y
        spread = jnp.trace(decoder @ sigma @ decoder.T)
        code = jnp.mean(jnp.sum(means**2, axis=1)) + jnp.trace(sigma)
        return (
            (jnp.mean(jnp.sum(missed**2, axis=1)) + spread) / variance
            + energy.beta / energy.prior_std**2 * code
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


def test_without_x_it_is_the_vae_of_y(rng):
    x, y = rng.normal(size=(8, 2)), rng.normal(size=(8, 3))
    energy, point = posed(rng, "full", False, (x, y))
    zero = lambda leaf: jnp.zeros_like(leaf)
    alone = eqx.tree_at(
        lambda p: (p.encoder_x, p.skip),
        point,
        (jax.tree.map(zero, point.encoder_x), jax.tree.map(zero, point.skip)),
    )
    numbers: Any = dict(beta=0.7, decoder_std=0.8, prior_std=1.3)
    vae = NegativeELBO(Moments.from_data(y), **numbers)
    same = LinearVAE(point.encoder_y, point.decoder, point.covariance)
    np.testing.assert_allclose(energy(alone), vae(same), rtol=1e-13)
    np.testing.assert_allclose(energy.elbo(alone), vae.elbo(same), rtol=1e-13)


@pytest.mark.parametrize("name", ["beta", "decoder_std", "prior_std"])
@pytest.mark.parametrize("value", [-1.0, 0.0, float("nan"), float("inf")])
def test_numbers_out_of_range(name, value):
    moments = Moments.from_data(np.ones((2, 2)), np.ones((2, 1)))
    with pytest.raises(Exception, match=f"{name} must be a"):
        ConditionalELBO(moments, **{name: value})


def test_maps_that_do_not_fit(rng):
    energy, point = posed(rng, "full", False, (np.ones((3, 2)), np.ones((3, 3))))
    with pytest.raises(ValueError, match="skip maps 3 inputs"):
        energy(eqx.tree_at(lambda p: p.skip, point, LinearMap(jnp.ones((3, 3)))))
    with pytest.raises(ValueError, match="encoder_y maps 3 inputs to 4 outputs"):
        energy(eqx.tree_at(lambda p: p.encoder_y, point, LinearMap(jnp.ones((4, 3)))))
