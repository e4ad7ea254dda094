r"""Steps on the manifold of rank-$k$ matrices that lose neither rank nor sign.

Along the exact balanced flow $W = Y\,\mathrm{diag}(e^l)\,X^\top$ obeys the smooth
equation $\dot Y = -BY$, $\dot X = -A^\top X$ with bounded $B, A$ (see
`manifolds.FixedRank`). One step of any Runge-Kutta method for it, from the orthonormal
$Y = U$, $X = V$, changes both sides by a small relative amount: the rank and the sign
of the determinant are kept to all orders of the step, and the error of each singular
value is relative to that value. After the step a graded singular value decomposition
makes $Y, X$ orthonormal again. The order is that of the method.
"""

from collections.abc import Callable
from typing import Any, cast, ClassVar

import diffrax
import jax.numpy as jnp
from diffrax import LocalLinearInterpolation

from ..arguments import checked_fields
from ..models.low_rank import LowRank
from .step_control import root_mean_square


@checked_fields
class RankPreserving(diffrax.AbstractAdaptiveSolver):
    """Any explicit diffrax solver with an error estimate, for points `LowRank`.

    The default of `integrate` for such points, with `Tsit5`. Usable in
    `diffrax.diffeqsolve` too (interpolation is linear in the coordinates, so save at
    steps only).
    """

    solver: diffrax.AbstractAdaptiveSolver = diffrax.Tsit5()
    interpolation_cls: ClassVar[Callable[..., LocalLinearInterpolation]] = (
        LocalLinearInterpolation
    )

    @property
    def term_structure(self):
        return self.solver.term_structure

    def order(self, terms):
        return self.solver.order(terms)

    def error_order(self, terms):
        return self.solver.error_order(terms)

    def func(self, terms, t0, y0, args):
        return self.solver.func(terms, t0, y0, args)

    def init(self, terms, t0, t1, y0, args) -> None:
        return None

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        del solver_state, made_jump
        # What a method keeps from its last step is in the last step's coordinates.
        fresh = self.solver.init(terms, t0, t1, y0, args)
        y1, error, _, _, result = self.solver.step(
            terms, t0, t1, y0, args, fresh, made_jump=False
        )
        point = y1.canonical()
        dense: dict[str, Any] = {"y0": y0, "y1": point}
        return point, self._relative(cast(LowRank, error), point), dense, None, result

    def _relative(self, error: LowRank, point: LowRank) -> LowRank:
        """Step size control compares the error with the size of the whole point, of
        which the logarithms, that may be -1000, should be no part."""
        size = root_mean_square((point.left, point.right))
        scale = root_mean_square(point) / size
        return LowRank(
            error.left * scale, jnp.zeros_like(point.log_values), error.right * scale
        )
