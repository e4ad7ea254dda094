"""Conditional VAEs of perceptrons: collapse against theta."""

import numpy as np
import pytest

from gradflow import plot
from gradflow.cli import main
from gradflow.experiments import nonlinear_cvae
from gradflow.experiments.nonlinear_cvae import Config, run


@pytest.mark.slow
def test_networks_in_short_stopped_and_resumed(tmp_path, capsys, monkeypatch):
    """By the command line; what was stopped ends at the same table."""
    command = (
        "run nonlinear_cvae --digits 1 6 --draws 1 --width 32 --depth 1 --steps 900 "
        "--every 200 --latents 4 --epsilon 0.02 --rate 3e-3"
    ).split()
    report = run(
        Config(
            digits=(1, 6), draws=1, width=32, depth=1, steps=900, rate=3e-3, latents=4,
            epsilon=0.02,
        ),
        progress=False,
    )  # fmt: skip
    one, six = report.rows
    assert one["linear: collapsed"] == 1
    assert one["nats"] < six["nats"]
    assert "trained on Gaussian samples" in report.notes[0]
    assert "the sum of theta predicts the order 1, 6; by" in report.notes[1]
    assert all(path.stat().st_size > 10_000 for path in plot.save(report, tmp_path))

    from gradflow.store.checkpoint import Checkpoint

    def write(self, step, arrays):
        whole(self, step, arrays)
        if self.path.parent.name == "digit-6" and step == 400:
            raise KeyboardInterrupt

    whole = Checkpoint.write
    out = ["--out", str(tmp_path / "run")]
    with monkeypatch.context() as patched:
        patched.setattr(Checkpoint, "write", write)
        with pytest.raises(SystemExit) as stop:
            main([*command, *out])
    assert stop.value.code == 130
    assert "stopped; 1 of 2 networks are done" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main([*command, *out])
    assert stop.value.code == 0
    assert report.table() in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(["verify", str(tmp_path / "run")])
    assert "2 rows computed again: the same" in capsys.readouterr().out


@pytest.mark.slow
def test_on_gaussian_samples_networks_carry_at_most_what_theory_says():
    """There no map does much better than linear ones; latents beside their threshold
    take longest to come up."""
    report = run(
        Config(draws=1, width=64, depth=1, steps=3000, digits=(1, 6)), progress=False
    )
    print(report.table(), report.notes)
    for row in report.rows:
        assert 0.5 * row["linear: nats"] < row["nats"] < 1.1 * row["linear: nats"]
        assert row["collapsed"] >= row["linear: collapsed"] - 1
    assert report.rows[0]["collapsed"] > report.rows[1]["collapsed"]


def test_order_counts_the_networks_in_which_theta_decides():
    linear = {1: _Known(1.0), 9: _Known(2.0), 6: _Known(3.0)}
    levels = {1: [2e-2, 2e-2], 9: [4e-2, 4e-2], 6: [2.0, 1e-3]}
    nats = {1: [0.1, 0.1], 9: [0.2, 0.2], 6: [0.3, 0.3]}
    found = {
        digit: {
            "level": np.array(levels[digit])[:, None],
            "nats": np.array(known)[:, None],
        }
        for digit, known in nats.items()
    }
    share, sums = nonlinear_cvae._order(linear, found, "theta", "theta")
    assert share.startswith("theta predicts the order 1, 9, 6; by the share of")
    assert "found for 1 of 2 initial weights" in share
    assert share.endswith("1 before 9 in 2 of 2, 9 before 6 in 1 of 2")
    assert "found for 2 of 2 initial weights" in sums


class _Known:
    def __init__(self, theta):
        self.theta = theta


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"digits": (10,)}, "digits must be <= 9, got 10"),
        ({"digits": (1, 1)}, r"digits=\(1, 1\) has equal entries"),
        ({"beta": 0.0}, "beta must be a finite number > 0, got 0.0"),
    ],
)
def test_bad_input(settings, message):
    with pytest.raises(ValueError, match=message):
        Config(**settings)
