"""Structures of noise: their algebra, and the fit that an M-step needs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from scipy.optimize import minimize

from gradflow.noise import Block, Diagonal, Full, Isotropic, Residual


FLOOR = 1e-6


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def _definite(rng, size):
    data = rng.normal(size=(size + 3, size))
    return data.T @ data / size


def _structures(rng):
    full = Full.of(_definite(rng, 2))
    diagonal, isotropic = Diagonal.of(rng.uniform(0.5, 2, 2)), Isotropic.of(0.7, 2)
    return [
        (Isotropic.of(0.7, 6), 1),
        (Diagonal.of(rng.uniform(0.5, 2, 6)), 6),
        (Full.of(_definite(rng, 6)), 21),
        (Block((full, diagonal, isotropic)), 6),
    ]


def test_algebra_is_that_of_the_matrix(rng):
    right = jnp.asarray(rng.normal(size=(6, 4)))
    for noise, parameters in _structures(rng):
        matrix = noise.matrix()
        assert matrix.shape == (6, 6) and noise.size == 6
        assert noise.parameters == parameters
        assert sum(leaf.size for leaf in jax.tree.leaves(noise)) == parameters
        close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13)
        close(noise.log_determinant(), jnp.linalg.slogdet(matrix)[1])
        close(noise.solve(right), jnp.linalg.solve(matrix, right))
        white = noise.whiten(right)
        close(white.T @ white, right.T @ jnp.linalg.solve(matrix, right))
        close(noise.whiten(noise.color(right)), right)
        root = noise.color(jnp.eye(6))
        close(root @ root.T, matrix)


def test_every_real_vector_is_a_noise(rng):
    for noise, _ in _structures(rng):
        random = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), noise)
        assert np.linalg.eigvalsh(random.matrix())[0] > 0


def test_residuals_are_formed_in_parts(rng):
    covariance = jnp.asarray(_definite(rng, 5))
    cross, loadings = (jnp.asarray(rng.normal(size=(5, 2))) for _ in range(2))
    second = jnp.asarray(_definite(rng, 2))
    residual = Residual(covariance, cross, second, loadings)
    whole = (
        covariance
        - cross @ loadings.T
        - loadings @ cross.T
        + loadings @ second @ loadings.T
    )
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-13)
    close(residual.matrix(), whole)
    close(residual.diagonal(), jnp.diagonal(whole))
    close(residual.rows(1, 4).matrix(), whole[1:4, 1:4])


def _plain(matrix):
    """A residual that is this matrix."""
    none = jnp.zeros((len(matrix), 1))
    return Residual(jnp.asarray(matrix), none, jnp.eye(1), none)


def test_fits_minimize(rng):
    """Against scipy, from the structure's own coordinates."""
    residual = _plain(_definite(rng, 6))

    def cost(noise):
        white = noise.whiten(noise.whiten(residual.matrix()).T)
        return noise.log_determinant() + jnp.trace(white)

    for noise, _ in _structures(rng):
        found = noise.fit(residual, FLOOR)
        assert type(found) is type(noise)
        flat, restore = ravel_pytree(noise)
        both = jax.jit(jax.value_and_grad(lambda x: cost(restore(x))))  # noqa: B023
        best = minimize(lambda x: [np.asarray(a) for a in both(x)], flat, jac=True)  # noqa: B023
        assert float(cost(found)) <= best.fun + 1e-12
        np.testing.assert_allclose(cost(found), best.fun, atol=1e-8)


def test_a_floor_is_kept_and_named(rng):
    small = np.diag([1.0, 1e-9, 4.0])
    residual = Residual(jnp.eye(3), jnp.zeros((3, 1)), jnp.eye(1), jnp.zeros((3, 1)))
    shrunk = Residual(
        jnp.eye(3),
        jnp.asarray([[0.0], [1.0], [0.0]]),
        jnp.eye(1),
        jnp.asarray([[0.0], [1.0], [0.0]]),
    )
    np.testing.assert_allclose(shrunk.matrix(), np.diag([1.0, 0.0, 1.0]), atol=0)
    scales = jnp.ones(3)
    found = Diagonal.of(np.ones(3)).fit(shrunk, 1e-3)
    np.testing.assert_allclose(jnp.exp(found.log_variances), [1, 1e-3, 1], rtol=1e-12)
    np.testing.assert_array_equal(found.floored(scales, 1e-3), [False, True, False])
    full = Full.of(np.eye(3)).fit(shrunk, 1e-3)
    np.testing.assert_allclose(full.matrix(), np.diag([1, 1e-3, 1]), atol=1e-15)
    np.testing.assert_array_equal(full.floored(scales, 1e-3), [False, True, False])
    iso = Isotropic.of(1.0, 3).fit(shrunk, 0.9)
    np.testing.assert_allclose(jnp.exp(iso.log_variance), 0.9, rtol=1e-12)
    assert iso.floored(scales, 0.9).all() and not iso.floored(scales, 0.1).any()
    for noise in (Diagonal.of(np.ones(3)), Full.of(np.eye(3)), Isotropic.of(1.0, 3)):
        assert not noise.fit(residual, 1e-3).floored(scales, 1e-3).any()
    two = Block((Diagonal.of(np.ones(1)), Full.of(np.eye(2)))).fit(shrunk, 1e-3)
    np.testing.assert_array_equal(two.floored(scales, 1e-3), [False, True, False])
    # The floor of a full block is relative to each variable's own variance.
    tiny = Full.of(small).fit(_plain(small), 1e-3)
    np.testing.assert_allclose(tiny.matrix(), small, rtol=1e-12)


def test_a_raised_full_noise_is_the_best_above_the_floor(rng):
    """Eigenvalues are raised, not entries: against random feasible matrices."""
    matrix = _definite(rng, 3)
    values, vectors = np.linalg.eigh(matrix)
    matrix = (vectors * [1e-8, *values[1:]]) @ vectors.T
    root = np.sqrt(np.diag(matrix))
    found = np.asarray(Full.of(np.eye(3)).fit(_plain(matrix), 0.05).matrix())
    cost = lambda m: np.linalg.slogdet(m)[1] + np.trace(np.linalg.solve(m, matrix))
    for _ in range(200):
        move = rng.normal(size=(3, 3)) * 10.0 ** rng.uniform(-4, -1)
        other = found + (move + move.T) * np.outer(root, root)
        values, vectors = np.linalg.eigh(other / np.outer(root, root))
        other = (vectors * np.maximum(values, 0.05)) @ vectors.T * np.outer(root, root)
        assert cost(other) >= cost(found) - 1e-12


@pytest.mark.parametrize("bad", [-1.0, 0.0, np.nan, np.inf])
def test_variances_refuse(bad):
    with pytest.raises(ValueError, match="variance must be finite and > 0, got"):
        Isotropic.of(bad, 3)
    with pytest.raises(ValueError, match=r"variances must be .* > 0, got .* at \[1\]"):
        Diagonal.of([1.0, bad, 1.0])


def test_structures_refuse():
    with pytest.raises(ValueError, match="variance must be numbers > 0, got 'x'"):
        Isotropic.of("x", 3)
    with pytest.raises(ValueError, match="variances must be a list of numbers, got"):
        Diagonal.of(1.0)
    for bad, text in ((0, "must be >= 1"), (True, "whole number"), (1.5, "whole")):
        noise = object.__new__(Isotropic)
        object.__setattr__(noise, "variables", bad)
        with pytest.raises(ValueError, match=f"variables .*{text}"):
            noise.__check_init__()
    with pytest.raises(ValueError, match=r"entries has shape \(4,\): a triangle of n"):
        Full(jnp.zeros(4))
    for bad, text in (
        (np.ones((2, 3)), r"shape \(2, 3\): a covariance must be square"),
        (np.array([[1, 0.5], [0, 1]]), "isn't symmetric"),
        (np.array([[1.0, 2], [2, 1]]), "isn't positive definite"),
    ):
        with pytest.raises(ValueError, match=text):
            Full.of(bad)
    with pytest.raises(ValueError, match="blocks is empty: give one noise"):
        Block(())
