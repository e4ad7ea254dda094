"""The implicit method that takes over where an explicit one crawls."""

from collections.abc import Callable
from typing import Any

import diffrax
import jax.numpy as jnp
import optimistix as optx
from jaxtyping import Array, Float, PyTree

from ..types import Scalar
from .step_control import root_mean_square


# The last correction of a stage, in units of the step's tolerance: with corrections as
# large as 1 the stages' own errors keep a run hovering above its stopping speed.
SETTLED = 0.1


class StageNewton(optx.AbstractRootFinder):
    r"""Newton's method for the stages of an implicit step, judged by its corrections.

    optimistix's own either demands a residual below an absolute tolerance, which the
    rounding of a stiff stage never meets (it is $\epsilon$ times the step times the
    largest rate), or gives up at the first correction that grows, as the first one
    often does from a large start.
    """

    rtol: float | Float[Array, ""]
    atol: float | Float[Array, ""]
    norm: Callable[[PyTree], Scalar] = root_mean_square

    def _newton(self) -> optx.Newton:
        return optx.Newton(self.rtol, self.atol, self.norm, cauchy_termination=False)  # pyright: ignore[reportArgumentType]

    def init(self, fn, y, args, options, f_struct, aux_struct, tags) -> Any:
        return self._newton().init(fn, y, args, options, f_struct, aux_struct, tags)

    def step(self, fn, y, args, options, state, tags):
        return self._newton().step(fn, y, args, options, state, tags)

    def terminate(self, fn, y, args, options, state, tags):
        del fn, y, args, options, tags
        solved = state.result == optx.RESULTS.successful
        diverged = (state.step > 0) & ~jnp.isfinite(state.diffsize)
        result = optx.RESULTS.where(
            solved & diverged, optx.RESULTS.nonlinear_divergence, state.result
        )
        return ~solved | diverged | (state.diffsize < SETTLED), result

    def postprocess(self, fn, y, aux, args, options, state, tags, result):
        return self._newton().postprocess(
            fn, y, aux, args, options, state, tags, result
        )


def stiff() -> diffrax.Kvaerno5:
    """Kvaerno's method of order 5 with full Newton steps.

    A long plateau after a fast mode is stiff: an explicit method must take steps of
    the fast mode's time. diffrax's default root finder keeps one Jacobian for the
    whole solve and fails its step when that converges slowly, which on deep linear
    networks of large starts is most of the time. Depth 5, width 3, entries of size 9,
    rtol 1e-6: unfinished after 1000 steps with that one and with optimistix's Newton,
    210 accepted and 27 rejected ones with `StageNewton`.

    The Jacobian is dense: up to about 1000 weights.
    """
    return diffrax.Kvaerno5(
        root_finder=diffrax.with_stepsize_controller_tols(StageNewton)()
    )
