"""Rates against the Hessian of the factors, which knows nothing of the product."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from gradflow import BalancedInit, Moments
from gradflow.datasets import gaussian, teacher
from gradflow.models import SquaredLoss
from gradflow.theory import LinearTheory
from gradflow.theory.rates import autoencoder_rate, balanced_rates


WIDTHS = [(4, 2, 4), (4, 2, 3, 4), (4, 2, 2, 3, 3, 4), (4, 4, 4)]


def _hessian_rates(theory, widths):
    """The positive eigenvalues of the factors' Hessian at a balanced minimizer."""
    point = BalancedInit(widths, theory.optimum().weight)(jr.key(5))
    flat, unravel = ravel_pytree(point)
    hessian = jax.jit(jax.hessian(lambda x: theory.energy(unravel(x))))(flat)
    values = np.linalg.eigvalsh(hessian)
    count = theory.rank * (widths[0] + widths[-1] - theory.rank)
    # The others are the directions in which the product does not change.
    assert np.all(np.abs(values[:-count]) < 1e-12 * values[-1])
    return values[-count:]


@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_rates_are_the_eigenvalues_of_the_factors_hessian(widths):
    rank = min(widths)
    theory = LinearTheory(SquaredLoss(gaussian(jr.key(1), 4, 12)), rank)
    rates = balanced_rates(theory, len(widths) - 1)
    np.testing.assert_allclose(rates, _hessian_rates(theory, widths), rtol=1e-9)
    eigenvalues = jnp.linalg.eigvalsh(theory.energy.moments.xx)
    slowest = autoencoder_rate(eigenvalues, rank, len(widths) - 1)
    assert slowest == pytest.approx(rates[0], rel=1e-10)


@pytest.mark.parametrize("widths", [(4, 2, 3), (4, 2, 3, 3), (3, 2, 2, 3, 5)], ids=str)
def test_supervised_rates(widths):
    data = teacher(jr.key(2), widths[0], widths[-1], 3, 20, noise=0.1)
    theory = LinearTheory(SquaredLoss(data), 2)
    rates = balanced_rates(theory, len(widths) - 1)
    np.testing.assert_allclose(rates, _hessian_rates(theory, widths), rtol=1e-8)


def test_limits_of_the_autoencoder_rate():
    # Close eigenvalues: half their difference. A small one: itself.
    assert autoencoder_rate([1 + 1e-9, 1.0], 1, 2) == pytest.approx(5e-10, rel=1e-6)
    assert autoencoder_rate([1.0, 1e-9], 1, 2) == pytest.approx(1e-9, rel=1e-6)
    # Nothing is left out: the whole space moves at N times the least eigenvalue.
    assert autoencoder_rate([3.0, 2.0], 2, 5) == 10.0
    # Ties can be rotated for nothing.
    assert autoencoder_rate([2.0, 1.0, 1.0], 2, 3) == 0.0


@pytest.mark.parametrize("depth", [0, -1, True])
def test_depth_is_checked(depth):
    theory = LinearTheory(SquaredLoss(gaussian(jr.key(1), 3, 9)), 1)
    with pytest.raises(ValueError, match="depth must be a whole number >= 1"):
        balanced_rates(theory, depth)
    with pytest.raises(ValueError, match="depth must be a whole number >= 1"):
        autoencoder_rate([2.0, 1.0], 1, depth)


def test_data_with_too_few_modes():
    values = jnp.diag(jnp.array([2.0, 0.0]))
    theory = LinearTheory(SquaredLoss(Moments(jnp.eye(2), values, values, 1)), 2)
    with pytest.raises(ValueError, match="fewer than rank=2 modes"):
        balanced_rates(theory, 2)


@pytest.mark.parametrize("values", [[1.0, 0.0], [1.0, np.nan], [2.0, -1.0]])
def test_eigenvalues_are_checked(values):
    with pytest.raises(ValueError, match="eigenvalues must be finite and > 0"):
        autoencoder_rate(values, 1, 2)
    with pytest.raises(ValueError, match="rank=3 must be from 1 to"):
        autoencoder_rate([2.0, 1.0], 3, 2)
