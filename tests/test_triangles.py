"""Factors by products: those of the library, with its derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradflow.triangles import anywhere, cholesky, triangular_inverse


def _definite(size, seed=0):
    data = np.random.default_rng(seed).normal(size=(size + 3, size))
    return jnp.asarray(data.T @ data / size)


@pytest.mark.parametrize("size", [1, 2, 5, 16, 33])
@pytest.mark.parametrize("lanes", [None, 2])
def test_factor_and_inverse_are_those_of_the_library(size, lanes):
    matrices = jnp.stack([_definite(size, seed) for seed in range(lanes or 1)])
    each = jax.vmap if lanes else lambda function: lambda x: function(x[0])[None]
    lowers = each(cholesky)(matrices)
    np.testing.assert_allclose(lowers, np.linalg.cholesky(matrices), rtol=0, atol=1e-14)
    for lower, inverse in zip(lowers, each(triangular_inverse)(lowers), strict=True):
        left = inverse @ lower - jnp.eye(size)
        assert np.abs(left).max() < 1e-14 * np.linalg.cond(lower)


def test_what_is_not_positive_definite_has_no_factor():
    matrices = jnp.stack([_definite(4) - 2 * jnp.eye(4), _definite(4)])
    assert not np.all(np.isfinite(cholesky(matrices[0])))
    finite = np.isfinite(jax.vmap(cholesky)(matrices)).all(axis=(1, 2))
    assert finite.tolist() == [False, True]


@pytest.mark.parametrize("many", [False, True])
def test_derivatives_are_those_of_the_library(many):
    matrix = _definite(5)
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(5, 5)))

    def total(factor, inverse):
        def function(matrix):
            symmetric = 0.5 * (matrix + matrix.T)
            lower = factor(symmetric)
            return jnp.sum(weights * lower) + jnp.sum(weights * inverse(lower))

        return function

    ours = total(cholesky, triangular_inverse)
    theirs = total(jnp.linalg.cholesky, jnp.linalg.inv)
    for derivative in (jax.grad, jax.hessian):
        of = derivative(ours)
        found = jax.vmap(of)(matrix[None])[0] if many else of(matrix)
        expected = derivative(theirs)(matrix)
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


def test_no_lane_pays_for_what_none_needs():
    def chosen(flag, x):
        return jax.lax.cond(anywhere(flag), lambda: jnp.where(flag, x**2, x), lambda: x)

    flags, x = jnp.array([False, True]), jnp.array([3.0, 3.0])
    np.testing.assert_array_equal(jax.vmap(chosen)(flags, x), [3, 9])
    assert jax.vmap(jax.jacobian(chosen, argnums=1))(flags, x).tolist() == [1, 6]
    # It stays a choice, which a select would not be.
    assert "cond[" in str(jax.make_jaxpr(jax.vmap(chosen))(flags, x))
