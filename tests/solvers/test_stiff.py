import diffrax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optimistix as optx
import pytest

from gradflow.flow import GradientFlow
from gradflow.initial import GaussianInit
from gradflow.models.linear import SquaredLoss
from gradflow.moments import Moments
from gradflow.solution import RESULTS
from gradflow.solve import integrate
from gradflow.solvers import stiff
from gradflow.solvers.stiff import StageNewton


SIZE = 3
TARGET = jr.normal(jr.key(9), (SIZE, SIZE))
FLOW = GradientFlow(SquaredLoss(Moments(jnp.eye(SIZE), TARGET.T, TARGET @ TARGET.T, 1)))


def _deep_start(scale):
    init = GaussianInit((SIZE,) * 6, scale / np.sqrt(SIZE))
    return init(jr.key(3))


@pytest.mark.slow
def test_stiff_solves_what_an_explicit_method_cannot():
    # Depth 5 with entries of size 9: the fastest mode is some 1e9 times the slowest.
    start = _deep_start(16.0)
    descend = lambda method: integrate(
        FLOW, start, method=method, tolerance=1e-3, max_steps=1000, throw=False
    )
    explicit = descend(diffrax.Tsit5())
    assert explicit.result == RESULTS.max_steps_reached and explicit.time < 1e-4
    implicit = descend(stiff())
    assert implicit.result == RESULTS.successful and implicit.speed <= 1e-3
    assert implicit.time > 100
    assert implicit.stats["steps"] + implicit.stats["rejected"] < 400
    # Where optimistix's own stopping rules fail: see the docstrings.
    newton = diffrax.with_stepsize_controller_tols(optx.Newton)()
    stalled = descend(diffrax.Kvaerno5(root_finder=newton))
    assert stalled.result == RESULTS.max_steps_reached


@pytest.mark.slow
def test_stiff_is_as_accurate_as_its_tolerance():
    # Against an explicit method at a tolerance a thousand times tighter.
    start = _deep_start(2.0)
    ends = [
        integrate(
            FLOW, start, method=method, horizon=0.5, rtol=rtol, tolerance=1e3 * rtol
        ).point.matrix()
        for method, rtol in [(stiff(), 1e-8), (diffrax.Tsit5(), 1e-11)]
    ]
    np.testing.assert_allclose(ends[0], ends[1], atol=1e-6)


def test_newton_finds_a_root_and_reports_when_there_is_none():
    newton = StageNewton(rtol=1e-10, atol=1e-10)
    solve = lambda function, start: optx.root_find(
        function, newton, start, max_steps=30, throw=False
    )
    found = solve(lambda y, args: jnp.tanh(y) - 0.5 + 0.01 * y**3, jnp.array([3.0]))
    assert found.result == optx.RESULTS.successful
    np.testing.assert_allclose(
        jnp.tanh(found.value) + 0.01 * found.value**3, 0.5, rtol=1e-12
    )
    rootless = solve(lambda y, args: y**2 + 1, jnp.array([0.7]))
    assert rootless.result != optx.RESULTS.successful
    singular = solve(lambda y, args: jnp.sum(y) - jnp.arange(2.0), jnp.ones(2))
    assert singular.result != optx.RESULTS.successful
    overflowing = solve(lambda y, args: y * jnp.inf, jnp.array([0.7]))
    assert overflowing.result != optx.RESULTS.successful
