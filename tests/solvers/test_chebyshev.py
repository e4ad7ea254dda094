from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import families
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from gradflow.flow import AbstractFlow, GradientFlow
from gradflow.initial import GaussianInit
from gradflow.manifolds import FixedRank
from gradflow.manifolds.base import AbstractManifold
from gradflow.models.base import AbstractEnergy
from gradflow.models.linear import DeepLinear, SquaredLoss
from gradflow.models.low_rank import LowRank
from gradflow.moments import Moments
from gradflow.solution import RESULTS
from gradflow.solve import integrate, Integrator
from gradflow.solvers import NormwiseStepSize, RKC2, stiff
from gradflow.solvers.chebyshev import (
    control_of,
    DAMPING,
    REACH,
    SAFETY,
    spectral_radius,
)
from gradflow.solvers.step_control import root_mean_square
from gradflow.types import names_of


METHOD = RKC2()
TSIT5 = diffrax.Tsit5()
ZERO = jnp.zeros(())


def _teacher(size=6, rank=2, dtype=jnp.float64):
    """The workload D2 of the benchmarks, smaller: a linear teacher of low rank and
    inputs of condition 1e4. The flow, a start, and a minimum."""
    rng = np.random.default_rng(2024)
    frame = families.orthogonal(rng, size)
    xx = (frame * np.geomspace(1.0, 1e-4, size)) @ frame.T
    layers, start = rng.normal(size=(2, 2, rank, size)) / np.sqrt(size)
    teacher = layers[1].T @ layers[0]
    cast = lambda array: jnp.asarray(array, dtype)
    xy, yy = xx @ teacher.T, teacher @ xx @ teacher.T
    moments = Moments(cast(xx), cast(xy), cast(yy), 1)
    network = lambda one, two: DeepLinear((cast(one), cast(two.T)))
    return GradientFlow(SquaredLoss(moments)), network(*start), network(*layers)


def _one_step(field, y0, length, *, method=METHOD, state=None):
    terms = diffrax.ODETerm(field)
    length = jnp.asarray(length, jax.tree.leaves(y0)[0].dtype)
    if state is None:
        state = method.init(terms, 0 * length, length, y0, None)
    y1, error, _, state, _ = method.step(
        terms, 0 * length, length, y0, None, state, made_jump=False
    )
    return y1, error, state


class Quadratic(AbstractEnergy):
    """E = sum of rates y^2 / 2, with flow y' = -rates y."""

    rates: Any

    def __call__(self, point):
        terms = jax.tree.map(lambda r, y: jnp.sum(r * y**2) / 2, self.rates, point)
        return sum(jax.tree.leaves(terms), ZERO)


# Stability.


def _polynomial(stages, z):
    """The stability polynomial by numpy, and how far it is bounded."""
    t = np.polynomial.chebyshev.Chebyshev.basis(stages)
    w0 = 1 + DAMPING / stages**2
    value, slope, curvature = t(w0), t.deriv(1)(w0), t.deriv(2)(w0)
    b, w1 = curvature / slope**2, slope / curvature
    shifted = w0 + w1 * z
    # Where numpy's own sum of a series is exact.
    assert np.all(np.abs(shifted) <= w0)
    return 1 - b * value + b * t(shifted), (w0 + 1) / w1


def test_stability_polynomial_is_the_closed_form_and_bounded():
    stages = np.arange(2, 51)
    reaches = REACH * (stages**2 - 1)
    z = -reaches[:, None] * np.linspace(0, 1, 61)[None, :]

    @jax.jit
    @jax.vmap
    def grow(z, stages):
        terms = diffrax.ODETerm(lambda t, y, args: z * y)
        one = jnp.ones_like(z)
        change, after = METHOD._stages(terms, ZERO, ZERO + 1, one, None, z, stages)
        return 1 + change, after

    found, after = map(np.asarray, grow(jnp.asarray(z), jnp.asarray(stages)))
    np.testing.assert_allclose(after, z * found, rtol=1e-9, atol=1e-9)
    for s, row, values in zip(stages, z, found, strict=True):
        exact, reach = _polynomial(int(s), row)
        np.testing.assert_allclose(values, exact, atol=1e-12)
        assert REACH * (s**2 - 1) <= reach <= 1.003 * REACH * (s**2 - 1)
        # A fast mode loses at least a thirtieth in each step.
        assert np.all(np.abs(values) <= 1) and np.all(np.abs(values[row < -3]) < 0.97)


def test_a_step_takes_as_many_stages_as_its_stiffness_needs():
    # For one equation the radius is known after one iteration.
    rates = jnp.geomspace(1e-3, 1e6, 400)
    step = lambda r: _one_step(lambda t, y, args: -r * y, jnp.ones(1), 1.0)
    y1, error, state = jax.tree.map(np.asarray, jax.jit(jax.vmap(step))(rates))
    np.testing.assert_allclose(state.radius, rates, rtol=1e-14)
    stages = state.age
    most = REACH * (METHOD.max_stages**2 - 1) / SAFETY
    fits = np.asarray(rates) <= most
    assert np.all(np.abs(y1[fits]) <= 1) and np.all(np.isfinite(error[fits]))
    assert np.all(stages[fits] >= 2)
    needed = SAFETY * np.asarray(rates) / REACH + 1
    assert np.all(stages[fits] ** 2 >= needed[fits])
    enough = (stages - 1) ** 2 < needed
    assert np.all(enough[fits] | (stages[fits] == 2))
    # A step that needs more costs nothing, and is rejected by any controller.
    assert np.any(~fits)
    np.testing.assert_array_equal(stages[~fits], 0)
    np.testing.assert_array_equal(y1[~fits], 1.0)
    np.testing.assert_array_equal(error[~fits], np.inf)


@pytest.mark.parametrize("controller", [
    NormwiseStepSize(1e-6), diffrax.PIDController(rtol=1e-6, atol=1e-9)
])  # fmt: skip
def test_a_step_that_needs_too_many_stages_is_cut(controller):
    y0, error = jnp.ones(1), jnp.array([jnp.inf])
    field = diffrax.ODETerm(lambda t, y, args: y)
    _, state = controller.init(field, 0.0, 1.0, y0, 1.0, None, METHOD.func, 3)
    keep, start, end, *_ = controller.adapt_step_size(
        ZERO, ZERO + 1, y0, y0, None, error, 3, state
    )
    assert not keep and start == 0
    np.testing.assert_allclose(end, 0.2, rtol=1e-12)


def test_too_few_stages_are_refused():
    with pytest.raises(ValueError, match="max_stages must be >= 2, got 1"):
        RKC2(max_stages=1)


# Order.


def _oscillating(t, y, args):
    """Not linear, not autonomous, and slightly stiff."""
    a, b = y["a"], y["b"]
    return {"a": -4 * a**3 + jnp.sin(3 * t) * b, "b": -a * b + jnp.cos(t) - 5 * b}


OSCILLATING = {"a": jnp.array([1.0, -0.5]), "b": jnp.array([0.2, 2.0])}


def _difference(x, y):
    return float(root_mean_square(jax.tree.map(jnp.subtract, x, y)))


@pytest.mark.parametrize("stages", [2, 3, 20])
def test_order_2_whatever_the_number_of_stages(stages):
    terms = diffrax.ODETerm(_oscillating)

    @jax.jit
    def end(count):
        length = 1.0 / count

        def step(i, y):
            t = i * length
            before = _oscillating(t, y, None)
            change, _ = METHOD._stages(terms, t, t + length, y, None, before, stages)
            return jax.tree.map(jnp.add, y, change)

        return jax.lax.fori_loop(0, count, step, OSCILLATING)

    exact = diffrax.diffeqsolve(
        terms, diffrax.Dopri8(), 0.0, 1.0, None, OSCILLATING,
        stepsize_controller=diffrax.PIDController(rtol=1e-13, atol=1e-13),
    ).ys  # fmt: skip
    exact = jax.tree.map(lambda leaf: leaf[0], exact)
    errors = [_difference(end(count), exact) for count in (20, 40, 80, 160)]
    orders = np.log2(np.divide(errors[:-1], errors[1:]))
    assert np.all(np.abs(orders - 2) < [0.4, 0.2, 0.1])


@pytest.mark.parametrize("rate", [0.1, 400.0])
def test_error_estimate_is_of_third_order_and_no_less_than_the_error(rate):
    # Along y' = -y^3 the mode of the given rate, at rest, decides the stages.
    field = lambda t, y, args: -jnp.array([1.0, rate]) * y**3 - jnp.array([0, rate]) * y
    start = jnp.array([1.0, 0.0])
    lengths = jnp.array([0.02, 0.01, 0.005])
    step = jax.jit(jax.vmap(lambda h: _one_step(field, start, h)))
    end, error, state = jax.tree.map(np.asarray, step(lengths))
    assert (rate < 100) == (state.age[-1] == 2)
    estimate, true = error[:, 0], 1 / np.sqrt(1 + 2 * np.asarray(lengths)) - end[:, 0]
    assert np.all((estimate / true > 1) & (estimate / true < 2.5))
    if rate < 1:
        scaling = np.log2(estimate[:-1] / estimate[1:])
        assert np.all(np.abs(scaling - 3) < [0.1, 0.06])


# The spectral radius.


def _estimate(function, point, direction, radius=ZERO):
    return spectral_radius(function, point, direction, radius, iterations=100)[:2]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("size", [3, 60])
def test_spectral_radius_of_random_matrices(getkey, size, dtype):
    halves = jr.normal(getkey(), (10, size, size), dtype)
    matrices = -jnp.einsum("nij,nkj->nik", halves, halves)
    starts = jr.normal(getkey(), (10, size), dtype)

    @jax.jit
    @jax.vmap
    def estimate(matrix, start):
        radius = jnp.zeros((), dtype)
        return _estimate(lambda y: matrix @ y, jnp.zeros_like(start), start, radius)

    vectors, radii = estimate(matrices, starts)
    assert radii.dtype == vectors.dtype == dtype
    ratios = np.asarray(radii) / np.linalg.norm(np.asarray(matrices), 2, axis=(1, 2))
    assert np.all((0.95 < ratios) & (ratios < 1.0001))


def test_spectral_radius_of_a_hessian():
    flow, start, minimum = _teacher()
    assert flow.speed(minimum) < 1e-13
    flat, unflatten = ravel_pytree(minimum)
    velocity = lambda y: ravel_pytree(flow.velocity(unflatten(y)))[0]
    exact = np.linalg.norm(np.asarray(jax.jit(jax.jacfwd(velocity))(flat)), 2)
    _, radius = jax.jit(lambda start: _estimate(flow.velocity, minimum, start))(start)
    assert 0.95 * exact < radius < 1.0001 * exact


def test_spectral_radius_follows_an_eigenvalue_that_overtakes():
    # The old direction holds nothing at all of the new one.
    rates = jnp.arange(1.0, 31.0)
    old = jnp.zeros(30).at[0].set(1.0)
    _, radius = _estimate(lambda y: -rates * y, jnp.zeros(30), old)
    assert 0.95 * 30 < radius <= 30
    # Without a need the pair stays as it is, and a radius of 0 is no trouble.
    kept = spectral_radius(
        lambda y: -rates * y, jnp.zeros(30), old, ZERO + 7, iterations=0
    )
    np.testing.assert_array_equal(kept[0], old)
    assert kept[1] == 7
    vector, radius = _estimate(lambda y: 0 * y, jnp.zeros(30), old)
    assert radius == 0 and jnp.isfinite(vector).all()


# Whole runs.


class Counted(AbstractFlow):
    """A flow that counts how often its velocity is asked for."""

    energy: AbstractEnergy
    manifold: AbstractManifold
    add: Callable[[], None] = eqx.field(static=True)

    def velocity(self, point):
        jax.debug.callback(self.add)
        return GradientFlow(self.energy, self.manifold).velocity(point)

    def speed(self, point):
        return GradientFlow(self.energy, self.manifold).speed(point)


def _counted(flow, point, **options) -> Any:
    """A solution, and the velocities it took."""
    calls = []
    counted = Counted(flow.energy, flow.manifold, lambda: calls.append(0))
    solution = integrate(counted, point, **options)
    jax.effects_barrier()
    return solution, len(calls)


def _slower_than(flow, speed):
    return lambda point: flow.speed(point) <= speed


@pytest.mark.slow
def test_a_stiff_run_is_that_of_the_implicit_method():
    flow, start, minimum = _teacher(size=4)
    times = jnp.array([0.5, 50.0, 3e5])
    paths: Any = [
        integrate(
            flow, start, times=times, method=method, rtol=rtol,
            tolerance=1e3 * rtol, observe={"map": lambda p: p.matrix()},
        ).history
        for method, rtol in [(METHOD, 1e-7), (stiff(), 1e-8)]
    ]  # fmt: skip
    np.testing.assert_allclose(paths[0]["map"], paths[1]["map"], atol=1e-5)
    np.testing.assert_allclose(paths[0]["map"][-1], minimum.matrix(), atol=1e-3)


def test_a_stiff_run_takes_a_tenth_of_the_velocities():
    flow, start, _ = _teacher()
    options: Any = dict(
        stop=lambda p: flow.speed(p) <= 1e-6, tolerance=1e-3, rtol=1e-6, throw=False
    )
    solution, calls = _counted(flow, start, method=METHOD, **options)
    assert solution.result == RESULTS.rule_met
    # At twelve times the velocities, 6 in each step, Tsit5 is still under way.
    explicit = integrate(flow, start, method=TSIT5, max_steps=2 * calls, **options)
    assert explicit.result == RESULTS.max_steps_reached


@pytest.mark.parametrize("direction", [1, -1])
def test_it_is_a_diffrax_solver(direction):
    # Stiff, not autonomous, forward and backward in time, and observed between steps.
    rate = 500.0
    exact = lambda t: jnp.stack([jnp.cos(t), jnp.sin(t) + jnp.exp(-abs(t))])
    drift = lambda t: jnp.stack(
        [-jnp.sin(t), jnp.cos(t) - direction * jnp.exp(-abs(t))]
    )
    field = lambda t, y, args: drift(t) - direction * rate * (y - exact(t))
    solution: Any = diffrax.diffeqsolve(
        diffrax.ODETerm(field), METHOD, 0.0, direction * 3.0, None, exact(0.0),
        stepsize_controller=diffrax.PIDController(rtol=1e-4, atol=1e-6),
        saveat=diffrax.SaveAt(ts=direction * jnp.linspace(0.0, 3.0, 50)),
    )  # fmt: skip
    np.testing.assert_allclose(solution.ys, jax.vmap(exact)(solution.ts), atol=1e-4)
    # An explicit method of order 5 would take 500.
    assert solution.stats["num_steps"] < 200, solution.stats


def test_a_jump_of_the_field_is_noticed():
    field = lambda t, y, args: jnp.where(t < 1, -y, 100 - 100 * y)
    solution: Any = diffrax.diffeqsolve(
        diffrax.ODETerm(field), METHOD, 0.0, 2.0, None, jnp.ones(1),
        stepsize_controller=diffrax.ClipStepSizeController(
            diffrax.PIDController(rtol=1e-6, atol=1e-8), jump_ts=jnp.array([1.0])
        ),
        saveat=diffrax.SaveAt(ts=jnp.array([1.0, 1.01])),
    )  # fmt: skip
    before = np.exp(-1)
    after = 1 + (before - 1) * np.exp(-1)
    np.testing.assert_allclose(solution.ys[:, 0], [before, after], atol=5e-5)


def test_lanes_of_unlike_stiffness_do_not_disturb_each_other():
    rates = jnp.array([0.0, 1e-3, 1.0, 30.0, 1e3, 1e5])

    def descend(rate):
        flow = GradientFlow(Quadratic({"slow": jnp.ones(1), "fast": rate}))
        point = {"slow": jnp.array([2.0]), "fast": jnp.array(1.0)}
        return integrate(
            flow, point, horizon=1.0, method=METHOD, rtol=1e-6, tolerance=1e-3,
            stop=_never, throw=False,
        )  # fmt: skip

    together = jax.jit(jax.vmap(descend))(rates)
    assert jnp.all(together.time == 1)
    np.testing.assert_allclose(together.point["slow"], 2 * np.exp(-1), rtol=1e-4)
    np.testing.assert_allclose(together.point["fast"], np.exp(-rates), atol=1e-4)
    one = jax.jit(descend)
    for lane in range(len(rates)):
        alone = one(rates[lane])
        for name in ("steps", "rejected"):
            assert alone.stats[name] == together.stats[name][lane]
        np.testing.assert_allclose(
            alone.point["fast"], together.point["fast"][lane], rtol=1e-10, atol=1e-12
        )


def _never(point):
    return jnp.array(False)


def test_float32():
    flow, start, _ = _teacher(dtype=jnp.float32)
    solution, calls = _counted(
        flow, start, method=METHOD, stop=_slower_than(flow, 1e-5), rtol=1e-5,
        tolerance=1e-2, throw=False,
    )  # fmt: skip
    assert solution.result == RESULTS.rule_met
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(solution.point))


@pytest.mark.slow
def test_no_lane_is_stuck_by_overflow():
    size, lanes, scales = 8, 4, jnp.array([1.0, 4.0, 16.0])
    target = jr.normal(jr.key(9), (size, size))
    moments = Moments(jnp.eye(size), target.T, target @ target.T, 1)
    flow = GradientFlow(SquaredLoss(moments))

    @jax.jit
    def descend(key, scale):
        point = GaussianInit((size,) * 4, scale / np.sqrt(size))(key)
        solution = integrate(
            flow, point, stop=lambda p: flow.energy(p) < 0.1, rtol=1e-5,
            tolerance=1e-2, max_steps=400, method=METHOD, throw=False,
        )  # fmt: skip
        return flow.energy(point), solution

    each = jax.vmap(jax.vmap(descend, (0, None)), (None, 0))
    before, solution = each(jr.split(jr.key(1), lanes), scales)
    assert np.all(solution.energy < before) and np.all(solution.time > 0)
    rejected, steps = (np.asarray(solution.stats[n]) for n in ("rejected", "steps"))
    assert np.all(rejected < 0.3 * steps + 10)
    assert np.all(names_of(RESULTS, solution.result)[:2] == "rule_met")


@pytest.mark.parametrize("controller", [
    NormwiseStepSize(1e-5), diffrax.PIDController(rtol=1e-5, atol=1e-9)
])  # fmt: skip
def test_a_far_start_comes_in_with_any_controller(controller):
    # A first step that long overflows, where diffrax's controller alone would divide
    # inf by inf.
    starts = jnp.array([300.0, 1e9])
    ends = jax.vmap(
        lambda start: (
            diffrax.diffeqsolve(
                diffrax.ODETerm(lambda t, y, args: -(y**3)),
                METHOD,
                0.0,
                1.0,
                0.01,
                start[None],
                stepsize_controller=controller,
            ).ys
        )  # fmt: skip
    )(starts)
    exact = 1 / np.sqrt(1 / np.asarray(starts) ** 2 + 2)
    np.testing.assert_allclose(np.asarray(ends)[:, 0, 0], exact, rtol=1e-3)


def test_its_steps_are_as_long_as_their_error_allows():
    # Errors grow like the third power of a step. Steps settle at 0.9 of the longest,
    # and at 0.9 ** (1 / 0.3) = 0.7 of it by the control of explicit methods.
    @eqx.filter_jit
    def steps(control):
        return diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: jnp.stack([y[1], -y[0]]) / 10),
            METHOD,
            0.0,
            100.0,
            None,
            jnp.array([1.0, 0.0]),
            stepsize_controller=control,
        ).stats["num_accepted_steps"]

    longer, quieter = steps(control_of(METHOD, 1e-6)), steps(NormwiseStepSize(1e-6))
    assert 0.7 < longer / quieter < 0.86
    flow, start, _ = _teacher()
    relay = Integrator(flow).descents(start)
    assert [descent.control.icoeff for descent in relay] == [0.3, 1.0]


@pytest.mark.slow
def test_points_of_fixed_rank():
    gram = jnp.diag(jnp.array([3.0, 2.0, 1.0]))
    flow = GradientFlow(SquaredLoss(Moments(gram, gram, gram, 1)), FixedRank(2, 2))
    left, right = (jnp.linalg.qr(jr.normal(jr.key(k), (3, 2)))[0] for k in (0, 1))
    point = LowRank(left, jnp.log(jnp.array([0.5, 0.1])), right)
    ends = [
        integrate(
            flow, point, horizon=1.0, method=method, rtol=1e-7, tolerance=1e-4
        ).point.matrix()
        for method in (METHOD, TSIT5)
    ]
    np.testing.assert_allclose(ends[0], ends[1], atol=1e-5)
