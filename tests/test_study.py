import os
import subprocess
import sys
from typing import Any, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from scipy import stats

from gradflow import (
    classify,
    fraction,
    GaussianInit,
    GradientFlow,
    integrate,
    Integrator,
    KIND,
    names_of,
    RESULTS,
    RULE,
    run_study,
    Solution,
    Store,
    Study,
    without_points,
)
from gradflow.datasets import gaussian
from gradflow.models import SquaredLoss
from gradflow.precision import precision
from gradflow.statistics import clopper_pearson
from gradflow.theory import LinearTheory


# ---- two studies: of a deep linear network, and of a loop that compiles at once


def _certify(theory, solution):
    return theory.certificate(solution.point)


def _sign(solution):
    return jnp.sign(solution.point)


def _network_study(draws, batch, *, initialize=None, verdict=True, tolerance=1e-3):
    theory = LinearTheory(SquaredLoss(gaussian(jr.key(7), 3, 9)), 1)
    flow = GradientFlow(theory.energy)
    descend = eqx.Partial(
        integrate,
        flow,
        stop=theory.certificate,
        tolerance=tolerance,
        max_steps=jnp.asarray(400),
        throw=False,
    )
    start = GaussianInit((3, 1, 3), jnp.asarray(0.3))
    # The verdict takes longer to compile than all else.
    certify = eqx.Partial(_certify, theory)
    inspect = eqx.Partial(classify, flow, theory) if verdict else certify
    return Study(initialize or start, descend, inspect, draws=draws, batch=batch)


def _halve(point, max_steps=100):
    """Halves a number until it is below 1e-3, in unit time a step."""
    steps = jax.lax.while_loop(
        lambda n: (n < max_steps) & (jnp.abs(point) * 0.5**n >= 1e-3),
        lambda n: n + 1,
        jnp.asarray(0),
    )
    end = point * 0.5**steps
    done = jnp.abs(end) < 1e-3
    result: Any = RESULTS.where(done, RESULTS.rule_met, RESULTS.max_steps_reached)  # pyright: ignore[reportArgumentType]
    return Solution(
        point=end,
        energy=end**2,
        speed=jnp.abs(end),
        time=steps.astype(end.dtype),
        distance=jnp.abs(point - end),
        times=None,
        history=None,
        result=result,
        stats={"steps": steps, "rejected": jnp.zeros_like(steps)},
    )


def _loop_study(draws, batch=4, descend=_halve, inspect=_sign):
    initialize = lambda key: 10.0 * jr.normal(key)
    return Study(initialize, descend, inspect, draws=draws, batch=batch)


def _leaves(outcome):
    return jax.tree.leaves((outcome.solution, outcome.finding))


def _of(tree, draw):
    return jax.tree.map(lambda leaf: leaf[draw], tree)


def _assert_same_bits(one, other):
    for a, b in zip(_leaves(one), _leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


# ---- what a draw is


@pytest.fixture(scope="module")
def outcome_by_eight():
    return run_study(_network_study(10, 8), jr.key(5))


def _assert_same_runs(one, other):
    """The same steps to the same ends, within ten times the solver's tolerance: what
    rounding changes in an error estimate moves the times of the steps."""
    for name in ("steps", "rejected"):
        np.testing.assert_array_equal(one.stats[name], other.stats[name])
    np.testing.assert_array_equal(
        names_of(RESULTS, one.result), names_of(RESULTS, other.result)
    )
    for a, b in zip(
        jax.tree.leaves((one.point, one.energy, one.time, one.distance)),
        jax.tree.leaves((other.point, other.energy, other.time, other.distance)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_draw_alone_is_draw_in_company(outcome_by_eight):
    study = _network_study(10, 8)
    for draw in (0, 7, 9):
        point = study.initialize(jr.fold_in(jr.key(5), draw))
        alone = eqx.filter_jit(study.descend)(point)
        _assert_same_runs(alone, _of(outcome_by_eight.solution, draw))


@pytest.mark.parametrize("batch", [3, 16])
def test_batch_size_changes_no_draw(outcome_by_eight, batch):
    # The last batches are short: 10 draws by 8 and by 3.
    outcome = run_study(_network_study(10, batch, verdict=False), jr.key(5))
    _assert_same_runs(outcome.solution, outcome_by_eight.solution)
    certified = outcome_by_eight.finding.kind == KIND.global_minimum
    np.testing.assert_array_equal(outcome.finding, certified)


def test_same_batch_size_gives_the_same_bits(outcome_by_eight):
    _assert_same_bits(run_study(_network_study(10, 8), jr.key(5)), outcome_by_eight)
    more = run_study(_network_study(17, 8), jr.key(5))
    for a, b in zip(_leaves(more), _leaves(outcome_by_eight), strict=True):
        np.testing.assert_array_equal(a[:10], b)


def test_draws_depend_on_the_key():
    study = _loop_study(6)
    one, other = run_study(study, jr.key(1)), run_study(study, jr.key(2))
    assert not np.any(one.solution.point == other.solution.point)
    assert len(set(one.solution.point)) == 6
    # A key in the older form is the same key.
    old = run_study(study, jr.key_data(jr.key(1)))
    _assert_same_bits(old, one)


def test_draws_are_those_of_their_number():
    study = Study(jr.normal, _halve, _sign, draws=9, batch=4)
    points = np.array([jr.normal(jr.fold_in(jr.key(3), i)) for i in range(9)])
    outcome = run_study(study, jr.key(3))
    ends = points * 0.5**outcome.solution.time
    np.testing.assert_allclose(outcome.solution.point, ends, rtol=1e-15)


# ---- batches


@pytest.mark.parametrize("draws", [1, 4, 5, 7, 8])
def test_short_last_batch(draws):
    outcome = run_study(_loop_study(draws), jr.key(0))
    for leaf in _leaves(outcome):
        assert isinstance(leaf, np.ndarray) and leaf.shape == (draws,)
    whole = run_study(_loop_study(8), jr.key(0))
    np.testing.assert_array_equal(outcome.finding, whole.finding[:draws])


def test_compilations_do_not_grow_with_batches():
    traces = []

    def study(draws):
        def counted(name, function):
            def call(argument):
                traces.append(name)
                return function(argument)

            return call

        return Study(
            counted("initialize", jr.normal),
            counted("descend", _halve),
            counted("inspect", _sign),
            draws=draws,
            batch=4,
        )

    run_study(study(4), jr.key(0))
    one_batch = sorted(traces)
    assert set(one_batch) == {"initialize", "descend", "inspect"}
    traces.clear()
    # 13 batches, the last of them short.
    run_study(study(49), jr.key(0))
    assert sorted(traces) == one_batch


def test_seconds_are_of_first_and_other_batches():
    outcome = run_study(_loop_study(8), jr.key(0))
    assert set(outcome.seconds) == {"first batches", "other batches"}
    assert outcome.seconds["first batches"] > outcome.seconds["other batches"] > 0


def test_progress_is_shown_when_asked(capsys):
    run_study(_loop_study(6), jr.key(0), progress=True)
    assert "6/6" in capsys.readouterr().err
    run_study(_loop_study(6), jr.key(0), progress=False)
    assert capsys.readouterr().err == ""


# ---- draws that fail


def _with_nan(key):
    network = GaussianInit((3, 1, 3), jnp.asarray(0.3))(key)
    bad = jnp.all(jr.key_data(key) == jr.key_data(jr.fold_in(jr.key(5), 4)))
    return jax.tree.map(lambda leaf: jnp.where(bad, jnp.nan, leaf), network)


def test_a_draw_that_is_not_finite_touches_no_other(outcome_by_eight):
    outcome = run_study(_network_study(10, 8, initialize=_with_nan), jr.key(5))
    others = np.arange(10) != 4
    for a, b in zip(_leaves(outcome), _leaves(outcome_by_eight), strict=True):
        np.testing.assert_array_equal(a[others], b[others])
    kinds = names_of(KIND, outcome.finding.kind)
    assert kinds[4] == "diverged" and not np.any(kinds[others] == "diverged")
    assert names_of(RESULTS, outcome.solution.result)[4] == "not_finite"
    share = fraction(outcome.finding.kind == KIND.global_minimum)
    assert (share.count, share.draws) == (9, 10)


# ---- precision


@pytest.mark.parametrize("flag", [False, True])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_dtype_holds_whatever_the_global_flag(flag, dtype):
    with jax.enable_x64(flag):
        # Arrays of the study are made under the other flag, too.
        shift = jnp.asarray(1.5)
        count = jnp.asarray(3)
        study = Study(
            eqx.Partial(lambda shift, count, key: shift + jr.normal(key), shift, count),
            eqx.Partial(_halve, max_steps=count),
            _sign,
            draws=3,
        )
        outcome = run_study(study, jr.key(0), dtype=dtype)
        assert jnp.asarray(1.0).dtype == (jnp.float64 if flag else jnp.float32)
    assert outcome.solution.point.dtype == dtype
    assert outcome.solution.time.dtype == dtype
    assert outcome.finding.dtype == dtype


def test_float64_is_the_default():
    with jax.enable_x64(False):
        outcome = run_study(_loop_study(3), jr.key(5))
    assert outcome.solution.point.dtype == np.float64
    _assert_same_bits(outcome, run_study(_loop_study(3), jr.key(5)))


def test_float32_of_a_network(outcome_by_eight):
    study = _network_study(10, 8, verdict=False, tolerance=0.01)
    outcome = run_study(study, jr.key(5), dtype="float32")
    for leaf in jax.tree.leaves((outcome.solution.point, outcome.solution.energy)):
        assert leaf.dtype == np.float32
    certified = outcome_by_eight.finding.kind == KIND.global_minimum
    np.testing.assert_array_equal(outcome.finding, certified)


@pytest.mark.slow
def test_verdicts_in_float64_of_runs_in_float32():
    """The draws of float64, rounded; the same verdicts; ends of float32 precision."""
    exact = _network_study(40, 8)
    study = eqx.tree_at(
        lambda s: s.descend,
        exact,
        Integrator(
            GradientFlow(exact.descend.keywords["stop"].energy),
            stop=exact.descend.keywords["stop"],
            tolerance=1e-3,
        ),
    )
    one, other = (run_study(study, jr.key(5), dtype=d) for d in ("float64", "mixed"))
    for name, members in (("kind", KIND), ("rule", RULE)):
        a, b = (names_of(members, getattr(x.finding, name)) for x in (one, other))
        assert np.array_equal(a, b)
    assert np.all(names_of(KIND, one.finding.kind) == "global_minimum")
    ends = (outcome.solution.point.weights for outcome in (one, other))
    for a, b in zip(*ends, strict=True):
        assert b.dtype == np.float64 and np.array_equal(b, b.astype(np.float32))
        assert not np.array_equal(a, a.astype(np.float32))
    # To a step: both stop at the first that certifies them.
    assert np.allclose(one.solution.time, other.solution.time, atol=0.7)


@pytest.mark.slow
def test_two_devices_change_no_bit(tmp_path):
    """Each has a queue of its own."""
    program = """if True:
        import sys
        import jax, jax.random as jr, numpy as np
        import gradflow as gf
        if sys.argv[1] == "2":
            assert len(jax.devices()) == 2
        def outcome():
            theory = gf.theory.LinearTheory(energy, 2)
            descend = gf.Integrator(gf.GradientFlow(energy), stop=theory.certificate)
            inspect = lambda solution: solution.time
            study = gf.Study(gf.GaussianInit((4, 2, 4), 0.3), descend, inspect, 60, 8)
            return gf.run_study(study, jr.key(0), progress=False).solution
        jax.config.update("jax_enable_x64", True)
        energy = gf.models.SquaredLoss(gf.datasets.gaussian(jr.key(1), 4, 20))
        found = jax.tree.leaves(outcome())
        np.savez(sys.argv[2], *found)
    """
    files = []
    for count in ("1", "2"):
        files.append(tmp_path / f"{count}.npz")
        flags = f"--xla_force_host_platform_device_count={count}"
        environment = {**os.environ, "XLA_FLAGS": flags}
        command = [sys.executable, "-c", program, count, str(files[-1])]
        subprocess.run(command, env=environment, check=True)
    one, two = (np.load(file) for file in files)
    assert len(one.files) > 5
    for name in one.files:
        np.testing.assert_array_equal(one[name], two[name])


def test_precision_is_left_again():
    with pytest.raises(RuntimeError):
        with precision("float32"):
            assert jnp.asarray(1.0).dtype == jnp.float32
            raise RuntimeError
    assert jnp.asarray(1.0).dtype == jnp.float64


def test_device_that_is_there():
    outcome = run_study(_loop_study(3), jr.key(0), device="cpu")
    _assert_same_bits(outcome, run_study(_loop_study(3), jr.key(0)))


# ---- fractions


def _flags(count, draws, undecided=0):
    order = np.arange(draws)
    return order < count, (order >= count) & (order < count + undecided)


@pytest.mark.parametrize(
    "count, draws", [(0, 1), (1, 1), (0, 20), (3, 20), (20, 20), (255, 256), (7, 1000)]
)
def test_interval_is_that_of_clopper_and_pearson(count, draws):
    share = fraction(_flags(count, draws)[0])
    low = stats.beta.ppf(0.025, count, draws - count + 1) if count else 0.0
    high = stats.beta.ppf(0.975, count + 1, draws - count) if count < draws else 1.0
    assert share.low == pytest.approx(low, abs=1e-12)
    assert share.high == pytest.approx(high, abs=1e-12)
    assert (share.outer_low, share.outer_high) == (share.low, share.high)
    assert share.estimate == count / draws


@pytest.mark.parametrize("draws", [1, 5, 20, 100, 256, 1000])
def test_coverage(draws):
    """At least 95 % for every probability, by the exact sum over all counts."""
    counts = np.arange(draws + 1)
    low, high = np.array([clopper_pearson(int(k), draws) for k in counts]).T
    # Coverage jumps at the ends of the intervals, so its least is beside one.
    ends = [np.nextafter(low, -1), np.nextafter(high, 2)]
    grid = np.concatenate([np.linspace(0, 1, 201), [1e-3, 0.05], *ends])
    grid = np.unique(grid[(grid >= 0) & (grid <= 1)])
    assert {0.0, 1e-3, 0.05, 0.5, 1.0} <= set(grid)
    chance = stats.binom.pmf(counts[None, :], draws, grid[:, None])
    covered = (low[None, :] <= grid[:, None]) & (grid[:, None] <= high[None, :])
    coverage = np.sum(chance * covered, axis=1)
    assert coverage.min() >= 0.95 - 1e-12
    # And it is not so by being everything.
    if draws >= 100:
        assert coverage.min() < 0.97 and np.max(high - low) < 0.21


@pytest.mark.parametrize(
    "count, draws, undecided", [(17, 20, 3), (0, 10, 10), (5, 9, 1)]
)
def test_undecided_draws_count_both_ways(count, draws, undecided):
    share = fraction(*_flags(count, draws, undecided))
    assert (share.count, share.draws, share.undecided) == (count, draws, undecided)
    none, every = _flags(count, draws)[0], _flags(count + undecided, draws)[0]
    assert (share.low, share.high) == (fraction(none).low, fraction(none).high)
    assert share.outer_low == fraction(none).low
    assert share.outer_high == fraction(every).high > share.high
    assert f"{undecided} undecided" in str(share)
    assert f"{count} of {draws}" in str(share)


def test_fraction_of_any_array_of_truths():
    expected = fraction(np.array([True, False, True]))
    assert str(fraction(jnp.array([True, False, True]))) == str(expected)
    assert str(fraction([True, False, True])) == str(expected)
    assert "undecided" not in str(expected)


# ---- what is held in memory


def test_points_need_not_be_held(tmp_path):
    study = _network_study(40, 8, verdict=False)
    whole = run_study(study, jr.key(0))
    with Store(tmp_path, chunk=16) as store:
        kept = run_study(study, jr.key(0), store=store, keep=without_points)
    bare = run_study(study, jr.key(0), keep=without_points)
    for outcome in (kept, bare):
        assert outcome.solution.point is None
        assert np.array_equal(cast(Any, outcome.finding), cast(Any, whole.finding))
        assert outcome.solution.time.shape == (40,)
    # The folder has them all the same.
    with Store(tmp_path, chunk=16) as store:
        again = run_study(study, jr.key(0), store=store)
    assert np.array_equal(again.solution.time, kept.solution.time)
    assert again.solution.point.weights[0].shape == (40, 1, 3)
