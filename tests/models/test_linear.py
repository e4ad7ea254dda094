import itertools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.extend.core import ClosedJaxpr

from gradflow.flow import GradientFlow
from gradflow.initial import BalancedInit
from gradflow.models.linear import (
    DeepLinear,
    invariants,
    LinearMap,
    SquaredLoss,
    TiedAutoencoder,
)
from gradflow.moments import Moments


@pytest.fixture
def rng():
    return np.random.default_rng(2024)


def _problem(rng, x_dim, y_dim, samples=12):
    x, y = rng.normal(size=(samples, x_dim)), rng.normal(size=(samples, y_dim))
    return x, y, Moments.from_data(x, y)


def _network(rng, widths):
    return DeepLinear(
        tuple(
            jnp.asarray(rng.normal(size=(out, into)))
            for into, out in itertools.pairwise(widths)
        )
    )


def _naive_loss(x, y, point):
    """The definition, with columns for samples as on paper."""
    product = jnp.eye(x.shape[1])
    for factor in point.factors():
        product = factor @ product
    return 0.5 * jnp.mean(jnp.sum((y.T - product @ x.T) ** 2, axis=0))


# Depths 1 to 5, with the narrowest layer first, last, inside, and tied.
WIDTHS = [
    (3, 4),
    (4, 3),
    (3, 3),
    (2, 5, 4),
    (5, 4, 2),
    (4, 2, 5),
    (3, 3, 3),
    (2, 6, 2, 5),
    (5, 2, 2, 4),
    (3, 6, 1, 7, 4),
    (4, 3, 2, 2, 3, 5),
    (1, 1, 1, 1, 1, 1),
]


@pytest.mark.parametrize("widths", WIDTHS)
def test_loss_and_differential_are_those_of_the_definition(rng, widths):
    x, y, moments = _problem(rng, widths[0], widths[-1])
    loss = SquaredLoss(moments)
    point = _network(rng, widths)

    @jax.jit
    def both(point):
        naive = lambda point: _naive_loss(x, y, point)
        return (
            (naive(point), loss(point)),
            (jax.grad(naive)(point), loss.differential(point)),
        )

    (value, found_value), (slope, found) = both(point)
    np.testing.assert_allclose(found_value, value, rtol=1e-12)
    assert isinstance(found, DeepLinear)
    for a, b in zip(found.weights, slope.weights, strict=True):
        assert jnp.max(jnp.abs(a - b)) <= 1e-12 * jnp.max(jnp.abs(b))


def test_linear_map_is_depth_one(rng):
    x, y, moments = _problem(rng, 4, 3)
    loss = SquaredLoss(moments)
    weight = jnp.asarray(rng.normal(size=(3, 4)))
    value, slope = jax.value_and_grad(lambda p: _naive_loss(x, y, p))(LinearMap(weight))
    found = loss.differential(LinearMap(weight))
    assert isinstance(found, LinearMap)
    np.testing.assert_allclose(loss(LinearMap(weight)), value, rtol=1e-13)
    np.testing.assert_allclose(found.weight, slope.weight, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(
        loss.differential(DeepLinear((weight,))).factors()[0], found.weight, rtol=0
    )
    np.testing.assert_array_equal(LinearMap(weight).matrix(), weight)


def test_autoencoder_at_the_identity_has_no_loss(rng):
    moments = Moments.from_data(rng.normal(size=(9, 3)))
    loss = SquaredLoss(moments)
    perfect = DeepLinear((jnp.eye(3), jnp.eye(3)))
    np.testing.assert_allclose(loss(perfect), 0.0, atol=1e-15)
    # And twice the identity makes the error of X itself.
    twice = DeepLinear((jnp.eye(3), 2 * jnp.eye(3)))
    np.testing.assert_allclose(loss(twice), 0.5 * jnp.trace(moments.xx), rtol=1e-14)


@pytest.mark.parametrize("rank", [1, 2, 4, 6])
def test_tied_autoencoder(rng, rank):
    x, y, moments = _problem(rng, 4, 4)
    auto = Moments.from_data(x)
    point = TiedAutoencoder(jnp.asarray(rng.normal(size=(4, rank))))
    frame = point.frame
    np.testing.assert_array_equal(point.matrix(), frame @ frame.T)
    # For any data of equal dimensions, and the formula for autoencoders.
    for data, target in ((moments, y), (auto, x)):
        loss = SquaredLoss(data)
        naive = lambda point, target=target: _naive_loss(x, target, point)
        value, slope = jax.jit(jax.value_and_grad(naive))(point)
        found_value, found = jax.jit(lambda p, e=loss: (e(p), e.differential(p)))(point)
        np.testing.assert_allclose(found_value, value, rtol=1e-12)
        assert isinstance(found, TiedAutoencoder)
        worst = jnp.max(jnp.abs(found.frame - slope.frame))
        assert worst <= 1e-12 * jnp.max(jnp.abs(slope.frame))
    rest, xx = jnp.eye(4) - point.matrix(), auto.xx
    expected = -rest @ xx @ frame - xx @ rest @ frame
    np.testing.assert_allclose(found.frame, expected, rtol=1e-12, atol=1e-13)


def _shapes(jaxpr):
    """The shape of every array computed, inner programs included."""
    for equation in jaxpr.eqns:
        for inner in jax.tree.leaves(list(equation.params.values())):
            if isinstance(inner, ClosedJaxpr):
                yield from _shapes(inner.jaxpr)
        if equation.primitive.name != "transpose":
            for variable in equation.outvars:
                yield variable.aval.shape


@pytest.mark.parametrize("cut", [0, 1, 2, 3])
def test_no_product_of_two_wide_sides_is_formed(rng, cut):
    # All wide sides differ, so that a shape tells whose product it is.
    widths = [17, 19, 23, 29]
    widths[cut] = 2
    _, _, moments = _problem(rng, widths[0], widths[-1])
    point = _network(rng, widths)
    flow = GradientFlow(SquaredLoss(moments))
    # The gradient has the shapes of the factors; the trace of yy reads its diagonal.
    allowed = {w.shape for w in point.weights} | {moments.yy.shape}
    for function in (flow.velocity, flow.energy, flow.speed):
        closed = jax.make_jaxpr(function)(point)
        shapes = set(_shapes(closed.jaxpr))
        assert len(shapes) > 3
        assert all(
            shape in allowed or min(shape, default=1) <= 2 for shape in shapes
        ), shapes


def test_cost_grows_like_width_squared_times_rank(rng):
    def flops(width):
        _, _, moments = _problem(rng, width, width)
        point = _network(rng, (width, 2, width, width))
        flow = GradientFlow(SquaredLoss(moments))
        program = jax.jit(lambda point: flow.velocity(point)).lower(point).compile()
        cost: Any = program.cost_analysis()
        return (cost[0] if isinstance(cost, list) else cost)["flops"]

    small, large = flops(40), flops(80)
    assert large / small < 4.3  # a product of two wide sides would make it 8
    # Six products of a wide matrix with a narrow one, two multiply-adds each, and the
    # outer products for three factors.
    assert large < 25 * 80**2 * 2


def test_matrix_and_widths(rng):
    point = _network(rng, (5, 2, 4, 3))
    assert point.depth == 3 and point.widths == (5, 2, 4, 3)
    first, second, third = point.weights
    np.testing.assert_allclose(point.matrix(), third @ second @ first, rtol=1e-13)
    assert point.factors() == point.weights


def test_conserved_matrices(rng):
    point = _network(rng, (3, 2, 4, 3))
    matrices = invariants(point)
    for matrix, (lower, upper) in zip(
        matrices, itertools.pairwise(point.weights), strict=True
    ):
        np.testing.assert_allclose(matrix, upper.T @ upper - lower @ lower.T)
    worst = max(np.linalg.norm(matrix) for matrix in matrices)
    np.testing.assert_allclose(point.imbalance(), worst, rtol=1e-13)
    # Any loss of the product conserves them: their derivative along the flow is 0.
    _, _, moments = _problem(rng, 3, 3)
    velocity = GradientFlow(SquaredLoss(moments)).velocity(point)
    _, change = jax.jvp(invariants, (point,), (velocity,))
    for matrix in change:
        np.testing.assert_allclose(matrix, 0, atol=1e-12)
    assert invariants(DeepLinear((jnp.eye(2),))) == ()


def test_imbalance_of_balanced_points_is_zero(rng):
    product = jnp.asarray(rng.normal(size=(4, 3)))
    balanced = BalancedInit((3, 5, 4), product)(jr.key(0))
    assert balanced.imbalance() < 1e-14
    first, second = balanced.weights
    assert DeepLinear((2 * first, second)).imbalance() > 1
    assert DeepLinear((product,)).imbalance() == 0
    # The last layer counts too.
    eye = jnp.eye(2)
    assert DeepLinear((eye, eye, 2 * eye)).imbalance() > 1


def test_a_network_is_a_tree(rng):
    point = _network(rng, (3, 2, 3))
    doubled = jax.tree.map(lambda w: 2 * w, point)
    assert isinstance(doubled, DeepLinear)
    np.testing.assert_allclose(doubled.matrix(), 4 * point.matrix())
    batch = jax.tree.map(lambda w: jnp.stack([w] * 4), point)
    assert batch.weights[0].shape == (4, 2, 3)
    _, _, moments = _problem(rng, 3, 3)
    assert jax.vmap(SquaredLoss(moments))(batch).shape == (4,)


def test_networks_refuse():
    eye = jnp.eye(2)
    with pytest.raises(ValueError, match="weights is empty: a network needs depth"):
        DeepLinear(())
    for bad in (jnp.ones(3), jnp.ones((1, 2, 2))):
        with pytest.raises(ValueError, match=r"weights\[1\] must be an array"):
            # The annotation refuses it too, when the type checker is on.
            _unchecked(DeepLinear, (eye, bad))
    for bad in (jnp.ones((0, 2)), jnp.ones((2, 0))):
        with pytest.raises(ValueError, match="without zero sides"):
            DeepLinear((eye, bad))
    with pytest.raises(ValueError, match=r"weights\[1\] takes 3 inputs but weights\["):
        DeepLinear((eye, jnp.ones((2, 3))))
    for shape in ((0, 2), (3, 0)):
        with pytest.raises(ValueError, match=r"must be a matrix \(x, rank\) without"):
            TiedAutoencoder(jnp.ones(shape))


def _unchecked(cls, weights):
    point = object.__new__(cls)
    object.__setattr__(point, "weights", weights)
    return point.__check_init__()


@pytest.mark.parametrize("widths", [(4, 2, 3), (3, 2, 4)])
def test_loss_refuses_a_network_of_other_widths(rng, widths):
    _, _, moments = _problem(rng, 3, 3)
    loss, point = SquaredLoss(moments), _network(rng, widths)
    message = (
        f"the network maps {widths[0]} inputs to {widths[-1]} outputs but the data "
        "have 3 and 3: the first and last widths must be those of x and y"
    )
    for function in (loss, loss.differential, eqx.filter_jit(loss)):
        with pytest.raises(ValueError, match=message):
            function(point)
