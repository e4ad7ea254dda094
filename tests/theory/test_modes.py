"""What the theories of probabilistic PCA and CCA share."""

import jax.numpy as jnp
import numpy as np
import pytest
from latents import moments_of

from gradflow.models import NegativeLogLikelihood
from gradflow.theory import PPCATheory
from gradflow.theory.modes import escape, nearest, subsets


def test_tied_modes_are_counted_together():
    values = jnp.array([3.0, 2.0, 2.0, 1.0])
    for share, expected in (
        ([1.0, 0.0, 0.0, 0.0], [1, 0, 0, 0]),
        ([0.0, 0.3, 0.7, 0.0], [0, 1, 0, 0]),
        ([0.4, 1.0, 1.0, 0.6], [0, 1, 1, 1]),
    ):
        found = nearest(jnp.array(share), values)
        np.testing.assert_array_equal(found, np.array(expected, bool))


def test_escape_times():
    number = lambda x: jnp.asarray(x, float)
    np.testing.assert_allclose(
        escape(number(2.0), number(np.exp(-6.0))), 3.0, rtol=1e-14
    )
    assert escape(number(0.0), number(0.1)) == jnp.inf  # nothing grows
    assert escape(number(1.0), number(0.0)) == jnp.inf  # at it
    assert escape(number(1.0), number(2.0)) == 0


def test_too_many_sets_to_list():
    theory = PPCATheory(NegativeLogLikelihood(moments_of(np.diag(np.arange(1, 31)))), 8)
    with pytest.raises(ValueError, match="index sets of 30 modes and 8 latent variab"):
        list(subsets(theory))
    # Their second critical value is known nonetheless.
    assert theory.certificate.level > theory.optimal_energy()
