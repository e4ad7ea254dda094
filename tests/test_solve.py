import itertools

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradflow.descent import Descent
from gradflow.flow import AbstractFlow, GradientFlow
from gradflow.manifolds import Euclidean
from gradflow.models.base import AbstractEnergy
from gradflow.models.linear import DeepLinear, invariants, LinearMap, SquaredLoss
from gradflow.moments import Moments
from gradflow.solution import failure_text, RESULTS, SUCCESSFUL
from gradflow.solve import integrate, Integrator
from gradflow.solvers import NormwiseStepSize, stiff
from gradflow.theory import dynamics
from gradflow.types import names_of


RTOLS = (1e-6, 1e-9)


class Quartic(AbstractEnergy):
    """E = sign y^4 / 4; y' = -sign y^3 comes to rest slowly, or blows up."""

    sign: float

    def __call__(self, point):
        return self.sign * jnp.sum(point**4) / 4


class Bowl(AbstractEnergy):
    """E = (y_1^2 + 3 y_2^2) / 2: each y decays exponentially; compiles fast."""

    def __call__(self, point):
        return jnp.sum(_rates(point) * point**2) / 2


class Valley(AbstractEnergy):
    """A bowl of any curvatures."""

    rates: jnp.ndarray

    def __call__(self, point):
        return jnp.sum(self.rates * point**2) / 2


class StackedFlow(AbstractFlow):
    """The flow of an autoencoder by a velocity that never saw the loss."""

    energy: SquaredLoss
    manifold: Euclidean = Euclidean()

    def velocity(self, point):
        return dynamics.stacked_velocity(self.energy.moments, point)


def _rates(point):
    return jnp.array([1.0, 3.0], point.dtype)


BLOW_UP = GradientFlow(Quartic(-1.0))  # y = (1 - 2t)^(-1/2) from y = 1
BOWL = GradientFlow(Bowl())
ONES = jnp.ones(2)


def _decayed(t):
    return np.exp(-np.multiply.outer(np.asarray(t), np.array([1.0, 3.0])))


@pytest.fixture
def rng():
    return np.random.default_rng(2024)


# Functions to observe live here: one made anew at each call is compiled anew.
def _product(point):
    return point.matrix()


def _itself(point):
    return point


def _never(point):
    return jnp.array(False)


def _large(point):
    return point > 0.5


def _count(point):
    return jnp.array(3)


def _orthogonal(rng, size):
    return np.linalg.qr(rng.normal(size=(size, size)))[0]


def _whitened(target):
    target = jnp.asarray(target)
    return Moments(jnp.eye(target.shape[1]), target.T, target @ target.T, 1)


def _balanced(rng, widths, product):
    """As `BalancedInit`, by numpy: eager jax would compile each shape anew."""
    rank = min(widths)
    left, values, right = np.linalg.svd(product)
    root = np.where(values > 1e-12, values, 0)[:rank] ** (1 / (len(widths) - 1))
    inner = [_orthogonal(rng, width)[:, :rank] for width in widths[1:-1]]
    frames = [right[:rank].T, *inner, left[:, :rank]]
    pairs = itertools.pairwise(frames)
    return DeepLinear(
        tuple(jnp.asarray(upper * root @ lower.T) for lower, upper in pairs)
    )


def _small_problem():
    """Two units, depth 2, whitened; comes to rest at t = 15."""
    target = np.array([[1.5, 0.2], [0.3, 0.9]])
    moments = _whitened(target)
    flow = GradientFlow(SquaredLoss(moments))
    start = DeepLinear((jnp.diag(jnp.array([0.5, 0.4])),) * 2)
    return flow, start, moments


def _observed(flow, start, times, observe, rtol, **options):
    solution = integrate(
        flow, start, times=jnp.asarray(times), observe=observe,
        rtol=rtol, tolerance=1e3 * rtol, **options,
    )  # fmt: skip
    assert solution.history is not None
    return solution, solution.history


# --- Exact trajectories. The promise is 100 rtol; measured are at most 5.


@pytest.mark.parametrize(
    "widths, rank, scale",
    [
        ((4, 3, 3), 3, 0.3),
        pytest.param((3, 2, 5), 2, 1e-3, marks=pytest.mark.slow),
        pytest.param((4, 4, 4), 2, 5.0, marks=pytest.mark.slow),
    ],
)
def test_follows_the_exact_flow_of_two_layers(rng, widths, rank, scale):
    x_dim, _, y_dim = widths
    target = rng.normal(size=(y_dim, x_dim))
    product = rng.normal(size=(y_dim, rank)) @ rng.normal(size=(rank, x_dim))
    moments = _whitened(target)
    flow = GradientFlow(SquaredLoss(moments))
    start = _balanced(rng, widths, scale * product)
    # Beyond, rounding wakes the idle units of a deficient start: e^(2 sigma t).
    times = np.array([0.0, 0.3, 1.0, 2.5, 4.0])
    solve = eqx.filter_jit(dynamics.whitened_two_layer)
    exact = np.stack([solve(moments, start, jnp.asarray(t)).matrix for t in times])
    size = np.max(np.abs(exact))
    for rtol in RTOLS:
        solution, history = _observed(flow, start, times, {"w": _product}, rtol)
        assert np.max(np.abs(history["w"] - exact)) <= 100 * rtol * size
        assert solution.result == RESULTS.horizon_reached
        assert solution.time == times[-1]
        np.testing.assert_array_equal(solution.times, times)
    # The same run, without looking in between.
    end = integrate(flow, start, horizon=4.0, stop=_never)
    error = np.max(np.abs(end.point.matrix() - exact[-1]))
    assert end.time == 4.0 and error <= 100 * RTOLS[-1] * size


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5])
def test_follows_decoupled_modes(rng, depth):
    m, lam, u0 = [1.5, 0.9, 0.4], [1.2, 0.7, 2.0], [0.05, -0.3, 3.0]
    left, right = _orthogonal(rng, 3), _orthogonal(rng, 3)
    moments = Moments(
        jnp.asarray(right * lam @ right.T),
        jnp.asarray((left * m @ right.T).T),
        jnp.eye(3),
        1,
    )
    start = _balanced(rng, (3,) * (depth + 1), left * u0 @ right.T)
    times = np.array([0.3, 1.0, 3.0, 6.0])
    exact = np.stack(
        [
            dynamics.decoupled_mode(*mode, depth, times)
            for mode in zip(u0, m, lam, strict=True)
        ],
        1,
    )
    flow = GradientFlow(SquaredLoss(moments))
    for rtol in RTOLS:
        _, history = _observed(flow, start, times, {"w": _product}, rtol)
        found = left.T @ history["w"] @ right
        expected = np.stack([np.diag(row) for row in exact])
        assert np.max(np.abs(found - expected)) <= 100 * rtol * np.max(np.abs(exact))


def _amplitudes(point):
    return point.weights[0][0], point.weights[1][:, 0]


def test_follows_the_start_of_remark_42():
    # It runs into a saddle; t is short enough for rounding not to escape from it.
    eigenvalue, times = 2.0, np.array([0.0, 0.5, 1.0, 3.0])
    xx = jnp.diag(jnp.array([eigenvalue, 1.0, 0.5]))
    flow = GradientFlow(SquaredLoss(Moments(xx, xx, xx, 1, autoencoding=True)))
    first = jnp.eye(3)[:1]
    start = DeepLinear((first, -first.T))
    alpha = dynamics.remark42(eigenvalue, times)
    for rtol in RTOLS:
        _, history = _observed(flow, start, times, {"a": _amplitudes}, rtol)
        below, above = history["a"]
        assert np.max(np.abs(below[:, 0] - alpha)) <= 100 * rtol
        assert np.max(np.abs(above[:, 0] + alpha)) <= 100 * rtol
        assert not below[:, 1:].any() and not above[:, 1:].any()


@pytest.mark.slow
def test_follows_the_stacked_form_from_an_unbalanced_start(rng):
    moments = Moments.from_data(rng.normal(size=(20, 3)))
    loss = SquaredLoss(moments)
    start = DeepLinear(
        (jnp.asarray(rng.normal(size=(2, 3))), jnp.asarray(rng.normal(size=(3, 2))))
    )
    assert start.imbalance() > 1
    for rtol in RTOLS:
        ends = [
            integrate(flow, start, horizon=3.0, rtol=rtol, tolerance=1e3 * rtol)
            for flow in (GradientFlow(loss), StackedFlow(loss))
        ]
        a, b = (end.point.matrix() for end in ends)
        assert np.max(np.abs(a - b)) <= 100 * rtol
        assert ends[0].stats["steps"] == ends[1].stats["steps"]


def test_a_long_plateau_loses_no_digits():
    # Depth 5 from 1e-4: the plateau lasts 2.6e11, the escape then takes steps of 0.1.
    m, lam, depth, size = 1.3, 0.7, 5, 1e-4
    xx, xy, yy = (jnp.full((1, 1), value) for value in (lam, m, m * m / lam))
    moments = Moments(xx, xy, yy, 1)
    start = DeepLinear((jnp.full((1, 1), size),) * depth)
    escaped = lambda point: point.matrix()[0, 0] > 0.99 * m / lam
    solution = integrate(GradientFlow(SquaredLoss(moments)), start, stop=escaped)
    assert solution.result == RESULTS.rule_met
    exact = dynamics.decoupled_escape_time(size**depth, m, lam, depth, 0.99)
    assert exact > 2e11 and solution.stats["steps"] < 1000
    np.testing.assert_allclose(solution.time, exact, rtol=1e-7)


@pytest.mark.parametrize("balanced", [True, False])
def test_balancedness_does_not_drift(rng, balanced):
    moments = Moments.from_data(rng.normal(size=(30, 4)), rng.normal(size=(30, 4)))
    flow = GradientFlow(SquaredLoss(moments))
    start = _balanced(rng, (4, 4, 4, 4), rng.normal(size=(4, 4)))
    if not balanced:
        start = jax.tree.map(lambda w: jnp.asarray(rng.normal(size=w.shape)) / 2, start)
    times = [0.0, 1.0, 10.0, 50.0, 200.0]
    for rtol in (1e-6, 1e-8, 1e-10):
        _, history = _observed(flow, start, times, {"i": invariants}, rtol)
        for matrix in history["i"]:
            assert np.max(np.abs(matrix - matrix[:1])) <= 10 * rtol


@pytest.mark.slow
def test_a_run_comes_to_rest_at_the_default_tolerance(rng):
    # Here an explicit method hovers at 70 to 1400 times its tolerance, for it ends at
    # the stability limit of a stiff direction; the stopping speed must lie above.
    eigenvalues = 20 * np.concatenate([[2.0, 1.5], np.linspace(0.8, 0.1, 18)])
    basis = _orthogonal(rng, 20)
    xx = basis * eigenvalues @ basis.T
    xx = jnp.asarray((xx + xx.T) / 2)
    flow = GradientFlow(SquaredLoss(Moments(xx, xx, xx, 1, autoencoding=True)))
    shapes = [(4, out, into) for into, out in itertools.pairwise((20, 2, 11, 20))]
    starts = [jnp.asarray(0.3 * rng.normal(size=shape)) for shape in shapes]

    def descend(rtol):
        lane = lambda *weights: integrate(
            flow, DeepLinear(weights), rtol=rtol, max_steps=6000, throw=False
        )
        return jax.vmap(lane)(*starts)

    solution = descend(None)
    assert set(names_of(RESULTS, solution.result)) == {"successful"}
    assert np.all(solution.speed <= 1e-6)
    best = 0.5 * np.sum(eigenvalues[2:])
    np.testing.assert_allclose(solution.energy, best, rtol=1e-10)
    # At a ratio of 100 none of them does.
    hovering = descend(1e-8)
    assert set(names_of(RESULTS, hovering.result)) == {"max_steps_reached"}
    np.testing.assert_allclose(hovering.energy, best, rtol=1e-10)


# --- What a run says of itself.


def test_solution_describes_the_end():
    solution = integrate(BOWL, ONES)
    assert solution.result == SUCCESSFUL
    np.testing.assert_allclose(solution.speed, BOWL.speed(solution.point), rtol=1e-12)
    np.testing.assert_allclose(solution.energy, BOWL.energy(solution.point), rtol=1e-12)
    assert 1e-7 < solution.speed <= 1e-6
    assert 13 < solution.time < 16
    assert solution.times is None and solution.history is None
    # The distance is relative to where it ended.
    moved = np.linalg.norm(solution.point - ONES) / np.linalg.norm(solution.point)
    np.testing.assert_allclose(solution.distance, moved, rtol=1e-12)
    assert solution.stats["steps"] > 50 and np.isclose(solution.stats["rtol"], 1e-9)
    # A looser tolerance stops earlier.
    early = integrate(BOWL, ONES, tolerance=1e-3)
    assert early.time < solution.time and 1e-4 < early.speed <= 1e-3


def test_a_start_at_rest_has_ended():
    solution = integrate(BOWL, jnp.zeros(2))
    assert solution.result == SUCCESSFUL
    assert solution.time == 0 and solution.stats["steps"] == 0
    assert solution.distance == 0


def test_a_rule_replaces_the_speed():
    low = lambda point: BOWL.energy(point) < 0.1
    solution = integrate(BOWL, ONES, stop=low)
    assert solution.result == RESULTS.rule_met
    assert 0.01 < solution.energy < 0.1 and solution.speed > 0.1
    at_once = integrate(BOWL, ONES / 10, stop=low)
    assert at_once.result == RESULTS.rule_met and at_once.time == 0
    # It alone decides: a point at rest that does not meet it runs on.
    resting = integrate(BOWL, ONES, stop=_never, horizon=100.0)
    assert resting.result == RESULTS.horizon_reached and resting.time == 100.0
    assert resting.speed < 1e-6


def test_horizon_reached_is_no_failure():
    solution = integrate(BOWL, ONES, horizon=0.7)
    assert solution.result == RESULTS.horizon_reached and solution.time == 0.7
    np.testing.assert_allclose(solution.point, _decayed(0.7), rtol=1e-7)


def test_steps_used_up():
    with pytest.raises(
        RuntimeError, match=r"^7 steps used at t=0\.\d+, speed .*: raise"
    ):
        integrate(BOWL, ONES, max_steps=7)
    solution = integrate(BOWL, ONES, max_steps=7, throw=False)
    assert solution.result == RESULTS.max_steps_reached
    assert solution.stats["steps"] + solution.stats["rejected"] == 7
    text = failure_text(solution)
    assert f"t={float(solution.time):.6g}" in text and "max_steps" in text
    # Compiled into a larger program it is an error all the same.
    with pytest.raises(RuntimeError, match="maximum number of solver steps"):
        eqx.filter_jit(lambda point: integrate(BOWL, point, max_steps=7))(ONES)


def test_blow_up():
    with pytest.raises(RuntimeError, match="step size fell to nothing at t=0.5: the"):
        integrate(BLOW_UP, jnp.ones(1))
    solution = integrate(BLOW_UP, jnp.ones(1), throw=False)
    assert solution.result == RESULTS.step_size_vanished
    np.testing.assert_allclose(solution.time, 0.5, atol=1e-6)


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, 1e200])
def test_a_start_that_is_not_finite(value):
    # The last one is, but its velocity is not.
    flow = GradientFlow(Quartic(1.0))
    start = jnp.array([1.0, value])
    with pytest.raises(RuntimeError, match="starting point or its velocity is not fin"):
        integrate(flow, start)
    solution = integrate(flow, start, throw=False)
    assert solution.result == RESULTS.not_finite
    assert solution.time == 0 and solution.stats["steps"] == 0


@pytest.mark.slow
def test_where_an_explicit_method_crawls():
    """On a bowl whose curvatures are a million apart "auto" takes a fiftieth of the
    velocities; where nothing is stiff it is Tsit5 to the last bit."""
    bowl = lambda *rates: GradientFlow(Valley(jnp.array(rates)))
    start = jnp.array([1.0, -1.0])
    settings = {"rtol": 1e-4, "tolerance": 1e-1, "horizon": 1.0, "max_steps": 10**6}
    stiff = bowl(1e5, 1.0)
    crawling = integrate(stiff, start, **settings)
    auto = integrate(stiff, start, method="auto", **settings)
    assert 50 * auto.stats["velocities"] < crawling.stats["velocities"]
    assert np.allclose(auto.point, [0, -np.exp(-1)], atol=1e-4)
    alone = Integrator(stiff, **settings).descents(start)[0]
    state = alone.init(start, jnp.zeros(()))
    step = eqx.filter_jit(lambda state: alone.step(state, jnp.asarray(1.0)))
    while not state.finished:
        state = step(state)
    assert state.result == RESULTS.stiff and state.steps < 100
    easy = bowl(1.0, 0.5)
    settings["rtol"] = 1e-6
    for name in ("point", "time"):
        one, other = (
            getattr(integrate(easy, start, method=method, **settings), name)
            for method in ("auto", diffrax.Tsit5())
        )
        assert np.array_equal(one, other)


def test_stabilised_steps_do_not_hover():
    """Tsit5 can't come to rest at a speed close to its tolerance; RKC2 can."""
    settings = {"rtol": 1e-4, "tolerance": 1e-4, "max_steps": 2000}
    flow = GradientFlow(Valley(jnp.array([1e4, 1.0])))
    with pytest.raises(ValueError, match="can't be reached with solver tolerance"):
        integrate(flow, ONES, **settings)
    solution = integrate(flow, ONES, method="auto", **settings)
    assert solution.result == SUCCESSFUL and solution.speed <= 1e-4
    with pytest.raises(ValueError, match="method='fast' must be 'auto' or a diffrax"):
        integrate(flow, ONES, method="fast")


def test_every_result_has_a_test():
    # The members that gradflow can produce are provoked above; adding one fails here.
    ours = set(names_of_members(RESULTS)) - set(names_of_members(diffrax.RESULTS))
    assert ours == {
        "rule_met",
        "horizon_reached",
        "step_size_vanished",
        "not_finite",
        "stiff",
        "energy_increased",  # in test_iterate.py
    }


def names_of_members(enumeration):
    return enumeration._name_to_item


def test_lanes_fail_alone():
    flow = GradientFlow(Quartic(1.0))
    lanes = jnp.array([[1.0, 0.5], [1.0, jnp.nan], [2.0, -3.0], [1.0, 1e200]])
    descend = lambda point: integrate(flow, point, throw=False)
    together = jax.vmap(descend)(lanes)
    names = list(names_of(RESULTS, together.result))
    assert names == ["successful", "not_finite", "successful", "not_finite"]
    # Alone, the others end in the same place, in as many steps.
    for lane in (0, 2):
        alone = descend(lanes[lane])
        assert alone.stats["steps"] == together.stats["steps"][lane]
        # (Rounding moves the steps a little, and so where the last one ends.)
        np.testing.assert_allclose(alone.point, together.point[lane], rtol=1e-5)


# --- Observations.


def test_observes_several_functions_from_time_zero():
    times = np.array([0.0, 1e-9, 0.5, 20.0])
    observe = {
        "y": _itself,
        "pair": lambda point: (point, {"norm": jnp.linalg.norm(point)}),
        "large": _large,
        "count": _count,
    }
    solution, history = _observed(BOWL, ONES, times, observe, 1e-9)
    assert set(history) == set(observe) and solution.result == RESULTS.horizon_reached
    np.testing.assert_array_equal(history["y"][0], ONES)
    np.testing.assert_array_equal(history["y"][-1], solution.point)
    np.testing.assert_allclose(history["y"][:3], _decayed(times[:3]), rtol=1e-7)
    norms = np.linalg.norm(history["y"], axis=1)
    np.testing.assert_allclose(history["pair"][1]["norm"], norms, rtol=1e-12)
    # Flags and counts come as floating numbers, among which there is a NaN.
    np.testing.assert_array_equal(history["large"], [[1, 1], [1, 1], [1, 0], [0, 0]])
    assert history["large"].dtype == history["count"].dtype == jnp.float64
    # The speed does not end an observed run, nor does a rule.
    always = lambda point: jnp.array(True)
    late, energies = _observed(BOWL, ONES, [1.0, 500.0], None, 1e-9, stop=always)
    assert late.time == 500.0 and set(energies) == {"energy"}
    expected = np.sum(_decayed(1.0) ** 2 * [1, 3]) / 2
    np.testing.assert_allclose(energies["energy"][0], expected, rtol=1e-7)
    assert abs(energies["energy"][1]) < 1e-12


def test_a_failed_run_is_nan_from_there_on():
    times = [0.1, 0.4, 0.6, 1.0]
    solution, history = _observed(
        BLOW_UP, jnp.ones(1), times, {"y": _itself}, 1e-9, throw=False
    )
    assert solution.result == RESULTS.step_size_vanished
    seen = history["y"][:, 0]
    np.testing.assert_allclose(seen[:2], [0.8**-0.5, 0.2**-0.5], rtol=1e-7)
    assert np.isnan(seen[2:]).all()
    np.testing.assert_allclose(solution.time, 0.5, atol=1e-6)
    # So is one whose steps are used up.
    solution, history = _observed(
        BLOW_UP, jnp.ones(1), times, {"y": _itself}, 1e-9, throw=False, max_steps=15
    )
    assert solution.result == RESULTS.max_steps_reached and 0.1 < solution.time < 0.4
    assert np.isfinite(history["y"][0]) and np.isnan(history["y"][1:]).all()
    with pytest.raises(RuntimeError, match="15 steps used at t=0"):
        _observed(BLOW_UP, jnp.ones(1), times, {"y": _itself}, 1e-9, max_steps=15)


# --- Methods.


@pytest.mark.parametrize(
    "method, rtol",
    [
        (diffrax.Dopri5(), 1e-6),
        (diffrax.Dopri8(), 1e-8),
        (diffrax.Heun(), 1e-6),
        (diffrax.Bosh3(), 1e-6),
        (diffrax.Kvaerno3(), 1e-6),
        (diffrax.Kvaerno5(), 1e-6),
        (stiff(), 1e-8),
        (diffrax.ImplicitEuler(), 1e-5),
        (diffrax.Euler(), 1e-5),  # without an error estimate: halved steps give one
    ],
    ids=lambda value: type(value).__name__,
)
def test_any_solver_will_do(method, rtol):
    end = integrate(
        BOWL, ONES, horizon=2.0, rtol=rtol, tolerance=1e3 * rtol, method=method,
        stop=_never,
    )  # fmt: skip
    assert end.result == RESULTS.horizon_reached and end.time == 2.0
    # Order 1 adds up the errors of some hundred steps.
    assert np.max(np.abs(end.point - _decayed(2.0))) <= 100 * rtol


def test_relay_of_methods():
    relay = (diffrax.Tsit5(), stiff())
    run = lambda **options: integrate(BOWL, ONES, tolerance=1e-5, **options)
    alone, both = run(), run(method=relay)
    whole = int(alone.stats["steps"] + alone.stats["rejected"])
    # If the first gets there by itself the second is idle.
    assert alone.stats["steps"] == both.stats["steps"]
    np.testing.assert_allclose(alone.time, both.time, rtol=1e-9)
    # If not, the second goes on from there, with steps of its own.
    part = whole // 2
    failed = run(max_steps=part, throw=False)
    assert failed.result == RESULTS.max_steps_reached and failed.time < alone.time
    solution = run(method=relay, max_steps=part + 10)
    assert solution.result == SUCCESSFUL and solution.speed <= 1e-5
    trials = solution.stats["steps"] + solution.stats["rejected"]
    assert part + 10 < trials < 2 * (part + 10)
    # Observed, it changes over between two times.
    times = np.array([0.0, 0.5, 1.5, 3.0, 6.0])
    solution, history = _observed(
        BOWL, ONES, times, {"y": _itself}, 1e-8, method=relay, max_steps=part + 10
    )
    assert solution.stats["steps"] + solution.stats["rejected"] > part + 10
    np.testing.assert_allclose(history["y"], _decayed(times), atol=1e-6)
    # When both run out, the last one says so.
    with pytest.raises(RuntimeError, match="^14 steps used"):
        run(method=relay, max_steps=7)


def test_a_failure_is_handed_on():
    # The second method must not start where the first found the end of the solution.
    run = lambda start: integrate(
        BLOW_UP, start, method=(diffrax.Tsit5(), diffrax.Dopri5()), throw=False
    )
    assert run(jnp.ones(1)).result == RESULTS.step_size_vanished
    assert run(jnp.full(1, jnp.nan)).result == RESULTS.not_finite


# --- Stopping, storing, going on.


def test_a_stored_state_goes_on_as_if_nothing_had_been(tmp_path):
    descent = Descent(
        BOWL,
        diffrax.Tsit5(),
        NormwiseStepSize(jnp.asarray(1e-9)),
        jnp.asarray(1e-6),
        None,
        jnp.asarray(16384),
    )
    horizon = jnp.asarray(1e6)
    step = eqx.filter_jit(descent.step)

    def finish(state):
        while not descent.finished(state):
            state = step(state, horizon)
        return state

    begun = eqx.filter_jit(descent.init)(ONES, jnp.asarray(0.0))
    whole = finish(begun)
    state = begun
    for _ in range(25):
        state = step(state, horizon)
    assert not descent.finished(state)
    eqx.tree_serialise_leaves(tmp_path / "state", state)
    again = finish(eqx.tree_deserialise_leaves(tmp_path / "state", begun))
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(a, b)
    # As plain arrays, too.
    leaves, structure = jax.tree.flatten(state)
    np.savez(tmp_path / "state.npz", *leaves)
    stored = np.load(tmp_path / "state.npz", allow_pickle=False)
    restored = [jnp.asarray(stored[name]) for name in stored.files]
    solution = descent.solution(finish(jax.tree.unflatten(structure, restored)))
    np.testing.assert_array_equal(solution.point, whole.point)
    # And it is what `integrate` does.
    integrated = integrate(BOWL, ONES)
    assert integrated.stats["steps"] == solution.stats["steps"]
    np.testing.assert_allclose(integrated.time, solution.time, rtol=1e-6)


# --- Precision and arguments.


def test_float32_comes_to_rest_at_its_own_default():
    flow, start, moments = _small_problem()
    single = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree)
    flow32 = GradientFlow(SquaredLoss(single(moments)))
    solution = integrate(flow32, single(start))
    assert solution.result == SUCCESSFUL and solution.speed <= 1e-2
    for value in (
        solution.energy,
        solution.speed,
        solution.time,
        *solution.point.factors(),
    ):
        assert value.dtype == jnp.float32
    assert np.isclose(solution.stats["rtol"], 1e-5)
    best = np.linalg.norm(
        np.asarray(solution.point.matrix(), np.float64) - moments.xy.T
    )
    assert best < 1e-1
    # Its default rtol is 1e-5; times and observations are in single precision too.
    solution, history = _observed(BOWL, single(ONES), [0.0, 2.0], {"y": _itself}, 1e-5)
    assert history["y"].dtype == solution.time.dtype == jnp.float32
    assert np.max(np.abs(np.asarray(history["y"][1]) - _decayed(2.0))) < 100 * 1e-5
    with pytest.raises(ValueError, match="below what float32 can reach"):
        integrate(flow32, single(start), tolerance=1e-6)


REFUSED = [
    ({"tolerance": 0.0}, "tolerance must be > 0, got 0.0"),
    ({"tolerance": -1.0}, "tolerance must be > 0, got -1.0"),
    ({"tolerance": np.nan}, "tolerance must be > 0, got nan"),
    ({"tolerance": np.inf}, "tolerance must be finite"),
    ({"rtol": 0.0}, "rtol must be > 0, got 0.0"),
    ({"rtol": np.nan}, "rtol must be > 0, got nan"),
    (
        {"tolerance": 1e-9, "rtol": 1e-9},
        "tolerance=1e-09 can't be reached with solver tolerance 1e-09: the speed of a "
        "numerical run hovers some hundred times above it, so use rtol <= 1e-12 or "
        "tolerance >= 1e-06",
    ),
    ({"rtol": 1e-7}, "tolerance=1e-06 can't be reached with solver tolerance 1e-07"),
    ({"tolerance": 1e-13}, "below what float64 can reach.*use tolerance >= 1.8e-12"),
    ({"horizon": 0.0}, "horizon must be > 0, got 0.0"),
    ({"horizon": -1.0}, "horizon must be > 0, got -1.0"),
    ({"horizon": np.nan}, "horizon must be > 0, got nan"),
    ({"max_steps": 0}, "max_steps must be > 0, got 0"),
    ({"max_steps": jnp.array(-1)}, "max_steps must be > 0, got -1"),
    ({"times": jnp.array([])}, "times has shape .0,.: give at least one"),
    ({"times": jnp.array([1.0, 1.0])}, "times must increase strictly"),
    ({"times": jnp.array([2.0, 1.0])}, "times must increase strictly"),
    ({"times": jnp.array([-1.0, 1.0])}, "times must be finite and >= 0"),
    ({"times": jnp.array([1.0, jnp.inf])}, "times must be finite and >= 0"),
    ({"times": jnp.array([jnp.nan])}, "times must be finite and >= 0"),
    ({"observe": {"w": _product}}, "observe is given without times"),
    ({"method": ()}, "method is empty"),
]


@pytest.mark.parametrize("options, text", REFUSED, ids=lambda value: None)
def test_refuses(options, text):
    with pytest.raises(ValueError, match=text):
        integrate(BOWL, ONES, **options)


def test_refuses_what_is_not_a_number_or_a_solver():
    # The type checker of the tests refuses these at the border; these come behind it.
    from gradflow.solve import _adaptive, _checked_times, check_positive

    for value in ("1", None, True, [1.0], jnp.ones(2)):
        with pytest.raises(ValueError, match="tolerance must be a number > 0"):
            check_positive("tolerance", value)
    for value in (2.5, True, jnp.array(2.5)):
        with pytest.raises(ValueError, match="max_steps must be a whole number > 0"):
            check_positive("max_steps", value, whole=True)
    for value in ("tsit5", diffrax.Tsit5, 3):
        with pytest.raises(ValueError, match="is no diffrax solver"):
            _adaptive(value, 1e-9, jnp.ones(2))
    with pytest.raises(ValueError, match=r"times has shape \(1, 1\)"):
        _checked_times([[1.0]], jnp.float64)


@pytest.mark.parametrize(
    "point", [jnp.array([1, 2]), {"a": 1.0}, (), jnp.array([1j]), [jnp.ones(2), "x"]]
)
def test_refuses_points_that_are_not_floating(point):
    flow = GradientFlow(Quartic(1.0))
    with pytest.raises(ValueError, match="point0 must be made of real floating point"):
        integrate(flow, point)


def test_a_traced_number_is_taken_as_it_is():
    # A sweep over max_steps under vmap can't be checked beforehand, and works.
    descend = lambda count: integrate(BOWL, ONES, max_steps=count, throw=False)
    solution = jax.vmap(descend)(jnp.array([5, 400]))
    names = list(names_of(RESULTS, solution.result))
    assert names == ["max_steps_reached", "successful"]


def test_depth_one_is_the_linear_map(rng):
    # One matrix, two ways to write it.
    moments = _whitened(rng.normal(size=(2, 3)))
    flow = GradientFlow(SquaredLoss(moments))
    weight = jnp.asarray(rng.normal(size=(2, 3)))
    ends = [
        integrate(flow, point, horizon=1.0).point.matrix()
        for point in (LinearMap(weight), DeepLinear((weight,)))
    ]
    np.testing.assert_allclose(ends[0], ends[1], rtol=1e-13)
