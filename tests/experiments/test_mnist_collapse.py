"""Linear VAEs on MNIST beside their thresholds of collapse, by flow and by Adam."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from gradflow import plot
from gradflow.datasets import mnist
from gradflow.experiments import mnist_cvae, mnist_hvae
from gradflow.experiments.sides import beside
from gradflow.initial import GaussianLike
from gradflow.models import ConditionalELBO, LinearCVAE, LinearMap
from gradflow.theory import CVAETheory


MARKS = (1, 2, 4, 8, 16, 32, 64)


def check(report):
    """All sides right by both methods, all of the flow certified."""
    print(report.table(), report.notes)
    for row in report.rows:
        assert row["flow: right"] == row["flow: certified"] == row["draws"], row
        assert row["Adam: right"] == row["draws"], row
        assert row["flow: D_MA"] < 1e-4 and row["Adam: D_MA"] < 1e-2, row
    return report.rows


def test_sides_are_half_way_to_the_next_threshold_or_nearer():
    low, high = beside(1.0, np.array([0.25, 0.9, 1.0, 4.0]), 0.1)
    np.testing.assert_allclose([low, high], [np.sqrt(0.9), 1.1])
    assert beside(1.0, np.array([1.0]), 0.5) == (1 / 1.5, 1.5)


@pytest.mark.slow
def test_quadrants_in_short(tmp_path):
    config = mnist_cvae.Config(
        latents=3, modes=4, inputs=2, marks=(1, 3), updates=1000, watched=100.0
    )
    report = mnist_cvae.run(config, progress=False)
    rows = check(report)
    assert [row["active in theory"] for row in rows] == [1, 0, 3, 2]
    np.testing.assert_allclose(rows[0]["its value"], 3.3311, rtol=2e-5)
    assert "flow: as many active as in theory, 4 of 4, 95 %" in report.notes[0]
    assert all(path.stat().st_size > 10_000 for path in plot.save(report, tmp_path))


@pytest.mark.slow
def test_quadrants():
    report = mnist_cvae.run(mnist_cvae.Config(), progress=False)
    rows = check(report)
    wanted = (3.3311, 2.0862, 1.5860, 0.84417, 0.43507, 0.19450, 0.061919)
    found = [row["its value"] for row in rows[::2]]
    np.testing.assert_allclose(found, wanted, rtol=5e-5)
    counts = [row["active in theory"] for row in rows]
    assert counts == [count for mark in MARKS for count in (mark, mark - 1)]


@pytest.mark.slow
def test_images_in_short(tmp_path):
    """Below 1 all of z_2 is active, above as many as there are theta above."""
    config = mnist_hvae.Config(
        latents=4, modes=4, marks=(1, 4), updates=1000, watched=30.0
    )
    report = mnist_hvae.run(config, progress=False)
    assert [row["active in theory"] for row in check(report)] == [1, 0, 4, 3]
    assert all(path.stat().st_size > 10_000 for path in plot.save(report, tmp_path))


@pytest.mark.slow
def test_images():
    rows = check(mnist_hvae.run(mnist_hvae.Config(), progress=False))
    found = [row["its value"] for row in rows[::2]]
    wanted = (6.1718, 2.0953, 1.7960, 1.2394, 1.0, 0.88623, 0.58468)
    np.testing.assert_allclose(found, wanted, rtol=5e-5)
    assert rows[8]["at"] == "threshold of modes 16, 32"
    counts = [row["active in theory"] for row in rows]
    # All that are left die at 1, and nothing happens at theta < 1.
    assert counts == [1, 0, 2, 1, 4, 3, 8, 7, 32, 12, 32, 32, 32, 32]


@pytest.mark.slow
def test_problem_is_that_of_all_pixels():
    """The least energy but for what is cut off; and at any point within the directions
    that are kept, the gradient on all pixels is that of the problem, so the others stay
    at 0."""
    whole = mnist(task="quadrant")
    config = mnist_cvae.Config(latents=3, modes=5, inputs=4, marks=(1,))
    problem = mnist_cvae.Quadrants(config)
    energy, theory = problem.posed(0.7)
    full = ConditionalELBO(whole, beta=0.7)
    known = CVAETheory(full, 3)
    rest = jnp.sum(known.spectrum()[5:])
    least = theory.optimal_energy() + rest
    np.testing.assert_allclose(least, known.optimal_energy(), rtol=1e-10)
    np.testing.assert_allclose(problem.thresholds, known.spectrum()[:3], rtol=1e-10)
    into_x, into_y = whole.principal()[1][:, :4], known.vectors[:, :5]

    def embedded(point):
        return LinearCVAE(
            LinearMap(point.encoder_x.matrix() @ into_x.T),
            LinearMap(point.encoder_y.matrix() @ into_y.T),
            LinearMap(into_y @ point.decoder.matrix()),
            LinearMap(into_y @ point.skip.matrix() @ into_x.T),
            point.covariance,
        )

    @eqx.filter_jit
    def of_residuals(point):
        """The energy of all pixels, of a point about x and y - C_yx C_xx^+ x."""
        encoder_y, back = point.encoder_y.matrix(), known.regression
        shifted = LinearCVAE(
            LinearMap(point.encoder_x.matrix() - encoder_y @ back),
            point.encoder_y,
            point.decoder,
            LinearMap(point.skip.matrix() + back),
            point.covariance,
        )
        return full(shifted)

    point = GaussianLike(problem.like, 0.3, 0.3)(jr.key(3))
    large = embedded(point)
    np.testing.assert_allclose(energy(point) + rest, of_residuals(large), rtol=1e-10)
    found = jax.grad(of_residuals)(large)
    wanted = embedded(energy.differential(point))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-9)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"marks": (65,)}, "marks has 65, but there are 64 latents"),
        ({"latents": 81, "marks": (1,)}, "latents=81 is more than modes=80"),
        ({"inputs": 0}, "inputs must be >= 1, got 0"),
        ({"inputs": 180}, "inputs must be <= 179, got 180"),
        ({"modes": 589}, "modes must be <= 588, got 589"),
        ({"apart": 0.0}, "apart must be a finite number > 0, got 0.0"),
        ({"updates": 0}, "updates must be >= 1, got 0"),
        ({"learning_rate": -1.0}, "learning_rate must be a finite number > 0"),
    ],
)
def test_bad_input(settings, message):
    with pytest.raises(ValueError, match=message):
        mnist_cvae.Config(**settings)


def test_no_more_directions_than_images_have():
    with pytest.raises(ValueError, match="modes must be <= 712, got 713"):
        mnist_hvae.Config(modes=713)
