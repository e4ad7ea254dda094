"""Three ways to write one flow, and its closed forms."""

import json
import math

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest

from gradflow import plot
from gradflow.experiments import equivalence
from gradflow.experiments.equivalence import Config, run


SMALL = {"dimension": 3, "depths": (2, 3), "ranks": (2,), "draws": 2}
PAIRS = ("product v factors", "factored v factors", "factored v product")


@pytest.fixture(autouse=True)
def no_figure_is_left():
    matplotlib.use("agg")
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def report():
    return run(Config(**SMALL), progress=False)


def _check(report):
    config = report.config
    sizes = [len(config[name]) for name in ("depths", "ranks", "smallest")]
    assert len(report.rows) == np.prod(sizes)
    for row in report.rows:
        assert (row["draws"], row["undecided"]) == (config["draws"], 0)
        for name in (*PAIRS, "closed form"):
            assert 0 < row[name] <= 1e-8
        # The largest of three distances is at most the sum of the others.
        assert row[PAIRS[0]] <= row[PAIRS[1]] + row[PAIRS[2]]
        # And the flows went somewhere.
        assert row["moved"] > 0.1
    assert report.notes == []


@pytest.mark.slow
def test_three_roads_and_the_closed_forms_agree(report):
    _check(report)
    # The coordinates of rank k lose nothing to small singular values.
    assert all(row["factored v factors"] <= 1e-9 for row in report.rows)
    assert report.experiment == "equivalence" and report.claim == equivalence.CLAIM
    json.loads(report.to_json())


@pytest.mark.slow
def test_all_depths_and_ranks():
    _check(run(Config(), progress=False))


@pytest.mark.slow
def test_rows_depend_on_the_seed_only(report):
    again = run(Config(**SMALL), progress=False)
    other = run(Config(**SMALL, seed=1), progress=False)
    assert again.rows == report.rows and other.rows != report.rows


@pytest.mark.slow
def test_runs_out_of_steps_are_undecided():
    report = run(Config(**SMALL, max_steps=3), progress=False)
    for row in report.rows:
        assert row["undecided"] == row["draws"] == 2
        assert math.isnan(row["moved"])
    # Each draw has two kinds of data, for depth 2 three, and three roads.
    assert len(report.notes) == 4 * 11
    assert report.notes[0] == (
        "depth 2, rank 2, smallest 1, draw 0, factors, supervised data: "
        "max_steps_reached"
    )
    assert report.notes[10] == "depth 2, rank 2, smallest 1: and 8 more"


def test_starts_are_the_same_at_every_depth():
    config = Config(**SMALL)
    with equivalence.precision("float64"):
        drawn = equivalence._drawn(config)
    few, many = (equivalence._starts(config, drawn, depth, 2) for depth in (3, 2))
    for one, other in zip(few, many, strict=True):
        np.testing.assert_array_equal(one, other[:, :2])
    np.testing.assert_allclose(
        np.exp(few.log_values[:, 0, 0]), [[1.0, 1.0], [1.0, 1e-6]], rtol=1e-14
    )
    assert equivalence._values(1, 1e-6) == [1e-6]


@pytest.mark.slow
def test_nothing_is_cut_off(report):
    figure = plot.equivalence(report)
    figure.canvas.draw()
    box = figure.get_tightbbox()
    width, height = figure.get_size_inches()
    assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height
    boxes = [axes.get_tightbbox() for axes in figure.axes]
    assert boxes[0].x1 <= boxes[1].x0
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == [*PAIRS, "closed form"]
    for axes, depth in zip(figure.axes, SMALL["depths"], strict=True):
        assert axes.get_title() == f"N = {depth}" and axes.get_yscale() == "log"
        rows = [row for row in report.rows if row["depth"] == depth]
        for line, name in zip(axes.lines, names, strict=True):
            largest = max(row[name] for row in rows)
            assert np.max(line.get_ydata()) == pytest.approx(largest)


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"ranks": (5,)}, "ranks has 5, which is larger than dimension=4"),
        ({"ranks": (0,)}, "ranks must be >= 1, got 0"),
        ({"depths": (1,)}, "depths must be >= 2, got 1"),
        ({"smallest": (2.0,)}, "smallest has 2.0, but the largest singular value is 1"),
        ({"smallest": (0.0,)}, "smallest must be a finite number > 0, got 0.0"),
        ({"horizon": float("inf")}, "horizon must be a finite number > 0, got inf"),
        ({"dtype": "float32"}, "is below what float32 can reach"),
        ({"draws": 0}, "draws must be >= 1, got 0"),
    ],
    ids=str,
)
def test_bad_settings(changes, text):
    with pytest.raises(ValueError, match=text):
        Config(**changes)
