import json
import subprocess
import sys

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_hex

from gradflow import fraction, plot, read_report, Report


KINDS = ["global minimum", "saddle", "undecided", "diverged"]
TIMES = np.geomspace(0.1, 100, 40)


@pytest.fixture(autouse=True)
def no_figure_is_left():
    matplotlib.use("agg")
    yield
    plt.close("all")


def _row(depth, scale, *counts):
    """A row of the table for this many draws of each of `KINDS`."""
    draws, (best, _, undecided, _) = sum(counts), counts
    places = np.arange(draws)
    share = fraction(places < best, (places >= best) & (places < best + undecided))
    return {
        "depth": depth,
        "scale": scale,
        "draws": draws,
        **dict(zip(KINDS, counts, strict=True)),
        "95 % low": share.low,
        "95 % high": share.high,
        "outer low": share.outer_low,
        "outer high": share.outer_high,
    }


def _panel(title, rates=(0.5, 1.0), lines=(5.0, 1.2), end=np.inf):
    runs = [5 * np.exp(-rate * TIMES) for rate in rates]
    runs = [np.where(TIMES < end, run, np.nan) for run in runs]
    return {"title": title, "times": TIMES, "energies": runs, "lines": list(lines)}


MIXED = [
    (_row(2, 0.3, 250, 6, 0, 0), _panel("depth 2, scale 0.3")),
    (_row(3, 0.03, 180, 20, 50, 6), _panel("depth 3, scale 0.03", (0.1, 2.0), end=9)),
    (_row(4, 1e200, 0, 0, 0, 256), _panel("depth 4, scale 1e+200", (), ())),
]


def _report(parts=MIXED):
    rows, panels = zip(*parts, strict=True)
    return Report(
        "convergence", "", {}, {}, list(rows), [], {"panels": list(panels)}, {}
    )


def _grid(count):
    return _report(
        [
            (_row(depth, 0.01 * depth, 1000, 0, 24, 0), _panel(f"depth {depth}"))
            for depth in range(2, 2 + count)
        ]
    )


def _decided(share):
    return _report([(_row(2, 0.3, *share), _panel("depth 2, scale 0.3"))])


REPORTS = {
    "mixed": _report(),
    "one row": _report(MIXED[:1]),
    "nothing undecided": _decided((8, 0, 0, 0)),
    "everything undecided": _decided((0, 0, 8, 0)),
    "nine rows": _grid(9),
}


@pytest.mark.parametrize("name", REPORTS)
def test_nothing_is_cut_off_or_covered(name):
    figure = plot.convergence(REPORTS[name])
    figure.canvas.draw()
    box = figure.get_tightbbox()
    width, height = figure.get_size_inches()
    assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height
    # Axes with all that belongs to them (labels, titles, the legend).
    boxes = [axes.get_tightbbox() for axes in figure.axes]
    for i, one in enumerate(boxes):
        for other in boxes[:i]:
            apart_x = one.x1 <= other.x0 or other.x1 <= one.x0
            apart_y = one.y1 <= other.y0 or other.y1 <= one.y0
            assert apart_x or apart_y
    # Names and counts of rows stand clear of each other.
    outcomes = figure.axes[-1]
    for texts in (outcomes.get_yticklabels(), outcomes.texts):
        spans = sorted(
            (text.get_window_extent().y0, text.get_window_extent().y1) for text in texts
        )
        assert all(a[1] <= b[0] for a, b in zip(spans[:-1], spans[1:], strict=True))


@pytest.mark.parametrize("name", REPORTS)
def test_every_outcome_is_listed(name):
    axes = plot.convergence(REPORTS[name]).axes[-1]
    legend = axes.get_legend()
    assert [text.get_text() for text in legend.get_texts()] == KINDS
    colors = [to_hex(patch.get_facecolor()).upper() for patch in legend.get_patches()]
    assert colors == [plot.COLORS[kind] for kind in KINDS]
    assert len(set(colors)) == len(KINDS)


def test_bars_are_the_shares():
    report = _report()
    axes = plot.convergence(report).axes[-1]
    bars = {bars.get_label(): bars for bars in axes.containers}
    assert list(bars) == KINDS
    for i, row in enumerate(report.rows):
        right = 0.0
        for kind in KINDS:
            bar = bars[kind].patches[i]
            assert bar.get_width() == pytest.approx(row[kind] / row["draws"])
            assert bar.get_x() == pytest.approx(right)
            right += bar.get_width()
        assert right == pytest.approx(1)
    labels = [text.get_text() for text in axes.texts]
    assert labels == ["250 of 256", "180 of 256", "0 of 256"]
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == [
        "depth 2, scale 0.3",
        "depth 3, scale 0.03",
        "depth 4, scale 1e+200",
    ]
    # Read from top to bottom, as in the table.
    heights = [bar.get_y() for bar in bars["saddle"].patches]
    assert heights == sorted(heights, reverse=True)


def test_both_intervals_are_drawn():
    report = _report()
    axes = plot.convergence(report).axes[-1]
    ends = [tuple(np.asarray(line.get_xdata(), float)) for line in axes.lines]
    for row in report.rows:
        assert (row["95 % low"], row["95 % high"]) in ends
        assert (row["outer low"], row["outer high"]) in ends
    assert report.rows[1]["outer high"] > report.rows[1]["95 % high"]


def test_critical_values_are_thin_black_lines():
    figure = plot.convergence(_report())
    for (_, panel), axes in zip(MIXED, figure.axes, strict=False):
        flat = [line for line in axes.lines if len(set(line.get_ydata())) == 1]
        assert [line.get_ydata()[0] for line in flat] == panel["lines"]
        for line in flat:
            assert to_hex(line.get_color()) == "#000000"
            assert line.get_linewidth() < 1
        runs = [line for line in axes.lines if line not in flat]
        assert len(runs) == len(panel["energies"])
        for line, run in zip(runs, panel["energies"], strict=True):
            np.testing.assert_array_equal(line.get_xdata(), TIMES)
            np.testing.assert_array_equal(line.get_ydata(), run)
            assert to_hex(line.get_color()).upper() in plot.RUNS
        assert axes.get_title() == panel["title"]
        if runs:
            assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
            low, high = axes.get_ylim()
            assert low < min(panel["lines"]) and max(panel["lines"]) < high


@pytest.mark.parametrize(
    "run",
    [
        np.full(40, np.nan),
        np.full(40, np.inf),
        np.full(40, -1e-18),
        np.where(TIMES < 1, 1e200, np.inf),
    ],
    ids=["nan", "inf", "negative", "huge"],
)
@pytest.mark.parametrize("others", [0, 1])
def test_runs_that_no_logarithm_shows(run, others, tmp_path):
    panel = _panel("runs", (1.0,) * others, (1.0, 0.0))
    panel["energies"] = [run, *panel["energies"]]
    paths = plot.save(_report([(MIXED[0][0], panel)]), tmp_path)
    assert all(path.stat().st_size > 1000 for path in paths)


def test_panel_without_runs_says_so():
    figure = plot.convergence(_report())
    assert [text.get_text() for text in figure.axes[2].texts] == ["no run to draw"]


def test_figure_of_a_report_that_was_read(tmp_path):
    report = _report()
    report.write(tmp_path)
    found = read_report(tmp_path)
    assert any(None in run for run in found.figure["panels"][1]["energies"])
    for one, other in zip(
        plot.convergence(report).axes, plot.convergence(found).axes, strict=True
    ):
        assert len(one.lines) == len(other.lines)
        assert one.get_ylim() == other.get_ylim()
        for a, b in zip(one.lines, other.lines, strict=True):
            np.testing.assert_array_equal(a.get_xydata(), b.get_xydata())


def test_save(tmp_path):
    backend = matplotlib.get_backend()
    style = dict(matplotlib.rcParams)
    paths = plot.save(_report(), tmp_path)
    assert [path.name for path in paths] == ["convergence.png", "convergence.pdf"]
    assert paths[0].read_bytes().startswith(b"\x89PNG")
    assert paths[1].read_bytes().startswith(b"%PDF")
    # Nothing stays behind.
    assert plt.get_fignums() == []
    assert matplotlib.get_backend() == backend and dict(matplotlib.rcParams) == style
    height, width, _ = plt.imread(paths[0]).shape
    assert width >= 5.5 * plot.STYLE["savefig.dpi"] and height > 300


def test_experiment_without_a_figure(tmp_path):
    report = Report("other", "", {}, {}, [], [], {}, {})
    with pytest.raises(ValueError, match="other has no figure: figures exist for conv"):
        plot.save(report, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_import_does_not_load_matplotlib():
    code = (
        "import json, sys, gradflow.plot;"
        "print(json.dumps(sorted({'matplotlib', 'jax'} & sys.modules.keys())))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert json.loads(run.stdout) == []
