"""Gaussian latent-variable problems and points: the four models, at random."""

import jax
import jax.numpy as jnp
import jax.random as jr

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


# By name: numbers of variables of the views, shared and private latent variables.
MODELS = {
    "fa": ((6,), 2, (0,)),
    "ppca": ((6,), 2, (0,)),
    "pcca": ((3, 3), 2, (0, 0)),
    "ibfa": ((4, 3), 1, (1, 1)),
}


def moments_of(covariance, count=100):
    covariance = jnp.asarray(covariance, float)
    return Moments(covariance, covariance, covariance, count, autoencoding=True)


def pattern_of(model):
    sizes, shared, private = MODELS[model]
    return battery_pattern(sizes, shared, private) if model == "ibfa" else None


def energy_of(model, covariance, **options):
    return NegativeLogLikelihood(moments_of(covariance), pattern_of(model), **options)


def noise_of(model, key):
    """Random noise of the model's structure, of variances around 1."""
    sizes, _, _ = MODELS[model]
    match model:
        case "fa":
            return Diagonal(0.5 * jr.normal(key, sizes))
        case "ppca":
            return Isotropic(0.5 * jr.normal(key), sizes[0])
        case "pcca":
            entries = [size * (size + 1) // 2 for size in sizes]
            keys = jr.split(key, len(sizes))
            return Block(
                tuple(
                    Full(0.3 * jr.normal(k, (n,)))
                    for k, n in zip(keys, entries, strict=True)
                )
            )
        case _:
            logs = 0.5 * jr.normal(key, (len(sizes),))
            return Block(tuple(Isotropic(logs[i], n) for i, n in enumerate(sizes)))


def point_of(model, key):
    """A random point; loadings that the pattern holds are 0."""
    sizes, shared, private = MODELS[model]
    below, beside = jr.split(key)
    loadings = jr.normal(below, (sum(sizes), shared + sum(private)))
    pattern = pattern_of(model)
    if pattern is not None:
        loadings = jnp.where(jnp.asarray(pattern), loadings, 0)
    return LatentGaussian(loadings, noise_of(model, beside))


def covariance_of(key, size, samples, most=40):
    """Of random data (at most 40 samples) with a few strong directions; singular for
    few samples. Their number may be traced."""
    first, second, third = jr.split(key, 3)
    strong = jr.normal(first, (2, size))
    data = jr.normal(second, (most, 2)) @ strong + jr.normal(third, (most, size))
    data = jnp.where(jnp.arange(most)[:, None] < samples, data, 0)
    return data.T @ data / samples


def planted_covariance(key, size, latents):
    """That of a factor model with much to explain and no variance near 0, but for some
    noise: EM is quick on it."""
    first, second, third = jr.split(key, 3)
    loadings = jr.normal(first, (size, latents))
    variances = jr.uniform(second, (size,), minval=0.5, maxval=1.5)
    other = jr.normal(third, (500, size))
    whole = loadings @ loadings.T + jnp.diag(variances)
    root = jnp.linalg.cholesky(whole)
    return root @ (other.T @ other / 500) @ root.T


def naive(point, covariance):
    """The definition."""
    model = point.covariance()
    size = len(covariance)
    return 0.5 * (
        size * jnp.log(2 * jnp.pi)
        + jnp.linalg.slogdet(model)[1]
        + jnp.trace(jnp.linalg.solve(model, covariance))
    )


def largest(tree):
    return max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(tree))
