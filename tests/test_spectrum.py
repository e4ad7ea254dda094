import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from gradflow.spectrum import (
    best_rank,
    cutoff,
    eigh_descending,
    psd_power,
    svd_signed,
)


def _psd(key, dimension, rank):
    root = jr.normal(key, (dimension, rank))
    return root @ root.T


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_powers_are_those_of_the_pseudo_inverse(getkey, rank):
    matrix = _psd(getkey(), 5, rank)
    inverse = np.linalg.pinv(np.asarray(matrix), rcond=1e-10, hermitian=True)
    np.testing.assert_allclose(psd_power(matrix, 1.0), matrix, atol=1e-12)
    np.testing.assert_allclose(psd_power(matrix, -1.0), inverse, rtol=1e-7, atol=1e-9)
    projector = psd_power(matrix, 0.0)
    np.testing.assert_allclose(projector @ matrix, matrix, atol=1e-12)
    np.testing.assert_allclose(jnp.trace(projector), rank, atol=1e-12)


@pytest.mark.parametrize("power", [0.5, -0.5, 1 / 3, 2.0])
def test_powers_add(getkey, power):
    matrix = _psd(getkey(), 6, 4)
    whole = psd_power(matrix, power) @ psd_power(matrix, 1.0 - power)
    np.testing.assert_allclose(whole, matrix, rtol=1e-8, atol=1e-8)


def test_power_of_zero_is_zero_and_of_nan_is_nan():
    assert not psd_power(jnp.zeros((3, 3)), -0.5).any()
    assert jnp.isnan(psd_power(jnp.full((3, 3), jnp.nan), -0.5)).all()
    # Negative eigenvalues are rounding and count as zero, however large the others.
    assert not psd_power(-jnp.eye(3), 0.5).any()


def test_power_drops_what_is_below_rtol():
    matrix = jnp.diag(jnp.array([1.0, 1e-3, 1e-13]))
    diagonal = jnp.diag(psd_power(matrix, -1.0))
    np.testing.assert_allclose(diagonal, [1.0, 1e3, 0.0], rtol=1e-12)
    diagonal = jnp.diag(psd_power(matrix, -1.0, rtol=1e-2))
    np.testing.assert_allclose(diagonal, [1.0, 0.0, 0.0], rtol=1e-12)
    diagonal = jnp.diag(psd_power(matrix, -1.0, rtol=0.0))
    np.testing.assert_allclose(diagonal, [1.0, 1e3, 1e13], rtol=1e-12)


def test_derivative_of_a_power_of_a_singular_matrix(getkey):
    matrix = _psd(getkey(), 4, 3)

    def trace(scale):
        return jnp.trace(psd_power(scale * matrix, -0.5))

    # tr((s M)^p) = s^p tr(M^p).
    np.testing.assert_allclose(jax.grad(trace)(1.0), -0.5 * trace(1.0), rtol=1e-6)


def test_cutoff():
    assert cutoff(10, np.dtype(np.float64)) == 1e-12
    assert cutoff(10, np.dtype(np.float32)) == 10 * 2.0**-23
    assert cutoff(10, np.dtype(np.float32), 0.1) == 0.1


@pytest.mark.parametrize("rtol", [-1.0, 1.0, float("nan"), float("inf")])
def test_bad_rtol(rtol):
    with pytest.raises(ValueError, match="rtol must be at least 0 and below 1"):
        psd_power(jnp.eye(2), 0.5, rtol=rtol)


def test_eigh_descending(getkey):
    matrix = _psd(getkey(), 6, 6)
    values, vectors = eigh_descending(matrix)
    assert (jnp.diff(values) <= 0).all()
    np.testing.assert_allclose(
        vectors @ jnp.diag(values) @ vectors.T, matrix, atol=1e-12
    )
    np.testing.assert_allclose(vectors.T @ vectors, jnp.eye(6), atol=1e-13)
    _check_signs(vectors)


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4), (1, 4), (4, 1)])
def test_svd_signed(getkey, shape):
    matrix = jr.normal(getkey(), shape)
    u, s, vt = svd_signed(matrix)
    rank = min(shape)
    assert u.shape == (shape[0], rank) and vt.shape == (rank, shape[1])
    np.testing.assert_allclose(u @ jnp.diag(s) @ vt, matrix, atol=1e-13)
    np.testing.assert_allclose(u.T @ u, jnp.eye(rank), atol=1e-13)
    np.testing.assert_allclose(s, np.linalg.svd(np.asarray(matrix))[1], rtol=1e-12)
    _check_signs(u)


def test_signs_do_not_depend_on_rounding():
    # Eigenvectors (1, 1) and (1, -1) over sqrt(2): the largest entry is a tie.
    for noise in (-1e-15, 0.0, 1e-15):
        matrix = jnp.array([[2.0 + noise, 1.0], [1.0, 2.0 - noise]])
        expected = np.array([[1.0, 1.0], [1.0, -1.0]]) / np.sqrt(2)
        np.testing.assert_allclose(eigh_descending(matrix)[1], expected, atol=1e-12)
        np.testing.assert_allclose(svd_signed(matrix)[0], expected, atol=1e-12)


@pytest.mark.parametrize("rank", [0, 1, 2, 3])
def test_best_rank_leaves_the_smallest_singular_values(getkey, rank):
    matrix = jr.normal(getkey(), (3, 5))
    best = best_rank(matrix, rank)
    left = np.linalg.svd(np.asarray(matrix - best))[1]
    expected = np.zeros(3)
    expected[: 3 - rank] = np.linalg.svd(np.asarray(matrix))[1][rank:]
    np.testing.assert_allclose(left, expected, atol=1e-13)
    assert np.linalg.matrix_rank(np.asarray(best)) == rank


@pytest.mark.parametrize("rank", [-1, 4])
def test_best_rank_refuses(rank):
    with pytest.raises(ValueError, match=rf"rank={rank} .* at most min\(shape\)=3"):
        best_rank(jnp.ones((3, 5)), rank)


def test_traceable_and_of_the_type_given(getkey):
    matrices = jax.vmap(lambda key: _psd(key, 3, 3))(jr.split(getkey(), 4))
    matrices = matrices.astype(jnp.float32)
    for function in (
        lambda matrix: psd_power(matrix, -0.5),
        eigh_descending,
        svd_signed,
        lambda matrix: best_rank(matrix, 2),
    ):
        together = eqx.filter_jit(jax.vmap(function))(matrices)
        for leaf in jax.tree.leaves(together):
            assert leaf.dtype == jnp.float32
        first = jax.tree.map(lambda leaf: leaf[0], together)
        for one, other in zip(
            jax.tree.leaves(first), jax.tree.leaves(function(matrices[0])), strict=True
        ):
            np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)


def _check_signs(columns):
    columns = np.asarray(columns)
    largest = np.abs(columns).argmax(axis=0)
    assert (columns[largest, np.arange(columns.shape[1])] > 0).all()
