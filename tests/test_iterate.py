"""Iterations are descents: loops, lanes, studies and failures."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from latents import energy_of, planted_covariance, point_of

from gradflow.em import AbstractIteration, ExpectationMaximization
from gradflow.iterate import iterate, Iterator
from gradflow.models import AbstractEnergy
from gradflow.solution import failure_text, RESULTS
from gradflow.study import run_study, Study
from gradflow.types import names_of


@pytest.fixture
def problem(getkey):
    energy = energy_of("fa", planted_covariance(getkey(), 6, 1))
    return ExpectationMaximization(energy), point_of("fa", getkey())


def _by_hand(iteration, point, steps):
    """A plain loop, in as many small programs as there are steps."""
    step = eqx.filter_jit(lambda point: iteration.step(point))
    energies = [iteration.energy(point)]
    for _ in range(steps):
        point = step(point)
        energies.append(iteration.energy(point))
    return point, np.array(energies)


def test_iterate_is_the_loop(problem):
    iteration, start = problem
    end = iterate(iteration, start, max_steps=7, throw=False)
    point, energies = _by_hand(iteration, start, 7)
    for a, b in zip(jax.tree.leaves(end.point), jax.tree.leaves(point), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-13)
    np.testing.assert_allclose(end.energy, energies[-1], rtol=1e-14)
    assert end.time == 7 and end.stats["steps"] == 7 and end.stats["velocities"] == 7
    np.testing.assert_allclose(
        end.stats["increase"], np.diff(energies).max(), rtol=1e-6
    )
    assert end.result == RESULTS.max_steps_reached
    assert "7 iterations used, the last of length" in failure_text(end)
    with pytest.raises(RuntimeError, match="accelerate with Squarem"):
        iterate(iteration, start, max_steps=7)


@pytest.mark.slow
def test_a_run_ends_at_short_steps(problem):
    iteration, start = problem
    end = iterate(iteration, start, tolerance=1e-5)
    assert end.result == RESULTS.successful and end.speed <= 1e-5
    point, _ = _by_hand(iteration, start, int(end.stats["steps"]) - 2)
    assert iteration.speed(point) > 1e-5
    again = iterate(iteration, end.point, tolerance=1e-5)
    assert again.stats["steps"] == 1 and again.distance < 1e-5


def test_observed_runs(problem):
    iteration, start = problem
    times = jnp.array([0.0, 1.0, 2.5, 6.0])
    end = iterate(
        iteration, start, times=times, observe={"energy": iteration.energy}, stop=None
    )
    _, energies = _by_hand(iteration, start, 6)
    assert end.time == 6 and end.result == RESULTS.horizon_reached
    by_default = iterate(iteration, start, times=times)
    assert end.history is not None and by_default.history is not None
    np.testing.assert_allclose(end.history["energy"], energies[[0, 1, 3, 6]])
    np.testing.assert_array_equal(by_default.history["energy"], end.history["energy"])
    with pytest.raises(ValueError, match="observe is given without times"):
        iterate(iteration, start, observe={})


def test_a_rule_ends_a_run(problem):
    iteration, start = problem
    _, energies = _by_hand(iteration, start, 4)
    level = 0.5 * (energies[3] + energies[4])
    end = iterate(iteration, start, stop=lambda p: iteration.energy(p) < level)
    assert end.result == RESULTS.rule_met and end.stats["steps"] == 4
    at_once = iterate(iteration, start, stop=lambda p: jnp.array(True))
    assert at_once.result == RESULTS.rule_met and at_once.stats["steps"] == 0


def test_a_small_gain_ends_a_run(problem):
    iteration, start = problem
    _, energies = _by_hand(iteration, start, 12)
    gains = -np.diff(energies)
    assert np.all(np.diff(gains[3:]) < 0)
    end = iterate(iteration, start, gain=0.5 * float(gains[8] + gains[9]))
    assert end.result == RESULTS.successful and end.stats["steps"] == 10


class Bowl(AbstractEnergy):
    """$x^2$, or a NaN where x < 0."""

    def __call__(self, point):
        return jnp.where(point[0] >= 0, point[0] ** 2, jnp.nan)


class Shift(AbstractIteration):
    energy: Bowl
    by: float

    def step(self, point):
        return point + self.by


def test_an_increase_ends_the_run_before_it():
    start = jnp.array([1.0])
    end = iterate(Shift(Bowl(), 0.5), start, throw=False)
    assert end.result == RESULTS.energy_increased
    assert end.point[0] == 1 and end.energy == 1 and end.stats["steps"] == 1
    np.testing.assert_allclose(end.stats["increase"], 1.25)
    with pytest.raises(
        RuntimeError, match=r"rose by 1.25 at iteration 1 \(tolerance 1"
    ):
        iterate(Shift(Bowl(), 0.5), start)
    # Within the slack it is rounding.
    end = iterate(Shift(Bowl(), 0.5), start, slack=1.3, max_steps=1, throw=False)
    assert end.result == RESULTS.max_steps_reached and end.point[0] == 1.5
    # A NaN is an increase, and what came before it is good.
    end = iterate(Shift(Bowl(), -0.4), start, throw=False)
    assert end.result == RESULTS.energy_increased and end.stats["increase"] == jnp.inf
    np.testing.assert_allclose(end.point[0], 0.2)
    with pytest.raises(RuntimeError, match="The starting point or its velocity is not"):
        iterate(Shift(Bowl(), -0.4), -start)


def test_a_study_of_em_refills_its_lanes(problem):
    """Draws in lanes are the draws alone, however many lanes there are."""
    iteration, _ = problem
    starts = lambda key: point_of("fa", key)
    found = []
    for batch in (3, 8):
        study = Study(starts, Iterator(iteration), lambda s: s.energy, 10, batch)
        found.append(run_study(study, jr.key(3), progress=False))
    first, second = found
    assert np.all(names_of(RESULTS, first.solution.result) == "successful")
    np.testing.assert_allclose(first.finding, second.finding, atol=1e-12)
    np.testing.assert_array_equal(
        first.solution.stats["steps"], second.solution.stats["steps"]
    )
    assert first.solution.stats["heywood"].shape == (10, 6)
    alone = Iterator(iteration)(starts(jr.fold_in(jr.key(3), 4)))
    np.testing.assert_allclose(first.solution.energy[4], alone.energy, atol=1e-12)
    assert first.solution.stats["steps"][4] == alone.stats["steps"]
    np.testing.assert_allclose(first.solution.distance[4], alone.distance, rtol=1e-6)


def test_failures_stay_in_a_study(problem):
    iteration, _ = problem
    study = Study(
        lambda key: point_of("fa", key),
        Iterator(iteration, max_steps=3),
        lambda s: s.speed,
        4,
    )
    outcome = run_study(study, jr.key(0), progress=False)
    assert np.all(names_of(RESULTS, outcome.solution.result) == "max_steps_reached")
    np.testing.assert_array_equal(outcome.solution.stats["steps"], 3)


def test_float32(problem):
    iteration, start = problem
    narrow = lambda tree: jax.tree.map(
        lambda x: x.astype(jnp.float32) if eqx.is_inexact_array(x) else x, tree
    )
    wide = iterate(iteration, start)
    end = iterate(narrow(iteration), narrow(start))
    assert end.energy.dtype == jnp.float32 and end.result == RESULTS.successful
    np.testing.assert_allclose(end.energy, wide.energy, rtol=1e-4)


@pytest.mark.parametrize("name", ["tolerance", "slack", "gain", "max_steps"])
def test_numbers_refuse(problem, name):
    iteration, start = problem
    for bad in (0, -1, np.nan, "x"):
        numbers = {name: bad}
        with pytest.raises(ValueError, match=f"{name} must be"):
            _unchecked(iteration, **numbers)
    del start
    with pytest.raises(ValueError, match="tolerance must be finite"):
        _unchecked(iteration, tolerance=np.inf)


def _unchecked(iteration, **changes):
    """Past the annotations, which refuse some of this too."""
    iterator = Iterator(iteration)
    for name, value in changes.items():
        object.__setattr__(iterator, name, value)
    iterator.__check_init__()


def test_points_of_other_things_refuse(problem):
    iteration, _ = problem
    with pytest.raises(ValueError, match="point0 must be made of real floating point"):
        iterate(iteration, jnp.arange(3))
