import functools
from typing import Any, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import mpmath
import numpy as np
import pytest
from families import orthogonal
from hypothesis import given, settings, strategies as st

from gradflow.spectrum import (
    best_rank,
    cutoff,
    eigh_descending,
    graded_svd,
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


def _sides(rng, size):
    """Two well-conditioned sides, condition number about 10."""
    side = lambda rows: (
        orthogonal(rng, rows)[:, :size]
        @ (orthogonal(rng, size) * np.geomspace(3, 0.3, size))
        @ orthogonal(rng, size)
    )
    return jnp.asarray(side(size + 1)), jnp.asarray(side(size + 2))


LOGS = {
    "close": lambda k: -0.3 * np.arange(k),
    "one e^-10 at a time": lambda k: 5.0 - 10.0 * np.arange(k),
    "one e^-400 at a time": lambda k: 100.0 - 400.0 * np.arange(k),
    "repeated": lambda k: np.where(np.arange(k) < k // 2, 0.0, -50.0),
    "all equal": lambda k: np.full(k, -700.0),
    "ascending": lambda k: -30.0 * np.arange(k)[::-1],
}


@pytest.mark.parametrize("size", [2, 3, 4, 6])
def test_graded_svd_against_many_digits(size):
    rng = np.random.default_rng(size)
    compiled = jax.jit(graded_svd)
    for logs in LOGS.values():
        logs = logs(size)
        left, right = _sides(rng, size)
        u, values, v = (np.asarray(a) for a in compiled(left, jnp.asarray(logs), right))
        for side in (u, v):
            np.testing.assert_allclose(side.T @ side, np.eye(size), atol=2e-14)
        assert np.all(np.diff(values) <= 0)
        digits = 60 + int((logs.max() - logs.min()) / 2)
        with mpmath.workdps(digits):
            mp = lambda a: mpmath.matrix(a.tolist())  # noqa: B023
            scales = mpmath.diag([mpmath.exp(mpmath.mpf(x)) for x in logs.tolist()])
            whole = mp(np.asarray(left)) * scales * mp(np.asarray(right)).T
            exact = cast(Any, mpmath).svd_r(whole, compute_uv=False)
            exact = sorted((mpmath.log(exact[i]) for i in range(size)), reverse=True)
            found = [mpmath.mpf(x) for x in values.tolist()]
            for one, other in zip(found, exact, strict=True):
                # Relative in the singular value itself, but for what rounding of its
                # logarithm leaves.
                assert abs(one - other) <= 3e-14 + 4e-16 * abs(other)
            # And the vectors: off the diagonal there is rounding of the larger of the
            # two values, besides products of two roundings of the largest of all.
            core = mp(u).T * whole * mp(v)
            sizes = [mpmath.exp(x) for x in found]
            for i in range(size):
                for j in range(size):
                    value = abs(core[i, j] - (sizes[i] if i == j else 0))
                    least = sizes[min(i, j)] * (1 + abs(found[min(i, j)]) / 100)
                    assert value <= 1e-13 * least + 1e-26 * sizes[0]


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    st.lists(st.floats(-400, 400), min_size=3, max_size=3),
    st.integers(0, 2**32 - 1),
)
def test_graded_svd_keeps_the_determinant_and_forgets_the_order(logs, seed):
    rng = np.random.default_rng(seed)
    left, right = (orthogonal(rng, 3) + 0.2 * rng.normal(size=(3, 3)) for _ in "yx")
    logs = np.asarray(logs)
    compiled = _compiled_svd()
    u, values, v = compiled(jnp.asarray(left), jnp.asarray(logs), jnp.asarray(right))
    signs = [np.linalg.slogdet(m) for m in (left, right)]
    condition = np.linalg.cond(left) * np.linalg.cond(right)
    noise = 1e-14 * condition + 1e-15 * np.abs(logs).sum()
    expected = signs[0][1] + logs.sum() + signs[1][1]
    assert abs(np.sum(values) - expected) <= noise
    sign = np.linalg.det(np.asarray(u)) * np.linalg.det(np.asarray(v))
    assert abs(sign - signs[0][0] * signs[1][0]) <= 1e-13
    order = rng.permutation(3)
    columns = (left[:, order], logs[order], right[:, order])
    _, again, _ = compiled(*(jnp.asarray(a) for a in columns))
    np.testing.assert_allclose(again, values, rtol=1e-15, atol=1e-14 * condition)


@functools.cache
def _compiled_svd():
    return jax.jit(graded_svd)


def test_graded_svd_of_one_column(getkey):
    left, right = jr.normal(getkey(), (3, 1)), jr.normal(getkey(), (2, 1))
    u, values, v = _compiled_svd()(left, jnp.array([-1e4]), right)
    size = jnp.linalg.norm(left) * jnp.linalg.norm(right)
    np.testing.assert_allclose(values, -1e4 + jnp.log(size), rtol=1e-15)
    np.testing.assert_allclose(u @ v.T, left @ right.T / size, atol=1e-15)


def test_graded_svd_in_a_batch_and_in_float32():
    rng = np.random.default_rng(7)
    logs = jnp.asarray([[0.0, -3.0, -80.0], [-5.0, -5.0, 0.0], [0.0, -1.0, -2.0]])
    sides = [_sides(rng, 3) for _ in logs]
    left, right = (jnp.stack([pair[i] for pair in sides]) for i in range(2))
    together = jax.jit(jax.vmap(graded_svd))
    found = together(left, logs, right)
    compiled = _compiled_svd()
    for i in range(len(logs)):
        alone = compiled(left[i], logs[i], right[i])
        np.testing.assert_allclose(found[1][i], alone[1], rtol=1e-14, atol=1e-14)
    single = together(*(a.astype(jnp.float32) for a in (left, logs, right)))
    assert all(leaf.dtype == jnp.float32 for leaf in single)
    np.testing.assert_allclose(single[1], found[1], rtol=1e-6, atol=2e-6)
    for side in (single[0], single[2]):
        gram = jnp.swapaxes(side, 1, 2) @ side
        np.testing.assert_allclose(gram, jnp.stack([jnp.eye(3)] * 3), atol=1e-6)


def test_graded_svd_of_a_diagonal_is_exact():
    # Nothing to rotate: not one bit may change, for a run at rest stays at rest.
    logs = jnp.array([3.0, 0.0, -500.0])
    u, values, v = _compiled_svd()(jnp.eye(4)[:, :3], logs, jnp.eye(3))
    np.testing.assert_array_equal(values, logs)
    np.testing.assert_array_equal(jnp.abs(u), jnp.eye(4)[:, :3])
    np.testing.assert_array_equal(u.T[:, :3], v)
