import json

import jax
import numpy as np
import pytest

from gradflow import fraction, Moments, Store
from gradflow.experiments import convergence
from gradflow.experiments.convergence import Config, run
from gradflow.models import SquaredLoss
from gradflow.theory import LinearTheory


KINDS = ("global minimum", "saddle", "undecided", "diverged")
TINY = {"draws": 8, "rank": 1, "depths": (2,), "scales": (0.3,)}


def _tiny(**changes):
    return Config(**TINY | {"data": "gaussian", "dimension": 3} | changes)


def _check_rows(report):
    """What must hold of every row, whatever was found."""
    config = report.config
    assert len(report.rows) == len(config["depths"]) * len(config["scales"])
    for row in report.rows:
        counts = [row[kind] for kind in KINDS]
        assert min(counts) >= 0 and sum(counts) == row["draws"] == config["draws"]
        assert 0 <= row["by certificate"] <= row["global minimum"]
        places, best = np.arange(row["draws"]), row["global minimum"]
        share = fraction(
            places < best, (places >= best) & (places < best + row["undecided"])
        )
        assert (row["95 % low"], row["95 % high"]) == (share.low, share.high)
        assert (row["outer low"], row["outer high"]) == (
            share.outer_low,
            share.outer_high,
        )
        assert (row["outer high"] > row["95 % high"]) == (row["undecided"] > 0)
        widths = [int(width) for width in row["widths"].split("-")]
        assert len(widths) - 1 == row["depth"] in config["depths"]
        assert widths[0] == config["dimension"] and min(widths) == config["rank"]
        assert row["scale"] in config["scales"]
        assert row["median time"] >= 0 and row["median steps"] >= 0


def _check_notes(report):
    """One note for each undecided draw, up to ten of a row."""
    for row in report.rows:
        where = f"depth {row['depth']}, scale {row['scale']:g}"
        notes = [note for note in report.notes if note.startswith(f"{where}, draw ")]
        assert len(notes) == min(row["undecided"], 10)
        assert len(set(notes)) == len(notes)
        for note in notes:
            assert " at t=" in note and "gap" in note and "\n" not in note


def _check_panels(report):
    for row, panel in zip(report.rows, report.figure["panels"], strict=True):
        assert panel["title"] == f"depth {row['depth']}, scale {row['scale']:g}"
        energies = np.asarray(panel["energies"])
        assert energies.shape == (4, len(panel["times"]))
        assert np.all(np.diff(panel["times"]) > 0)
        # A gradient flow's loss falls; the solver's tolerance is 1e-6.
        assert np.all(np.diff(energies, axis=1) <= 1e-5 * energies.max())
        assert all(0 < value <= 1.05 * energies.max() for value in panel["lines"])


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(
            {"data": "gaussian", "scales": (0.3, 0.03)}, marks=pytest.mark.slow
        ),
        pytest.param({"data": "teacher"}, marks=pytest.mark.slow),
        {"data": "mnist", "dimension": 4, "digit": 3},
    ],
)
def test_almost_every_run_finds_a_global_minimum(changes):
    report = run(_tiny(**changes), progress=False)
    _check_rows(report)
    _check_notes(report)
    _check_panels(report)
    for row in report.rows:
        assert row["global minimum"] == row["by certificate"] == 8
        assert row["median time"] > 0 and row["median steps"] > 0
    assert report.notes == []
    assert report.experiment == "convergence"
    assert report.claim == convergence.CLAIM
    assert report.environment["dtype"] == "float64"
    assert all(duration >= 0 for duration in report.seconds.values())
    # Losses of the drawn runs come down to the least that the theory knows.
    for panel in report.figure["panels"]:
        energies = np.asarray(panel["energies"])
        assert np.median(energies[:, -1]) < 0.1 * np.median(energies[:, 0])
        assert energies.min() > -1e-9
    json.loads(report.to_json())


@pytest.mark.slow
def test_rows_depend_on_the_seed_only():
    first, again = (run(_tiny(), progress=False) for _ in range(2))
    with jax.enable_x64(False):
        other_flag = run(_tiny(), progress=False)
    for report in (again, other_flag):
        assert report.rows == first.rows and report.notes == first.notes
        one, other = report.figure["panels"][0], first.figure["panels"][0]
        np.testing.assert_array_equal(one["energies"], other["energies"])
    assert run(_tiny(seed=1), progress=False).rows != first.rows


@pytest.mark.slow
def test_a_row_does_not_depend_on_later_rows():
    both = run(_tiny(scales=(0.3, 0.03)), progress=False)
    assert run(_tiny(), progress=False).rows[0] == both.rows[0]


@pytest.mark.slow
def test_draws_out_of_steps_are_undecided(tmp_path):
    report = run(_tiny(max_steps=3, draws=24, batch=8), progress=False)
    # With a store only what is counted is held: the notes read the rest.
    with Store(tmp_path, chunk=24) as store:
        kept = run(_tiny(max_steps=3, draws=24, batch=8), progress=False, store=store)
    assert kept.rows == report.rows and kept.notes == report.notes
    _check_rows(report)
    _check_notes(report)
    row = report.rows[0]
    assert row["undecided"] > 10 and row["median steps"] <= 2 * 3
    assert all("max_steps_reached" in note for note in report.notes[:10])
    more = f"depth 2, scale 0.3: and {row['undecided'] - 10} more undecided draws"
    assert report.notes[10] == more
    # The very same draws, given more steps, are decided.
    assert run(_tiny(draws=24, batch=8), progress=False).rows[0]["undecided"] == 0


def test_draws_at_the_horizon_are_undecided():
    report = run(_tiny(horizon=1e-3), progress=False)
    _check_rows(report)
    _check_notes(report)
    row = report.rows[0]
    assert row["undecided"] > 0
    assert row["global minimum"] + row["undecided"] == row["draws"]
    assert all("horizon_reached at t=0.001" in note for note in report.notes)
    assert max(report.figure["panels"][0]["times"]) <= 1e-3


def test_draws_that_are_not_finite_stay_in_the_denominator():
    report = run(_tiny(scales=(1e200,)), progress=False)
    _check_rows(report)
    row = report.rows[0]
    assert (row["diverged"], row["draws"]) == (8, 8)
    assert row["95 % low"] == 0 and row["undecided"] == 0
    assert report.notes == [
        "depth 2, scale 1e+200: 8 of 8 draws are not finite (draws 0, 1, 2, 3, 4, 5, "
        "6, 7); others are unaffected"
    ]
    assert report.figure["panels"][0]["energies"] == []


@pytest.mark.slow
def test_more_curves_than_draws():
    report = run(_tiny(curves=20), progress=False)
    assert np.asarray(report.figure["panels"][0]["energies"]).shape[0] == 8
    panel = run(_tiny(curves=0), progress=False).figure["panels"][0]
    assert panel["energies"] == panel["lines"] == []


@pytest.mark.slow
def test_float32():
    report = run(_tiny(dtype="float32", tolerance=0.01), progress=False)
    _check_rows(report)
    assert report.environment["dtype"] == "float32"
    assert report.rows[0]["global minimum"] == 8
    assert np.asarray(report.figure["panels"][0]["energies"]).dtype == np.float32


def test_critical_lines_are_the_greedy_chain():
    # Singular values 3, 2 and 0: the last adds no value of its own.
    values = np.diag([3.0, 2.0, 0.0])
    theory = LinearTheory(SquaredLoss(Moments(np.eye(3), values, values**2, 1)), 3)
    least = float(theory.optimal_energy())
    lines = convergence._lines(theory, 100.0, least)
    np.testing.assert_allclose(lines, [6.5, 2.0], rtol=1e-12)
    # Those above all runs are left out.
    assert convergence._lines(theory, 2.0, least) == lines[1:]


@pytest.mark.slow
def test_a_horizon_is_kept_by_slow_draws_too():
    config = Config(
        data="gaussian",
        dimension=3,
        rank=1,
        depths=(3,),
        scales=(0.01,),
        draws=4,
        horizon=2.0,
        curves=0,
    )
    report = run(config, progress=False)
    assert report.rows[0]["median time"] == 2.0
    assert report.rows[0]["undecided"] == 4
    assert all("horizon_reached at t=2" in note for note in report.notes)
