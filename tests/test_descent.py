"""A descent is a state that can be stopped, stored and taken up again."""

# Points of several kinds share one energy.
# pyright: reportArgumentType=false

import io

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from gradflow import datasets
from gradflow.audit import Audit
from gradflow.flow import GradientFlow
from gradflow.initial import GaussianInit
from gradflow.models.linear import SquaredLoss
from gradflow.solve import integrate, Integrator
from gradflow.solvers.chebyshev import RKC2
from gradflow.solvers.stiff import stiff


POINT = GaussianInit((4, 2, 4), 0.3)(jr.key(1))
FLOW = GradientFlow(SquaredLoss(datasets.gaussian(jr.key(0), 4, 12)))
HORIZON = jnp.asarray(40.0)


@eqx.filter_jit
def go_on(descent, state, most):
    """Until the run is over, or for so many steps."""
    return jax.lax.fori_loop(
        0,
        most,
        lambda _, s: jax.lax.cond(
            descent.finished(s), lambda s: s, lambda s: descent.step(s, HORIZON), s
        ),
        state,
    )


@pytest.mark.parametrize(
    "method",
    [diffrax.Tsit5(), RKC2(), pytest.param(stiff(), marks=pytest.mark.slow)],
    ids=lambda m: type(m).__name__,
)
@pytest.mark.slow
def test_stored_and_taken_up_again_to_the_last_bit(method):
    integrator = Integrator(FLOW, method=method, tolerance=1e-5, audit=Audit)
    (descent,) = integrator.descents(POINT)
    start = eqx.filter_jit(descent.init)(POINT, jnp.zeros(()))
    whole = go_on(descent, start, 5000)
    stopped = go_on(descent, start, 9)
    assert not bool(descent.finished(stopped)) and bool(descent.finished(whole))

    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, stopped)
    file.seek(0)
    again = eqx.tree_deserialise_leaves(file, start)
    resumed = go_on(descent, again, 4991)
    for one, other in zip(
        jax.tree.leaves(resumed), jax.tree.leaves(whole), strict=True
    ):
        assert np.array_equal(one, other, equal_nan=True)

    solution = descent.solution(whole)
    direct = integrate(
        FLOW, POINT, method=method, tolerance=1e-5, horizon=40.0, audit=Audit
    )
    assert int(direct.stats["steps"]) == int(solution.stats["steps"])
    assert np.isclose(direct.energy, solution.energy, rtol=1e-12)
