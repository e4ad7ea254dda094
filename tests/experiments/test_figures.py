"""Each figure at tiny settings, against what theory says of it."""

import dataclasses
import json
import math

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_hex

from gradflow import plot, read_report
from gradflow.experiments import figures
from gradflow.experiments.figures import Config, fitted_rate, run
from gradflow.experiments.section7 import FIGURES, Sizes
from gradflow.theory.dynamics import remark42


TINY = Sizes(depths=(2, 3), dimensions=(3,))
SIZES = {
    2: Sizes(dimensions=(3,)),
    3: Sizes(depths=(2,), dimensions=(3, 4)),
    4: Sizes(dimensions=(3,), ranks=(1,)),
    6: Sizes(dimensions=(3,)),
    8: Sizes(depths=(2,), dimensions=(3, 4)),
    9: Sizes(depths=(2,), dimensions=(4,), ranks=(1, 2)),
    10: Sizes(depths=(3,), dimensions=(3,)),
    11: Sizes(depths=(3,), dimensions=(3,)),
    12: Sizes(depths=(3,), dimensions=(3,)),
}
KINDS = ("global minimum", "saddle", "undecided", "diverged")


@pytest.fixture(autouse=True)
def no_figure_is_left():
    matplotlib.use("agg")
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def reports():
    """One report of each figure."""
    found = {}

    def report(number):
        if number not in found:
            entry = FIGURES[number]
            small = dataclasses.replace(entry, quick=SIZES.get(number, TINY))
            with pytest.MonkeyPatch.context() as patch:
                patch.setitem(FIGURES, number, small)
                found[number] = run(Config(figure=number, draws=2), progress=False)
        return found[number]

    return report


# Quick to run, and of every sort: autoencoders and supervised, Remark 42, rates.
QUICK = (1, 4, 10)


def numbers(*without):
    return [
        pytest.param(number, marks=() if number in QUICK else pytest.mark.slow)
        for number in FIGURES
        if number not in without
    ]


@pytest.mark.parametrize("number", numbers())
def test_rows(reports, number):
    report = reports(number)
    entry, sizes = FIGURES[number], SIZES.get(number, TINY)
    shapes = (entry.starts, sizes.depths, sizes.dimensions, sizes.ranks)
    assert len(report.rows) == math.prod(map(len, shapes))
    for row in report.rows:
        assert sum(row[kind] for kind in KINDS) == row["draws"]
        # A run that left the exact flow by rounding decides nothing.
        assert row["undecided" if number == 4 else "global minimum"] == row["draws"]
    assert report.experiment == "figures" and report.claim == figures.CLAIM
    assert report.figure["title"].startswith(f"Figure {number}: ")
    json.loads(report.to_json())


@pytest.mark.parametrize("number", numbers(4))
def test_runs_reach_what_theory_says(reports, number):
    report = reports(number)
    assert report.notes == []
    for row in report.rows:
        assert row["residual"] == pytest.approx(row["least residual"], rel=1e-7)
        assert row["distance"] < 1e-5
        # What is left of the next mode where rates are fitted.
        assert row["rate"] == pytest.approx(row["rate in theory"], rel=0.1)


@pytest.mark.parametrize("number", numbers(4))
def test_curves_and_lines(reports, number):
    entry = FIGURES[number]
    for panel in reports(number).figure["panels"]:
        for group in panel["sets"]:
            runs = np.asarray(group["runs"])
            assert runs.shape == (2, len(group["x"])) and np.all(runs > 0)
            assert np.all(np.diff(group["x"]) > 0)
        each = 2 if entry.measure == "distance" else 1
        assert len(panel["lines"]) == each * len(panel["sets"])
        for i, line in enumerate(panel["lines"]):
            group, y = panel["sets"][i // each], np.asarray(line["y"])
            runs = np.asarray(group["runs"])
            if entry.measure == "residual":
                # The loss falls, to the limit and not below it.
                assert np.all(np.diff(runs, axis=1) <= 1e-6 * runs.max())
                assert np.all(runs >= y[0] - 1e-9 * runs.max())
            elif entry.measure == "rate":
                np.testing.assert_allclose(np.median(runs, axis=0), y, rtol=0.1)
            else:
                # The line runs along the run in the last third of its length.
                x, run = np.asarray(line["x"]), runs[i % each]
                assert x[0] >= -1e-9 and y[0] > 1e3 * y[1]
                at = (group["x"] > (x[0] + 2 * x[1]) / 3) & (group["x"] < x[1])
                along = np.exp(np.interp(group["x"], x, np.log(y)))
                np.testing.assert_allclose(run[at], along[at], rtol=0.5)


def test_remark42_is_followed_until_rounding_parts_it(reports):
    report = reports(4)
    panel, row = report.figure["panels"][0], report.rows[0]
    times, sizes = panel["sets"][0]["x"], np.asarray(panel["sets"][0]["runs"])[0]
    exact = np.asarray(panel["lines"][0]["y"])
    rate = figures.ESCAPE_TIMES / times[-1]
    np.testing.assert_allclose(exact, remark42(rate, times) ** 2, rtol=1e-12)
    early = times < 0.5 * row["parting from rounding"]
    np.testing.assert_allclose(sizes[early], exact[early], rtol=1e-6)
    assert row["parted at"] == pytest.approx(row["parting from rounding"], rel=0.2)
    # It comes to the minimum, which the exact flow never does.
    assert row["size at the end"] == pytest.approx(1, abs=1e-6)
    assert row["exact size at the end"] < 1e-40
    assert row["end of the run"] == "global_minimum"
    assert row["precision limited at"] < row["parted at"]
    assert len(report.notes) == 1 and "precision_limited from t=" in report.notes[0]


def test_before_it_parts_remark42_is_undecided():
    small = dataclasses.replace(FIGURES[4], quick=SIZES[4])
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FIGURES, 4, small)
        report = run(Config(figure=4, horizon=5.0), progress=False)
    row = report.rows[0]
    assert (row["undecided"], row["global minimum"]) == (1, 0)
    assert row["parted at"] == row["precision limited at"] == math.inf
    assert row["end of the run"] == "not_critical"
    assert "more time to leave it" in report.notes[0]


@pytest.mark.parametrize("number", numbers())
def test_nothing_is_cut_off_and_theory_is_thin_and_black(reports, number):
    report = reports(number)
    figure = plot.figures(report)
    figure.canvas.draw()
    box = figure.get_tightbbox()
    width, height = figure.get_size_inches()
    assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height
    boxes = [axes.get_tightbbox() for axes in figure.axes]
    assert all(a.x1 <= b.x0 for a, b in zip(boxes[:-1], boxes[1:], strict=True))
    for axes, panel in zip(figure.axes, report.figure["panels"], strict=True):
        black = [line for line in axes.lines if to_hex(line.get_color()) == "#000000"]
        assert len(black) == len(panel["lines"]) > 0
        assert all(line.get_linewidth() < 1 for line in black)
        names = [text.get_text() for text in axes.get_legend().get_texts()]
        theory = panel.get("line", "theory")
        assert sorted(names) == sorted([theory, *(g["label"] for g in panel["sets"])])
        assert axes.get_xlabel() and axes.get_ylabel() and axes.get_title()


def test_rows_depend_on_the_seed_only(reports):
    entry = dataclasses.replace(FIGURES[1], quick=TINY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FIGURES, 1, entry)
        again = run(Config(figure=1, draws=2), progress=False)
        other = run(Config(figure=1, draws=2, seed=1), progress=False)
    assert again.rows == reports(1).rows
    assert other.rows != again.rows


@pytest.mark.slow
def test_float32(tmp_path):
    small = dataclasses.replace(FIGURES[8], quick=Sizes(dimensions=(3,)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FIGURES, 8, small)
        config = Config(figure=8, draws=2, dtype="float32", tolerance=0.01)
        report = run(config, progress=False)
    row = report.rows[0]
    assert row["global minimum"] == 2
    # Fitted above its errors, where several modes still count.
    assert row["rate"] == pytest.approx(row["rate in theory"], rel=0.5)
    report.write(tmp_path)
    paths = plot.save(read_report(tmp_path), tmp_path)
    assert [path.name for path in paths] == ["figures.png", "figures.pdf"]


def test_a_run_cut_short_has_no_rate(tmp_path):
    small = dataclasses.replace(FIGURES[8], quick=Sizes(dimensions=(3,)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FIGURES, 8, small)
        report = run(Config(figure=8, draws=2, horizon=60.0), progress=False)
    assert math.isnan(report.rows[0]["rate"])
    report.write(tmp_path)
    assert len(plot.save(read_report(tmp_path), tmp_path)) == 2


def test_a_fit_keeps_to_its_window():
    times = np.linspace(0, 60, 400)
    # Fast at first, and at last on the solver's floor.
    falling = np.exp(-3 * times) + 1e-2 * np.exp(-0.5 * times) + 1e-9
    assert fitted_rate(times, falling, 2e-8, 2e-6) == pytest.approx(0.5, rel=0.01)
    assert math.isnan(fitted_rate(times, np.ones(400), 2e-8, 2e-6))
    assert math.isnan(fitted_rate(times, np.full(400, np.nan), 2e-8, 2e-6))


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"figure": 0}, "figure must be >= 1, got 0"),
        ({"figure": 13}, "figure must be <= 12, got 13"),
        ({"figure": True}, "figure must be a whole number, got True"),
        ({"draws": 0}, "draws must be >= 1, got 0"),
    ],
    ids=str,
)
def test_bad_settings(changes, text):
    with pytest.raises(ValueError, match=text):
        Config(**changes)


def test_the_source_has_larger_sizes():
    for entry in FIGURES.values():
        assert max(entry.paper.dimensions) >= max(entry.quick.dimensions)
        assert max(entry.paper.depths) >= max(entry.quick.depths)
