import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import moments

from gradflow.models.linear import SquaredLoss
from gradflow.models.low_rank import LowRank


@pytest.fixture
def rng():
    return np.random.default_rng(2024)


def _point(rng, y_dim=5, x_dim=4, logs=(0.3, -2.0, 0.1)):
    normal = lambda rows: jnp.asarray(rng.normal(size=(rows, len(logs))))
    return LowRank(normal(y_dim), jnp.asarray(logs), normal(x_dim))


def _exact(point):
    left, logs, right = (np.asarray(leaf) for leaf in jax.tree.leaves(point))
    return left * np.exp(logs) @ right.T


def test_matrix_and_factors(rng):
    point = _point(rng)
    assert point.rank == 3
    np.testing.assert_allclose(point.values, np.exp(point.log_values), rtol=1e-15)
    np.testing.assert_allclose(point.matrix(), _exact(point), rtol=0, atol=1e-14)
    lower, upper = point.factors()
    assert lower.shape == (3, 4) and upper.shape == (5, 3)
    np.testing.assert_allclose(upper @ lower, _exact(point), rtol=0, atol=1e-14)


@jax.jit
def _canonical(point):
    return point.canonical()


@pytest.mark.parametrize("logs", [(0.3, -2.0, 0.1), (1.0, 1.0, 1.0), (-2e3, -3, -1e3)])
def test_canonical_is_the_same_matrix(rng, logs):
    point = _point(rng, logs=logs)
    canonical = _canonical(point)
    matrix = _exact(point)
    size = np.abs(matrix).max()
    np.testing.assert_allclose(canonical.matrix(), matrix, rtol=0, atol=1e-14 * size)
    for side in (canonical.left, canonical.right):
        np.testing.assert_allclose(side.T @ side, np.eye(3), atol=2e-14)
    assert np.all(np.diff(canonical.log_values) <= 0)
    singular = np.linalg.svd(matrix, compute_uv=False)[:3]
    found = np.exp(canonical.log_values)
    np.testing.assert_allclose(found, singular, rtol=0, atol=1e-14 * singular[0])
    # And again: nothing is left to do.
    again = _canonical(canonical)
    np.testing.assert_allclose(again.log_values, canonical.log_values, rtol=1e-14)


def test_values_too_small_for_a_float(rng):
    # The logarithm has no floor; what a factor of the matrix is divided by has one.
    point = _point(rng, logs=(0.0, -500.0, -1e5))
    assert point.log_values[2] == -1e5
    np.testing.assert_allclose(point.values[1], np.exp(-500.0), rtol=1e-13)
    assert 0 < point.values[2] < 1e-260
    np.testing.assert_allclose(point.matrix(), _exact(point), rtol=1e-13)
    single = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), point)
    assert 0 < single.values[1] < 1e-31 and single.matrix().dtype == jnp.float32
    # So the differential by Y over s is finite and right.
    energy = lambda p: jnp.sum(jnp.sin(p.matrix()))
    slope = jax.grad(energy)(point)
    expected = np.cos(_exact(point)) @ np.asarray(point.right)
    found = slope.left / point.values[None, :]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("depth", [1, 2, 3, 5])
def test_balanced_factors(rng, depth):
    point = _point(rng)
    network = point.balanced(depth)
    assert network.depth == depth
    assert network.widths == (4, *[3] * (depth - 1), 5)
    np.testing.assert_allclose(network.matrix(), _exact(point), rtol=0, atol=1e-13)
    assert network.imbalance() <= 1e-13


def test_of_a_matrix(rng):
    for rank in (1, 3):
        matrix = rng.normal(size=(5, rank)) @ rng.normal(size=(rank, 4))
        point = LowRank.of(jnp.asarray(matrix), rank)
        assert point.rank == rank
        np.testing.assert_allclose(point.matrix(), matrix, rtol=0, atol=1e-13)
        np.testing.assert_allclose(point.left.T @ point.left, np.eye(rank), atol=1e-14)
    # Round trip, in a trace too.
    back = jax.jit(lambda p: LowRank.of(p.matrix(), 3))(point)
    np.testing.assert_allclose(back.log_values, point.log_values, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        (2, "weight has rank 3, not rank=2: .* ask for rank=3"),
        (4, "weight has rank 3, not rank=4: .* ask for rank=3"),
        (0, "rank=0 must be from 1 to 4, the smaller side"),
        (5, "rank=5 must be from 1 to 4, the smaller side"),
        (True, "rank must be a whole number, got True"),
    ],
)
def test_of_refuses(rng, rank, message):
    matrix = jnp.asarray(rng.normal(size=(5, 3)) @ rng.normal(size=(3, 4)))
    with pytest.raises(ValueError, match=message):
        LowRank.of(matrix, rank)


def test_of_refuses_what_has_no_rank():
    for value in (np.nan, np.inf):
        with pytest.raises(ValueError, match="non-finite values: give finite ones"):
            LowRank.of(jnp.full((2, 3), value), 1)
    with pytest.raises(ValueError, match="weight has rank 0, not rank=1"):
        LowRank.of(jnp.zeros((2, 3)), 1)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((4, 2), (3,), (5, 2)), r"shapes \[\(4, 2\), \(3,\), \(5, 2\)\]: they must"),
        (((4, 2), (2,), (5, 3)), r"must be \(y, rank\), \(rank,\) and \(x, rank\)"),
        (((4, 3), (3,), (2, 3)), "rank=3 must be from 1 to 2, the smaller side"),
        (((4, 0), (0,), (5, 0)), "rank=0 must be from 1 to 4, the smaller side"),
        (((4,), (2,), (5, 2)), "must be"),
    ],
)
def test_shapes_are_checked(shapes, message):
    with pytest.raises(ValueError, match=message):
        _unchecked(*(jnp.ones(shape) for shape in shapes))


def _unchecked(*leaves):
    """As without the type checker of the tests, which refuses first."""
    point = object.__new__(LowRank)
    for name, leaf in zip(("left", "log_values", "right"), leaves, strict=True):
        object.__setattr__(point, name, leaf)
    point.__check_init__()


def test_squared_loss_of_its_factors(rng):
    loss = SquaredLoss(moments(rng, [2.0, 1.0, 0.5], 4, 5, noise=0.1))
    point = _point(rng)

    def naive(point):
        weight = point.left @ jnp.diag(jnp.exp(point.log_values)) @ point.right.T
        m = loss.moments
        residual = m.yy - 2 * weight @ m.xy + weight @ m.xx @ weight.T
        return 0.5 * jnp.trace(residual)

    @jax.jit
    def both(point):
        values = loss(point), naive(point)
        return values, loss.differential(point), jax.grad(naive)(point)

    (found, expected), slope, naive_slope = both(point)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert isinstance(slope, LowRank)
    for a, b in zip(jax.tree.leaves(slope), jax.tree.leaves(naive_slope), strict=True):
        assert jnp.max(jnp.abs(a - b)) <= 1e-12 * jnp.max(jnp.abs(b))
