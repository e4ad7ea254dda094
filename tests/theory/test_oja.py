import math

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate

from gradflow.flow import GradientFlow
from gradflow.manifolds import Stiefel
from gradflow.models.linear import SquaredLoss, TiedAutoencoder
from gradflow.moments import Moments
from gradflow.solve import integrate
from gradflow.theory import oja


ANY = eqx.filter_jit(oja.projector)
STIEFEL = eqx.filter_jit(oja.stiefel_projector)
VALUES = (3.0, 2.0, 1.2, 0.6, 0.1)


@pytest.fixture
def rng():
    return np.random.default_rng(2024)


def _data(rng, values=VALUES):
    """Moments with these eigenvalues, and the eigenvectors."""
    modes = np.linalg.qr(rng.normal(size=(len(values), len(values))))[0]
    xx = (modes * np.asarray(values)) @ modes.T
    xx = jnp.asarray(0.5 * (xx + xx.T))
    return Moments(xx, xx, xx, 1, autoencoding=True), modes


def _point(frame):
    return TiedAutoencoder(jnp.asarray(frame))


def _orthonormal(rng, rank, dim=5):
    return _point(np.linalg.qr(rng.normal(size=(dim, rank)))[0])


def _factored(projector, rank):
    """A start with this projector."""
    values, vectors = np.linalg.eigh(np.asarray(projector))
    return _point(vectors[:, -rank:] * np.sqrt(np.maximum(values[-rank:], 0.0)))


def _naive(moments, network, t):
    """Oja's flow by its definition and an independent integrator."""
    xx, shape = np.asarray(moments.xx), network.frame.shape

    def velocity(_, flat):
        frame = flat.reshape(shape)
        pull = xx @ frame
        return (pull - frame @ (frame.T @ pull)).ravel()

    flat = np.asarray(network.frame).ravel()
    end = scipy.integrate.solve_ivp(
        velocity, (0, t), flat, method="DOP853", rtol=1e-13, atol=1e-15
    ).y[:, -1]
    return end.reshape(shape) @ end.reshape(shape).T


@pytest.mark.parametrize(
    "rank",
    [
        pytest.param(1, marks=pytest.mark.slow),
        2,
        pytest.param(3, marks=pytest.mark.slow),
    ],
)
def test_integration_on_stiefel_agrees(rng, rank):
    moments, _ = _data(rng)
    network = _orthonormal(rng, rank)
    times = jnp.array([0.3, 1.0, 4.0])
    run = integrate(
        GradientFlow(SquaredLoss(moments), Stiefel()),
        network,
        times=times,
        observe={"projector": lambda network: network.matrix()},
        tolerance=1e-8,
        rtol=1e-10,
    )
    assert run.history is not None
    for t, numeric in zip(times, run.history["projector"], strict=True):
        exact = STIEFEL(moments, network, t)
        np.testing.assert_allclose(numeric, exact, rtol=0, atol=1e-8)
        np.testing.assert_allclose(ANY(moments, network, t), exact, atol=1e-13)


@pytest.mark.parametrize("values", [VALUES, (2.0, 2.0, 2.0, 1.0, 0.0)])
@pytest.mark.parametrize("rank, scale", [(1, 0.1), (2, 3.0), (3, 1e-3)])
def test_any_start_solves_oja(rng, values, rank, scale):
    moments, _ = _data(rng, values)
    network = _point(scale * rng.normal(size=(5, rank)))
    for t in (0.0, 0.4, 3.0):
        found = ANY(moments, network, jnp.asarray(t))
        np.testing.assert_allclose(found, _naive(moments, network, t), atol=1e-11)


def test_repeated_eigenvalues_and_every_orthonormal_start(rng):
    moments, _ = _data(rng, (2.0, 2.0, 1.0, 1.0, 1.0))
    for network in (_orthonormal(rng, 3), _point(np.eye(5)[:, :3])):
        for t in (0.4, 3.0):
            exact = STIEFEL(moments, network, jnp.asarray(t))
            np.testing.assert_allclose(exact, _naive(moments, network, t), atol=1e-11)
            found = ANY(moments, network, jnp.asarray(t))
            np.testing.assert_allclose(found, exact, atol=1e-13)
            square = np.asarray(exact) @ np.asarray(exact)
            np.testing.assert_allclose(square, exact, atol=1e-13)


def test_worked_example():
    # Computed independently at tolerance 1e-13; the fifth direction is idle.
    xx = jnp.diag(jnp.array([3.0, 2.0, 1.0, 0.5, 0.1]))
    moments = Moments(xx, xx, xx, 1, autoencoding=True)
    network = _point([[0.6, 0.0], [0.0, 0.6], [0.8, 0.0], [0.0, 0.8], [0.0, 0.0]])
    expected = np.diag(
        [0.8060641436630754, 0.7159857507172667, 0.1939358563369245, 0.2840142492827334]
    )
    expected[0, 2] = expected[2, 0] = 0.3953792356254793
    expected[1, 3] = expected[3, 1] = 0.4509436278373371
    expected = np.pad(expected, (0, 1))
    for solve in (ANY, STIEFEL):
        found = solve(moments, network, jnp.asarray(0.5))
        np.testing.assert_allclose(found, expected, atol=1e-14)
        late = np.asarray(solve(moments, network, jnp.asarray(10.0)))
        np.testing.assert_allclose(late[1, 3], 4.078697606690332e-07, rtol=1e-12)
        np.testing.assert_allclose(late[3, 3], 1.663577416682421e-13, rtol=1e-12)


@pytest.mark.parametrize("solve", [ANY, STIEFEL])
def test_long_times_are_compositions_of_short_ones(rng, solve):
    moments, modes = _data(rng)
    for rank in (1, 2, 3):
        network = _orthonormal(rng, rank)
        if solve is ANY:
            network = _point(0.2 * network.frame)
        # e^(2 sigma t) is 1e868 at the end: only composed steps get there.
        whole, composed = 1000 / 3, network
        for part in (0.1, 0.7, 2.0, 10.0):
            composed = _factored(solve(moments, composed, jnp.asarray(part)), rank)
        once = solve(moments, network, jnp.asarray(12.8))
        np.testing.assert_allclose(composed.matrix(), once, atol=1e-10)
        found = solve(moments, network, jnp.asarray(whole))
        composed = solve(moments, composed, jnp.asarray(whole - 12.8))
        np.testing.assert_allclose(composed, found, atol=1e-10)
        best = modes[:, :rank] @ modes[:, :rank].T
        np.testing.assert_allclose(found, best, atol=1e-12)


def test_a_small_share_of_the_leading_eigenvector_escapes_in_time():
    # tan of the angle is 1e-12 e^(gap t): no rounding hastens it.
    xx = jnp.diag(jnp.asarray(VALUES))
    moments = Moments(xx, xx, xx, 1, autoencoding=True)
    network = _point([[1e-12], [1.0], [0.0], [0.0], [0.0]])
    for t in (20.0, 27.0, 30.0):
        tangent = 1e-12 * math.exp(t)
        for solve in (ANY, STIEFEL):
            found = np.asarray(solve(moments, network, jnp.asarray(t)))[0, 0]
            np.testing.assert_allclose(found, tangent**2 / (1 + tangent**2), rtol=1e-9)


def _lacking(rng, modes):
    """An orthonormal start of rank 2 whose V_0^T [v_1 v_2] has rank 1."""
    rows = rng.normal(size=(5, 2))
    rows[1] = -2 * rows[0]
    return _point(modes @ np.linalg.qr(rows)[0])


@pytest.mark.parametrize("solve", [ANY, STIEFEL])
def test_a_start_that_lacks_a_leading_direction_stays_off_the_optimum(rng, solve):
    moments, modes = _data(rng)
    network = _lacking(rng, modes)
    # One combination of v_1 and v_2 is absent: what is left of them becomes v_1.
    expected = modes[:, [0, 2]] @ modes[:, [0, 2]].T
    found = solve(moments, network, jnp.asarray(1000 / 3))
    np.testing.assert_allclose(found, expected, atol=1e-12)
    with pytest.raises(ValueError, match=r"V_0\^T \[v_1 ... v_r\] is singular"):
        oja.limit(moments, network)
    # The same from starts of any size and rank.
    if solve is ANY:
        deficient = _point(np.outer(modes[:, 1], [0.3, 7.0]))
        found = ANY(moments, deficient, jnp.asarray(1000 / 3))
        best = np.outer(modes[:, 1], modes[:, 1])
        np.testing.assert_allclose(found, best, atol=1e-12)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_limit_and_rate(rng, rank):
    moments, modes = _data(rng)
    best = modes[:, :rank] @ modes[:, :rank].T
    gap = VALUES[rank - 1] - VALUES[rank]
    np.testing.assert_allclose(oja.rate(moments, rank), gap, rtol=1e-12)
    xx = np.asarray(moments.xx)
    rest = lambda end: np.eye(5) - end
    energy = lambda end: 0.5 * np.trace(rest(end) @ xx @ rest(end))
    for network in (
        _orthonormal(rng, rank),
        _point(0.1 * rng.normal(size=(5, rank))),
    ):
        limit = oja.limit(moments, network)
        np.testing.assert_allclose(limit, best, atol=1e-13)
        ends = [np.asarray(ANY(moments, network, jnp.asarray(t))) for t in (7.0, 9.0)]
        near, far = (float(np.linalg.norm(end - limit)) for end in ends)
        np.testing.assert_allclose(math.log(near / far) / 2, gap, rtol=2e-2)
        near, far = (energy(end) - 0.5 * sum(VALUES[rank:]) for end in ends)
        np.testing.assert_allclose(math.log(near / far) / 2, 2 * gap, rtol=2e-2)


def test_the_limit_at_full_rank(rng):
    moments, _ = _data(rng)
    network = _point(rng.normal(size=(5, 5)))
    np.testing.assert_allclose(oja.limit(moments, network), np.eye(5), atol=1e-13)


def test_refuses(rng):
    moments, _ = _data(rng)
    network = _orthonormal(rng, 2)
    plain = Moments(moments.xx, moments.xy, moments.yy, 1)
    indefinite = -moments.xx
    indefinite = Moments(indefinite, indefinite, indefinite, 1, autoencoding=True)
    wrong = jnp.ones((5, 2)).at[0, 0].set(jnp.nan)
    for solve in (oja.projector, oja.stiefel_projector):
        for t in (-1.0, math.nan, math.inf):
            with pytest.raises(ValueError, match="t must be finite and >= 0"):
                solve(moments, network, t)
        with pytest.raises(ValueError, match="needs an autoencoder, where Y = X"):
            solve(plain, network, 1.0)
        with pytest.raises(ValueError, match="xx has a negative eigenvalue"):
            solve(indefinite, network, 1.0)
        with pytest.raises(ValueError, match="height 4 but the data have 5"):
            solve(moments, TiedAutoencoder(jnp.ones((4, 1))), 1.0)
        with pytest.raises(ValueError, match="needs a finite start"):
            solve(moments, TiedAutoencoder(wrong), 1.0)
    for solve in (ANY, STIEFEL):
        with pytest.raises(RuntimeError, match="t must be finite and >= 0"):
            solve(moments, network, jnp.asarray(-1.0))
    skewed = TiedAutoencoder((1 + 1e-9) * network.frame)
    with pytest.raises(ValueError, match="needs an orthonormal start"):
        oja.stiefel_projector(moments, skewed, 1.0)
    with pytest.raises(RuntimeError, match="needs an orthonormal start"):
        STIEFEL(moments, skewed, jnp.asarray(1.0))


def test_limit_and_rate_refuse(rng):
    moments, _ = _data(rng)
    tied, _ = _data(rng, (2.0, 1.0, 1.0, 0.5, 0.0))
    with pytest.raises(ValueError, match="no gap between eigenvalues 2 and 3"):
        oja.limit(tied, _orthonormal(rng, 2))
    with pytest.raises(ValueError, match="no gap between eigenvalues 5 and 6"):
        oja.limit(tied, _orthonormal(rng, 5))
    with pytest.raises(ValueError, match="rank=6 is larger than the data's dimension"):
        oja.limit(moments, TiedAutoencoder(jnp.ones((5, 6))))
    with pytest.raises(ValueError, match="needs a finite start"):
        oja.limit(moments, TiedAutoencoder(jnp.full((5, 1), jnp.nan)))
    with pytest.raises(ValueError, match="no gap between eigenvalues 2 and 3"):
        oja.rate(tied, 2)
    for rank in (0, 5):
        with pytest.raises(ValueError, match="rank must be a whole number from 1 to 4"):
            oja.rate(moments, rank)
