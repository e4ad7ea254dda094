r"""How fast a balanced flow converges in the end.

| on paper | in code |
|---|---|
| $W^*$, the best matrix of rank $r$, $W^* = U S V^\top$ | `theory.optimum()` |
| $G = \nabla L^1(W^*)$, $C = XX^\top$ | `gradient`, `moments.xx` |
| $N$, $\lambda_i$ | `depth`, `eigenvalues` |

From a balanced start the product follows $\dot W = -\mathcal{A}_W(\nabla L^1(W))$, the
gradient flow of $L^1$ on matrices of rank $r$ in a metric of their own. Near $W^*$ it
is linear: with $\xi, \eta$ tangent at $W^*$ and

$$H(\xi, \eta) = \mathrm{tr}(\xi C \eta^\top) + \langle G,\ \xi W^{*+} \eta + \eta
W^{*+} \xi \rangle$$

the rates are the eigenvalues of $\mathcal{A}_{W^*} H$, and $\|W(t) - W^*\|$ falls like
$e^{-\mu t}$ with the smallest of them from almost every start that ends there. Times
are for moments divided by $n$: the source's rates are $n$ times these.

*Reference:* the flow and $\mathcal{A}_W$ are those of Bah, Rauhut, Terstiege,
Westdickenberg, *Learning deep linear neural networks: Riemannian gradient flows and
convergence to global minimizers* (2020), sections 2 and 3; the source prints no rates
for depth $N \ge 2$.
"""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Array, Float

from .linear import LinearTheory


def balanced_rates(theory: LinearTheory, depth: int) -> Float[np.ndarray, " rates"]:
    r"""All $r (d_x + d_y - r)$ rates at the best matrix of rank $r$, ascending.

    In the singular vectors of $W^*$ the operator $\mathcal{A}_{W^*}$ multiplies entry
    $(a, b)$ by $K_{ab} = \sum_j s_a^{2 (N - j) / N} s_b^{2 (j - 1) / N}$. Computed on
    the host from a dense matrix of that size.

    **Raises:** `ValueError` for depth < 1, or if $Q$ has rank less than `theory.rank`:
    the limit is then not isolated among matrices of that rank.
    """
    _check_depth(depth)
    rank = theory.rank
    if not theory.singular_values[rank - 1] > 0:
        raise ValueError(
            f"the data have fewer than rank={rank} modes: lower the rank of the theory"
        )
    moments = theory.energy.moments
    xx, best = np.asarray(moments.xx, float), np.asarray(theory.optimum().weight, float)
    gradient = best @ xx - np.asarray(moments.xy, float).T
    left, values, right = np.linalg.svd(best)
    rows, columns = best.shape
    gram, slope = right @ xx @ right.T, left.T @ gradient @ right.T

    tangent = np.ones(best.shape, bool)
    tangent[rank:, rank:] = False
    a, b = np.nonzero(tangent)
    hessian = (a[:, None] == a[None, :]) * gram[np.ix_(b, b)]
    # What leaves the range of W* on one side couples to what leaves it on the other.
    lower, upper = np.flatnonzero(a >= rank), np.flatnonzero(b >= rank)
    meet = b[lower][:, None] == a[upper][None, :]
    coupling = meet * slope[np.ix_(a[lower], b[upper])] / values[b[lower]][:, None]
    hessian[np.ix_(lower, upper)] += coupling
    hessian[np.ix_(upper, lower)] += coupling.T

    powers = 2 * np.arange(depth) / depth
    sides = []
    for size in (rows, columns):
        s = np.zeros(size)
        s[:rank] = values[:rank]
        sides.append(s[:, None] ** powers[None, :])
    scale = np.sqrt((sides[0][:, ::-1] @ sides[1].T)[a, b])
    return np.linalg.eigvalsh(scale[:, None] * hessian * scale[None, :])


def autoencoder_rate(
    eigenvalues: Sequence[float] | np.ndarray | Float[Array, " d"],
    rank: int,
    depth: int,
) -> float:
    r"""The smallest of the `balanced_rates` of an autoencoder, in closed form:

    $$\mu = \min\Bigl(N \lambda_r,\ \min_{a > r} \tfrac12 \bigl[\lambda_r + \lambda_a -
    \sqrt{(\lambda_r - \lambda_a)^2 + 4 \lambda_a^2}\,\bigr]\Bigr).$$

    With $\lambda_a$ close to $\lambda_r$ this is half of their difference; with
    $\lambda_a$ close to 0 it is $\lambda_a$. The second term is at most $\lambda_a \le
    \lambda_r$, so the depth plays no part unless $r = d$.

    **Raises:** `ValueError` for depth < 1, eigenvalues that are not finite and > 0, or
    a rank that is not from 1 to their number.
    """
    _check_depth(depth)
    values = np.sort(np.asarray(eigenvalues, float))[::-1]
    if values.ndim != 1 or not np.all(np.isfinite(values) & (values > 0)):
        raise ValueError(f"eigenvalues must be finite and > 0, got {eigenvalues}")
    if not 1 <= rank <= values.size:
        raise ValueError(
            f"rank={rank} must be from 1 to the number of eigenvalues, {values.size}"
        )
    last, rest = float(values[rank - 1]), values[rank:]
    # The product over the sum of the two roots: no digits are lost where they differ.
    sums = last + rest
    slow = 2 * rest * (last - rest)
    slow = slow / (sums + np.sqrt((last - rest) ** 2 + 4 * rest**2))
    return min(depth * last, float(np.min(slow, initial=math.inf)))


def _check_depth(depth):
    whole = isinstance(depth, (int, np.integer)) and not isinstance(depth, bool)
    if not whole or depth < 1:
        raise ValueError(f"depth must be a whole number >= 1, got {depth!r}")
