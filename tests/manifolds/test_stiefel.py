import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradflow.flow import GradientFlow
from gradflow.manifolds import Stiefel
from gradflow.models.linear import DeepLinear, SquaredLoss, TiedAutoencoder
from gradflow.moments import Moments
from gradflow.solve import integrate


MANIFOLD = Stiefel()


@pytest.fixture
def rng():
    return np.random.default_rng(2024)


def _point(rng, height=5, rank=3):
    frame = np.linalg.qr(rng.normal(size=(height, rank)))[0]
    return TiedAutoencoder(jnp.asarray(frame))


def _tangent(rng, point):
    chart, dimension = MANIFOLD.chart(point)
    step, zero = jnp.asarray(rng.normal(size=dimension)), jnp.zeros(dimension)
    return jax.jit(lambda step: jax.jvp(chart, (zero,), (step,))[1])(step)


def _loss(rng, height=5):
    sizes = 1.5 ** -np.arange(height)
    return SquaredLoss(Moments.from_data(sizes * rng.normal(size=(40, height))))


@pytest.mark.parametrize("height, rank", [(5, 3), (4, 1), (3, 3)])
def test_gradient_represents_the_differential(rng, height, rank):
    # g(grad E, xi) = dE(xi) for every tangent xi, also where the energy is not that of
    # the projector.
    point, tilt = _point(rng, height, rank), jnp.asarray(rng.normal(size=(rank, rank)))
    loss = _loss(rng, height)
    chart, dimension = MANIFOLD.chart(point)

    def compare(steps):
        along = lambda step: jax.jvp(chart, (jnp.zeros(dimension),), (step,))[1]
        tangents = jax.vmap(along)(steps)
        for energy in (lambda p: loss(p), lambda p: jnp.sum(jnp.sin(p.frame @ tilt))):
            gradient = MANIFOLD.gradient(point, jax.grad(energy)(point))
            change = lambda xi, e=energy: jax.jvp(e, (point,), (xi,))[1]
            inner = lambda xi, g=gradient: MANIFOLD.inner(point, g, xi)
            yield gradient, jax.vmap(inner)(tangents), jax.vmap(change)(tangents)

    steps = jnp.asarray(rng.normal(size=(5, dimension)))
    for gradient, found, expected in jax.jit(lambda s: list(compare(s)))(steps):
        worst = jnp.max(jnp.abs(found - expected))
        assert worst <= 1e-12 * max(1.0, jnp.max(jnp.abs(expected)))
        # And it is a tangent.
        slant = point.frame.T @ gradient.frame
        np.testing.assert_allclose(slant, -slant.T, atol=1e-13)


def test_inner_is_that_of_the_space_around(rng):
    point = _point(rng)
    u, v = _tangent(rng, point), _tangent(rng, point)
    inner = MANIFOLD.inner(point, u, v)
    np.testing.assert_allclose(inner, np.sum(u.frame * v.frame), rtol=1e-13)
    assert inner.shape == ()


@pytest.mark.parametrize("height, rank", [(5, 3), (4, 1), (3, 3)])
def test_chart(rng, height, rank):
    point = _point(rng, height, rank)
    chart, dimension = MANIFOLD.chart(point)
    assert dimension == rank * height - rank * (rank + 1) // 2
    zero = jnp.zeros(dimension)
    origin = chart(zero)
    assert isinstance(origin, TiedAutoencoder)
    np.testing.assert_allclose(origin.frame, point.frame, atol=1e-15)
    for size in (1e-8, 1.0, 1e3):
        moved = chart(size * jnp.asarray(rng.normal(size=dimension)))
        assert MANIFOLD.defect(moved) < 1e-14
    # Orthonormal coordinates at the point: the differential is injective.
    jacobian = jax.jit(jax.jacobian(lambda step: chart(step).frame.ravel()))(zero)
    np.testing.assert_allclose(jacobian.T @ jacobian, np.eye(dimension), atol=1e-14)


def test_chart_is_smooth(rng):
    # The second derivative at 0, by automatic and by finite differences.
    point = _point(rng)
    chart, dimension = MANIFOLD.chart(point)
    step = jnp.asarray(rng.normal(size=dimension))
    line = jax.jit(lambda s: chart(s * step).frame)
    exact = jax.jit(jax.jacfwd(jax.jacfwd(line)))(0.0)
    h = 1e-4
    numeric = (line(h) - 2 * line(0.0) + line(-h)) / h**2
    np.testing.assert_allclose(exact, numeric, atol=1e-5)
    # What verdicts need: a Hessian in the chart.
    loss = _loss(rng)
    hessian = jax.jit(jax.hessian(lambda s: loss(chart(s))))(jnp.zeros(dimension))
    assert jnp.isfinite(hessian).all()
    np.testing.assert_allclose(hessian, hessian.T, atol=1e-12)


def test_the_gradient_flow_of_an_autoencoder_is_ojas(rng):
    point, loss = _point(rng), _loss(rng)
    velocity = GradientFlow(loss, MANIFOLD).velocity(point).factors()[1]
    pull = loss.moments.xx @ point.frame
    expected = pull - point.frame @ (point.frame.T @ pull)
    np.testing.assert_allclose(velocity, expected, atol=1e-13)
    # On the manifold the Euclidean gradient flow is the same.
    euclidean = GradientFlow(loss).velocity(point).factors()[1]
    np.testing.assert_allclose(euclidean, expected, atol=1e-13)


def test_the_flow_keeps_frames_orthonormal(rng):
    point, loss = _point(rng), _loss(rng)
    flow = GradientFlow(loss, MANIFOLD)
    run = integrate(flow, point, tolerance=1e-8, rtol=1e-10)
    assert MANIFOLD.defect(run.point) < 1e-9
    leading = np.linalg.eigh(np.asarray(loss.moments.xx))[1][:, -3:]
    np.testing.assert_allclose(run.point.matrix(), leading @ leading.T, atol=1e-6)


def test_defect(rng):
    point = _point(rng)
    assert MANIFOLD.defect(point) < 1e-14
    twice = TiedAutoencoder(2 * point.frame)
    np.testing.assert_allclose(MANIFOLD.defect(twice), 3 * np.sqrt(3), rtol=1e-14)
    single = TiedAutoencoder(jnp.ones((1, 1), jnp.float32))
    assert MANIFOLD.defect(single).dtype == jnp.float32


def test_any_tree_with_one_leaf_is_a_point(rng):
    frame = _point(rng).frame
    origin = lambda frame: MANIFOLD.chart({"v": frame})[0](jnp.zeros(9))
    frames = jnp.stack([frame, -frame])
    np.testing.assert_allclose(jax.vmap(origin)(frames)["v"], frames, atol=1e-15)


def test_refuses_points_that_are_no_frames(rng):
    for point in (
        DeepLinear((jnp.eye(2), jnp.eye(2))),
        TiedAutoencoder(jnp.ones((2, 3))),
        jnp.ones(3),
    ):
        with pytest.raises(ValueError, match="a point of Stiefel is one matrix"):
            Stiefel().defect(point)
        with pytest.raises(ValueError, match="a point of Stiefel is one matrix"):
            Stiefel().gradient(point, point)
