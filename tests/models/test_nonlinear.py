"""Sampled ELBOs: with affine maps their mean is the exact one of linear VAEs."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from gradflow import collapse
from gradflow.initial import GaussianLike
from gradflow.models import (
    ConditionalELBO,
    HierarchicalELBO,
    LinearCVAE,
    LinearHVAE,
    NonlinearCVAE,
    NonlinearHVAE,
    SampledConditionalELBO,
    SampledHierarchicalELBO,
)
from gradflow.moments import Moments


SAMPLES, DRAWS = 8, 2000


@pytest.fixture
def rng():
    return np.random.default_rng(11)


def affine(perceptron, weight, bias=None):
    """A perceptron of depth 0 with this weight and bias."""
    bias = jnp.zeros(len(weight)) if bias is None else bias
    (layer,) = perceptron.layers
    layer = eqx.tree_at(lambda one: (one.weight, one.bias), layer, (weight, bias))
    return eqx.tree_at(lambda p: p.layers, perceptron, (layer,))


def with_variances(perceptron, matrix, covariance):
    """Means by a matrix, and log-variances that are the same for all inputs."""
    logs = covariance.log_variances
    weight = jnp.concatenate([matrix, jnp.zeros((len(logs), matrix.shape[1]))])
    return affine(perceptron, weight, jnp.concatenate([jnp.zeros_like(logs), logs]))


def conditional(rng):
    """A linear conditional VAE, and it again as perceptrons."""
    x, y = (jnp.asarray(rng.normal(size=(SAMPLES, size))) for size in (2, 3))
    settings = {"beta": 0.7, "decoder_std": 0.8, "prior_std": 1.3}
    like = LinearCVAE.zeros(2, 3, 2, covariance="diagonal")
    point = GaussianLike(like, 0.6, 0.4)(jr.key(1))
    same = NonlinearCVAE.random(2, 3, 2, width=1, depth=0, key=jr.key(2))
    code = jnp.concatenate([point.encoder_x.matrix(), point.encoder_y.matrix()], 1)
    back = jnp.concatenate([point.decoder.matrix(), point.skip.matrix()], 1)
    same = NonlinearCVAE(
        with_variances(same.encoder, code, point.covariance),
        affine(same.decoder, back),
    )
    exact = ConditionalELBO(Moments.from_data(x, y), **settings)
    return (exact, point), (SampledConditionalELBO(**settings), same), (x, y)


def hierarchical(rng, fixed):
    x = jnp.asarray(rng.normal(size=(SAMPLES, 3)))
    settings = {"beta_1": 0.7, "beta_2": 1.2, "decoder_std": 0.8, "prior_std": 1.3}
    like = LinearHVAE.zeros(
        3, 2, 2, covariance_1=None if fixed else "diagonal", covariance_2="diagonal"
    )
    point = GaussianLike(like, 0.6, 0.4)(jr.key(3))
    same = NonlinearHVAE.random(
        3, 2, 2, width=1, depth=0, key=jr.key(4), learn_first=not fixed
    )
    first = point.encoder_1.matrix()
    if fixed:
        encoder_1 = affine(same.encoder_1, first)
    else:
        encoder_1 = with_variances(same.encoder_1, first, point.covariance_1)
    same = NonlinearHVAE(
        encoder_1,
        with_variances(same.encoder_2, point.encoder_2.matrix(), point.covariance_2),
        affine(same.decoder_1, point.decoder_1.matrix()),
        affine(same.decoder_2, point.decoder_2.matrix()),
    )
    exact = HierarchicalELBO(
        Moments.from_data(x),
        covariance_1=jnp.eye(2) * 0.9**2 if fixed else None,
        **settings,
    )
    sampled = SampledHierarchicalELBO(encoder_std=0.9 if fixed else None, **settings)
    return (exact, point), (sampled, same), x


@eqx.filter_jit
def sampled(function, *data):
    """A function of one sample and a key, [draw, sample, ...]."""

    def one(key):
        keys = jr.split(key, SAMPLES)
        return jax.vmap(lambda key, *row: function(*row, key=key))(keys, *data)

    return jax.vmap(one)(jr.split(jr.key(5), DRAWS))


def check(draws, exact):
    """The mean over samples and draws is `exact`, up to 4 standard errors."""
    means = np.asarray(draws).mean(axis=1)
    error = means.std(axis=0, ddof=1) / np.sqrt(DRAWS)
    assert (np.abs(means.mean(axis=0) - np.asarray(exact)) < 4 * error + 1e-12).all()
    # Precise enough to see a wrong constant.
    assert (error < 0.03 * np.abs(exact) + 3e-3).all()


def test_elbo_of_affine_maps_is_that_of_a_linear_conditional_vae(rng):
    (exact, linear), (energy, point), (x, y) = conditional(rng)
    draws = sampled(eqx.Partial(energy.elbo, point), x, y)
    check(draws, exact.elbo(linear))


def test_elbo_is_exact_where_nothing_depends_on_what_is_drawn(rng):
    """With a decoder that takes no notice of z: constants to the last digit."""
    (exact, linear), (energy, point), (x, y) = conditional(rng)
    unread = lambda matrix: matrix.at[:, :2].set(0.0)
    weight = lambda p: p.decoder.layers[0].weight
    point = eqx.tree_at(weight, point, unread(weight(point)))
    matrix = lambda p: p.decoder.weight
    linear = eqx.tree_at(matrix, linear, unread(matrix(linear)))
    elbo = jax.jit(jax.vmap(lambda x, y: energy.elbo(point, x, y, key=jr.key(0))))
    each = elbo(x, y)
    np.testing.assert_allclose(np.mean(each), exact.elbo(linear), rtol=1e-12)


@pytest.mark.parametrize("fixed", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_elbo_and_kl_of_affine_maps_are_those_of_a_linear_hierarchical_vae(rng, fixed):
    (exact, linear), (energy, point), x = hierarchical(rng, fixed)
    both = lambda x, key: (
        energy.elbo(point, x, key=key),
        energy.kl(point, x, key=key),
    )
    elbo, found = sampled(both, x)
    check(elbo, exact.elbo(linear))
    wanted = collapse.kl_hierarchical(exact, linear)
    for draws, value in zip(found, wanted, strict=True):
        check(draws, value)


def test_kl_of_each_sample_and_latent(rng):
    (exact, linear), (energy, point), data = conditional(rng)
    each = jax.vmap(lambda x, y: energy.kl(point, x, y))(*data)
    wanted = collapse.kl_samples(exact, linear, *data)
    np.testing.assert_allclose(each, wanted, rtol=1e-12)


def test_gradient_passes_through_the_samples(rng):
    """Against finite differences, with the same draws."""
    point = NonlinearCVAE.random(2, 3, 2, width=4, depth=1, key=jr.key(0))
    energy = SampledConditionalELBO(beta=0.5)
    x, y = (jnp.asarray(rng.normal(size=size)) for size in (2, 3))
    start = point.encoder.layers[0].weight

    @jax.jit
    def loss(weight):
        there = eqx.tree_at(lambda p: p.encoder.layers[0].weight, point, weight)
        return energy.elbo(there, x, y, key=jr.key(1))

    turn = jnp.asarray(rng.normal(size=start.shape))
    slope = jnp.sum(jax.grad(loss)(start) * turn)
    step = 1e-6
    differences = (loss(start + step * turn) - loss(start - step * turn)) / (2 * step)
    assert abs(slope) > 1e-3
    np.testing.assert_allclose(slope, differences, rtol=1e-6)


@pytest.mark.parametrize("name", ["beta_1", "beta_2", "decoder_std", "encoder_std"])
@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_numbers_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"{name} must be a finite number > 0"):
        SampledHierarchicalELBO(**{name: value})
    if name == "decoder_std":
        with pytest.raises(ValueError, match=f"{name} must be a finite number > 0"):
            SampledConditionalELBO(decoder_std=value)


def test_maps_that_do_not_fit(rng):
    (_, _), (energy, point), (x, y) = conditional(rng)
    with pytest.raises(ValueError, match="decoder maps 4 inputs to 3 outputs"):
        energy.elbo(point, x[0, :1], jnp.ones(4), key=jr.key(0))
    odd = eqx.tree_at(lambda p: p.encoder, point, eqx.nn.MLP(5, 3, 1, 0, key=jr.key(0)))
    with pytest.raises(ValueError, match="encoder has 3 outputs, an odd number"):
        energy.kl(odd, x[0], y[0])
    _, (energy, point), x = hierarchical(rng, True)
    with pytest.raises(ValueError, match="encoder_1 maps 3 inputs to 2 outputs"):
        SampledHierarchicalELBO().elbo(point, x[0], key=jr.key(0))
