import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradflow.manifolds import AbstractManifold, Euclidean
from gradflow.models.linear import DeepLinear, LinearMap


MANIFOLD = Euclidean()


@pytest.fixture
def rng():
    return np.random.default_rng(2024)


def _point(rng):
    matrix = lambda *shape: jnp.asarray(rng.normal(size=shape))
    return DeepLinear((matrix(2, 3), matrix(4, 2)))


def test_inner_is_the_sum_of_products(rng):
    point, u, v = _point(rng), _point(rng), _point(rng)
    expected = sum(
        float(np.sum(np.asarray(a) * np.asarray(b)))
        for a, b in zip(u.weights, v.weights, strict=True)
    )
    inner = MANIFOLD.inner(point, u, v)
    assert inner.shape == ()
    np.testing.assert_allclose(inner, expected, rtol=1e-13)
    # A metric is symmetric, bilinear and positive.
    np.testing.assert_allclose(MANIFOLD.inner(point, v, u), inner, rtol=1e-14)
    twice = jax.tree.map(lambda w: 2 * w, u)
    np.testing.assert_allclose(MANIFOLD.inner(point, twice, v), 2 * inner, rtol=1e-14)
    assert MANIFOLD.inner(point, u, u) > 0


def test_gradient_represents_the_differential(rng):
    # g(grad E, u) = dE(u) for every tangent u.
    point, u = _point(rng), _point(rng)
    energy = lambda network: jnp.sum(jnp.sin(network.matrix()))
    gradient = MANIFOLD.gradient(point, jax.grad(energy)(point))
    _, change = jax.jvp(energy, (point,), (u,))
    np.testing.assert_allclose(MANIFOLD.inner(point, gradient, u), change, rtol=1e-12)


def test_chart_takes_zero_to_the_point_and_keeps_lengths(rng):
    point = _point(rng)
    chart, dimension = MANIFOLD.chart(point)
    assert dimension == 6 + 8
    origin = chart(jnp.zeros(dimension))
    assert isinstance(origin, DeepLinear)
    for a, b in zip(origin.weights, point.weights, strict=True):
        np.testing.assert_array_equal(a, b)
    # Each coordinate moves one entry by as much: orthonormal coordinates.
    jacobian = jax.jacobian(lambda step: chart(step).factors())(jnp.zeros(dimension))
    columns = np.concatenate([np.asarray(j).reshape(-1, dimension) for j in jacobian])
    np.testing.assert_allclose(columns.T @ columns, np.eye(dimension), atol=1e-14)


def test_every_point_is_on_it(rng):
    defect = MANIFOLD.defect(_point(rng))
    assert defect == 0 and defect.shape == ()
    single = LinearMap(jnp.ones((1, 1), jnp.float32))
    assert MANIFOLD.defect(single).dtype == jnp.float32


def test_a_manifold_is_four_methods():
    assert AbstractManifold.__abstractmethods__ == {
        "gradient",
        "inner",
        "chart",
        "defect",
    }
