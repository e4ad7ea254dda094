import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import scipy.integrate

from gradflow.theory.riccati import echelon, riccati


ECHELON = eqx.filter_jit(echelon)


def _pivots(matrix):
    """The place of the first entry of each column that is not 0.0."""
    present = np.asarray(matrix) != 0
    return [int(np.argmax(c)) if c.any() else len(c) for c in present.T]


def _planted(key, small):
    """Rows 0, 1 and 2 span 2 dimensions, and row 1 adds only `small` to row 0."""
    rows = jr.normal(key, (6, 3))
    first, other = rows[0], rows[1]
    return rows.at[1].set(first + small * other).at[2].set(first - 3 * other)


@pytest.mark.parametrize("small", [1.0, 1e-4, 1e-8])
def test_echelon_finds_what_is_absent(getkey, small):
    rotation = jnp.linalg.qr(jr.normal(getkey(), (3, 3)))[0]
    matrix = _planted(getkey(), small) @ rotation
    found = ECHELON(matrix)
    assert _pivots(found) == [3, 1, 0]
    # It is the same matrix up to an orthogonal one on the right.
    np.testing.assert_allclose(found @ found.T, matrix @ matrix.T, atol=1e-13)


def test_echelon_of_extreme_matrices(getkey):
    generic = jr.normal(getkey(), (6, 3))
    assert _pivots(ECHELON(generic)) == [2, 1, 0]
    assert _pivots(ECHELON(generic.at[:3].set(0.0))) == [5, 4, 3]
    assert _pivots(ECHELON(generic[:, [0, 1, 0]])) == [6, 1, 0]
    assert not ECHELON(jnp.zeros((6, 3))).any()
    # A scale is no reason, a tiny entry beside ordinary ones is.
    assert _pivots(ECHELON(1e-150 * generic)) == [2, 1, 0]
    assert _pivots(ECHELON(generic.at[0].set(1e-13))) == [2, 1, 0]
    assert _pivots(ECHELON(generic.at[0].set(1e-15))) == [3, 2, 1]


def test_riccati_solves_its_equation(getkey):
    rates = jnp.array([1.3, 0.4, 0.0, -0.7])
    weights = jnp.array([0.5, 2.0, 1.0, 0.0])
    factor = jr.normal(getkey(), (4, 6))  # wider than high

    def velocity(_, flat):
        p = flat.reshape(4, 4)
        drift = rates[:, None] * p
        return np.asarray(drift + drift.T - (p * weights[None, :]) @ p).ravel()

    flat = np.asarray(factor @ factor.T).ravel()
    end = scipy.integrate.solve_ivp(
        velocity, (0, 3), flat, method="DOP853", rtol=1e-12, atol=1e-14
    ).y[:, -1]
    found = eqx.filter_jit(riccati)(rates, weights, factor, jnp.asarray(3.0))
    np.testing.assert_allclose(found @ found.T, end.reshape(4, 4), atol=1e-10)
