"""Rates against the Hessian of the factors, which knows nothing of the product."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from gradflow import BalancedInit, Moments
from gradflow.datasets import gaussian, teacher
from gradflow.models import DeepLinear, SquaredLoss
from gradflow.theory import LinearTheory
from gradflow.theory.rates import autoencoder_rate, balanced_rates, rates


WIDTHS = [(4, 2, 4), (4, 2, 3, 4), (4, 2, 2, 3, 3, 4), (4, 4, 4)]


def _hessian_rates(theory, point):
    """The positive eigenvalues of the factors' Hessian at a minimizer."""
    flat, unravel = ravel_pytree(point)
    hessian = jax.jit(jax.hessian(lambda x: theory.energy(unravel(x))))(flat)
    values = np.linalg.eigvalsh(hessian)
    count = theory.rank * (point.widths[0] + point.widths[-1] - theory.rank)
    # The others are the directions in which the product does not change.
    assert np.all(np.abs(values[:-count]) < 1e-12 * values[-1])
    return values[-count:]


def _balanced(theory, widths):
    return BalancedInit(widths, theory.optimum().weight)(jr.key(5))


def _unbalanced(theory, widths):
    """The same product by other factors, with idle units that feed on."""
    rng = np.random.default_rng(1)
    weights = [np.asarray(weight) for weight in _balanced(theory, widths).weights]
    for j in range(len(weights) - 1):
        change = np.eye(widths[j + 1]) + 0.3 * rng.normal(size=[widths[j + 1]] * 2)
        weights[j] = change @ weights[j]
        weights[j + 1] = weights[j + 1] @ np.linalg.inv(change)
    product = weights[0]
    for j in range(1, len(weights)):
        blind = np.eye(len(product)) - product @ np.linalg.pinv(product)
        weights[j] = weights[j] + 0.5 * rng.normal(size=weights[j].shape) @ blind
        product = weights[j] @ product
    return DeepLinear(tuple(map(jnp.asarray, weights)))


@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_rates_are_the_eigenvalues_of_the_factors_hessian(widths):
    rank = min(widths)
    theory = LinearTheory(SquaredLoss(gaussian(jr.key(1), 4, 12)), rank)
    slow = balanced_rates(theory, len(widths) - 1)
    point = _balanced(theory, widths)
    np.testing.assert_allclose(slow, _hessian_rates(theory, point), rtol=1e-9)
    np.testing.assert_allclose(slow, rates(theory, point), rtol=1e-9)
    eigenvalues = jnp.linalg.eigvalsh(theory.energy.moments.xx)
    slowest = autoencoder_rate(eigenvalues, rank, len(widths) - 1)
    assert slowest == pytest.approx(slow[0], rel=1e-10)


@pytest.mark.parametrize("widths", [(4, 2, 3), (4, 2, 3, 3), (3, 2, 2, 3, 5)], ids=str)
def test_supervised_rates(widths):
    data = teacher(jr.key(2), widths[0], widths[-1], 3, 20, noise=0.1)
    theory = LinearTheory(SquaredLoss(data), 2)
    slow = balanced_rates(theory, len(widths) - 1)
    point = _balanced(theory, widths)
    np.testing.assert_allclose(slow, _hessian_rates(theory, point), rtol=1e-8)
    # At other factors of the same product they are others.
    point = _unbalanced(theory, widths)
    found = rates(theory, point)
    np.testing.assert_allclose(found, _hessian_rates(theory, point), rtol=1e-8)
    assert abs(found[0] / slow[0] - 1) > 1e-3


def test_limits_of_the_autoencoder_rate():
    # Close eigenvalues: half their difference. A small one: itself.
    assert autoencoder_rate([1 + 1e-9, 1.0], 1, 2) == pytest.approx(5e-10, rel=1e-6)
    assert autoencoder_rate([1.0, 1e-9], 1, 2) == pytest.approx(1e-9, rel=1e-6)
    # Nothing is left out: the whole space moves at N times the least eigenvalue.
    assert autoencoder_rate([3.0, 2.0], 2, 5) == 10.0
    # Ties can be rotated for nothing.
    assert autoencoder_rate([2.0, 1.0, 1.0], 2, 3) == 0.0


def test_networks_are_checked():
    theory = LinearTheory(SquaredLoss(gaussian(jr.key(1), 3, 9)), 1)
    point = _balanced(theory, (3, 1, 3))
    wide = DeepLinear((jnp.eye(3), theory.optimum().weight))
    with pytest.raises(ValueError, match="narrowest width is 3 and the theory's rank"):
        rates(theory, wide)
    far = DeepLinear((point.weights[0], 1.1 * point.weights[1]))
    with pytest.raises(ValueError, match="from the best matrix of rank 1: these are"):
        rates(theory, far)


@pytest.mark.parametrize("depth", [0, -1, True])
def test_depth_is_checked(depth):
    theory = LinearTheory(SquaredLoss(gaussian(jr.key(1), 3, 9)), 1)
    with pytest.raises(ValueError, match="depth must be"):
        balanced_rates(theory, depth)
    with pytest.raises(ValueError, match="depth must be"):
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
