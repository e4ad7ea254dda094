r"""Deep linear networks: every critical point, and what kind it is.

| on paper | in code |
|---|---|
| $C = XX^\top$ | `moments.xx` |
| $Q = YX^\top C^{-1/2}$ | `q` |
| $Q = \sum_j \sigma_j u_j v_j^\top$ | `left`, `singular_values`, `right` |
| $r = \min_j d_j$ | `rank` |
| $J$ | `modes` |
| $T = W C^{1/2}$ | whitened product |

All with moments divided by $n$.

*Reference:* Bah, Rauhut, Terstiege, Westdickenberg 2020, sections 5 and 6; the
second-order criterion is that of Achour, Malgouyres, Gerchinovitz (2021), in the form
proved without assumptions on rank or distinctness (`README.md` beside this file).
"""

import itertools
import math
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ..arguments import checked_arguments
from ..models.base import EnergyBelow
from ..models.linear import AbstractLinearNetwork, DeepLinear, LinearMap, SquaredLoss
from ..spectrum import cutoff, psd_power, svd_signed
from ..types import Scalar
from .base import AbstractTheory, learned_modes, Match
from .second_order import escape_time, examine


# Two critical values closer than this times sigma_1^2 are one value: no loss in
# float64 tells them apart along a run, and the time to decide between them is its
# inverse.
TIE = 1e-9
# Singular values below this times the largest are zero: they are rounding in
# yx xx^{-1/2}.
ZERO = 1e-10


class LinearTheory(AbstractTheory[AbstractLinearNetwork]):
    r"""The critical points of $L^N$ for networks of narrowest width `rank`.

    **Raises:** `ValueError` if `rank` is not between 1 and the smaller data
    dimension; if xx is singular (the theory needs it invertible).
    """

    energy: SquaredLoss
    rank: int = eqx.field(static=True)
    root: Float[Array, "x x"]
    inverse_root: Float[Array, "x x"]
    q: Float[Array, "y x"]
    left: Float[Array, "y modes"]
    singular_values: Float[Array, " modes"]
    right: Float[Array, "modes x"]

    @checked_arguments
    def __init__(self, energy: SquaredLoss, rank: int):
        moments = energy.moments
        x_dim, y_dim = moments.xy.shape
        if isinstance(rank, bool) or not isinstance(rank, (int, np.integer)):
            raise ValueError(f"rank must be a whole number, got {rank!r}")
        if rank < 1:
            raise ValueError(
                f"rank must be >= 1, got {rank}: it is the narrowest width"
            )
        if rank > min(x_dim, y_dim):
            raise ValueError(
                f"rank={rank} is larger than min(widths)={min(x_dim, y_dim)}: the "
                "narrowest width counts the data's own dimensions too"
            )
        xx = _require_definite(moments.xx)
        self.energy = energy
        self.rank = int(rank)
        self.root, self.inverse_root, self.q, *decomposition = _decomposed(
            xx, moments.xy
        )
        self.left, self.singular_values, self.right = decomposition

    def spectrum(self) -> Float[Array, " modes"]:
        r"""$\sigma_1 \ge \sigma_2 \ge \dots$, the singular values of $Q$."""
        return self.singular_values

    def optimal_energy(self) -> Scalar:
        r"""$\frac12 (\mathrm{tr}\,yy - \sum_{i \le r} \sigma_i^2)$.

        *Reference:* Bah et al. 2020, Proposition 32.
        """
        return self.critical_energy(range(self.rank))

    def critical_energy(self, modes: Sequence[int]) -> Scalar:
        r"""$\frac12 (\mathrm{tr}\,yy - \sum_{j \in J} \sigma_j^2)$."""
        kept = np.zeros(self.singular_values.shape, dtype=bool)
        kept[self._checked(modes)] = True
        # All modes, whatever the set: no number of modes is compiled anew.
        return _value(self.energy.moments.yy, self.singular_values, kept)

    def index_sets(self) -> list[tuple[int, ...]]:
        """Every $J$ with at most `rank` of the nonzero modes, smallest first.

        **Raises:** `ValueError` where they are too many to list (over 100 000).
        """
        count = int(jnp.sum(self.singular_values > 0))
        sizes = range(min(count, self.rank) + 1)
        total = sum(math.comb(count, size) for size in sizes)
        if total > 100_000:
            raise ValueError(
                f"there are {total} index sets of {count} modes and rank {self.rank}: "
                "too many to list; ask for the critical point of one set"
            )
        return [
            subset
            for size in sizes
            for subset in itertools.combinations(range(count), size)
        ]

    def critical_values(self) -> Float[np.ndarray, " values"]:
        """The distinct critical values, ascending; `TIE` decides what is distinct.

        **Raises:** as `index_sets`.
        """
        values = np.asarray(self.singular_values) ** 2
        offset = 0.5 * float(jnp.trace(self.energy.moments.yy))
        sums = sorted(
            offset - 0.5 * sum(values[list(subset)]) for subset in self.index_sets()
        )
        distinct = [sums[0]]
        for value in sums[1:]:
            if value - distinct[-1] > 0.5 * TIE * values[0]:
                distinct.append(value)
        return np.asarray(distinct)

    def optimum(self) -> LinearMap:
        r"""$\sum_{i \le r} \sigma_i u_i v_i^\top C^{-1/2}$, a global minimizer.

        The minimizers in the factors are all factorizations of it (and, where
        $\sigma_r = \sigma_{r+1}$, of its rotations within that eigenspace).
        """
        return self.critical_point(range(self.rank))

    def critical_point(self, modes: Sequence[int]) -> LinearMap:
        r"""$\sum_{j \in J} \sigma_j u_j v_j^\top C^{-1/2}$.

        *Reference:* Bah et al. 2020, Proposition 32. *Erratum:* with ties the printed
        form must range over all singular value decompositions of $Q$, and global
        minimality is equality of multisets, not of sets.
        """
        kept = self._checked(modes)
        left = self.left[:, kept] * self.singular_values[None, kept]
        return LinearMap(left @ self.right[kept] @ self.inverse_root)

    def lift(self, modes: Sequence[int], widths: Sequence[int]) -> DeepLinear:
        r"""Factors of `critical_point(modes)` that are critical for $L^N$:
        $W_1 = \sum_i e_i v_{j_i}^\top C^{-1/2}$, $W_l = \sum_i e_i e_i^\top$,
        $W_N = \sum_i \sigma_{j_i} u_{j_i} e_i^\top$.

        *Reference:* Bah et al. 2020, Proposition 34 (b).
        """
        kept = self._checked(modes)
        widths = tuple(widths)
        size, depth = len(kept), len(widths) - 1
        if widths[0] != self.root.shape[0] or widths[-1] != self.left.shape[0]:
            raise ValueError(
                f"widths={widths} must begin with {self.root.shape[0]} and end with "
                f"{self.left.shape[0]}, the data's dimensions"
            )
        if size > min(widths):
            raise ValueError(
                f"modes={tuple(modes)} are {size} but min(widths)={min(widths)}: a "
                "network can't learn more modes than its narrowest layer has units"
            )
        lower = self.right[kept] @ self.inverse_root
        upper = self.left[:, kept] * self.singular_values[None, kept]
        if depth == 1:
            return DeepLinear((upper @ lower,))
        weights = [
            jnp.zeros((out, into), self.left.dtype)
            for into, out in itertools.pairwise(widths)
        ]
        for j in range(1, depth - 1):
            weights[j] = weights[j].at[:size, :size].set(jnp.eye(size))
        weights[0] = weights[0].at[:size].set(lower)
        weights[-1] = weights[-1].at[:, :size].set(upper)
        return DeepLinear(tuple(weights))

    def index(self, modes: Sequence[int], depth: int) -> int:
        r"""The number of negative eigenvalues of the Hessian of $L^N$ at
        `lift(modes)`: one for each pair $j_0 \in J$, $j_1 \notin J$ with
        $\sigma_{j_1} > \sigma_{j_0}$, and for depth 2 also $(r - k)(q - k)$ for the
        idle units.

        Counted with the rotations that leave $Q$'s ties alone excluded. *Reference:*
        the curves of Bah et al. 2020, Propositions 33 and 36; that there are no
        others is checked against the Hessian's spectrum in the tests.
        """
        kept = set(self._checked(modes).tolist())
        values = np.asarray(self.singular_values)
        tie = TIE * values[0] ** 2
        count = int(np.sum(values > 0))
        rest = [j for j in range(count) if j not in kept]
        swaps = sum(values[b] ** 2 - values[a] ** 2 > tie for a in kept for b in rest)
        idle = (self.rank - len(kept)) * len(rest) if depth == 2 else 0
        return int(swaps + idle)

    def threshold(self) -> Scalar:
        """The second smallest distinct critical value, or infinity."""
        return self.optimal_energy() + self._least_gap()

    def _least_gap(self) -> Scalar:
        # The smallest change of an optimal index set swaps one mode of it for one
        # outside, or for none.
        squares = self.singular_values**2
        inside = squares[: self.rank, None]
        outside = jnp.append(squares[self.rank :], 0.0)[None, :]
        gaps = inside - outside
        return 0.5 * jnp.min(jnp.where(gaps > TIE * squares[0], gaps, jnp.inf))

    def excess(self, point: AbstractLinearNetwork) -> Scalar:
        r"""$E - E^*$, from $\frac12(\|T - Q\|^2 - \sum_{i > r} \sigma_i^2)$: exact to
        rounding of the excess itself where nothing is left to learn."""
        tail = jnp.sum(self.singular_values[self.rank :] ** 2)
        return 0.5 * (jnp.sum((self._whitened(point) - self.q) ** 2) - tail)

    @property
    def certificate(self) -> EnergyBelow[AbstractLinearNetwork]:
        """Whether the loss is below every critical value but the least.

        The exact flow never increases the loss and converges to a critical point
        (xx is invertible), so its limit is then a global minimizer.

        *Reference:* Bah et al. 2020, section 3 (convergence) and Proposition 32.
        """
        # The energy and not `excess`: it costs no product of two wide sides.
        optimal = self.optimal_energy()
        return EnergyBelow(
            self.energy,
            level=optimal + (1 - 1e-6) * self._least_gap(),
            noise=jnp.full_like(optimal, 500),
            offset=jnp.trace(self.energy.moments.yy),
        )

    def active(self, point: AbstractLinearNetwork) -> Bool[Array, " modes"]:
        r"""The modes $J$ of the critical point nearest in whitened coordinates.

        Mode $j$ is active where $u_j^\top T v_j > \sigma_j / 2$. Modes with equal
        $\sigma_j$ are counted together (their basis is arbitrary) and the first ones
        reported.
        """
        values = self.singular_values
        aligned = jnp.sum(self.left * (self._whitened(point) @ self.right.T), axis=0)
        share = jnp.where(values > 0, aligned / jnp.where(values > 0, values, 1), 0)
        return learned_modes(share, values**2, TIE * values[0] ** 2)

    def match(self, point: AbstractLinearNetwork) -> Match:
        """How `point` compares with the critical points of $L^N$."""
        modes = self.active(point)
        squares = self.singular_values**2
        size = jnp.sum(modes)
        learned = jnp.sum(jnp.where(modes, squares, 0))
        anatomy = examine(self._whitened_factors(point), self.q, size)
        # Equality of multisets of singular values, by their sum of squares.
        top = jnp.sum(jnp.where(jnp.arange(squares.size) < size, squares, 0))
        best = top - learned <= TIE * squares[0]
        full = size >= jnp.sum(squares[: self.rank] > 0)
        critical = anatomy.critical
        return Match(
            critical,
            critical & anatomy.exact,
            critical & best & full,
            critical & (~best | (~full & anatomy.loose)),
            critical & best & ~full & anatomy.tightened,
            modes,
            0.5 * (jnp.trace(self.energy.moments.yy) - learned),
            size,
            anatomy.rank_gap,
        )

    def remaining(self, point: AbstractLinearNetwork) -> Scalar:
        """Predicted time to leave the neighborhood of the nearest critical point."""
        return escape_time(
            self._whitened_factors(point),
            self.q,
            self.inverse_root,
            jnp.sum(self.active(point)),
        )

    def _whitened_factors(self, point: AbstractLinearNetwork):
        first, *rest = point.factors()
        return (first @ self.root, *rest)

    def _whitened(self, point: AbstractLinearNetwork) -> Float[Array, "y x"]:
        return point.matrix() @ self.root

    def _checked(self, modes: Sequence[int]) -> Int[np.ndarray, " modes"]:
        kept = [int(j) for j in modes]
        count = self.singular_values.size
        if len(set(kept)) < len(kept) or any(not 0 <= j < count for j in kept):
            raise ValueError(
                f"modes={tuple(kept)} must be different numbers from 0 to {count - 1}"
            )
        if len(kept) > self.rank:
            raise ValueError(
                f"modes={tuple(kept)} are {len(kept)}, more than rank={self.rank}"
            )
        return np.asarray(kept, dtype=int)


@jax.jit  # One by one its operations take longer to compile than together.
def _decomposed(xx, xy):
    inverse_root = psd_power(xx, -0.5)
    q = xy.T @ inverse_root
    left, values, right = svd_signed(q)
    values = jnp.where(values > ZERO * values[0], values, 0.0)
    return psd_power(xx, 0.5), inverse_root, q, left, values, right


@jax.jit
def _value(yy, singular_values, kept):
    return 0.5 * (jnp.trace(yy) - jnp.sum(jnp.where(kept, singular_values**2, 0.0)))


def _require_definite(xx):
    values = jnp.linalg.eigvalsh(xx)
    least = cutoff(xx.shape[0], xx.dtype) * values[-1]
    singular = values[0] <= least
    if isinstance(singular, jax.core.Tracer):
        return eqx.error_if(
            xx,
            singular,
            "xx is singular: the theory needs it invertible; use moments.restrict",
        )
    if bool(singular):
        rank = int(jnp.sum(values > least))
        raise ValueError(
            f"xx has rank {rank} of {len(values)}: minimizers aren't unique and the "
            "full-rank theory doesn't apply; restrict the data to its support with "
            f"moments.restrict({rank}), or drop constant and repeated columns"
        )
    return xx
