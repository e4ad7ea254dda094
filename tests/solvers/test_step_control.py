import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from gradflow.flow import GradientFlow
from gradflow.initial import GaussianInit
from gradflow.models.base import AbstractEnergy
from gradflow.models.linear import DeepLinear, LinearMap, SquaredLoss
from gradflow.moments import Moments
from gradflow.solution import RESULTS
from gradflow.solve import integrate
from gradflow.solvers import NormwiseStepSize
from gradflow.solvers.step_control import root_mean_square
from gradflow.types import names_of


class Quartic(AbstractEnergy):
    """E = sign y^4 / 4, with flow y' = -sign y^3."""

    sign: float

    def __call__(self, point):
        return self.sign * jnp.sum(point**4) / 4


def _cubic(t, y, args):
    return -(y**3)


def _itself(point):
    return point


def test_root_mean_square():
    tree = {"a": jnp.array([3.0, -4.0]), "b": jnp.array([[0.0, 0.0]])}
    np.testing.assert_allclose(root_mean_square(tree), 2.5, rtol=1e-15)
    assert root_mean_square(jnp.zeros(3)) == 0
    # No overflow, no underflow; and infinities stay such.
    for size in (1e200, 1e-200):
        found = root_mean_square(jnp.array([3 * size, 4 * size]))
        np.testing.assert_allclose(found / size, np.sqrt(12.5), rtol=1e-14)
    assert root_mean_square(jnp.array([1.0, jnp.inf])) == jnp.inf
    assert jnp.isnan(root_mean_square(jnp.array([1.0, jnp.nan])))


@pytest.mark.parametrize("depth", [2, 3, 5])
@pytest.mark.slow
def test_no_lane_is_stuck_by_overflow(depth):
    # Trial steps from these starts overflow: with diffrax's PIDController 29 of 64
    # lanes of depth 3 and scale 16 never take a step, nor do 26 of depth 5.
    size, lanes, max_steps = 8, 32, 400
    target = jr.normal(jr.key(9), (size, size))
    moments = Moments(jnp.eye(size), target.T, target @ target.T, 1)
    flow = GradientFlow(SquaredLoss(moments))
    close = lambda point: flow.energy(point) < 1e-3

    @jax.jit
    def run(scale, keys):
        init = GaussianInit((size,) * (depth + 1), scale / np.sqrt(size))
        point = jax.vmap(init)(keys)
        descend = lambda point: integrate(
            flow, point, stop=close, rtol=1e-6, tolerance=1e-3, max_steps=max_steps,
            throw=False,
        )  # fmt: skip
        return jax.vmap(flow.energy)(point), jax.vmap(descend)(point)

    for scale in (1.0, 2.0, 4.0, 8.0, 16.0):
        before, solution = run(scale, jr.split(jr.key(1), lanes))
        rejected = np.asarray(solution.stats["rejected"])
        trials = np.asarray(solution.stats["steps"]) + rejected
        ends = set(names_of(RESULTS, solution.result))
        assert ends <= {"rule_met", "max_steps_reached"}
        done = names_of(RESULTS, solution.result) == "rule_met"
        assert np.all(done | (trials == max_steps))
        # Time advances and the energy falls, in nearly every step taken.
        assert np.all(solution.time > 0) and np.all(jnp.isfinite(solution.time))
        assert np.all(solution.energy < before)
        assert np.all(rejected < 0.15 * trials + 10)


@pytest.mark.parametrize("start", [1e2, 1e3, 1e6])
def test_a_far_start_comes_in(start):
    times = np.array([1e-12, 1e-6, 1e-3, 1.0, 100.0])
    exact = 1 / np.sqrt(1 / start**2 + 2 * times)
    for rtol in (1e-6, 1e-9):
        solution = integrate(
            GradientFlow(Quartic(1.0)), jnp.array([start]), times=jnp.asarray(times),
            observe={"y": _itself}, rtol=rtol, tolerance=1e3 * rtol,
        )  # fmt: skip
        assert solution.history is not None
        found = solution.history["y"][:, 0]
        np.testing.assert_allclose(found, exact, rtol=10 * rtol)
        # Logarithmically many steps, and hardly any for nothing.
        assert solution.stats["steps"] < 700 and solution.stats["rejected"] <= 5


@pytest.mark.parametrize("start", [1e2, 300.0, 1e6])
def test_it_controls_diffeqsolve_too(start):
    solve = lambda controller: diffrax.diffeqsolve(
        diffrax.ODETerm(_cubic),
        diffrax.Tsit5(),
        t0=0.0,
        t1=1.0,
        dt0=None,
        y0=jnp.array([start]),
        stepsize_controller=controller,
        throw=False,
    )
    solution = solve(NormwiseStepSize(rtol=1e-8))
    assert solution.result == diffrax.RESULTS.successful
    assert solution.ys is not None
    exact = 1 / np.sqrt(1 / start**2 + 2)
    np.testing.assert_allclose(solution.ys[0, 0], exact, rtol=1e-7)
    # The trap that this controller is there for. If this fails diffrax has been fixed.
    trapped = solve(diffrax.PIDController(rtol=1e-6, atol=1e-9))
    assert trapped.result == diffrax.RESULTS.max_steps_reached
    assert trapped.stats["num_accepted_steps"] == 0


def test_blow_up_is_found_and_named():
    # y' = y^3 from 1 is (1 - 2t)^(-1/2).
    flow = GradientFlow(Quartic(-1.0))
    for rtol, closeness in [(1e-6, 1e-6), (1e-9, 1e-8)]:
        solution = integrate(
            flow, jnp.array([1.0]), rtol=rtol, tolerance=1e3 * rtol, throw=False
        )
        assert solution.result == RESULTS.step_size_vanished
        np.testing.assert_allclose(solution.time, 0.5, atol=closeness)
        assert jnp.isfinite(solution.point).all()
    with pytest.raises(RuntimeError, match="step size fell to nothing at t=0.5"):
        integrate(flow, jnp.array([1.0]))


def test_rotated_layers_take_the_same_steps(getkey):
    # Zeros in the weights must not decide: a rotation of a layer fills them in.
    entries = jnp.diag(jnp.array([1.0, 0.5, 0.0]))
    target = jr.normal(getkey(), (3, 3))
    moments = Moments(jnp.eye(3), target.T, target @ target.T, 1)
    flow = GradientFlow(SquaredLoss(moments))
    descend = eqx.filter_jit(
        lambda point: integrate(
            flow, point, horizon=1.0, rtol=1e-8, tolerance=1e-5, throw=False
        )
    )
    plain = descend(DeepLinear((entries, entries, jnp.eye(3))))
    r1, r2 = (jnp.linalg.qr(jr.normal(getkey(), (3, 3)))[0] for _ in range(2))
    turned = DeepLinear((r1 @ entries, r2 @ entries @ r1.T, r2.T))
    rotated = descend(turned)
    for name in ("steps", "rejected"):
        assert plain.stats[name] == rotated.stats[name]
    assert plain.stats["steps"] > 20
    np.testing.assert_allclose(rotated.point.matrix(), plain.point.matrix(), atol=1e-10)
    # Nor does the order of the entries matter.
    flip = jnp.eye(3)[::-1]
    flipped = descend(DeepLinear((flip @ entries, entries @ flip, jnp.eye(3))))
    assert flipped.stats["steps"] == plain.stats["steps"]


def test_first_step_of_a_start_at_rest():
    # A velocity of 0 at the start must not make the first step infinite or NaN.
    flow = GradientFlow(Quartic(1.0))
    solution = integrate(flow, jnp.zeros(2), horizon=3.0, stop=_never)
    assert solution.result == RESULTS.horizon_reached and solution.time == 3.0
    np.testing.assert_array_equal(solution.point, 0.0)


def _never(point):
    return jnp.array(False)


def test_a_solver_without_error_estimate_is_refused():
    with pytest.raises(ValueError, match="no error estimate.*HalfSolver"):
        diffrax.diffeqsolve(
            diffrax.ODETerm(_cubic),
            diffrax.Euler(),
            t0=0.0,
            t1=1.0,
            dt0=0.1,
            y0=jnp.ones(1),
            stepsize_controller=NormwiseStepSize(rtol=1e-3),
        )


@pytest.mark.parametrize("size", [0.0, 1e-100])
def test_a_start_at_zero_that_is_not_at_rest(size):
    # Nothing is small relative to such a point; the step must not vanish.
    flow = GradientFlow(SquaredLoss(Moments(jnp.eye(2), jnp.eye(2), jnp.eye(2), 1)))
    solution = integrate(flow, LinearMap(size * jnp.ones((2, 2))))
    assert solution.result == RESULTS.successful
    np.testing.assert_allclose(solution.point.matrix(), jnp.eye(2), atol=1e-6)
