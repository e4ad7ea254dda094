"""Phase diagrams by runs and by theory, and the order in which latents come up."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradflow import plot
from gradflow.experiments import phases
from gradflow.experiments.activation import growth_rates
from gradflow.experiments.phases import ConditionalGrid, HierarchicalGrid
from gradflow.experiments.posterior_collapse import Config, run
from gradflow.models import CholeskyCovariance, LinearMap, LinearVAE, NegativeELBO


def row(report, grid):
    (found,) = [r for r in report.rows if r["grid"] == grid]
    return found


def check(report, grid):
    found = row(report, grid)
    assert found["cells right"] == found["cells"]
    assert found["right"] == found["certified"] == found["draws"]
    assert found["cells off at boundaries"] == 0
    return found


@pytest.mark.slow
def test_active_latents_against_beta(tmp_path):
    report = run(
        Config(grids=("vae",), points=5, latents=(2,), draws=2), progress=False
    )
    found = check(report, "vae")
    assert found["draws"] == 10 and found["case a"] > 0 and found["case c"] > 0
    assert "active means more than 0.001 nats" in report.notes[0]
    # One panel with a few cells.
    assert all(path.stat().st_size > 5_000 for path in plot.save(report, tmp_path))


@pytest.mark.slow
def test_every_grid_and_the_dynamics(tmp_path):
    """All cells, all three cases of a hierarchical VAE, boundaries, and the order of
    activation."""
    report = run(Config(), progress=False)
    for grid in ("vae", "cvae", "hvae", "sigma_1"):
        found = check(report, grid)
        print(grid, found)
        if grid in ("hvae", "sigma_1"):
            assert min(found[f"case {case}"] for case in "abc") > 0
    found = row(report, "dynamics")
    assert found["right"] == found["draws"] == 32
    assert all(path.stat().st_size > 10_000 for path in plot.save(report, tmp_path))


def test_correlation_collapses_a_conditional_vae():
    """Remark 1: what y has in common with x needs no latent, so the more they are
    correlated the smaller is the beta at which each latent collapses."""
    grid = ConditionalGrid((3.0, 1.5), (1.0,), (0.0, 0.5, 0.9))
    for rho in grid.y:
        wanted = (1 - rho**2) * np.array([3.0, 1.5])
        np.testing.assert_allclose(grid.thresholds(rho), wanted, rtol=1e-12)
    counts = [
        (grid.predicted(grid.posed(1.0, rho)[2]) == 2).sum() for rho in (0, 0.7, 0.9)
    ]
    assert counts == [0, 1, 2]


def test_cases_of_a_hierarchical_vae():
    """By the inequalities of the three cases, on each side of each boundary."""
    grid = HierarchicalGrid((4.0, 0.5), (1.0,), (1.0,), by="beta_1")
    for beta_1 in (0.5, 1.5, 6.0):
        for beta_2 in (0.3, 0.8, 2.0, 4.5, 7.0):
            found = grid.predicted(grid.posed(beta_2, beta_1)[2])
            for mode, theta2 in enumerate((4.0, 0.5)):
                alive = beta_2 < max(np.sqrt(beta_1 * theta2), beta_1)
                case = (0 if theta2 > beta_2 else 1) if alive else 2
                assert found[mode] == case
    assert phases.CASES[2] == "c"


def test_growth_rates_are_those_of_the_hessian():
    """At the collapsed point, by differentiation."""
    variances = np.array([2.0, 0.3])
    energy = NegativeELBO(
        phases.moments_of(variances), beta=0.7, decoder_std=0.8, prior_std=1.2
    )

    def loss(flat):
        point = LinearVAE(
            LinearMap(flat[:2].reshape(1, 2)), LinearMap(flat[2:].reshape(2, 1)),
            CholeskyCovariance.of(jnp.array([[1.2**2]])),
        )  # fmt: skip
        return energy(point)

    values = np.linalg.eigvalsh(jax.hessian(loss)(jnp.zeros(4)))
    rates = growth_rates(energy, variances)
    np.testing.assert_allclose(np.sort(-rates), values[:2], rtol=1e-12)
    assert rates[0] > 0 > rates[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"grids": ()}, r"grids=\(\) must be some of vae, cvae"),
        ({"variances": (1.0, 1.0)}, r"variances=\(1.0, 1.0\) has equal entries"),
        ({"pair": (1.0, -1.0)}, "pair must be a finite number > 0, got -1.0"),
        ({"beta_low": 0.0}, "beta_low must be a finite number > 0, got 0.0"),
        ({"beta_high": float("nan")}, "beta_high must be a finite number > 0, got nan"),
        ({"beta_high": 0.1}, "beta_low=0.2 must be below beta_high=0.1"),
        ({"correlations": (1.0,)}, "correlations must be >= 0 and < 1, got 1.0"),
        ({"correlations": ()}, "correlations is empty"),
        ({"points": 1}, "points must be >= 2, got 1"),
        ({"latents": (0,)}, "latents must be >= 1, got 0"),
    ],
)
def test_bad_input(settings, message):
    with pytest.raises(ValueError, match=message):
        Config(**settings)
