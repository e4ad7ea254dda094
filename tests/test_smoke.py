"""The main job, small: runs on every Python and jax that there is."""

import equinox as eqx
import jax.random as jr
import numpy as np

import gradflow as gf


def test_from_data_to_fraction():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(100, 5))
    y = x @ rng.normal(size=(5, 4)) + 0.1 * rng.normal(size=(100, 4))
    energy = gf.models.SquaredLoss(gf.Moments.from_data(x, y))
    theory = gf.theory.LinearTheory(energy, rank=2)
    flow = gf.GradientFlow(energy)
    study = gf.Study(
        gf.GaussianInit(widths=(5, 3, 2, 4), scale=0.3),
        eqx.Partial(gf.integrate, flow, stop=theory.certificate, throw=False),
        eqx.Partial(gf.classify, flow, theory),
        draws=32,
    )
    outcome = gf.run_study(study, jr.key(0))
    best = outcome.finding.kind == gf.KIND.global_minimum
    assert str(gf.fraction(best)) == "32 of 32, 95 % interval [0.8911, 1.0000]"


def test_mnist_moments():
    moments = gf.datasets.mnist().restrict(16)
    values, _ = moments.principal()
    np.testing.assert_allclose(np.sqrt(values[0]), 6.1718, atol=5e-5)
    np.testing.assert_allclose(np.sqrt(values[15]), 0.88623, atol=5e-6)
