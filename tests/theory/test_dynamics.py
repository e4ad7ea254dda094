import math

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import scipy.integrate

from gradflow.flow import GradientFlow
from gradflow.initial import BalancedInit
from gradflow.models.linear import DeepLinear, SquaredLoss
from gradflow.moments import Moments
from gradflow.spectrum import best_rank
from gradflow.theory import dynamics


SOLVE = eqx.filter_jit(dynamics.whitened_two_layer)


def _whitened(target):
    return Moments(
        jnp.eye(target.shape[1]), target.T, target @ target.T, count=target.shape[1]
    )


def _naive_factors(target, network, t):
    """The two factors by the plain chain rule and an independent integrator."""
    target = np.asarray(target)
    first, second = (np.asarray(w) for w in network.weights)

    def velocity(_, flat):
        w1 = flat[: first.size].reshape(first.shape)
        w2 = flat[first.size :].reshape(second.shape)
        residual = w2 @ w1 - target
        return -np.concatenate([(w2.T @ residual).ravel(), (residual @ w1.T).ravel()])

    flat = np.concatenate([first.ravel(), second.ravel()])
    end = scipy.integrate.solve_ivp(
        velocity, (0, t), flat, method="DOP853", rtol=1e-13, atol=1e-15
    ).y[:, -1]
    return (
        end[: first.size].reshape(first.shape),
        end[first.size :].reshape(second.shape),
    )


@pytest.mark.parametrize(
    "x, hidden, y, rank, scale",
    [
        (4, 3, 3, 3, 0.3),
        (2, 2, 4, 2, 1e-3),  # more outputs, from near 0
        (4, 6, 4, 4, 5.0),  # a wide hidden layer, from far out
        (4, 2, 3, 1, 0.3),  # rank 1 with an idle unit
        (1, 1, 1, 1, 0.1),
    ],
)
def test_whitened_two_layer_solves_the_factor_flow(getkey, x, hidden, y, rank, scale):
    target = jr.normal(getkey(), (y, x))
    start = jr.normal(getkey(), (y, rank)) @ jr.normal(getkey(), (rank, x))
    network = BalancedInit((x, hidden, y), scale * start)(getkey())
    exact = lambda t: SOLVE(_whitened(target), network, jnp.asarray(t))
    for t in (0.4, 3.0):
        first, second = _naive_factors(target, network, t)
        found = exact(t)
        # The numerical factors grow an idle unit from rounding, by e^(2 sigma t).
        close = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-11)
        close(found.matrix, second @ first)
        close(found.input_gram, first.T @ first)
        close(found.output_gram, second @ second.T)
    start = exact(0.0)
    np.testing.assert_allclose(start.matrix, network.matrix(), atol=1e-14 * scale)


def test_whitened_two_layer_worked_example():
    # Computed independently by a Runge-Kutta method at tolerance 1e-13.
    target = jnp.array([[1.5, 0.2, 0.0, 0.1], [0.3, 0.9, 0.2, 0.0], [0, 0.1, 0.5, 0.3]])
    entries = jnp.diag(jnp.array([0.4, 0.2, 0.1]))
    first = jnp.concatenate([entries, jnp.zeros((3, 1))], axis=1)
    network = DeepLinear((first, entries))
    found = SOLVE(_whitened(target), network, jnp.asarray(3.0)).matrix
    expected = [
        [1.491790810782, 0.226197202845, 0.003515340494, 0.092826212188],
        [0.320349876248, 0.813065358430, 0.224615095101, 0.043918748921],
        [0.010913775780, 0.159901398892, 0.203188490567, 0.081679617730],
    ]
    np.testing.assert_allclose(found, expected, atol=1e-11)


def test_whitened_two_layer_does_not_overflow(getkey):
    # e^(2 sigma t) is 1e868 here: only composed steps get there.
    left = jnp.linalg.qr(jr.normal(getkey(), (4, 4)))[0]
    right = jnp.linalg.qr(jr.normal(getkey(), (4, 4)))[0]
    values = jnp.array([2.0, 1.0, 0.5, 0.0])
    target = (left * values[None, :]) @ right.T
    network = BalancedInit((4, 2, 4), 0.1 * left[:, :2] @ right[:, :2].T)(getkey())
    moments = _whitened(target)
    found = SOLVE(moments, network, jnp.asarray(500.0))
    best = (left[:, :2] * values[None, :2]) @ right[:, :2].T
    np.testing.assert_allclose(found.matrix, best, atol=1e-13)
    # Composed or not makes no difference.
    once = SOLVE(moments, network, jnp.asarray(0.9))
    for _ in range(2):
        once = SOLVE(moments, _factors_of(once, 2), jnp.asarray(0.9))
    thrice = SOLVE(moments, network, jnp.asarray(2.7))
    np.testing.assert_allclose(once.matrix, thrice.matrix, atol=1e-13)


def _factors_of(product, hidden):
    left, values, right = jnp.linalg.svd(product.matrix)
    root = jnp.sqrt(values[:hidden])
    return DeepLinear((root[:, None] * right[:hidden], left[:, :hidden] * root[None]))


def test_whitened_two_layer_over_long_times_is_short_ones_composed(getkey):
    # From small starts, through every saddle on the way, to sigma t = 1000.
    values = jnp.array([2.0, 1.0, 0.5])
    left = jnp.linalg.qr(jr.normal(getkey(), (3, 3)))[0]
    moments = _whitened(left * values[None, :])
    network = BalancedInit((3, 3, 3), 1e-3 * left * jnp.array([[1.0, 2.0, -3.0]]))(
        getkey()
    )
    composed, elapsed = network, 0.0
    for part in (0.1, 1.0, 2.9, 8.0, 88.0, 400.0):
        elapsed += part
        composed = _factors_of(SOLVE(moments, composed, jnp.asarray(part)), 3)
        found = SOLVE(moments, network, jnp.asarray(elapsed)).matrix
        np.testing.assert_allclose(composed.matrix(), found, atol=1e-10)


def test_whitened_two_layer_ends_where_the_sign_of_the_determinant_says(getkey):
    # Rounding of what a start lacks, grown by e^(sigma t), would end all at the target.
    for _ in range(10):
        target, product = jr.normal(getkey(), (3, 3)), jr.normal(getkey(), (3, 3))
        network = BalancedInit((3, 3, 3), product)(getkey())
        sigma = jnp.linalg.svd(target, compute_uv=False)
        time = 1000 / sigma[0]
        found = SOLVE(_whitened(target), network, time).matrix
        agree = jnp.linalg.det(target) * jnp.linalg.det(product) > 0
        expected = best_rank(target, 3 if agree else 2)
        # What is left of the slowest mode, and of its share in the others.
        slow = 1e3 * math.exp(-min(2 * sigma[2], sigma[1] - sigma[2]) * time)
        np.testing.assert_allclose(found, expected, atol=1e-10 + slow)


def test_whitened_two_layer_keeps_an_idle_unit_idle(getkey):
    # Rank is conserved exactly, where integrators of the factors lose it by rounding.
    target = jr.normal(getkey(), (3, 3))
    network = BalancedInit((3, 3, 3), jnp.outer(target[:, 0], target[1]))(getkey())
    found = SOLVE(_whitened(target), network, jnp.asarray(100.0))
    values = jnp.linalg.svd(found.matrix, compute_uv=False)
    assert values[0] > 0.1 and values[1] < 1e-14


def test_whitened_two_layer_refuses(getkey):
    target = jr.normal(getkey(), (3, 2))
    moments = _whitened(target)
    network = BalancedInit((2, 2, 3), target)(getkey())
    solve = dynamics.whitened_two_layer
    with pytest.raises(ValueError, match="depth 2, got depth 3"):
        solve(moments, BalancedInit((2, 2, 2, 3), target)(getkey()), 1.0)
    with pytest.raises(ValueError, match="maps 3 inputs to 3 outputs but the data"):
        solve(moments, BalancedInit((3, 2, 3), jnp.zeros((3, 3)))(getkey()), 1.0)
    with pytest.raises(ValueError, match="xx is not the identity"):
        solve(Moments(2 * moments.xx, moments.xy, moments.yy, 1), network, 1.0)
    first, second = network.weights
    with pytest.raises(ValueError, match="balanced start"):
        solve(moments, DeepLinear((first * (1 + 1e-9), second)), 1.0)
    with pytest.raises(ValueError, match="finite and balanced start"):
        solve(moments, DeepLinear((first * jnp.nan, second)), 1.0)
    for t in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="t must be finite and >= 0"):
            solve(moments, network, t)
    with pytest.raises(RuntimeError, match="t must be finite and >= 0"):
        jax.jit(lambda t: solve(moments, network, t).matrix)(-1.0)


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("m", [1.3, -1.3, 1e-3, 0.0])
def test_decoupled_mode_solves_its_equation(depth, m):
    lam, times = 0.7, np.array([0.0, 1e-3, 0.5, 3.0, 20.0])
    limit = m / lam
    for u0 in (0.05, -0.05, 1e-4, 0.999 * limit, 1.001 * limit, 3.0, -3.0, 40.0):
        if u0 == 0 or (depth == 1 and u0 == 1e-4):
            continue

        def velocity(_, u):
            return depth * np.abs(u) ** (2 - 2 / depth) * (m - lam * u)

        # Rounding of the integrator moves a mode that has decayed below 1e-300.
        expected = scipy.integrate.solve_ivp(
            velocity, (0, 20), [u0], "DOP853", times, rtol=1e-12, atol=1e-300
        ).y[0]
        found = dynamics.decoupled_mode(u0, m, lam, depth, times)
        np.testing.assert_allclose(found, expected, rtol=2e-10, atol=1e-25)


def test_decoupled_mode_worked_examples():
    # Computed independently by a Runge-Kutta method at tolerance 1e-13.
    for depth, expected in [
        (1, 0.5836708092940395),
        (2, 0.1711640151258201),
        (3, 0.10944495565929478),
        (4, 0.09639883575448654),
    ]:
        found = dynamics.decoupled_mode(0.05, 1.3, 0.7, depth, 0.5)
        np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("depth", [1, 2, 3, 5])
def test_decoupled_mode_over_long_times(depth):
    mode = lambda u0, t: dynamics.decoupled_mode(u0, 1.3, 0.7, depth, t)
    for u0 in (1e-3, 1.8, 2.0, 1e6):
        np.testing.assert_allclose(mode(u0, 1e40), 1.3 / 0.7, rtol=1e-14)
    if depth == 1:
        np.testing.assert_allclose(mode(-1.0, 1e40), 1.3 / 0.7, rtol=1e-14)
    else:
        # It decays, and never crosses 0.
        decayed = mode(-1.0, np.array([1.0, 10.0, 100.0]))
        assert np.all(decayed < 0) and np.all(np.diff(decayed) > 0)
        assert mode(0.0, 5.0) == 0
        assert abs(mode(-1e6, 1e250)) < 1e-100
    # An array of any shape, and a start at rest.
    assert mode(0.1, np.ones((2, 3))).shape == (2, 3)
    np.testing.assert_allclose(mode(1.3 / 0.7, 3.0), 1.3 / 0.7, rtol=1e-14)


@pytest.mark.parametrize("depth", [1, 2, 3, 5, 10])
def test_long_times_are_short_ones_composed(depth):
    for u0 in (1e-100, -1e-100, 1e-3, -1e-3, 1.8, 40.0, -40.0, 1e100, -1e100, 0.0):
        for m in (1.3, -1.3, 1e-3, 1e-8, 0.0):
            whole = 1000 / 1.3
            mode = lambda u, t, m=m: dynamics.decoupled_mode(u, m, 0.7, depth, t)
            composed, elapsed = u0, 0.0
            for part in (1e-3, 0.1, 1.0, 10.0, 100.0, whole - 111.101):
                composed, elapsed = float(mode(composed, part)), elapsed + part
                expected = float(mode(u0, elapsed))
                # A mode below 1e-260 counts as 0, which is what the target sees of it.
                np.testing.assert_allclose(composed, expected, rtol=1e-10, atol=1e-250)


def test_decoupled_mode_is_the_flow_of_a_network():
    # The mode equation against the velocity of a network with these modes.
    for depth in (1, 2, 3, 5):
        u, m, lam = np.array([0.3, -0.2]), np.array([1.1, 0.4]), np.array([0.6, 2.0])
        moments = Moments(jnp.diag(lam), jnp.diag(m), jnp.eye(2), 1)
        network = BalancedInit((2,) * (depth + 1), jnp.diag(u))(jr.key(depth))
        flow = GradientFlow(SquaredLoss(moments))
        product = lambda network: network.matrix()
        _, velocity = jax.jvp(product, (network,), (flow.velocity(network),))
        step = 1e-4
        ends = [
            dynamics.decoupled_mode(*mode, depth, np.array([step, 2 * step]))
            for mode in zip(u, m, lam, strict=True)
        ]
        slope = [
            (4 * near - far - 3 * start) / (2 * step)
            for (near, far), start in zip(ends, u, strict=True)
        ]
        np.testing.assert_allclose(velocity, np.diag(slope), atol=1e-6)


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 6])
def test_escape_time_is_when_the_mode_escapes(depth):
    for u0, m in [(0.01, 1.3), (-0.01, -1.3), (1e-6, 0.2), (1e-12, 5.0)]:
        for share in (0.1, 0.5, 0.99):
            time = dynamics.decoupled_escape_time(u0, m, 0.7, depth, share)
            reached = dynamics.decoupled_mode(u0, m, 0.7, depth, time)
            np.testing.assert_allclose(reached, share * m / 0.7, rtol=1e-6)


@pytest.mark.parametrize("depth", [1, 2, 3, 10])
def test_escape_times_add(depth):
    time = lambda u0, share: dynamics.decoupled_escape_time(u0, 1.3, 0.7, depth, share)
    for u0 in (1e-3, 1e-12):
        parts = time(u0, 0.1) + time(0.1 * 1.3 / 0.7, 0.99)
        np.testing.assert_allclose(parts, time(u0, 0.99), rtol=1e-10)


def test_escape_time_grows_as_stated():
    m, lam, small = 1.3, 0.7, 1e-30
    time = dynamics.decoupled_escape_time(small, m, lam, 2)
    np.testing.assert_allclose(time, math.log(1 / small) / (2 * m), rtol=1e-2)
    for depth in (3, 4, 6):
        time = dynamics.decoupled_escape_time(small, m, lam, depth)
        expected = small ** -(1 - 2 / depth) / ((depth - 2) * m)
        np.testing.assert_allclose(time, expected, rtol=1e-6)
    for u0 in (0.0, -0.1):
        assert dynamics.decoupled_escape_time(u0, m, lam, 3) == math.inf
    # Depth 1 crosses 0.
    assert dynamics.decoupled_escape_time(-0.1, m, lam, 1) < 2


def test_modes_refuse():
    mode = dynamics.decoupled_mode
    for depth in (0, -1):
        with pytest.raises(
            ValueError, match=f"depth must be a whole number >= 1, got {depth}"
        ):
            mode(0.1, 1.0, 1.0, depth, 1.0)
    for depth in (True, 2.0):
        with pytest.raises(ValueError, match="depth must be a whole number"):
            dynamics._check_mode(0.1, 1.0, 1.0, depth)
    for lam in (0.0, -1.0):
        with pytest.raises(ValueError, match="lam must be > 0"):
            mode(0.1, 1.0, lam, 2, 1.0)
    for name, values in [
        ("u0", (math.nan, 1.0, 1.0)),
        ("m", (1.0, math.inf, 1.0)),
        ("lam", (1.0, 1.0, math.nan)),
    ]:
        with pytest.raises(ValueError, match=f"{name} must be finite"):
            mode(*values, 2, 1.0)
    for t in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="t must be finite and >= 0"):
            mode(0.1, 1.0, 1.0, 3, t)
    escape = dynamics.decoupled_escape_time
    for share in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match="share must be strictly between 0 and 1"):
            escape(0.1, 1.0, 1.0, 3, share)
    with pytest.raises(ValueError, match="m must not be 0"):
        escape(0.1, 0.0, 1.0, 3)
    with pytest.raises(ValueError, match="u0=0.6 is already beyond share=0.5"):
        escape(0.6, 1.0, 1.0, 3)


def test_remark42():
    np.testing.assert_allclose(dynamics.remark42(2.0, 0.0), 1.0, rtol=1e-15)
    # At lambda_1 = 2 and t = 1, worked by hand.
    np.testing.assert_allclose(
        dynamics.remark42(2.0, 1.0), 0.09613771490076968, rtol=1e-14
    )
    times = np.array([0.3, 2.0, 1e3])
    found = dynamics.remark42(1.0, times)
    np.testing.assert_allclose(
        found[:2], (2 * np.exp(2 * times[:2]) - 1) ** -0.5, rtol=1e-14
    )
    assert found[2] == 0  # and no overflow
    # From where it is after one time it goes on as from the start.
    later = dynamics.decoupled_mode(-(found[0] ** 2), 1.0, 1.0, 2, times)
    expected = -(dynamics.remark42(1.0, 0.3 + times) ** 2)
    np.testing.assert_allclose(later, expected, rtol=1e-10)
    # It is the mode with u(0) = -1: the product is -alpha_1^2.
    modes = dynamics.decoupled_mode(-1.0, 1.0, 1.0, 2, times)
    np.testing.assert_allclose(-(found**2), modes, rtol=1e-12)
    for eigenvalue in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="eigenvalue must be finite and > 0"):
            dynamics.remark42(eigenvalue, 1.0)
    for t in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="t must be finite and >= 0"):
            dynamics.remark42(1.0, t)


@pytest.mark.parametrize("hidden", [1, 3, 5])
def test_stacked_velocity_is_the_velocity(getkey, hidden):
    moments = Moments.from_data(np.asarray(jr.normal(getkey(), (20, 3))))
    network = DeepLinear(
        (jr.normal(getkey(), (hidden, 3)), jr.normal(getkey(), (3, hidden)))
    )
    found = dynamics.stacked_velocity(moments, network)
    expected = GradientFlow(SquaredLoss(moments)).velocity(network)
    for a, b in zip(found.weights, expected.factors(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def test_stacked_velocity_refuses(getkey):
    moments = Moments.from_data(np.asarray(jr.normal(getkey(), (20, 3))))
    layer = jnp.eye(3)
    singular = Moments.from_data(np.ones((20, 3)))
    with pytest.raises(ValueError, match="needs C\\^-1, but xx is singular"):
        dynamics.stacked_velocity(singular, DeepLinear((layer, layer)))
    with pytest.raises(ValueError, match="needs an autoencoder"):
        dynamics.stacked_velocity(
            Moments(moments.xx, moments.xy, moments.yy, 20), DeepLinear((layer, layer))
        )
    with pytest.raises(ValueError, match="depth 2, got depth 1"):
        dynamics.stacked_velocity(moments, DeepLinear((layer,)))
    with pytest.raises(ValueError, match="maps 2 inputs to 3 outputs but the data"):
        dynamics.stacked_velocity(moments, DeepLinear((jnp.ones((3, 2)), layer)))
