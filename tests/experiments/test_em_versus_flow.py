"""EM, accelerated EM and gradient flow end at the same optimum."""

import builtins
import json

import jax.numpy as jnp
import jax.random as jr
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest

from gradflow import plot
from gradflow.experiments import em_versus_flow
from gradflow.experiments.em_versus_flow import Config, run
from gradflow.experiments.latent_problems import MODELS, problem


@pytest.fixture(autouse=True)
def no_figure_is_left():
    matplotlib.use("agg")
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def report():
    return run(Config(models=("ppca",), draws=8, variables=6), progress=False)


def _agree(rows):
    for row in rows:
        assert row["optimum"] == row["draws"]
        assert row["undecided"] == row["saddle"] == row["other minimum"] == 0
        assert row["on the way"] == row["Heywood"] == row["other Heywood"] == 0
        # A flow ends at a speed of 1e-6, so 5e-13 over the least rate above.
        assert abs(row["least gap"]) < 1e-10
        if row["method"] != "flow":
            assert row["apart from flow"] == 0 and row["worst increase"] <= 1e-10
        if row["method"] in ("flow", "em"):
            # Where the next eigenvalue is near, a run is a mixture of the two.
            np.testing.assert_allclose(row["rate seen"], row["rate"], rtol=0.02)


@pytest.mark.slow
def test_rows(report):
    assert [row["method"] for row in report.rows] == ["flow", "em", "squarem"]
    assert all(row["closed form"] == "yes" for row in report.rows)
    _agree(report.rows)
    updates = {row["method"]: row["median updates"] for row in report.rows}
    assert updates["squarem"] < updates["em"] < updates["flow"]
    assert any("the true point's energy is 0." in note for note in report.notes)
    assert report.experiment == "em_versus_flow"
    assert report.claim == em_versus_flow.CLAIM
    json.loads(report.to_json())


@pytest.mark.slow
def test_figure(report, tmp_path):
    """Runs in color, the linearization as a thin black line upon them."""
    figure = plot.em_versus_flow(report)
    assert [axes.get_title() for axes in figure.axes] == ["ppca by em", "ppca by flow"]
    for axes in figure.axes:
        run, line = axes.lines
        assert line.get_color() == "black"
        x, y = line.get_data()
        there = np.interp(x[-1], run.get_xdata(), np.log(run.get_ydata()))
        assert abs(np.log(y[-1]) - there) < 0.5
    assert len(plot.save(report, tmp_path)) == 2


@pytest.mark.slow
def test_all_models_agree():
    """From the same 200 starts: the same optimum, to 1e-8 in value."""
    report = run(Config(), progress=False)
    assert {row["model"] for row in report.rows} == set(MODELS)
    assert all(row["draws"] == 200 for row in report.rows)
    _agree(report.rows)


@pytest.mark.parametrize("data", ["wine", "mnist"])
@pytest.mark.slow
def test_problems(data):
    """All four models of the same variables; starts fit them."""
    sizes = set()
    for model in MODELS:
        posed = problem(
            model, data, jr.key(0), variables=6, latents=2, private=1, scale=0.5
        )
        point = posed.start(jr.key(1))
        sizes.add(posed.energy.size)
        assert posed.truth is None and jnp.isfinite(posed.energy(point))
        assert posed.energy.pattern is None or model == "ibfa"
    assert sizes == {13 if data == "wine" else 6}


def test_scikit_learn_may_be_missing(monkeypatch):
    found = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.startswith("sklearn"):
            raise ImportError(name)
        return found(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ValueError, match="data=wine comes with scikit-learn, which is"):
        run(Config(data="wine"), progress=False)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"models": ()}, r"models=\(\) must be some of ppca, fa, pcca, ibfa"),
        ({"methods": ("newton",)}, r"methods=\('newton',\) must be some of flow, em"),
        ({"variables": 3}, "variables must be >= 4, got 3"),
        ({"latents": 0}, "latents must be >= 1, got 0"),
        ({"private": 0}, "private must be >= 1, got 0"),
        ({"latents": 7}, "latents=7 and private=1 are too many for variables=8"),
        ({"scale": 0.0}, "scale must be a finite number > 0, got 0"),
        ({"step": -1.0}, "step must be a finite number > 0, got -1"),
    ],
)
def test_refuses(options, text):
    with pytest.raises(ValueError, match=text):
        Config(**options)


def test_refuses_more_latent_variables_than_a_table_has():
    text = "latents=12 and private=1 are too many for the 13 variables of data=wine"
    with pytest.raises(ValueError, match=text):
        run(Config(data="wine", latents=12), progress=False)
