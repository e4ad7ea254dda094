r"""The balanced flow on rank-$k$ matrices: where it ends, and where it cannot.

| on paper | in code |
|---|---|
| $W = U\,\mathrm{diag}(s)\,V^\top \in M_k$ | `LowRank` |
| $N$ | `depth` |
| $Q = YX^\top C^{-1/2} = \sum_j \sigma_j u_j v_j^\top$ | `linear` |

The balanced flow is that of $N$ balanced factors of inner widths $k$, so all that
`LinearTheory` knows of their critical points holds. Besides, the exact flow keeps the
rank for all finite times, and with it, for $k = d_x = d_y$, the sign of $\det W$: a
start of the wrong sign cannot end at the minimum.

*Reference:* Bah, Rauhut, Terstiege, Westdickenberg 2020, Proposition 10 (rank) and
Corollary 17. *Erratum:* Conjecture 41 (b) and (c) are false as printed, by the sign.
"""

from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from ..arguments import checked_arguments
from ..models.linear import SquaredLoss
from ..models.low_rank import LowRank
from ..types import Scalar
from .base import AbstractTheory, Limit, Match
from .linear import LinearTheory, TIE


# Singular values below this times the largest do not count for the rank of W(0) U_r.
RANK = 1e-12


class LowRankTheory(AbstractTheory[LowRank]):
    r"""The balanced flow of depth `depth` on matrices of rank `rank`.

    **Raises:** `ValueError` as `LinearTheory`, or unless depth is a whole number >= 2
    (for depth 1 singular values can reach 0 in finite time).
    """

    energy: SquaredLoss
    rank: int = eqx.field(static=True)
    depth: int = eqx.field(static=True)
    linear: LinearTheory

    @checked_arguments
    def __init__(self, energy: SquaredLoss, rank: int, depth: int):
        if isinstance(depth, bool) or not isinstance(depth, (int, np.integer)):
            raise ValueError(f"depth must be a whole number, got {depth!r}")
        if depth < 2:
            raise ValueError(
                f"depth must be >= 2, got {depth}: with one factor singular values "
                "can reach 0 in finite time and the rank is not kept"
            )
        self.energy = energy
        self.linear = LinearTheory(energy, rank)
        self.rank, self.depth = self.linear.rank, int(depth)

    def optimal_energy(self) -> Scalar:
        return self.linear.optimal_energy()

    def spectrum(self) -> Float[Array, " modes"]:
        return self.linear.spectrum()

    def active(self, point: LowRank) -> Bool[Array, " modes"]:
        return self.linear.active(point)

    @property
    def certificate(self) -> Callable[[LowRank], Bool[Array, ""]]:
        return self._certified

    def _certified(self, point: LowRank) -> Bool[Array, ""]:
        return self.linear.certificate(self._checked(point))

    def match(self, point: LowRank) -> Match:
        return self.linear.match(self._checked(point).balanced(self.depth))

    def remaining(self, point: LowRank) -> Scalar:
        return self.linear.remaining(self._checked(point).balanced(self.depth))

    def saddle_limit(self, point: LowRank) -> Limit:
        r"""The saddle where a start of the wrong sign ends.

        If W is square of full rank, $\det W(t)$ never changes its sign. If that is not
        the sign of $\det Q$, the limit is not the one critical point of full rank, so
        it is one of lower rank; and a loss below all but the least of their values
        says which. The same holds within a block of $k$ modes that the flow never
        leaves: where the $u_j, v_j$ diagonalize $C$ and W has entries, none of them
        rounding, for these modes only.

        *Reference:* the counterexamples to Conjecture 41 (b) and (c) of Bah et al.
        2020 (`README.md` beside this file).
        """
        values = self.linear.singular_values
        self._checked(point)
        obstructed, block = self._obstruction(point)
        # The least critical values below full rank leave out one mode, or two.
        missed = jnp.where(block, values**2, jnp.inf)
        least = jnp.min(missed)
        tied = missed <= least + TIE * values[0] ** 2
        two = jnp.sum(jnp.sort(missed)[:2]) if missed.size > 1 else jnp.inf
        beyond = jnp.minimum(jnp.min(jnp.where(tied, jnp.inf, missed)), two)
        total = jnp.trace(self.energy.moments.yy)
        learned = jnp.sum(jnp.where(block, values**2, 0))
        energy = self.energy(point)
        noise = 500 * jnp.finfo(energy.dtype).eps * (energy + total)
        below = energy + noise < 0.5 * (total - learned + (1 - 1e-6) * beyond)

        places = jnp.arange(values.size)
        modes = block & (places != jnp.max(jnp.where(tied, places, -1)))
        # Balanced factors of a best approximation of lower rank: strict for two
        # layers only, by the second-order criterion.
        best = jnp.sum(jnp.where(places < self.rank - 1, values**2, 0))
        optimal = best - (learned - least) <= TIE * values[0] ** 2
        return Limit(
            obstructed & below,
            ~optimal | (self.depth == 2),
            modes,
            0.5 * (total - learned + least),
            jnp.asarray(self.rank - 1),
        )

    def hypotheses(self, point: LowRank) -> dict[str, Bool[Array, ""]]:
        r"""What the statements about an autoencoder ask of the start $W(0)$.

        - `positive`: $u_i^\top W(0) u_i > 0$ for $i \le r$, and `spans`:
          $\mathrm{rank}(W(0) U_r) = r$. Together they are the hypothesis of
          Conjecture 41 (b).
        - `sign`: no determinant has the wrong sign; not asked for by the source, and
          needed.
        - `loss`: the loss is below the second least critical value.

        *Reference:* Bah et al. 2020, Conjecture 41, Corollary 48 (3).
        """
        top = self.linear.left[:, : self.rank]
        entries = ((top.T @ point.left) * point.values[None, :]) @ (point.right.T @ top)
        # Of W U_r = Y D X^T U_r, where Y D is injective.
        spans = jnp.linalg.svd(point.right.T @ top, compute_uv=False)
        return {
            "positive": jnp.all(jnp.diagonal(entries) > 0),
            "spans": spans[-1] > RANK * spans[0],
            "sign": ~self._obstruction(point)[0],
            "loss": self.certificate(point),
        }

    def _checked(self, point: LowRank) -> LowRank:
        if not isinstance(point, LowRank) or point.rank != self.rank:
            kind = type(point).__name__
            of = f" of rank {point.rank}" if isinstance(point, LowRank) else ""
            raise ValueError(
                f"this theory is of LowRank points of rank {self.rank}, got {kind}{of}:"
                " make one with LowRank.of, or a theory of that rank"
            )
        return point

    def _obstruction(self, point: LowRank):
        """Whether a determinant has the wrong sign, and of which modes."""
        linear = self.linear
        left = linear.left.T @ point.left
        right = linear.right @ (linear.root @ point.right)
        block = jnp.any(left != 0, axis=1)
        filled = jnp.sum(block) == self.rank
        same = jnp.all(block == jnp.any(right != 0, axis=1))
        # Its rows first: as many as columns, if the block is filled.
        rows = jnp.argsort(~block, stable=True)[: self.rank]
        signs = [jnp.linalg.slogdet(side[rows])[0] for side in (left, right)]
        learnable = jnp.all(jnp.where(block, linear.singular_values > 0, True))
        wrong = signs[0] * signs[1] < 0
        kept = self._invariant(block) & filled & same & learnable
        return kept & wrong, block

    def _invariant(self, block: Bool[Array, " modes"]) -> Bool[Array, ""]:
        """Whether a block of modes is one that the flow never leaves."""
        if self.rank == self.linear.left.shape[0] == self.linear.right.shape[1]:
            return jnp.array(True)
        gram = self.linear.right @ self.energy.moments.xx @ self.linear.right.T
        across = jnp.where(block[:, None] == block[None, :], 0, gram)
        complete = len({*self.linear.left.shape, *self.linear.right.shape}) == 1
        return jnp.all(across == 0) & complete
