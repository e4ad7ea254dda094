import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradflow.flow import AbstractFlow, GradientFlow
from gradflow.manifolds import AbstractManifold, Euclidean
from gradflow.models.base import AbstractEnergy
from gradflow.models.linear import DeepLinear, LinearMap, SquaredLoss
from gradflow.moments import Moments


class Quartic(AbstractEnergy):
    """An energy without a differential of its own, on two leaves."""

    def __call__(self, point):
        return jnp.sum(point["a"] ** 4) - jnp.prod(point["a"]) * jnp.cos(point["b"])


class Doubled(AbstractManifold):
    """Flat space measured twice as long: g(u, v) = 4 u.v, so grad = dE / 4."""

    def gradient(self, point, differential):
        return jax.tree.map(lambda d: d / 4, differential)

    def inner(self, point, u, v):
        return 4 * Euclidean().inner(point, u, v)

    def chart(self, point):
        return Euclidean().chart(point)

    def defect(self, point):
        return Euclidean().defect(point)


@pytest.fixture
def rng():
    return np.random.default_rng(2024)


def _cases(rng):
    moments = Moments.from_data(rng.normal(size=(12, 4)), rng.normal(size=(12, 3)))
    loss = SquaredLoss(moments)
    matrix = lambda *shape: jnp.asarray(rng.normal(size=shape))
    return [
        (loss, DeepLinear((matrix(2, 4), matrix(5, 2), matrix(3, 5)))),
        (loss, LinearMap(matrix(3, 4))),
        (Quartic(), {"a": matrix(3), "b": jnp.asarray(0.7)}),
    ]


@pytest.mark.parametrize("case", range(3))
def test_energy_falls_by_the_square_of_the_speed(rng, case):
    energy, point = _cases(rng)[case]

    @jax.jit
    def rates(point):
        found = []
        for flow in (GradientFlow(energy), GradientFlow(energy, Doubled())):
            velocity = flow.velocity(point)
            _, change = jax.jvp(energy.__call__, (point,), (velocity,))
            found.append((change, flow.speed(point)))
        return found

    for change, speed in rates(point):
        assert speed > 0.1
        np.testing.assert_allclose(change, -(speed**2), rtol=1e-12)


@pytest.mark.parametrize("case", range(3))
def test_velocity_is_minus_the_gradient(rng, case):
    energy, point = _cases(rng)[case]
    velocity = GradientFlow(energy).velocity(point)
    gradient = jax.grad(energy.__call__)(point)
    assert jax.tree.structure(velocity) == jax.tree.structure(point)
    for a, b in zip(jax.tree.leaves(velocity), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(a, -b, rtol=1e-12, atol=1e-13)


def test_a_metric_twice_as_long_slows_the_flow(rng):
    energy, point = _cases(rng)[1]
    plain, doubled = GradientFlow(energy), GradientFlow(energy, Doubled())
    np.testing.assert_allclose(
        doubled.velocity(point).factors()[0], plain.velocity(point).factors()[0] / 4
    )
    np.testing.assert_allclose(doubled.speed(point), plain.speed(point) / 2)


def test_speed_is_zero_at_rest():
    flow = GradientFlow(Quartic())
    assert flow.speed({"a": jnp.zeros(3), "b": jnp.asarray(0.0)}) == 0


def test_a_flow_needs_a_velocity():
    assert AbstractFlow.__abstractmethods__ == {"velocity"}
    assert isinstance(GradientFlow(Quartic()).manifold, Euclidean)
