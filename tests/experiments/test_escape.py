"""Rounding and planted perturbations, against when theory says that they escape."""

import json
import math

import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_hex

from gradflow import GradientFlow, Moments, plot
from gradflow.experiments import escape
from gradflow.experiments.escape import Config, run
from gradflow.experiments.remark42 import (
    crossing,
    draw,
    SeparatedFlow,
    shares,
    SumAndDifference,
)
from gradflow.manifolds import Euclidean
from gradflow.models import DeepLinear, SquaredLoss
from gradflow.theory.dynamics import remark42, stacked_velocity


EPS = (1e-2, 1e-8, 1e-14)
EIGENVALUES = (2.0, 0.8, 0.4)


@pytest.fixture(autouse=True)
def no_figure_is_left():
    matplotlib.use("agg")
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def report():
    return run(Config(eps=EPS, draws=2), progress=False)


def _rows(report, **wanted):
    rows = [row for row in report.rows if all(row[k] == v for k, v in wanted.items())]
    assert rows
    return rows


@pytest.mark.slow
def test_rows(report):
    assert len(report.rows) == 5 + 4 * len(EPS)
    for row in report.rows:
        assert row["escaped"] + row["stayed"] + row["undecided"] == row["draws"] == 2
        pushed = row["perturbation"] != "none"
        assert row["escaped" if pushed else "stayed"] == 2
    assert report.experiment == "escape" and report.claim == escape.CLAIM
    json.loads(report.to_json())


@pytest.mark.slow
def test_slope_over_twelve_decades(report):
    slopes = {slope["series"]: slope for slope in report.figure["slopes"]}
    assert len(slopes) == 4
    for name in ("separated, float64", "factors, float64"):
        slope = slopes[f"{name}, unbalanced"]
        assert slope["decades"] == pytest.approx(12)
        assert slope["in theory"] == 1 / EIGENVALUES[0]
        assert slope["ratio"] == pytest.approx(1, abs=1e-3)
    # What is balanced takes twice as long.
    slope = slopes["separated, float64, balanced"]
    assert slope["in theory"] == 2 / EIGENVALUES[0]
    assert slope["ratio"] == pytest.approx(1, abs=0.01)
    # In float32 one of these perturbations is above rounding: that is no slope.
    assert math.isnan(slopes["factors, float32, unbalanced"]["slope"])
    assert len(report.notes) == 3
    assert all("has slope" in note for note in report.notes)


@pytest.mark.parametrize("method", ["separated", "factors"])
@pytest.mark.slow
def test_escape_times_are_those_of_theory(report, method):
    for row in _rows(report, method=method, dtype="float64"):
        if row["perturbation"] in ("unbalanced", "balanced"):
            # What is large across competes with what grows along.
            accuracy = 0.03 if row["eps"] > 1e-3 else 3e-3
            assert row["ratio"] == pytest.approx(1, abs=accuracy)


@pytest.mark.slow
def test_rounding_is_a_perturbation_of_its_unit(report):
    for dtype in ("float32", "float64"):
        (row,) = _rows(report, method="factors", perturbation="rounding", dtype=dtype)
        unit = float(np.finfo(dtype).eps)
        assert row["eps"] == unit
        assert row["in theory"] == pytest.approx(math.log(1 / unit) / EIGENVALUES[0])
        # From a tenth of a hundredth of it to three times.
        slack = math.log(1000) / EIGENVALUES[0]
        assert -0.6 < row["escape time"] - row["in theory"] < slack
        assert row["precision limited"] == 2
        # Known when it is as large as what is left of the start: half way.
        assert row["limited at"] < 0.6 * row["escape time"]


@pytest.mark.slow
def test_the_audit_tells_planted_perturbations_from_rounding(report):
    for row in _rows(report, method="factors", perturbation="unbalanced"):
        lost = row["eps"] < 0.1 * float(np.finfo(row["dtype"]).eps)
        assert row["precision limited"] == (2 if lost else 0)
        # What is lost escapes when rounding says, at any time.
        assert lost or row["ratio"] == pytest.approx(1, abs=0.03)


@pytest.mark.slow
def test_points_of_fixed_rank_are_pushed_to_second_order_only(report):
    (row,) = _rows(report, method="fixed rank", perturbation="rounding")
    assert row["ratio"] == pytest.approx(1, abs=0.1)
    (alone,) = _rows(report, method="factors", perturbation="rounding", dtype="float64")
    assert row["earliest"] > 1.5 * alone["latest"]


@pytest.mark.slow
def test_few_steps_and_a_short_horizon_decide_nothing():
    few = run(Config(eps=EPS, draws=2, max_steps=3), progress=False)
    assert all(row["undecided"] == 2 for row in few.rows)
    assert all(note.endswith("cut off by max_steps") for note in few.notes[:10])
    assert few.notes[10:] == ["and 24 more undecided draws"]
    short = run(Config(eps=EPS, draws=2, horizon=1.0), progress=False)
    for row in short.rows:
        assert row["escaped"] == 0
        # Only an imbalance of 1e-2 has left the exact flow so soon.
        left = row["eps"] == 1e-2 and row["perturbation"] == "unbalanced"
        assert row["undecided"] == (2 if left else 0)
    assert len(short.notes) == 6
    assert all("under way at the horizon" in note for note in short.notes)
    assert all(math.isnan(slope["slope"]) for slope in short.figure["slopes"])


# ---- the theory


def _point(getkey, scale=1.0):
    return SumAndDifference(
        scale * jr.normal(getkey(), (3,)), jr.normal(getkey(), (3,))
    )


def _flow():
    xx = jnp.diag(jnp.array(EIGENVALUES))
    energy = SquaredLoss(Moments(xx, xx, xx, 1, autoencoding=True))
    return SeparatedFlow(energy, Euclidean(), jnp.array(EIGENVALUES))


def test_separated_flow_is_the_flow_of_the_factors(getkey):
    flow, point = _flow(), _point(getkey)
    network = DeepLinear(point.factors())
    mine = DeepLinear(flow.velocity(point).factors())
    for other in (
        GradientFlow(flow.energy).velocity(network),
        stacked_velocity(flow.energy.moments, network),
    ):
        for a, b in zip(mine.factors(), other.factors(), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def test_what_is_small_keeps_its_relative_accuracy(getkey):
    flow, start = _flow(), jnp.zeros(3).at[0].set(math.sqrt(2))
    for eps in (1e-14, 1e-100):
        point = SumAndDifference(jnp.array([eps, 0.0, 0.0]), start)
        assert flow.velocity(point).p[0] == pytest.approx(4 * eps, rel=1e-12)


def test_growth_beside_the_exact_flow(getkey):
    """The imbalance grows at (1 + alpha^2) lambda_1, by forward differentiation."""
    flow, time = _flow(), 0.3
    size = float(remark42(EIGENVALUES[0], time))
    zero, leading = jnp.zeros(3), jnp.zeros(3).at[0].set(1.0)
    point = SumAndDifference(zero, math.sqrt(2) * size * leading)
    _, growth = jax.jvp(flow.velocity, (point,), (SumAndDifference(leading, zero),))
    rate = EIGENVALUES[0] * (1 + size**2)
    np.testing.assert_allclose(growth.p, rate * leading, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(growth.q, zero, atol=1e-14)


def test_imbalance_is_conserved(getkey):
    flow, point = _flow(), _point(getkey)
    imbalance = lambda point: jnp.sum(point.p * point.q)
    _, change = jax.jvp(imbalance, (point,), (flow.velocity(point),))
    assert change == pytest.approx(0, abs=1e-12)


def test_shares_depend_on_ratios_of_eigenvalues_only():
    np.testing.assert_allclose(shares(EIGENVALUES), shares((20.0, 8.0, 4.0)), rtol=1e-8)
    # Finite however small the gap.
    assert np.all(np.isfinite(shares((2.0, 1.9, 1e-3))))


def test_crossing_between_observations():
    times = np.linspace(0, 10, 23)
    logistic = 1 / (1 + np.exp(-4 * (times - 6.1)))
    assert crossing(times, logistic) == pytest.approx(6.1, rel=1e-12)
    assert math.isnan(crossing(times, np.full(23, 0.4)))
    assert math.isnan(crossing(times, np.full(23, math.nan)))
    # From a negative value to above 1: linear.
    assert crossing(np.array([0.0, 1.0]), np.array([-0.5, 1.5])) == 0.5


def test_draws_depend_on_the_seed_and_their_number_only():
    few, many, other = draw(0, 2, 3), draw(0, 5, 3), draw(1, 2, 3)
    np.testing.assert_array_equal(few.bases, many.bases[:2])
    np.testing.assert_array_equal(few.across, many.across[:2])
    assert np.all(few.bases != other.bases)
    assert np.all(few.across[:, 0, 0] == 0)
    np.testing.assert_allclose(np.linalg.norm(few.beside, axis=1), 1, rtol=1e-12)


# ---- the figure


@pytest.mark.slow
def test_nothing_is_cut_off_and_theory_is_thin_and_black(report):
    figure = plot.escape(report)
    figure.canvas.draw()
    box = figure.get_tightbbox()
    width, height = figure.get_size_inches()
    assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height
    left, right = figure.axes
    assert left.get_tightbbox().x1 <= right.get_tightbbox().x0
    for axes, count in ((left, 1), (right, 2)):
        black = [
            line
            for line in axes.lines
            if to_hex(line.get_color()) == "#000000" and len(line.get_xdata()) > 1
        ]
        assert len(black) == count
        assert all(line.get_linewidth() < 1 for line in black)
        assert axes.get_xlabel() and axes.get_ylabel() and axes.get_title()
    names = [text.get_text() for text in right.get_legend().get_texts()]
    assert {"theory", "factors, float32, rounding", "factors, float64, rounding"} < set(
        names
    )
    assert right.get_xscale() == "log"


@pytest.mark.slow
def test_lines_run_through_the_points(report):
    times = report.figure["panels"][1]
    sets = {group["label"]: group for group in times["sets"]}
    for name, line in zip(("unbalanced", "balanced"), times["lines"], strict=True):
        group = sets[f"separated, float64, {name}"]
        expected = np.interp(np.log(group["x"]), np.log(line["x"]), line["y"])
        middle = np.median(group["runs"], axis=0)
        np.testing.assert_allclose(middle, expected, rtol=0.02)


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"eigenvalues": (1.0,)}, "must be at least two, descending"),
        ({"eigenvalues": (1.0, 1.0)}, "must be at least two, descending"),
        ({"eigenvalues": (1.0, 2.0)}, "must be at least two, descending"),
        ({"eigenvalues": (1.0, 0.0)}, "eigenvalues must be a finite number > 0, got 0"),
        ({"eps": (0.5, 1e-3)}, "eps has 0.5: give numbers <= 0.1"),
        ({"eps": (1e-3, 1e-3)}, "a slope needs two different numbers"),
        ({"eps": (-1e-3, 1e-3)}, "eps must be a finite number > 0, got -0.001"),
        ({"eps": ()}, "eps is empty"),
        ({"draws": 0}, "draws must be >= 1, got 0"),
    ],
    ids=str,
)
def test_bad_settings(changes, text):
    with pytest.raises(ValueError, match=text):
        Config(**changes)
