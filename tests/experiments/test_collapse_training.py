"""Flow and Adam on their way to the closed form, on synthetic data."""

import numpy as np
import pytest

from gradflow import plot
from gradflow.experiments.collapse_training import Config, FAMILIES, Family, run


def check(report):
    print(report.table())
    assert [row["family"] for row in report.rows[::2]] == list(FAMILIES)
    for row in report.rows:
        assert row["active in theory"] == (0 if row["setting"] == "collapsed" else 1)
        assert row["flow: right"] == row["flow: certified"] == row["draws"], row
        assert row["Adam: right"] == row["draws"], row
        assert row["flow: D_MA"] < 1e-4 and row["Adam: D_MA"] < 1e-2, row


@pytest.mark.slow
def test_all_families_in_short(tmp_path):
    config = Config(
        draws=1, samples=200, dimension=3, latents=2, updates=1000, watched=100.0
    )
    report = run(config, progress=False)
    check(report)
    assert all(path.stat().st_size > 10_000 for path in plot.save(report, tmp_path))


@pytest.mark.slow
def test_all_families():
    check(run(Config(), progress=False))


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_settings_are_on_their_sides_of_the_thresholds(name):
    family = Family(Config(samples=200, dimension=3, latents=2), name)
    for setting, wanted in (("collapsed", 0), ("active", 1)):
        energy, theory = family.posed(family.beta(setting))
        assert 2 - int(theory.collapsed()) == wanted
        seen = np.asarray(family.nats(energy, theory.optimum()))
        assert (seen > 1e-6).sum() == wanted


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"above": 1.0}, "above=1.0 must be above 1"),
        ({"latents": 9}, "latents=9 is more than dimension=8"),
        ({"latents": 1}, "latents must be >= 2, got 1"),
        ({"least": 0.0}, "least must be a finite number > 0, got 0.0"),
    ],
)
def test_bad_input(settings, message):
    with pytest.raises(ValueError, match=message):
        Config(**settings)
