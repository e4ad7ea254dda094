"""What is wrong with a matrix of fixed rank is said in one sentence."""

# pyright: reportArgumentType=false
from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from gradflow.audit import Audit
from gradflow.critical import classify
from gradflow.flow import GradientFlow
from gradflow.manifolds import (
    balanced_inverse,
    balanced_operator,
    FixedRank,
    tangent_projection,
)
from gradflow.manifolds.fixed_rank import _check_arguments
from gradflow.models import LinearMap, LowRank, SquaredLoss
from gradflow.moments import Moments
from gradflow.solve import integrate
from gradflow.theory import LowRankTheory


XX = jnp.diag(jnp.array([3.0, 2.0, 1.0]))
ENERGY = SquaredLoss(Moments(XX, XX, XX, 1, autoencoding=True))
ONE = jnp.eye(3)
POINT = LowRank.of(ONE, 3)
TWO = LowRank.of(jnp.diag(jnp.array([1.0, 1.0, 0.0])), 2)
# Two of these come behind the type checker of the tests.
CASES = {
    "shapes": (
        lambda: _check_arguments(ONE, jnp.ones((2, 3)), 2, None),
        r"z has shape \(2, 3\): it must be \(3, 3\)",
    ),
    "depth": (lambda: balanced_operator(ONE, ONE, 0), "depth must be >= 1, got 0"),
    "inverse": (lambda: balanced_inverse(ONE, ONE, 0), "depth must be >= 1, got 0"),
    "rank": (lambda: balanced_operator(ONE, ONE, 2, rank=9), "rank=9 must be from 0"),
    "tangent": (lambda: tangent_projection(ONE, ONE, 7), "rank=7 must be from 0 to 3"),
    "balanced": (lambda: POINT.balanced(0), "depth must be >= 1, got 0"),
    "flat": (lambda: integrate(GradientFlow(ENERGY), POINT), "needs manifold=FixedR"),
    "audit": (
        lambda: Audit.__check_init__(SimpleNamespace(start=POINT)),
        "start of an Audit must be a DeepLinear network, got LowRank: leave",
    ),
    "other rank": (
        lambda: classify(
            GradientFlow(ENERGY, FixedRank(2, 2)), LowRankTheory(ENERGY, 3, 2), TWO
        ),
        "got LowRank of rank 2",
    ),
    "certificate of another rank": (
        lambda: LowRankTheory(ENERGY, 3, 2).certificate(TWO),
        "got LowRank of rank 2",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_message(name):
    call, message = CASES[name]
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_entries_of_a_matrix_are_no_low_rank_point():
    with pytest.raises(Exception, match="LowRank"):
        LowRankTheory(ENERGY, 3, 2).match(LinearMap(ONE))
