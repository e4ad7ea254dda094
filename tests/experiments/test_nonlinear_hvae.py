"""Hierarchical VAEs of perceptrons: which level carries what."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from gradflow import image_plot, plot
from gradflow.experiments import nonlinear_hvae
from gradflow.experiments.nonlinear_hvae import Config, run


@pytest.mark.slow
def test_networks_in_short(tmp_path):
    config = Config(
        beta_1=(1.0,), beta_2=(0.5, 5.0), width=32, depth=1, steps=300, latents=4,
        rate=3e-3,
    )  # fmt: skip
    report = run(config, progress=False)
    print(report.table(), report.notes)
    little, much = report.rows
    # On Gaussian samples no map does much better than linear ones.
    for row, collapsed in ((little, 0), (much, 3)):
        assert row["linear: z_2 collapsed"] == row["z_2 collapsed"] == collapsed
    assert little["nats of z_2"] > much["nats of z_2"]
    assert "trained on Gaussian samples" in report.notes[0]
    assert "beta_2: 1 of 1 neighboring networks" in report.notes[1]
    assert all(path.stat().st_size > 10_000 for path in plot.save(report, tmp_path))


def test_changes_between_neighbors_are_counted():
    config = Config(beta_1=(1.0, 2.0), beta_2=(1.0, 3.0))
    carried = {
        (1.0, 1.0): (1.0, 4.0),
        (1.0, 3.0): (2.0, 1.0),
        (2.0, 1.0): (0.5, 5.0),
        (2.0, 3.0): (2.5, 6.0),
    }
    found = {
        pair: {"nats_1": np.array([[one]]), "nats_2": np.array([[two]])}
        for pair, (one, two) in carried.items()
    }
    counts = [
        note.split(": ")[1].split(" neighboring")[0]
        for note in nonlinear_hvae._falls(config, found)
    ]
    assert counts == ["1 of 2", "2 of 2", "2 of 2", "1 of 2"]


def test_mosaic_puts_each_image_in_its_place():
    images = np.arange(6 * 784).reshape(2, 3, 784).astype(np.uint8)
    figure, axes = plt.subplots()
    image_plot.mosaic([[i.tobytes().hex() for i in band] for band in images], axes)
    (drawn,) = axes.get_images()
    whole = np.asarray(drawn.get_array())
    assert whole.shape == (56, 84)
    np.testing.assert_array_equal(whole[28:, 28:56], images[1, 1].reshape(28, 28))
    plt.close(figure)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta_1": (2.0, 1.0)}, r"beta_1=\(2.0, 1.0\) must rise"),
        ({"beta_2": (1.0, 1.0)}, r"beta_2=\(1.0, 1.0\) must rise"),
        ({"beta_2": ()}, "beta_2 is empty"),
        ({"sigma_1": 0.0}, "sigma_1 must be a finite number > 0, got 0.0"),
    ],
)
def test_bad_input(settings, message):
    with pytest.raises(ValueError, match=message):
        Config(**settings)
