r"""Matrices of fixed rank, as a product whose small singular values stay accurate.

| on paper | in code |
|---|---|
| $W = U\,\mathrm{diag}(s)\,V^\top$ | `left`, exp of `log_values`, `right` |
| $k$ | `rank` |

*Reference:* Bah, Rauhut, Terstiege, Westdickenberg 2020, sections 3 and 4 (the
manifold of rank-$k$ matrices).
"""

import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..arguments import checked_fields
from ..spectrum import graded_svd
from .linear import AbstractLinearNetwork, DeepLinear


@checked_fields
class LowRank(AbstractLinearNetwork):
    r"""$W = Y\,\mathrm{diag}(e^l)\,X^\top$ of rank $k$: `left` $Y$ and `right` $X$ have
    $k$ well-conditioned columns, orthonormal ones in canonical form.

    The exact balanced flow keeps the rank for all finite times, but a singular value
    may fall like $e^{-250}$. Kept as a logarithm it stays accurate: no rounding of $W$
    itself can lift it.

    **Raises:** `ValueError` when the shapes do not fit.
    """

    left: Float[Array, "y rank"]
    log_values: Float[Array, " rank"]
    right: Float[Array, "x rank"]

    def __check_init__(self):
        shapes = [jnp.shape(a) for a in (self.left, self.log_values, self.right)]
        ranks = {shape[-1] for shape in shapes if shape}
        if [len(shape) for shape in shapes] != [2, 1, 2] or len(ranks) != 1:
            raise ValueError(
                f"left, log_values and right have shapes {shapes}: they must be "
                "(y, rank), (rank,) and (x, rank)"
            )
        rank = ranks.pop()
        if not 1 <= rank <= min(shapes[0][0], shapes[2][0]):
            raise ValueError(
                f"rank={rank} must be from 1 to {min(shapes[0][0], shapes[2][0])}, the "
                "smaller side"
            )

    def factors(self) -> tuple[Float[Array, "_ _"], ...]:
        return self.values[:, None] * self.right.T, self.left

    @property
    def rank(self) -> int:
        """$k$."""
        return self.log_values.shape[0]

    @property
    def values(self) -> Float[Array, " rank"]:
        """$e^l$, but none below 1e-261 (1e-32 in float32).

        A smaller one changes no entry of W that a float can tell, while whatever has
        this factor, such as the differential by Y, can still be divided by it.
        """
        floor = 0.85 * float(np.log(jnp.finfo(self.log_values.dtype).tiny))
        return jnp.exp(jnp.maximum(self.log_values, floor))

    def canonical(self) -> "LowRank":
        """The same matrix with orthonormal columns and descending values."""
        return LowRank(*graded_svd(self.left, self.log_values, self.right))

    def balanced(self, depth: int) -> DeepLinear:
        r"""Balanced factors of $W$ with all inner widths $k$: $W_1 = D V^\top$,
        $W_j = D$, $W_N = U D$ with $D = \mathrm{diag}(s^{1/N})$."""
        if depth < 1:
            raise ValueError(f"depth must be >= 1, got {depth}")
        point = self.canonical()
        root = jnp.exp(point.log_values / depth)
        if depth == 1:
            return DeepLinear((self.matrix(),))
        inner = (jnp.diag(root),) * (depth - 2)
        first, last = root[:, None] * point.right.T, point.left * root[None, :]
        return DeepLinear((first, *inner, last))

    @staticmethod
    def of(weight: Float[Array, "y x"], rank: int) -> "LowRank":
        """A matrix of this rank, by its singular value decomposition.

        **Raises:** `ValueError` if the matrix is not finite or has another rank.
        """
        if jnp.ndim(weight) != 2:
            raise ValueError(
                f"weight has shape {jnp.shape(weight)}: give a matrix (y, x)"
            )
        left, values, right = jnp.linalg.svd(weight, full_matrices=False)
        if isinstance(rank, bool) or not isinstance(rank, (int, np.integer)):
            raise ValueError(f"rank must be a whole number, got {rank!r}")
        if not 1 <= rank <= values.size:
            raise ValueError(
                f"rank={rank} must be from 1 to {values.size}, the smaller side"
            )
        if not isinstance(values, jax.core.Tracer):
            if not np.all(np.isfinite(weight)):
                raise ValueError("weight has non-finite values: give finite ones")
            noise = max(weight.shape) * float(jnp.finfo(values.dtype).eps) * values[0]
            found = int(jnp.sum(values > noise))
            if found != rank:
                raise ValueError(
                    f"weight has rank {found}, not rank={rank}: the flow never leaves "
                    f"the matrices of its start's rank, so ask for rank={found}"
                )
        # Rows and columns of zeros stay so: what is exact in W is exact in its factors.
        rows = jnp.any(weight != 0, axis=1, keepdims=True)
        columns = jnp.any(weight != 0, axis=0)[:, None]
        return LowRank(
            jnp.where(rows, left[:, :rank], 0),
            jnp.log(values[:rank]),
            jnp.where(columns, right[:rank].T, 0),
        )
