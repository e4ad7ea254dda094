from typing import Any

import diffrax
import equinox as eqx
import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import orthogonal

from gradflow.flow import GradientFlow
from gradflow.manifolds import FixedRank
from gradflow.models.linear import LinearMap, SquaredLoss
from gradflow.models.low_rank import LowRank
from gradflow.moments import Moments
from gradflow.solution import RESULTS
from gradflow.solve import integrate
from gradflow.solvers import RankPreserving
from gradflow.solvers.step_control import root_mean_square
from gradflow.theory.dynamics import decoupled_mode


AUTOENCODER = jnp.diag(jnp.array([3.0, 2.0, 1.0]))
TSIT5 = diffrax.Tsit5()
slow = pytest.mark.slow


@pytest.fixture
def rng():
    return np.random.default_rng(2024)


def _matrix(point):
    return point.matrix()


def _itself(point):
    return point


def _loss(gram=AUTOENCODER):
    return SquaredLoss(Moments(gram, gram, gram, 1))


def _start(rng, y_dim, x_dim, values):
    left, right = (orthogonal(rng, n)[:, : len(values)] for n in (y_dim, x_dim))
    logs = jnp.log(jnp.asarray(values))
    return LowRank(jnp.asarray(left), logs, jnp.asarray(right))


@eqx.filter_jit
def _run(flow, point, times, observe, method: Any = TSIT5, rtol=1e-10) -> Any:
    return integrate(
        flow, point, times=times, observe=observe, tolerance=1000 * rtol, rtol=rtol,
        method=method, max_steps=10**5, throw=False,
    )  # fmt: skip


# Order.


@eqx.filter_jit
def _fixed_steps(solver, flow, point, horizon, count):
    """The end after `count` equal steps, without any control of their size."""
    terms = diffrax.ODETerm(lambda t, y, args: flow.velocity(y))
    step = horizon / count
    state = solver.init(terms, 0.0, step, point, None)

    def one(i, point):
        point, *_ = solver.step(terms, 0.0, step, point, None, state, made_jump=False)
        return point

    return jax.lax.fori_loop(0, count, one, point)


METHODS = ((diffrax.Heun(), 2, 20), (diffrax.Bosh3(), 3, 20), (TSIT5, 5, 8))


@pytest.mark.parametrize(
    ("inner", "order", "steps", "depth", "rank"),
    [
        pytest.param(
            *method, *case, marks=() if case == (3, 2) and method[1] == 5 else slow
        )
        for method in METHODS
        for case in ((3, 2), (2, 2), (2, 3), (3, 3))
    ],
)
@pytest.mark.slow
def test_order_is_that_of_the_method(rng, inner, order, steps, depth, rank):
    energy = SquaredLoss(families.moments(rng, [2.0, 1.0, 0.6], 3, 4, noise=0.1))
    point = _start(rng, 4, 3, [1.2, 0.7, 0.3][:rank])
    flow, solver = GradientFlow(energy, FixedRank(rank, depth)), RankPreserving(inner)
    assert solver.order(None) == inner.order(None) == order
    # The same flow by N factors.
    exact = _run(
        GradientFlow(energy), point.balanced(depth), jnp.array([1.0]), {"W": _matrix},
        TSIT5, 1e-13,
    ).history["W"][0]  # fmt: skip
    errors = []
    for refined in range(4):
        count = jnp.asarray(steps * 2**refined)
        end = _fixed_steps(solver, flow, point, 1.0, count)
        errors.append(float(jnp.linalg.norm(end.matrix() - exact)))
    rates = np.log2(np.array(errors[:-1]) / np.array(errors[1:]))
    assert errors[-1] > 1e-13  # not yet rounding
    assert np.all(rates > order - 0.35) and rates[-1] < order + 1.5


def test_the_error_is_relative_to_the_sides(rng):
    # The control divides by the size of the whole point, of which the logarithms are
    # part, -1000 maybe: they would hide any error.
    normal = lambda *shape: jnp.asarray(1e-6 * rng.normal(size=shape))
    raw = LowRank(normal(3, 2), normal(2), normal(4, 2))
    for logs in ((0.0, -1.0), (0.0, -1e4)):
        point = _start(rng, 3, 4, [1.0, 0.5])
        point = LowRank(point.left, jnp.asarray(logs), point.right)
        scaled = RankPreserving()._relative(raw, point)
        assert not scaled.log_values.any()
        sides = root_mean_square((point.left, point.right))
        for found, error in ((scaled.left, raw.left), (scaled.right, raw.right)):
            np.testing.assert_allclose(
                found / root_mean_square(point), error / sides, rtol=1e-14
            )


# Rank and sign.


def test_sign_is_kept_where_a_singular_value_falls_below_1e_100(rng):
    weight = np.asarray(orthogonal(rng, 3) * [1.0, 0.6, 0.3] @ orthogonal(rng, 3).T)
    weight = weight if np.linalg.det(weight) < 0 else -weight
    point = LowRank.of(jnp.asarray(weight), 3)
    energy = _loss()
    flow = GradientFlow(energy, FixedRank(3, 2))
    times = jnp.array([30.0, 65.0, 100.0, 130.0])
    solution = _run(flow, point, times, {"point": _itself, "energy": energy})
    assert solution.result == RESULTS.horizon_reached
    seen = solution.history["point"]
    signs = np.linalg.det(seen.left) * np.linalg.det(seen.right)
    np.testing.assert_allclose(signs, -1.0, atol=1e-12)
    # It ends at the saddle diag(1, 1, 0), of energy 1/2, ...
    np.testing.assert_allclose(solution.history["energy"][1:], 0.5, rtol=1e-12)
    end = solution.point.matrix()
    np.testing.assert_allclose(end, jnp.diag(jnp.array([1.0, 1.0, 0.0])), atol=1e-9)
    # ... to which the last singular value falls as exp(-2 lambda_3 t), in each digit.
    logs = seen.log_values[:, 2]
    assert logs[-1] < np.log(1e-100)
    slopes = np.diff(logs) / np.diff(times)
    np.testing.assert_allclose(slopes, -2.0, rtol=1e-6)
    assert np.all(np.diff(seen.log_values, axis=1) <= 0)
    # The right sign goes to the minimum.
    point = LowRank(-point.left, point.log_values, point.right)
    solution = _run(flow, point, times, {"point": _itself, "energy": energy})
    np.testing.assert_allclose(solution.point.matrix(), jnp.eye(3), atol=1e-8)


@pytest.mark.parametrize(
    ("depth", "horizon"), [(2, 60.0), pytest.param(3, 1e4, marks=slow)]
)
@pytest.mark.slow
def test_counterexample_to_conjecture_41b(depth, horizon):
    # All u_i^T W(0) u_i > 0, and yet not to diag(1, 1, 0).
    weight = jnp.array([[1.0, 3, 0], [3, 1, 0], [0, 0, 0]])
    energy = _loss()
    flow = GradientFlow(energy, FixedRank(2, depth))
    point = LowRank.of(weight, 2)
    times = jnp.array([horizon / 2, horizon])
    solution = _run(flow, point, times, {"point": _itself})
    assert solution.result == RESULTS.horizon_reached
    end = solution.point
    expected = np.diag([1.0, 0.0, 0.0])
    # s' = -2 lambda s for N = 2, s' = -3 lambda s^(4/3) for N = 3, with lambda = 2.
    left = np.exp(-4 * horizon) if depth == 2 else (2 * horizon) ** -3.0
    np.testing.assert_allclose(end.matrix(), expected, atol=1e-8 + 2 * left)
    np.testing.assert_allclose(energy(end), 1.5, atol=1e-7)
    if depth == 2:
        seen = solution.history["point"].log_values[:, 1]
        np.testing.assert_allclose(seen[1] - seen[0], -2 * horizon, rtol=1e-6)
    else:
        np.testing.assert_allclose(end.values[1], left, rtol=1e-3)
    # The zero row and column, that the exact flow keeps, are still exactly 0.
    assert not end.left[2].any() and not end.right[2].any()


# The flow three ways.


@pytest.mark.parametrize(
    ("depth", "values"),
    [
        pytest.param(depth, values, marks=() if case == (3, 2) else slow)
        for values in ((1.0, 1e-6), (1.5, 0.5, 1e-6))
        for depth in (2, 3, 5, 10)
        for case in [(depth, len(values))]
    ],
)
@pytest.mark.slow
def test_the_flow_three_ways(rng, depth, values):
    energy = SquaredLoss(families.moments(rng, [2.0, 1.0, 0.6], 3, 4, noise=0.1))
    point = _start(rng, 4, 3, values)
    balanced = GradientFlow(energy, FixedRank(len(values), depth))
    times = jnp.array([0.1, 0.5, 1.0])
    observe = {"W": _matrix}
    factored = _run(balanced, point, times, observe).history["W"]
    flat = GradientFlow(energy)
    factors = _run(flat, point.balanced(depth), times, observe).history["W"]
    np.testing.assert_allclose(factored, factors, rtol=0, atol=1e-9)
    # All entries of W hold a small singular value to rounding of the largest only, and
    # errors of the steps lift it: hence a method of higher order for this one.
    dense = LinearMap(point.matrix())
    ambient = _run(balanced, dense, times, observe, diffrax.Dopri8()).history["W"]
    np.testing.assert_allclose(ambient, factored, rtol=0, atol=1e-8)
    assert np.linalg.norm(factored[-1] - factored[0]) > 0.1


# Exact solutions.


@pytest.mark.parametrize(
    "depth", [3, pytest.param(2, marks=slow), pytest.param(5, marks=slow)]
)
def test_decoupled_modes(depth):
    # W(0) diagonal beside a diagonal C: each mode on its own, also of the wrong sign.
    start = np.array([0.4, -0.7, 1e-5])
    gram = np.array([1.5, 1.0, 0.5])
    flow = GradientFlow(_loss(jnp.diag(jnp.asarray(gram))), FixedRank(3, depth))
    times = jnp.array([0.5, 2.0, 8.0])
    exact = np.stack(
        [
            decoupled_mode(float(u0), float(lam), float(lam), depth, np.asarray(times))
            for u0, lam in zip(start, gram, strict=True)
        ],
        axis=1,
    )
    # Another order of modes, and signs on either side.
    point = LowRank(
        jnp.eye(3)[:, [2, 0, 1]] * jnp.array([1.0, 1.0, -1.0])[None, :],
        jnp.log(jnp.abs(jnp.asarray(start)))[jnp.array([2, 0, 1])],
        jnp.eye(3)[:, [2, 0, 1]],
    )
    seen = _run(flow, point, times, {"W": _matrix}).history["W"]
    # Relative to each mode, however small it is.
    found = np.diagonal(seen, axis1=1, axis2=2)
    np.testing.assert_allclose(found, exact, rtol=1e-8)
    off = seen - np.stack([np.diag(row) for row in found])
    # Nothing but rounding of orthonormal sides.
    assert np.abs(off).max() <= 1e-15


# As a solver among others.


@slow
def test_any_method_is_made_rank_preserving(rng):
    point = _start(rng, 3, 3, [1.0, 0.5, 0.1])
    flow = GradientFlow(_loss(), FixedRank(3, 2))
    times = jnp.array([1.0])
    found = [
        _run(flow, point, times, {"W": _matrix}, method, 1e-6)
        for method in (
            TSIT5,
            RankPreserving(TSIT5),
            diffrax.Heun(),
        )
    ]
    for other in found[1:]:
        assert other.result == RESULTS.horizon_reached
        np.testing.assert_allclose(other.history["W"], found[0].history["W"], atol=1e-4)
    for solution in found:
        gram = solution.point.left.T @ solution.point.left
        np.testing.assert_allclose(gram, jnp.eye(3), atol=1e-13)


@slow
def test_it_works_in_diffeqsolve(rng):
    point = _start(rng, 4, 4, [1.0, 0.1])
    energy = _loss(jnp.diag(jnp.array([2.0, 1.5, 1.0, 0.5])))
    flow = GradientFlow(energy, FixedRank(2, 3))
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, y, args: flow.velocity(y)),
        RankPreserving(),
        t0=0.0,
        t1=1.0,
        dt0=0.01,
        y0=point,
    )
    expected = _run(flow, point, jnp.array([1.0]), {"W": _matrix}).history["W"][0]
    assert solution.ys is not None
    end = jax.tree.map(lambda leaf: leaf[-1], solution.ys)
    np.testing.assert_allclose(end.matrix(), expected, atol=1e-8)


@slow
def test_lanes_and_float32(rng):
    starts = [_start(rng, 3, 3, [1.0, 0.5, 0.1]) for _ in range(3)]
    points = jax.tree.map(lambda *leaves: jnp.stack(leaves), *starts)
    flow = GradientFlow(_loss(), FixedRank(3, 2))
    times = jnp.array([0.5, 10.0])
    run = lambda point: _run(flow, point, times, {"point": _itself}).history["point"]
    together = jax.vmap(run)(points)
    for i, start in enumerate(starts):
        alone = run(start)
        np.testing.assert_allclose(
            together.log_values[i], alone.log_values, rtol=1e-9, atol=1e-9
        )
    cast = lambda tree: jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)
    single = _run(
        cast(flow), cast(starts[0]), times.astype(jnp.float32), {"point": _itself},
        TSIT5, 1e-5,
    ).history["point"]  # fmt: skip
    assert single.log_values.dtype == jnp.float32
    np.testing.assert_allclose(
        single.log_values, together.log_values[0], rtol=1e-3, atol=1e-3
    )
