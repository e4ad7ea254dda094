r"""Does a run follow the exact flow, or its own rounding?

The exact flow of the factors conserves $W_{j+1}^\top W_{j+1} - W_j W_j^\top$. From a
balanced start it therefore keeps the rank of the product and, if that is square, the
sign of its determinant. Numbers keep the first only to the error of the steps. Where a
singular value falls below that error, the run crosses 0 and leaves a saddle that the
exact flow converges to: its verdict rests on rounding.

(The integral of $\mathrm{d}\log|\det W|/\mathrm{d}t$, set beside the actual
determinant, does not show it: both sides of the crossing are mirror images, and after
it the two agree again.)
"""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool

from .models.linear import DeepLinear, invariants


# A start is balanced to this, relative to the squares of its factors.
BALANCED = 1e-12
# Singular values of the start below this times the largest are 0.
ABSENT = 1e-12
# One that was absent and is now above this has been lifted by rounding.
LIFTED = 1e-6
# What the numbers may do to the invariants, over what they must not reach.
SHARE = 0.1


class Audit(eqx.Module):
    """Made from a run's start; tells of each later point what it breaks.

    - `sign`: the determinant of a balanced start's product changed its sign.
    - `rank`: its product gained a singular value.
    - `balance`: the invariants drifted by more than a tenth of the least squared
      singular value of a factor (or of the invariants' own size, for starts that are
      not balanced): where that direction goes is decided by the drift.

    To be given to `integrate` as `audit=Audit`.
    """

    start: DeepLinear

    def __check_init__(self):
        if not isinstance(self.start, DeepLinear):
            raise ValueError(
                "start of an Audit must be a DeepLinear network, got "
                f"{type(self.start).__name__}: leave audit out (LowRank runs keep rank "
                "and sign by construction)"
            )

    def __call__(self, network: DeepLinear) -> dict[str, Bool[Array, ""]]:
        kept = invariants(self.start)
        sizes = jnp.stack([jnp.sum(weight**2) for weight in self.start.weights])
        balanced = self.start.imbalance() <= BALANCED * jnp.max(sizes)
        before = jnp.linalg.svd(self.start.matrix(), compute_uv=False)
        present = before > ABSENT * before[0]
        rank = jnp.where(balanced, jnp.sum(present), before.size)
        matrix = network.matrix()
        now = jnp.linalg.svd(matrix, compute_uv=False)
        lifted = jnp.max(jnp.where(present, 0, now)) > LIFTED * now[0]
        flipped = jnp.array(False)
        if matrix.shape[0] == matrix.shape[1]:
            signs = [jnp.linalg.slogdet(m)[0] for m in (self.start.matrix(), matrix)]
            flipped = jnp.all(present) & (signs[0] * signs[1] < 0)
        drifted = jnp.array(False)
        smallest = jnp.stack(
            [
                jnp.linalg.svd(weight, compute_uv=False)[rank - 1]
                for weight in network.weights
            ]
        )
        for old, new in zip(kept, invariants(network), strict=True):
            room = jnp.maximum(jnp.min(smallest) ** 2, jnp.linalg.norm(old))
            drifted = drifted | (jnp.linalg.norm(new - old) > SHARE * room)
        return {
            "sign": balanced & flipped,
            "rank": balanced & lifted,
            "balance": drifted,
        }
