r"""How fast runs converge in the end.

| on paper | in code |
|---|---|
| $W^*$, the best matrix of rank $r$, $W^* = U S V^\top$ | `theory.optimum()` |
| $G = \nabla L^1(W^*)$, $C = XX^\top$ | `slope` in the bases $U, V$, `moments.xx` |
| $A_j = W_N \cdots W_{j+1}$, $B_j = W_{j-1} \cdots W_1$ | `above`, `below` |
| $N$, $\lambda_i$ | `depth`, `eigenvalues` |

The product of the factors follows $\dot W = -\mathcal{A}(\nabla L^1(W))$ with
$\mathcal{A}(Z) = \sum_j A_j A_j^\top Z B_j^\top B_j$; from a balanced start this is
$\mathcal{A}_W$, a function of $W$ alone. Near $W^*$, with narrowest width $r$, the flow
is linear in the tangent space of matrices of rank $r$: with $\xi, \eta$ in it and

$$H(\xi, \eta) = \mathrm{tr}(\xi C \eta^\top) + \langle G,\ \xi W^{*+} \eta + \eta
W^{*+} \xi \rangle$$

the rates are the eigenvalues of $\mathcal{A} H$ at the limit, and $\|W(t) - W^*\|$
falls like $e^{-\mu t}$ with the smallest of them from almost every start that ends
there. They are also the nonzero eigenvalues of the Hessian of $L^N$. Times are for
moments divided by $n$: the source's rates are $n$ times these.

*Reference:* the flow and $\mathcal{A}_W$ are those of Bah, Rauhut, Terstiege,
Westdickenberg, *Learning deep linear neural networks: Riemannian gradient flows and
convergence to global minimizers* (2020), sections 2 and 3; the source prints no rates
for depth $N \ge 2$.
"""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Array, Float

from ..arguments import checked_arguments
from ..models.linear import DeepLinear
from .linear import LinearTheory


@checked_arguments
def rates(theory: LinearTheory, network: DeepLinear) -> Float[np.ndarray, " rates"]:
    r"""All $r (d_x + d_y - r)$ rates at a minimizer of $L^N$ in the factors, ascending.

    Computed on the host from a dense matrix of that size.

    **Raises:** `ValueError` if the product is not $W^*$ to 1e-3, if the narrowest width
    is not `theory.rank`, or if $Q$ has rank less than that.
    """
    hessian, (left, right), (a, b) = _tangent(theory)
    if min(network.widths) != theory.rank:
        raise ValueError(
            f"the network's narrowest width is {min(network.widths)} and the theory's "
            f"rank={theory.rank}: both must be the same"
        )
    best = np.asarray(theory.optimum().weight, float)
    factors = [np.asarray(weight, float) for weight in network.weights]
    distance = np.linalg.norm(np.asarray(network.matrix()) - best)
    if not distance <= 1e-3 * np.linalg.norm(best):
        raise ValueError(
            f"the network is {distance:.3g} from the best matrix of rank "
            f"{theory.rank}: these are the rates at a minimizer"
        )
    below = [right]
    for weight in factors[:-1]:
        below.append(weight @ below[-1])
    above = [left]
    for weight in reversed(factors[1:]):
        above.append(weight.T @ above[-1])
    metric = np.zeros_like(hessian)
    for lower, upper in zip(below, reversed(above), strict=True):
        metric += (upper.T @ upper)[np.ix_(a, a)] * (lower.T @ lower)[np.ix_(b, b)]
    root = np.linalg.cholesky(metric)
    return np.linalg.eigvalsh(root.T @ hessian @ root)


@checked_arguments
def balanced_rates(theory: LinearTheory, depth: int) -> Float[np.ndarray, " rates"]:
    r"""The `rates` at every balanced minimizer, known without one.

    In the singular vectors of $W^*$ the operator $\mathcal{A}_{W^*}$ multiplies entry
    $(a, b)$ by $K_{ab} = \sum_j s_a^{2 (N - j) / N} s_b^{2 (j - 1) / N}$.

    **Raises:** `ValueError` for depth < 1, or if $Q$ has rank less than `theory.rank`:
    the limit is then not isolated among matrices of that rank.
    """
    _check_depth(depth)
    hessian, (left, right), (a, b) = _tangent(theory)
    values = np.linalg.svd(np.asarray(theory.optimum().weight), compute_uv=False)
    powers = 2 * np.arange(depth) / depth
    sides = []
    for size in (len(left), len(right)):
        s = np.zeros(size)
        s[: theory.rank] = values[: theory.rank]
        sides.append(s[:, None] ** powers[None, :])
    scale = np.sqrt((sides[0][:, ::-1] @ sides[1].T)[a, b])
    return np.linalg.eigvalsh(scale[:, None] * hessian * scale[None, :])


def _tangent(theory: LinearTheory):
    r"""The matrix of H, the bases U and V of its coordinates, and which of the entries
    of $U^\top \xi V$ are coordinates of the tangent space."""
    rank = theory.rank
    if not theory.singular_values[rank - 1] > 0:
        raise ValueError(
            f"the data have fewer than rank={rank} modes: lower the rank of the theory"
        )
    moments = theory.energy.moments
    xx, best = np.asarray(moments.xx, float), np.asarray(theory.optimum().weight, float)
    gradient = best @ xx - np.asarray(moments.xy, float).T
    left, values, right = np.linalg.svd(best)
    gram, slope = right @ xx @ right.T, left.T @ gradient @ right.T
    inside = np.ones(best.shape, bool)
    inside[rank:, rank:] = False
    a, b = np.nonzero(inside)
    hessian = (a[:, None] == a[None, :]) * gram[np.ix_(b, b)]
    # What leaves the range of W* on one side couples to what leaves it on the other.
    lower, upper = np.flatnonzero(a >= rank), np.flatnonzero(b >= rank)
    meet = b[lower][:, None] == a[upper][None, :]
    coupling = meet * slope[np.ix_(a[lower], b[upper])] / values[b[lower]][:, None]
    hessian[np.ix_(lower, upper)] += coupling
    hessian[np.ix_(upper, lower)] += coupling.T
    return hessian, (left, right.T), (a, b)


@checked_arguments
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
