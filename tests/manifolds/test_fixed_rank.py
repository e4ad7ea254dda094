import itertools
import math
from typing import Any, cast

import equinox as eqx
import families
import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from families import orthogonal
from pymanopt.manifolds import FixedRankEmbedded

from gradflow.manifolds import (
    balanced_inverse,
    balanced_inverse_factored,
    balanced_operator,
    balanced_operator_factored,
    FixedRank,
    tangent_projection,
)
from gradflow.models.linear import DeepLinear, LinearMap, SquaredLoss
from gradflow.models.low_rank import LowRank
from gradflow.theory import LinearTheory


EPS = float(np.finfo(float).eps)
DEPTHS = [1, 2, 3, 5, 10]
slow = pytest.mark.slow
# Where each case has to be compiled: some of them by default.
FEWER_DEPTHS = [3, 10, *(pytest.param(depth, marks=slow) for depth in (1, 2, 5))]
FEWER_SIZES = [
    (5, 3, 2),
    *(pytest.param(*c, marks=slow) for c in ((4, 4, 4), (3, 5, 1))),
]


@pytest.fixture
def rng():
    return np.random.default_rng(2024)


# The definition, in 60 digits: powers of W W^T and W^T W by their eigenvalues.


def _exact_powers(matrix, depth):
    """The powers 0, 1/N, ..., (N-1)/N of a positive semidefinite matrix."""
    values, vectors = cast(Any, mpmath).eigsy(matrix)
    largest = max(values)
    # 60 digits: an eigenvalue that is 0 comes out below 1e-55 of the largest, and the
    # smallest that is not 0 in these tests is 1e-30 of it.
    kept = [value if value > largest * mpmath.mpf("1e-45") else 0 for value in values]
    powers = [mpmath.eye(matrix.rows)]
    for j in range(1, depth):
        roots = mpmath.diag([mpmath.mpf(x) ** (mpmath.mpf(j) / depth) for x in kept])
        powers.append(vectors * roots * vectors.T)
    return powers


def _exact_operator(weight, z, depth):
    """A_W(Z) for an mpmath matrix W, however small its singular values."""
    with mpmath.workdps(60):
        above = _exact_powers(weight * weight.T, depth)
        below = _exact_powers(weight.T * weight, depth)
        total = mpmath.zeros(weight.rows, weight.cols)
        for j in range(1, depth + 1):
            total += above[depth - j] * _mp(z) * below[j - 1]
        return np.array(total.tolist(), dtype=float)


def _tangent_operator(weight, z, depth, left, right):
    """The same, for depth 1 of the tangent part: for others it is all that counts."""
    if depth > 1:
        return _exact_operator(weight, z, depth)
    up, down = left @ (left.T @ z), (z @ right) @ right.T
    return up + down - left @ (left.T @ down)


def _mp(matrix):
    return mpmath.matrix(np.asarray(matrix, dtype=float).tolist())


def _relative(found, expected):
    found, expected = np.asarray(found), np.asarray(expected)
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


# Compiled once for each shape and manifold.
_inner = eqx.filter_jit(lambda manifold, point, u, v: manifold.inner(point, u, v))


@eqx.filter_jit
def _mismatch(manifold, energy, point, tangent):
    """|g(grad E, xi) - dE(xi)| over the sizes of grad E and xi."""
    gradient = manifold.gradient(point, jax.grad(energy)(point))
    _, change = jax.jvp(energy, (point,), (tangent,))
    g = lambda u, v: manifold.inner(point, u, v)
    size = jnp.sqrt(g(gradient, gradient) * g(tangent, tangent))
    return jnp.abs(g(gradient, tangent) - change) / size


@eqx.filter_jit
def _gradient(manifold, energy, point):
    return manifold.gradient(point, jax.grad(energy)(point))


@jax.jit
def _ambient(point, tangent):
    """A tangent at a point in factors, as a matrix."""
    return jax.jvp(lambda p: p.matrix(), (point,), (tangent,))[1]


class Slope(eqx.Module):
    """<Z, W>."""

    z: jax.Array

    def __call__(self, point):
        return jnp.sum(self.z * point.matrix())


# Matrices that floats represent exactly, so that their ranks are what they are said to
# be: rounding raised to the power 2/N is no rounding.
HADAMARD = np.array([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]])


def _matrices(rng):
    half = HADAMARD / 2.0  # orthogonal
    whole = lambda *shape: rng.integers(-4, 5, size=shape).astype(float)
    return {
        "square": rng.normal(size=(4, 4)),
        "tall": rng.normal(size=(5, 3)),
        "wide": rng.normal(size=(3, 5)),
        "all equal": 3 * half,
        "repeated": half @ np.diag([3.0, 3.0, 0.5, 0.5]) @ half[[2, 0, 3, 1]].T,
        "repeated and zero": half @ np.diag([2.0, 2.0, 1.0, 0.0]) @ half[::-1].T,
        "repeated, tall": np.eye(5)[:, [4, 0, 2]] * [2.0, -1.0, 2.0],
        "zero, square": whole(4, 2) @ whole(2, 4),
        "zero, tall": whole(5, 2) @ whole(2, 3),
        "zero, wide": whole(3, 2) @ whole(2, 5),
        "one row": rng.normal(size=(1, 4)),
        "nothing": np.zeros((4, 4)),
    }


@pytest.mark.parametrize("name", list(_matrices(np.random.default_rng(0))))
def test_operator_is_the_definition(rng, name):
    weight = _matrices(rng)[name]
    rank = int(np.linalg.matrix_rank(weight))
    z = rng.normal(size=weight.shape)
    for depth in DEPTHS:
        exact = _exact_operator(_mp(weight), z, depth)
        for known in (None, rank):
            found = balanced_operator(
                jnp.asarray(weight), jnp.asarray(z), depth, rank=known
            )
            if name == "nothing" and depth > 1:
                np.testing.assert_array_equal(found, 0.0)
            else:
                assert _relative(found, exact) <= 1e-12


@pytest.mark.parametrize("depth", DEPTHS)
def test_tiny_singular_values_of_exact_matrices(rng, depth):
    # A signed permutation of the rows of a diagonal matrix has no rounding in it.
    weight = np.zeros((5, 3))
    weight[[3, 0, 4], range(3)] = [-1e-12, 1e-6, 1.0]
    z = rng.normal(size=weight.shape)
    exact = _exact_operator(_mp(weight), z, depth)
    found = balanced_operator(jnp.asarray(weight), jnp.asarray(z), depth)
    # Not the norm only, but each entry: the smallest is 1e-24 of the largest.
    np.testing.assert_allclose(found, exact, rtol=1e-12)
    # And so it is inverted, with a zero singular value among them.
    weight[0] = 0
    there = balanced_operator(jnp.asarray(weight), jnp.asarray(z), depth)
    back = balanced_inverse(jnp.asarray(weight), there, depth)
    z[[0, 1, 2], 1] = 0  # not tangent: both singular values are 0
    np.testing.assert_allclose(back, z, rtol=1e-10)


def _graded(rng, y_dim, x_dim, values):
    left, right = orthogonal(rng, y_dim), orthogonal(rng, x_dim)
    left, right = left[:, : len(values)], right[:, : len(values)]
    with mpmath.workdps(60):
        exact = _mp(left) * mpmath.diag([mpmath.mpf(v) for v in values]) * _mp(right).T
    return left, right, exact


GRADED = [
    (4, 4, (1.0, 1e-3, 1e-9, 1e-12)),
    (5, 3, (2.0, 1e-12)),
    (3, 5, (1e-12, 1e-12)),
    (4, 4, (1.0, 1.0, 1.0, 1e-12)),
]


@pytest.mark.parametrize("depth", DEPTHS)
def test_dense_operator_errs_by_rounding_of_the_matrix_only(rng, depth):
    # A dense W holds its singular values to eps |W|, and A_W has their powers 2/N:
    # the rounding of W alone moves A_W by eps times its condition number.
    for y_dim, x_dim, values in GRADED:
        left, right, exact = _graded(rng, y_dim, x_dim, values)
        weight = jnp.asarray(np.array(exact.tolist(), dtype=float))
        z = rng.normal(size=(y_dim, x_dim))
        expected = _exact_operator(exact, z, depth)
        found = balanced_operator(weight, jnp.asarray(z), depth, rank=len(values))
        condition = (max(values) / min(values)) ** max(1 - 2 / depth, 0)
        assert _relative(found, expected) <= 1e-12 + 10 * condition * EPS


@pytest.mark.parametrize("depth", DEPTHS)
def test_factored_operator_is_the_definition(rng, depth):
    for y_dim, x_dim, values in GRADED:
        left, right, weight = _graded(rng, y_dim, x_dim, values)
        z = rng.normal(size=(y_dim, x_dim))
        exact = _tangent_operator(weight, z, depth, left, right)
        u, v, logs = jnp.asarray(left), jnp.asarray(right), jnp.log(jnp.array(values))
        core, up, down = balanced_operator_factored(logs, u, v, z @ v, z.T @ u, depth)
        assert _relative(u @ core @ v.T + up @ v.T + u @ down.T, exact) <= 1e-12
        assert np.abs(u.T @ up).max() <= 1e-14 * np.linalg.norm(z)
        assert np.abs(v.T @ down).max() <= 1e-14 * np.linalg.norm(z)
        # The inverse knows the tangent part of Z by the same three parts, each entry
        # to its own accuracy.
        parts = balanced_inverse_factored(logs, core, up, down, depth)
        inside = u.T @ z @ v
        for part, expected in zip(
            parts, (inside, z @ v - u @ inside, z.T @ u - v @ inside.T), strict=True
        ):
            assert np.abs(part - expected).max() <= 1e-10 * np.abs(z).max()


@pytest.mark.parametrize("depth", FEWER_DEPTHS)
def test_gradient_at_a_low_rank_point_is_the_definition(rng, depth):
    for y_dim, x_dim, values in GRADED[:2]:
        left, right, weight = _graded(rng, y_dim, x_dim, values)
        logs = np.log(values)
        with mpmath.workdps(60):
            exp = mpmath.diag([mpmath.exp(mpmath.mpf(float(x))) for x in logs])
            weight = _mp(left) * exp * _mp(right).T
        slope = rng.normal(size=(y_dim, x_dim))
        exact = _tangent_operator(weight, slope, depth, left, right)
        point = LowRank(jnp.asarray(left), jnp.asarray(logs), jnp.asarray(right))
        gradient = _ambient_gradient(point, slope, depth)
        # For depth 1 both sides move at rates 1/s, and rounding is relative to these.
        allowed = 1e-12 if depth > 1 else 10 * EPS * max(values) / min(values)
        assert _relative(gradient, exact) <= allowed
        # Nor does another representation of the point matter.
        moved = _another(rng, point)
        gradient = _ambient_gradient(moved, slope, depth)
        assert _relative(gradient, exact) <= allowed


def _ambient_gradient(point, slope, depth):
    """The gradient of <slope, W> as a matrix, from a point in factors."""
    manifold = FixedRank(point.rank, depth)
    return _ambient(point, _gradient(manifold, Slope(jnp.asarray(slope)), point))


def _another(rng, point):
    """The same matrix by sides that are not orthonormal: $Y = U R^{-1}$ and $X^T =
    (D^{-1} R D) V^T$ for a triangular R, of which only ratios below 1 enter."""
    logs = np.asarray(point.log_values)
    size = len(logs)
    upper = np.triu(0.4 * rng.normal(size=(size, size)), 1)
    upper += np.diag(np.exp(0.3 * rng.normal(size=size)))
    ratios = np.exp(np.minimum(logs[None, :] - logs[:, None], 0))
    left = np.asarray(point.left) @ np.linalg.inv(upper)
    right = np.asarray(point.right) @ (upper * ratios).T
    order = rng.permutation(size)
    sides = (jnp.asarray(side[:, order]) for side in (left, right))
    return LowRank(next(sides), jnp.asarray(logs[order]), next(sides))


# The inverse, and the tangent space.


@pytest.mark.parametrize("name", list(_matrices(np.random.default_rng(0)))[:-1])
def test_inverse_on_the_tangent_space_only(rng, name):
    weight = _matrices(rng)[name]
    rank = int(np.linalg.matrix_rank(weight))
    weight, z = jnp.asarray(weight), jnp.asarray(rng.normal(size=weight.shape))
    tangent = tangent_projection(weight, z, rank)
    beyond = z - tangent
    for depth in DEPTHS:
        for known in (None, rank):
            there = balanced_operator(weight, tangent, depth, rank=known)
            back = balanced_inverse(weight, there, depth, rank=known)
            assert _relative(back, tangent) <= 1e-10
            # The operator leaves the tangent space alone, and its inverse projects.
            moved = tangent_projection(weight, there, rank)
            assert _relative(moved, there) <= 1e-12
            of_all = balanced_inverse(weight, z, depth, rank=known)
            of_tangent = balanced_inverse(weight, tangent, depth, rank=known)
            assert _relative(of_all, of_tangent) <= 1e-12
            lost = balanced_inverse(weight, beyond, depth, rank=known)
            size = jnp.linalg.norm(of_tangent)
            assert jnp.linalg.norm(lost) <= 1e-12 * size
            if depth > 1:
                lost = balanced_operator(weight, beyond, depth, rank=known)
                assert jnp.linalg.norm(lost) <= 1e-12 * jnp.linalg.norm(there)


@pytest.mark.parametrize(("y_dim", "x_dim", "rank"), FEWER_SIZES)
def test_tangents_are_velocities_of_curves(rng, y_dim, x_dim, rank):
    left, right = rng.normal(size=(y_dim, rank)), rng.normal(size=(rank, x_dim))
    weight = jnp.asarray(left @ right)
    velocity = rng.normal(size=left.shape) @ right + left @ rng.normal(size=right.shape)
    found = tangent_projection(weight, jnp.asarray(velocity), rank)
    assert _relative(found, velocity) <= 1e-13
    # An orthogonal projection on a space of the dimension of M_k.
    basis = jnp.eye(y_dim * x_dim).reshape(-1, y_dim, x_dim)
    project = jax.vmap(lambda z: tangent_projection(weight, z, rank))
    matrix = np.asarray(project(basis)).reshape(y_dim * x_dim, -1)
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-14)
    np.testing.assert_allclose(matrix @ matrix, matrix, atol=1e-14)
    np.testing.assert_allclose(np.trace(matrix), rank * (y_dim + x_dim - rank))


# The metric against its three integrals, by the trapezoidal rule in x = log t: what
# is analytic and decays at both ends, it integrates with an exponentially small error.


def _spectra(weight, rank):
    """Eigenvalues and vectors of W W^T and W^T W, zeros exact."""
    out = []
    for gram in (weight @ weight.T, weight.T @ weight):
        values, vectors = np.linalg.eigh(gram)
        values[: len(values) - rank] = 0
        out.append((values, vectors))
    return out


def _first_integral(weight, rank, depth):
    """(sin(pi/N)/pi) int t^(1/N) / ((t + a)(t + b)) dt for all eigenvalues a, b."""
    (a, _), (b, _) = _spectra(weight, rank)
    step = 0.2
    x = np.arange(-36 * depth, 74, step)
    t = np.exp(x)
    # Each factor times e^(x/2): no factor over- or underflows.
    root = np.exp(x / 2)
    one, two = root / (t + a[:, None]), root / (t + b[:, None])
    # For a = b = 0 it diverges; dropped, since tangents have no such entries.
    weights = np.exp(x / depth) * step
    with np.errstate(over="ignore"):
        entries = (one * weights) @ two.T
    return math.sin(math.pi / depth) / math.pi * entries


def _second_integral(weight, rank, depth):
    """int int e^(-sa) e^(-rb) (s + r)^(-1-1/N) ds dr / (N Gamma(1-1/N)), r = t - s."""
    (a, _), (b, _) = _spectra(weight, rank)
    step = 0.25
    x = np.arange(-75, 36 * depth, step)
    s = np.exp(x)
    # s r (s + r)^(-1-1/N) by logarithms.
    total = np.logaddexp(x[:, None], x[None, :])
    kernel = np.exp(x[:, None] + x[None, :] - (1 + 1 / depth) * total) * step**2
    one, two = np.exp(-s * a[:, None]), np.exp(-s * b[:, None])
    return one @ kernel @ two.T / (depth * math.gamma(1 - 1 / depth))


def _third_integral(weight, rank, depth):
    """int e^(-t sqrt(a)) e^(-t sqrt(b)) dt, for N = 2."""
    assert depth == 2
    (a, _), (b, _) = _spectra(weight, rank)
    step = 0.2
    t = np.exp(np.arange(-40, 8, step))
    one, two = (np.exp(-t * np.sqrt(c)[:, None]) for c in (a, b))
    return (one * t * step) @ two.T


@pytest.mark.parametrize(
    "depth", [2, 10, *(pytest.param(depth, marks=slow) for depth in (3, 5))]
)
def test_metric_is_its_integrals(rng, depth):
    integrals = [_first_integral, _second_integral]
    for integral in integrals + [_third_integral] * (depth == 2):
        _compare_with_integral(rng, depth, integral)


def _compare_with_integral(rng, depth, integral):
    half = HADAMARD / 2.0
    weights = {
        3: half @ np.diag([2.0, 2.0, 1.0, 0.0]) @ half[::-1].T,
        2: rng.normal(size=(5, 2)) @ rng.normal(size=(2, 3)),
    }
    for rank, weight in weights.items():
        entries = integral(weight, rank, depth)
        (a, left), (b, right) = _spectra(weight, rank)
        entries = np.where((a[:, None] > 0) | (b[None, :] > 0), entries, 0)
        point = LinearMap(jnp.asarray(weight))
        project = lambda z, point=point, rank=rank: LinearMap(
            tangent_projection(point.weight, jnp.asarray(z), rank)
        )
        one, two = (project(rng.normal(size=weight.shape)) for _ in range(2))
        turned = [left.T @ np.asarray(z.weight) @ right for z in (one, two)]
        manifold = FixedRank(rank, depth)
        size = math.sqrt(
            _inner(manifold, point, one, one) * _inner(manifold, point, two, two)
        )
        expected = np.sum(entries * turned[0] * turned[1])
        assert abs(_inner(manifold, point, one, two) - expected) <= 1e-10 * size
        # And at the same point in factors, with the same tangents.
        factored = LowRank.of(point.weight, rank)
        for other in (factored, _another(rng, factored)):
            tangents = [_in_factors(other, z.weight) for z in (one, two)]
            assert _relative(_ambient(other, tangents[0]), one.weight) <= 1e-12
            found = _inner(manifold, other, *tangents)
            assert abs(found - expected) <= 1e-10 * size


def _in_factors(point, tangent):
    """A tangent as LowRank, from any dY and dX that give it: (1 - P/2) Z X (D X^T X)^-1
    for the left, where P projects on the columns of Y, and likewise the right."""
    y, d, x = (np.asarray(a) for a in (point.left, point.values, point.right))
    z = np.asarray(tangent)

    def one(y, x, z):
        outer = z @ x @ np.linalg.inv(x.T @ x) / d
        return outer - y @ np.linalg.solve(y.T @ y, y.T @ outer) / 2

    # The halves of the common part do not overlap: P Z Q/2 from either side.
    zeros = jnp.zeros_like(point.log_values)
    return LowRank(jnp.asarray(one(y, x, z)), zeros, jnp.asarray(one(x, y, z.T)))


# The gradient represents the differential.


class Wave(eqx.Module):
    """A smooth energy that is no polynomial, of W alone."""

    a: jax.Array
    b: jax.Array

    def __call__(self, point):
        return jnp.sum(jnp.sin(self.a @ point.matrix() @ self.b))


def _wave(rng, y_dim, x_dim):
    a, b = rng.normal(size=(y_dim, y_dim)), rng.normal(size=(x_dim, 3))
    return Wave(jnp.asarray(a), jnp.asarray(b))


@pytest.mark.parametrize(
    ("y_dim", "x_dim", "rank", "depth"),
    [
        (5, 3, 2, 1),
        (5, 3, 2, 10),
        (4, 4, 4, 3),
        (3, 5, 1, 3),
        *(
            pytest.param(*case, depth, marks=slow)
            for case in ((4, 4, 4), (5, 3, 2), (3, 5, 1))
            for depth in (2, 5)
        ),
    ],
)
def test_gradient_represents_the_differential(rng, y_dim, x_dim, rank, depth):
    energy = _wave(rng, y_dim, x_dim)
    manifold = FixedRank(rank, depth)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape))
    factored = LowRank(normal(y_dim, rank), normal(rank), normal(x_dim, rank))
    values = jnp.asarray(np.geomspace(1, 1e-3, rank))
    turned = LowRank(
        jnp.asarray(orthogonal(rng, y_dim)[:, :rank]),
        jnp.log(values),
        jnp.asarray(orthogonal(rng, x_dim)[:, :rank]),
    )
    tiny = LowRank(turned.left, jnp.log(values) * 100, turned.right)  # to 1e-300
    points = [factored, turned, _another(rng, turned)]
    for point in points + [_another(rng, tiny)] * (depth > 1):
        for _ in range(3):
            tangent = LowRank(normal(y_dim, rank), jnp.zeros(rank), normal(x_dim, rank))
            assert _mismatch(manifold, energy, point, tangent) <= 1e-12
    for point in (factored, turned):
        point = LinearMap(point.matrix())
        for _ in range(3):
            tangent = tangent_projection(point.weight, normal(y_dim, x_dim), rank)
            assert _mismatch(manifold, energy, point, LinearMap(tangent)) <= 1e-12


def test_all_representations_of_a_point_have_one_gradient(rng):
    energy = _wave(rng, 5, 3)
    for depth in (3,):
        point = LowRank.of(
            jnp.asarray(rng.normal(size=(5, 2)) @ rng.normal(size=(2, 3))), 2
        )
        dense = LinearMap(point.matrix())
        manifold = FixedRank(2, depth)
        expected = _gradient(manifold, energy, dense).weight
        for other in (point, _another(rng, point)):
            tangent = _gradient(manifold, energy, other)
            assert _relative(_ambient(other, tangent), expected) <= 1e-12
            assert not tangent.log_values.any()
            found = _inner(manifold, other, tangent, tangent)
            speed = _inner(manifold, dense, LinearMap(expected), LinearMap(expected))
            np.testing.assert_allclose(found, speed, rtol=1e-12)


@pytest.mark.parametrize(("y_dim", "x_dim", "rank"), FEWER_SIZES)
def test_depth_1_is_the_embedded_metric_of_pymanopt(rng, y_dim, x_dim, rank):
    embedded: Any = FixedRankEmbedded(y_dim, x_dim, rank)
    weight = rng.normal(size=(y_dim, rank)) @ rng.normal(size=(rank, x_dim))
    u, s, vt = np.linalg.svd(weight, full_matrices=False)
    there = (u[:, :rank], s[:rank], vt[:rank])
    slopes = [rng.normal(size=(y_dim, x_dim)) for _ in range(2)]
    theirs = [embedded.projection(there, slope) for slope in slopes]
    tangents = []
    for tangent in theirs:
        left, middle, right = embedded.embedding(there, tangent)
        tangents.append(left @ middle @ right.T)
    dense = LinearMap(jnp.asarray(weight))
    manifold = FixedRank(rank, 1)
    for slope, expected in zip(slopes, tangents, strict=True):
        found = tangent_projection(dense.weight, jnp.asarray(slope), rank)
        assert _relative(found, expected) <= 1e-12
        found = manifold.gradient(dense, LinearMap(jnp.asarray(slope))).matrix()
        assert _relative(found, expected) <= 1e-12
        factored = LowRank.of(dense.weight, rank)
        for point in (factored, _another(rng, factored)):
            found = _ambient_gradient(point, slope, 1)
            assert _relative(found, expected) <= 1e-12
    one, two = (LinearMap(jnp.asarray(z)) for z in tangents)
    inner = embedded.inner_product(there, *theirs)
    np.testing.assert_allclose(_inner(manifold, dense, one, two), inner, rtol=1e-12)


# Derivatives of the operator.


def _fifths(function, step):
    """The derivative at 0 by central differences, with an error of order step^6."""
    weights = (0.75, -0.15, 1 / 60)
    return sum(
        weight * (function(i * step) - function(-i * step)) / step
        for i, weight in enumerate(weights, start=1)
    )


@eqx.filter_jit
def _differentiated(at, z, dz, move, out, depth, rank):
    """The derivative along a curve at(t) and z + t dz, by differences and by jvp; and
    the product of both slopes of <out, A_W(Z)> with it."""
    function = lambda w, z: balanced_operator(w, z, depth, rank=rank)
    times = jnp.asarray([i * 1e-3 for i in (-3, -2, -1, 1, 2, 3)])
    values = jax.lax.map(lambda t: function(at(t), z + t * dz), times)
    # Of order step^6.
    weights = jnp.asarray([-1 / 60, 0.15, -0.75, 0.75, -0.15, 1 / 60]) / 1e-3
    differences = jnp.tensordot(weights, values, 1)
    _, change = jax.jvp(function, (at(0.0), z), (move, dz))
    slopes = jax.grad(lambda *at: jnp.sum(out * function(*at)), (0, 1))(at(0.0), z)
    return differences, change, jnp.sum(slopes[0] * move) + jnp.sum(slopes[1] * dz)


@pytest.mark.parametrize(
    "depth", [3, *(pytest.param(depth, marks=slow) for depth in (1, 2, 10))]
)
def test_derivative_of_the_operator(rng, depth):
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape))
    matrices = _matrices(rng)
    for name in ("square", "all equal", "repeated", "repeated and zero"):
        weight = jnp.asarray(matrices[name])
        rank = int(np.linalg.matrix_rank(weight))
        z, dz, out = (normal(*weight.shape) for _ in range(3))
        # A curve on the manifold: beyond it the operator is not smooth.
        b, a = (normal(size, size) for size in weight.shape)
        at = eqx.Partial(_curve, weight, b, a)
        differences, change, product = _differentiated(
            at, z, dz, b @ weight + weight @ a, out, depth, rank
        )
        assert _relative(change, differences) <= 1e-8
        size = jnp.linalg.norm(out) * jnp.linalg.norm(change)
        assert abs(product - jnp.sum(out * change)) <= 1e-13 * size


def _curve(weight, b, a, t):
    return weight + t * (b @ weight + weight @ a) + t**2 * b @ weight @ a


@pytest.mark.parametrize(
    "depth", [3, *(pytest.param(depth, marks=slow) for depth in (1, 2, 10))]
)
def test_no_derivative_is_nan(rng, depth):
    z = jnp.asarray(rng.normal(size=(4, 4)))

    @jax.jit
    def slopes(weight):
        total = lambda w, z: jnp.sum(balanced_operator(w, z, depth) ** 2)
        inverse = lambda z: jnp.sum(balanced_inverse(weight, z, depth) ** 2)
        return jax.grad(total, (0, 1))(weight, z), jax.grad(inverse)(z)

    for values in ([0.0] * 4, [1.0] * 4, [1.0, 1, 0, 0], [1, 1e-12, 1e-12, 0]):
        for slope in jax.tree.leaves(slopes(jnp.diag(jnp.asarray(values)))):
            assert jnp.isfinite(slope).all()


def test_jit_vmap_and_float32(rng):
    weights = jnp.asarray(rng.normal(size=(3, 4, 2)) @ rng.normal(size=(3, 2, 3)))
    zs = jnp.asarray(rng.normal(size=weights.shape))
    functions = (
        lambda w, z: balanced_operator(w, z, 3, rank=2),
        lambda w, z: balanced_inverse(w, z, 3, rank=2),
        lambda w, z: tangent_projection(w, z, 2),
    )
    for function in functions:
        together = jax.jit(jax.vmap(function))(weights, zs)
        alone = jnp.stack([function(w, z) for w, z in zip(weights, zs, strict=True)])
        assert _relative(together, alone) <= 1e-11
        single = function(weights[0].astype(jnp.float32), zs[0].astype(jnp.float32))
        assert single.dtype == jnp.float32
        assert _relative(single, alone[0]) <= 1e-3


# The chart.


@eqx.filter_jit
def _charted(manifold, point, step):
    """Points of a chart at 0 and at a step, and the derivative of the matrix at 0."""
    rebuild, dimension = manifold.chart(point)
    jacobian = jax.jacfwd(lambda step: rebuild(step).matrix())(0 * step)
    moved = rebuild(step)
    return (
        rebuild(0 * step),
        moved,
        manifold.defect(moved),
        jacobian.reshape(-1, dimension),
    )


@eqx.filter_jit
def _curvature(manifold, energy, point, origin):
    """Slope and Hessian of an energy in the chart."""
    rebuild, _ = manifold.chart(point)
    slope = jax.grad(lambda step: energy(rebuild(step)))
    return slope(origin), jax.jacfwd(slope)(origin)


@pytest.mark.parametrize(("y_dim", "x_dim", "rank"), FEWER_SIZES)
def test_chart(rng, y_dim, x_dim, rank):
    left, right = (orthogonal(rng, n)[:, :rank] for n in (y_dim, x_dim))
    weight = jnp.asarray(left * np.arange(1.0, 1.0 + rank) @ right.T)
    factored = LowRank.of(weight, rank)
    manifold = FixedRank(rank, 3)
    assert manifold.defect(factored) == 0
    dimension = rank * (x_dim + y_dim - rank)
    step = jnp.asarray(0.1 * rng.normal(size=dimension))
    for point in (LinearMap(weight), factored, _another(rng, factored)):
        origin, moved, defect, jacobian = _charted(manifold, point, step)
        assert type(origin) is type(moved) is type(point)
        assert _relative(origin.matrix(), weight) <= 1e-13
        # Orthonormal directions times singular values of W, all at least 1.
        assert np.linalg.svd(np.asarray(jacobian), compute_uv=False)[-1] >= 0.99
        assert defect <= 1e-13
        assert np.linalg.matrix_rank(np.asarray(moved.matrix())) == rank
        assert _relative(moved.matrix(), weight) > 0.01


def test_defect_is_the_distance(rng):
    left, right = orthogonal(rng, 5)[:, :3], orthogonal(rng, 3)
    weight = jnp.asarray(left * [1.0, 0.03, 0.04] @ right.T)
    for rank, distance in ((1, 0.05), (2, 0.03), (3, 0.0)):
        defect = FixedRank(rank, 2).defect(LinearMap(weight))
        np.testing.assert_allclose(defect, distance, rtol=1e-12, atol=0)


@pytest.mark.parametrize("rank", [2, *(pytest.param(k, marks=slow) for k in (1, 3))])
def test_inertia_at_critical_points_counts_swaps(rng, rank):
    values = np.array([4.0, 2.5, 1.5, 0.7])
    problem = families.moments(rng, values, 4, 5, noise=0.1)
    theory = LinearTheory(SquaredLoss(problem), rank)
    for modes in itertools.combinations(range(4), rank):
        swaps = sum(i < j for j in modes for i in range(4) if i not in modes)
        critical = theory.critical_point(modes)
        for point in (critical, LowRank.of(critical.weight, rank)):
            origin = jnp.zeros(rank * (9 - rank))
            slope, hessian = _curvature(
                FixedRank(rank, 3), theory.energy, point, origin
            )
            assert jnp.abs(slope).max() <= 1e-12
            eigenvalues = np.linalg.eigvalsh(hessian)
            assert np.abs(eigenvalues).min() > 1e-3
            assert np.sum(eigenvalues < 0) == swaps


# Bad input: one sentence each.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 2), "rank must be >= 1, got 0"),
        ((2, 0), "depth must be >= 1, got 0"),
        ((-1, 2), "rank must be >= 1, got -1"),
        ((2, True), "depth must be a whole number, got True"),
    ],
)
def test_rank_and_depth_are_checked(arguments, message):
    with pytest.raises(ValueError) as raised:
        FixedRank(*arguments)
    assert str(raised.value) == message


def test_points_are_checked():
    manifold = FixedRank(3, 2)
    low = LowRank(jnp.eye(4)[:, :2], jnp.zeros(2), jnp.eye(4)[:, :2])
    for point, message in (
        (low, "the point has rank 2 but the manifold rank=3: they must agree"),
        (
            LinearMap(jnp.ones((2, 4))),
            r"rank=3 is larger than min\(shape\)=2",
        ),
        (DeepLinear((jnp.eye(4), jnp.eye(4))), "LinearMap and LowRank, got DeepLinear"),
    ):
        for use in (
            lambda: manifold.gradient(point, point),  # noqa: B023
            lambda: manifold.inner(point, point, point),  # noqa: B023
            lambda: manifold.chart(point),  # noqa: B023
            lambda: manifold.defect(point),  # noqa: B023
        ):
            with pytest.raises(ValueError, match=message):
                use()
