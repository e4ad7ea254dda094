import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate

from gradflow.theory.riccati import echelon, riccati


ECHELON = eqx.filter_jit(echelon)


@pytest.fixture
def rng():
    return np.random.default_rng(2024)


def _pivots(matrix):
    """The place of the first entry of each column that is not 0.0."""
    present = np.asarray(matrix) != 0
    return [int(np.argmax(c)) if c.any() else len(c) for c in present.T]


def _planted(rng, small):
    """Rows 0, 1 and 2 span 2 dimensions, and row 1 adds only `small` to row 0."""
    rows = rng.normal(size=(6, 3))
    first, other = rows[0], rows[1].copy()
    rows[1:3] = first + small * other, first - 3 * other
    return rows


@pytest.mark.parametrize("small", [1.0, 1e-4, 1e-8])
def test_echelon_finds_what_is_absent(rng, small):
    rotation = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    matrix = _planted(rng, small) @ rotation
    found = np.asarray(ECHELON(jnp.asarray(matrix)))
    assert _pivots(found) == [3, 1, 0]
    # It is the same matrix up to an orthogonal one on the right.
    np.testing.assert_allclose(found @ found.T, matrix @ matrix.T, atol=1e-13)


def test_echelon_of_extreme_matrices(rng):
    generic = jnp.asarray(rng.normal(size=(6, 3)))
    assert _pivots(ECHELON(generic)) == [2, 1, 0]
    assert _pivots(ECHELON(generic.at[:3].set(0.0))) == [5, 4, 3]
    assert _pivots(ECHELON(generic[:, [0, 1, 0]])) == [6, 1, 0]
    assert not ECHELON(jnp.zeros((6, 3))).any()
    # A scale is no reason, a tiny entry beside ordinary ones is.
    assert _pivots(ECHELON(1e-150 * generic)) == [2, 1, 0]
    assert _pivots(ECHELON(generic.at[0].set(1e-11))) == [2, 1, 0]
    assert _pivots(ECHELON(generic.at[0].set(1e-15))) == [3, 2, 1]


def test_riccati_solves_its_equation(rng):
    rates = jnp.array([1.3, 0.4, 0.0, -0.7])
    weights = jnp.array([0.5, 2.0, 1.0, 0.0])
    factor = jnp.asarray(rng.normal(size=(4, 6)))  # wider than high

    def velocity(_, flat):
        p = flat.reshape(4, 4)
        drift = np.asarray(rates)[:, None] * p
        return (drift + drift.T - (p * np.asarray(weights)) @ p).ravel()

    flat = np.asarray(factor @ factor.T).ravel()
    end = scipy.integrate.solve_ivp(
        velocity, (0, 3), flat, method="DOP853", rtol=1e-12, atol=1e-14
    ).y[:, -1]
    found = eqx.filter_jit(riccati)(rates, weights, factor, jnp.asarray(3.0))
    np.testing.assert_allclose(found @ found.T, end.reshape(4, 4), atol=1e-10)
